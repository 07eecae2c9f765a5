"""`retentive export`: the graphs do what the model does, and run where retentive is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from tokenizers import Tokenizer, models, pre_tokenizers

import retentive
from retentive.cli import main
from retentive.compress import export as exports
from retentive.compress.export import PIECE, TOLERANCE, check, export
from retentive.compress.export_formats import FORMATS, Format
from retentive.data.tokenizer import END, save_tokenizer
from retentive.errors import InputError
from retentive.layers.activations import ACTIVATIONS
from retentive.mixers.attention import AttentionConfig
from retentive.mixers.state import TensorState
from retentive.models.checkpoint import load, save_model
from retentive.models.config import RetNetConfig
from retentive.models.retnet import RetNet
from retentive.models.state import RetNetState
from retentive.models.transformer import Transformer

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4}
CONFIGS = {
    "torch-export": zoo.retnet(
        **SMALL,
        block="parallel",
        num_kv_heads=2,
        rotary_dim=4,
        head_norm_affine=True,
        gate_act="gelu",
        qkv_bias=True,
        head_bias=True,
        ffn_bias=True,
        ffn_subln="layernorm",
        embed_norm=True,
        embed_scale=2.0,
    ),
    "onnx": zoo.retnet(
        **SMALL,
        gated_ffn=True,
        hidden_act="swish",
        norm="rmsnorm",
        head_norm="rmsnorm",
        decay="linspace",
        rotation="rope",
        row_scale=True,
        tie_word_embeddings=True,
    ),
}
EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_generate.py"


def words() -> Tokenizer:
    """An end token, and w1 to w60 for the other ids."""
    tokenizer = Tokenizer(models.WordLevel({END: 0} | {f"w{i}": i for i in range(1, 61)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END])
    return tokenizer


def build(config: RetNetConfig) -> RetNet:
    model = RetNet(config)
    model.init_weights(seed=0)
    return model


@pytest.fixture(scope="module", params=sorted(FORMATS))
def exported(request, tmp_path_factory):
    """The format, the model, and the folder that the command made of it."""
    folder = tmp_path_factory.mktemp("exported")
    model = build(CONFIGS[request.param])
    save_model(model, folder / "model")
    save_tokenizer(words(), folder / "model")
    (folder / "model/tokenizer_config.json").write_text('{"bos_token": "w1"}')
    out = folder / "out"
    assert main(["export", str(folder / "model"), str(out), "--format", request.param]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["model", "out"]
    return request.param, model, out


@pytest.fixture(scope="module")
def runs(exported):
    format, _, out = exported
    return {graph: FORMATS[format].open(out, graph) for graph in ("prefill", "step")}


def call(run, tokens, state: RetNetState):
    logits, positions, layers = run(tokens, state.positions, [layer["S"] for layer in state.layers])
    return logits, positions, torch.cat(layers, dim=1)


def distance(given, expected):
    return ((given - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("start", [0, 10**6])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 7), (3, 1), (4, 70)])
def test_the_graphs_do_what_the_model_does(exported, runs, rows, length, start):
    _, model, _ = exported
    generator = torch.Generator().manual_seed(2)
    state = model.init_state(rows)
    state = RetNetState(state.positions + start + torch.arange(rows), state.layers)
    for graph in ("prefill", "prefill", "step", "step"):  # each goes on from the one before it
        width = length if graph == "prefill" else 1
        tokens = torch.randint(61, (rows, width), generator=generator)
        given = call(runs[graph], tokens, state)
        with torch.no_grad():
            logits, state = model(tokens, state)
        assert distance(given[0], logits[:, -1]) <= TOLERANCE
        assert torch.equal(given[1], state.positions)
        assert distance(given[2], torch.cat([layer["S"] for layer in state.layers], 1)) <= TOLERANCE


@pytest.mark.parametrize("graph", ["prefill", "step"])
def test_angles_are_exact_at_a_million(exported, runs, graph):
    """An angle that was off by 1e-6 would be seen here; in float32 it is off by 0.05."""
    _, model, _ = exported
    tokens, state = torch.tensor([[5], [6]]), model.init_state(2)
    state = RetNetState(state.positions + 10**6, state.layers)
    first = call(runs[graph], tokens, state)[2][:, :4]
    exact = RetNet(model.config).double()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        _, after = exact(tokens, RetNetState(state.positions, exact.init_state(2).layers))
    assert distance(first, after.layers[0]["S"]) <= 1e-6


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # by the exporter, of itself
def test_every_activation_has_its_operations_in_onnx():
    """Of one small module: a graph of a model takes seconds."""

    class Activations(torch.nn.Module):
        def forward(self, x):
            return [activated(x) for activated in ACTIVATIONS.values()]

    x = torch.linspace(-5, 5, 101)
    program = torch.export.export(Activations(), (x,))
    graph = torch.onnx.export(program, dynamo=True, verbose=False)
    for name, given in zip(ACTIVATIONS, graph(x), strict=True):
        torch.testing.assert_close(given, ACTIVATIONS[name](x), msg=name)


def test_a_prompt_may_come_in_pieces(exported, runs):
    _, model, _ = exported
    tokens = torch.randint(61, (2, 50), generator=torch.Generator().manual_seed(3))
    state = model.init_state(2)
    carried = state.positions, [layer["S"] for layer in state.layers]
    for piece in tokens.split(20, dim=1):
        logits, *carried = runs["prefill"](piece, *carried)
    assert distance(logits, call(runs["prefill"], tokens, state)[0]) <= TOLERANCE


def test_rows_of_unequal_prompts_are_read_alone_and_decoded_together(exported, runs):
    _, model, _ = exported
    texts = [torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[6, 7]])]
    empty = model.init_state(1)
    read = [call(runs["prefill"], text, empty)[1:] for text in texts]
    positions = torch.cat([position for position, _ in read])
    layers = list(torch.cat([state for _, state in read]).split(4, dim=1))
    together, _, _ = runs["step"](torch.tensor([[8], [9]]), positions, layers)
    for row, text, last in zip(together, texts, (8, 9), strict=True):
        with torch.no_grad():
            alone, _ = model(torch.cat([text, torch.tensor([[last]])], dim=1))
        assert distance(row, alone[0, -1]) <= TOLERANCE


def test_the_weights_are_there_once(exported):
    _, model, out = exported
    for graph in (path for path in out.iterdir() if path.suffix in (".onnx", ".pt2")):
        held = graph.read_bytes()
        for name, weight in model.state_dict().items():
            if weight.ndim == 2:
                assert weight.numpy().tobytes()[:64] not in held, f"{name} in {graph}"
                assert weight.T.contiguous().numpy().tobytes()[:64] not in held, name


def test_the_folder_holds_no_path_of_this_machine(exported):
    _, _, out = exported
    source = str(Path(retentive.__file__).parent).encode()
    assert not any(source in path.read_bytes() for path in out.iterdir())


def test_the_folder_is_still_a_model_folder(exported):
    _, model, out = exported
    for name, weight in load(out).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).is_file()


def test_the_description_is_what_the_graphs_take_and_give(exported):
    import onnxruntime

    format, model, out = exported
    about = json.loads((out / "export.json").read_text())
    assert (about["format"], about["end_token"], about["piece"]) == (format, 0, PIECE)
    assert about["begin_tokens"] == [1]
    assert about["inputs"]["state.1"] == {"dtype": "float32", "shape": ["batch", 4, 8, 16]}
    if format != "onnx":
        return
    session = onnxruntime.InferenceSession(out / about["graphs"]["prefill"])
    for described, actual in (
        (about["inputs"], session.get_inputs()),
        (about["outputs"], session.get_outputs()),
    ):
        assert list(described) == [x.name for x in actual]
        assert [x["shape"] for x in described.values()] == [x.shape for x in actual]
    assert session.get_outputs()[0].shape == ["batch", model.config.vocab_size]


# Where retentive is not


def run_without(names: list[str], script: str) -> subprocess.CompletedProcess[str]:
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in names)
    return subprocess.run(
        [sys.executable, "-c", f"import sys\n{blocked}{script}"], capture_output=True, text=True
    )


def test_torch_loads_it_in_another_process(exported, tmp_path):
    format, model, out = exported
    if format != "torch-export":
        return
    result = run_without(
        ["retentive"],
        f"""
