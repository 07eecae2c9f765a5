"""Text from a folder that `retentive export MODEL OUT` wrote, without torch and without retentive.

pip install onnxruntime numpy tokenizers
python examples/onnx_generate.py OUT "How the text begins" --temperature 0.8
"""

import argparse
import json
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from tokenizers import Tokenizer

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("prompt")
parser.add_argument("--tokens", type=int, default=128, help="how many to write at most")
parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
given = parser.parse_args()

about = json.loads((given.folder / "export.json").read_text())
prefill, step = (InferenceSession(given.folder / about["graphs"][x]) for x in ("prefill", "step"))
tokenizer = Tokenizer.from_file(str(given.folder / "tokenizer.json"))
tokenizer.encode_special_tokens = True  # "<|end|>" in a prompt is text

names = list(about["inputs"])  # tokens, positions, the state of each layer
of_start = (about["inputs"][name] for name in names[1:])
carried = [np.zeros([1, *x["shape"][1:]], x["dtype"]) for x in of_start]
ids = about["begin_tokens"]  # what a text begins with, as in training
ids += tokenizer.encode(given.prompt, add_special_tokens=False).ids
for start in range(0, len(ids), about["piece"]):
    tokens = np.array([ids[start : start + about["piece"]]])
    logits, *carried = prefill.run(None, dict(zip(names, (tokens, *carried), strict=True)))

text = tokenizer.decode(ids)
for _ in range(given.tokens):
    noise = np.random.gumbel(size=logits.shape)  # its argmax is a draw from softmax(logits / t)
    token = int(np.argmax(logits + given.temperature * noise))
    if token == about["end_token"]:
        break
    ids.append(token)
    if not tokenizer.decode(ids).endswith("\ufffd"):  # a character is whole
        print(tokenizer.decode(ids)[len(text) :], end="", flush=True)
        text = tokenizer.decode(ids)
    tokens = np.array([[token]])
    logits, *carried = step.run(None, dict(zip(names, (tokens, *carried), strict=True)))