import torch
from safetensors.torch import load_file, save_file
weights = load_file({str(out / "model.safetensors")!r})
positions, state = torch.zeros(2, dtype=torch.int64), [torch.zeros(2, 4, 8, 16)] * 2
for graph, tokens in ("prefill", [[1, 2, 3], [4, 5, 6]]), ("step", [[7], [8]]):
    program = torch.export.load({str(out)!r} + f"/{{graph}}.pt2").module()
    logits, positions, state = program(weights, torch.tensor(tokens), positions, state)
save_file({{"logits": logits}}, {str(tmp_path / "logits")!r})
""",
    )
    assert result.returncode == 0, result.stderr
    from safetensors.torch import load_file

    with torch.no_grad():
        expected, _ = model(torch.tensor([[1, 2, 3, 7], [4, 5, 6, 8]]))
    assert distance(load_file(tmp_path / "logits")["logits"], expected[:, -1]) <= TOLERANCE


def example(out: Path, *options: str) -> str:
    argv = [str(EXAMPLE), str(out), *options]
    result = run_without(
        ["retentive", "torch", "safetensors"],
        f"import runpy; sys.argv = {argv!r}; runpy.run_path({argv[0]!r}, run_name='__main__')",
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_example_writes_what_generate_writes(exported):
    format, model, out = exported
    if format != "onnx":
        return
    for length in (3, PIECE + 5):  # one piece and two
        prompt = " ".join(f"w{1 + i % 60}" for i in range(length))
        expected = retentive.generate(model, words(), prompt, max_new_tokens=30, temperature=0)
        assert len(expected.split()) > 3
        assert example(out, prompt, "--tokens", "30") == expected
    assert example(out, prompt, "--tokens", "30", "--temperature", "5") != expected


# What is refused


@pytest.fixture
def stub(monkeypatch):
    """A format whose graphs are traced and written at once."""
    monkeypatch.setattr(exports, "trace", lambda model, graph: None)

    def write(program, path, state):
        path.write_text("a graph")

    monkeypatch.setitem(FORMATS, "stub", Format(".stub", (), write, lambda folder, graph: None))
    return monkeypatch


def refusal(call) -> str:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "found", [(1e-3, 0.0), (0.0, 1e-3), (float("nan"), 0.0), (0.0, float("nan"))]
)
def test_a_graph_that_differs_is_not_handed_out(stub, tmp_path, found):
    stub.setattr(exports, "check", lambda model, open_graph: exports.Errors(*found, TOLERANCE))
    (tmp_path / "mine").write_text("kept")
    said = refusal(lambda: export(build(CONFIGS["onnx"]), tmp_path / "out", "stub"))
    assert "differ from the model" in said and "not written" in said
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("spoil", ["nothing", "logits", "nan", "positions", "state"])
def test_the_check_sees_what_is_wrong(spoil):
    model = build(CONFIGS["onnx"])

    @torch.no_grad()
    def run(tokens, positions, layers):
        kinds = [TensorState("retention", {"S": S}) for S in layers]
        logits, after = model(tokens, RetNetState(positions, kinds))
        logits, positions = logits[:, -1].clone(), after.positions
        layers = [layer["S"].clone() for layer in after.layers]
        if spoil == "logits":
            logits += 1e-3
        elif spoil == "nan":
            logits[:] = torch.nan
        elif spoil == "positions":
            positions = positions + 1
        elif spoil == "state":
            layers[1] *= 1.001
        return logits, positions, layers

    with torch.no_grad():
        errors = check(model, lambda graph: run)
    assert errors.passed == (spoil == "nothing")


def test_what_was_there_stays(stub, tmp_path):
    for out in (tmp_path / "folder", tmp_path / "file"):
        out.mkdir() if out.name == "folder" else out.write_text("mine")
        model = build(CONFIGS["onnx"])
        assert "exists already" in refusal(lambda: export(model, out, "stub"))  # noqa: B023
        assert out.exists()


def test_a_folder_that_cannot_be_written(stub, tmp_path):
    model = build(CONFIGS["onnx"])
    said = refusal(lambda: export(model, tmp_path / "none" / "out", "stub"))
    assert "there is no folder" in said
    stub.setattr(os, "access", lambda path, mode: False)
    assert "no permission" in refusal(lambda: export(model, tmp_path / "out", "stub"))


def test_a_model_in_training_is_exported_for_inference_and_left_in_training(stub, tmp_path):
    model = build(zoo.retnet(**SMALL, dropout=0.5)).train()
    kinds = []
    stub.setattr(exports, "check", lambda model, open_graph: exports.Errors(0.0, 0.0, TOLERANCE))
    stub.setattr(exports, "trace", lambda model, graph: kinds.append(model.training))
    export(model, tmp_path / "out", "stub")
    assert kinds == [False, False] and model.training


def test_models_that_are_not_exported(stub, tmp_path):
    transformer = Transformer(zoo.transformer(**SMALL))
    said = refusal(lambda: export(transformer, tmp_path / "out", "stub"))
    assert "layer 0 mixes by attention" in said
    half = build(CONFIGS["onnx"]).bfloat16()
    assert "bfloat16" in refusal(lambda: export(half, tmp_path / "out", "stub"))
    attention = {"attention_layers": (1,), "attention": AttentionConfig(2)}
    for fields in (attention, {"xpos_base": 512.0}):
        model = build(zoo.retnet(**SMALL, **fields))
        said = refusal(lambda: export(model, tmp_path / "out", "stub"))  # noqa: B023
        assert "attention" in said if "attention" in fields else "with xPos" in said


def test_the_command_refuses_in_one_line(tmp_path, capsys, monkeypatch):
    save_model(build(CONFIGS["onnx"]), tmp_path / "model")

    def said(*options: str) -> str:
        assert main(["export", str(tmp_path / "model"), *options]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    assert "did you mean 'onnx'?" in said("--format", "onx")
    (tmp_path / "model-onnx").mkdir()  # where it is written unless told otherwise
    assert "exists already" in said()
    monkeypatch.setattr(exports, "find_spec", lambda name: None)
    assert 'pip install "retentive[export]"' in said(str(tmp_path / "out"))


def test_without_a_tokenizer(stub, tmp_path, capsys):
    save_model(build(CONFIGS["onnx"]), tmp_path / "model")
    stub.setattr(exports, "check", lambda model, open_graph: exports.Errors(0.0, 0.0, TOLERANCE))
    assert main(["export", str(tmp_path / "model"), "--format", "stub"]) == 0
    assert "no tokenizer.json" in capsys.readouterr().out
    about = json.loads((tmp_path / "model-stub" / "export.json").read_text())
    assert about["end_token"] is None
    assert np.array_equal(about["outputs"]["logits"]["shape"], ["batch", 61])
