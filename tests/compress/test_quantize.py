"""Bounds follow from the quantisation step, the kernels' bfloat16 (2^-9 a rounding), or float64."""

import copy
import dataclasses
import errno
import json
import math
import os
import statistics

import pytest
import torch
import zoo
from torch.nn import functional as F

from retentive import generate, load
from retentive.cli import main
from retentive.compress import quantize_command
from retentive.compress.quantize import quantize, quantize_weight
from retentive.data.tokenizer import byte_tokenizer, load_tokenizer, save_tokenizer
from retentive.decoding.program_runner import ProgramRunner
from retentive.decoding.runner import runner
from retentive.errors import InputError
from retentive.kernels.cpu.available import available
from retentive.layers import quantized
from retentive.layers.quantized import MANY_ROWS, QuantizedLinear, pack_nibbles, unpack_nibbles
from retentive.mixers.attention import AttentionConfig
from retentive.mixers.state import TensorState
from retentive.models.build import build_model
from retentive.models.checkpoint import load_config, save_model
from retentive.models.config import Quantization, RetNetConfig
from retentive.models.fingerprint import fingerprint
from retentive.models.matching import matching_transformer
from retentive.models.retnet import RetNet
from retentive.models.transformer import Transformer

SMALL = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2}
CONFIGS = {
    "retnet": zoo.retnet(**SMALL),
    "retnet-tied": zoo.retnet(**SMALL, tie_word_embeddings=True, gated_ffn=True, norm="rmsnorm"),
    "retnet-biased": zoo.retnet(
        **SMALL, qkv_bias=True, ffn_bias=True, head_bias=True, num_kv_heads=1, block="parallel"
    ),
    "hybrid": zoo.retnet(
        **SMALL, attention_layers=(1,), attention=AttentionConfig(2, qkv_bias=True, window=16)
    ),
    "transformer": zoo.transformer(**SMALL, num_kv_heads=1),
}
BITS = (16, 8, 4)
BF16 = 2**-8  # distance of neighbours, relative


def build(name: str) -> RetNet | Transformer:
    config = CONFIGS[name]
    model = build_model(config)
    model.init_weights(seed=0)
    for key, weight in model.named_parameters():
        if key.endswith("proj.bias") or key == "lm_head.bias":
            torch.nn.init.normal_(weight, generator=torch.manual_seed(0))
    return model.eval()


def linear(weight: torch.Tensor, bits: int, group_size: int = 32) -> QuantizedLinear:
    scheme = Quantization(bits, "test", group_size)
    layer = QuantizedLinear(weight.shape[1], weight.shape[0], scheme)
    layer.load_state_dict(quantize_weight(weight, scheme), assign=True)
    return layer


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.manual_seed(0))


def distance(given: torch.Tensor, expected: torch.Tensor) -> float:
    given, expected = given.detach().double(), expected.detach().double()
    return float((given - expected).norm() / expected.norm())


def typical(given: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance of the median token: where q·k is about 0, a head's norm shows noise only."""
    pairs = zip(given.flatten(0, 1), expected.flatten(0, 1), strict=True)
    return statistics.median(distance(*pair) for pair in pairs)


def dequantized(made: RetNet) -> RetNet:
    """The model whose weights are those that `made` multiplies by."""
    model = RetNet(dataclasses.replace(made.config, quantization=None))
    for name, weight in model.named_parameters():
        owner, kind = name.rsplit(".", 1)
        weight.data = getattr(made.get_submodule(owner), kind).detach().clone()
    return model.eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 257, (2, 40), generator=torch.manual_seed(1))


@pytest.fixture
def folder(tmp_path):
    save_model(build("retnet"), tmp_path / "model")
    save_tokenizer(byte_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


# The numbers


def test_nibbles_are_packed_low_half_first():
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [[0x21, 0x0F]]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pack_nibbles(unpack_nibbles(every)), every)


@pytest.mark.parametrize("shape", [(64, 64), (7, 40), (1, 33)])
def test_a_weight_is_at_most_half_a_step_off(shape):
    weight = random(*shape)
    eight = linear(weight, 8)
    step = weight.abs().amax(1, keepdim=True) / 127 * (1 + 2 * BF16)
    assert ((eight.weight - weight).abs() <= step / 2 + 1e-7).all()
    assert distance(linear(weight, 16).weight, weight) < BF16 / 2


@pytest.mark.parametrize("group_size", [32, 64])
def test_four_bits_beat_plain_rounding_to_a_groups_range(group_size):
    weight = random(48, 128)
    groups = weight.double().unflatten(1, (-1, group_size))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = (high - low) / 15
    plain = (((groups - low) / step).round() * step + low).flatten(1)
    assert distance(linear(weight, 4, group_size).weight, weight) < 0.97 * distance(plain, weight)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, -0.75])
def test_a_constant_weight_is_kept(bits, value):
    layer = linear(torch.full((3, 64), value), bits)
    torch.testing.assert_close(layer.weight, torch.full((3, 64), value), rtol=BF16, atol=0)


# The kernels


@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize("shape", [(64, 64), (96, 160), (7, 40), (130, 33)])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("vnni", [True, False])
def test_the_kernels_multiply_by_the_weight(bits, shape, rows, vnni, monkeypatch):
    if not vnni:
        monkeypatch.setattr(quantized, "_has_vnni", lambda: False)
    layer = linear(random(*shape), bits)
    x = random(2, rows, shape[1])
    expected = x.double() @ layer.weight.double().T
    y = layer(x)
    assert y.shape == expected.shape and y.dtype == x.dtype
    # x, y and, unpacked, the weight are rounded to bfloat16; or x to 127 steps of its largest
    assert distance(y, expected) < 1.5 * BF16 + (3 / 127 / math.sqrt(12) if bits == 8 else 0)
    assert layer(x.double()).dtype == torch.float64
    assert layer(x[0, 0]).shape == (shape[0],)


def test_a_row_does_not_depend_on_the_others():
    layer, x = linear(random(64, 64), 8), random(5, 64)
    x[3] *= 1000
    together = layer(x)
    for row in range(5):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])


def test_a_row_of_zeros_gives_zeros():
    assert not linear(random(64, 64), 8)(torch.zeros(2, 64)).any()


@pytest.mark.parametrize("bits", BITS)
def test_nothing_is_kept_for_many_rows(bits):
    """It would be in memory beside what is stored; few rows come again and again."""
    layer = linear(random(64, 64), bits)
    layer(random(MANY_ROWS, 64))
    assert layer._kernel is None
    layer(random(MANY_ROWS - 1, 64))
    assert layer._kernel is not None


# The model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("bits", "bound"), [(16, 0.01), (8, 0.03), (4, 0.25)])
def test_logits_stay_close(name, bits, bound, tokens):
    model = build(name)
    made = quantize(model, bits)
    assert typical(made(tokens)[0], model(tokens)[0]) < bound
    assert made.num_parameters() == model.num_parameters()
    assert (made.dtype, made.device) == (model.dtype, model.device)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("bits", BITS)
def test_a_folder_brings_the_model_back_to_the_bit(name, bits, tokens, tmp_path):
    made = quantize(build(name), bits)
    save_model(made, tmp_path)
    again = load(tmp_path)
    assert again.config == made.config == load_config(tmp_path)
    for (key, tensor), other in zip(
        made.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other) and tensor.dtype == other.dtype, key
    assert torch.equal(again(tokens)[0], made(tokens)[0])
    assert fingerprint(again) == fingerprint(made)
    save_model(again, tmp_path / "after use")  # what is stored is kept beside the kernels' layout
    assert fingerprint(load(tmp_path / "after use")) == fingerprint(made)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["retnet", "retnet-tied"])
def test_the_forms_agree(name, bits, tokens):
    made = quantize(build(name), bits)
    parallel, _ = made.set_kernels(form="parallel")(tokens)
    chunkwise, _ = made.set_kernels(form="chunkwise", chunk_size=16)(tokens)
    state, pieces = None, []
    for token in tokens.split(1, 1):
        logits, state = made.set_kernels()(token, state)
        pieces.append(logits)
    assert typical(chunkwise, parallel) < 8 * BF16
    assert typical(torch.cat(pieces, 1), parallel) < 8 * BF16


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["retnet", "retnet-tied", "retnet-biased"])
@torch.no_grad()
def test_a_step_multiplies_by_the_very_weights(name, bits, tokens):
    """Its activations are float32: it is as near to the dequantised model as that is to itself."""
    made = quantize(build(name), bits)
    exact = dequantized(made).double()
    _, state = exact(tokens[:, :8])
    expected, _ = exact(tokens[:, 8:], state)
    layers = [TensorState("retention", {"S": layer["S"].float()}) for layer in state.layers]
    decoding = runner(made, type(state)(state.positions, layers))
    assert isinstance(decoding, ProgramRunner) or not available()
    logits = torch.stack([decoding.step(token) for token in tokens[:, 8:].unbind(1)], 1)
    assert distance(logits, expected) < (5e-6 if available() else 8 * BF16)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("bits", BITS)
def test_the_loss_is_that_of_the_logits(name, bits, tokens):
    made = quantize(build(name), bits)
    h, _ = made.hidden(tokens[:, :-1])
    targets = tokens[:, 1:]
    expected = F.cross_entropy(made.head(h).flatten(0, 1), targets.flatten())
    assert math.isclose(made.loss(h, targets).item(), expected.item(), rel_tol=1e-2)


def test_embedding_and_head_have_eight_bits_at_least():
    made = quantize(build("retnet"), 4).state_dict()
    assert made["embed_tokens.table.qweight"].dtype == torch.int8
    assert made["lm_head.qweight"].dtype == torch.int8
    assert made["layers.0.retention.q_proj.qweight"].dtype == torch.uint8
    assert made["norm.weight"].dtype == torch.float32


def test_a_quantised_model_is_neither_trained_nor_initialised_nor_quantised_again():
    made = quantize(build("retnet"), 8)
    with pytest.raises(InputError, match="cannot be trained; train the one it was made from"):
        made.train()
    assert not any(weight.requires_grad for weight in made.parameters())
    with pytest.raises(InputError, match="has no initial weights"):
        RetNet(made.config)
    with pytest.raises(InputError, match="have 8 bits already"):
        quantize(made, 4)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"bits": 5}, "quantization bits are 5"),
        ({"group_size": 48}, "quantization group_size is 48"),
        ({"group": 32}, "unknown quantization key 'group'"),
        ({"bits": "8"}, "bits is '8'"),
    ],
)
def test_a_config_that_is_no_quantisation_is_one_line(change, line):
    fields = quantize(build("retnet"), 8).config.to_dict()
    with pytest.raises(InputError, match=line):
        RetNetConfig.from_dict({**fields, "quantization": {**fields["quantization"], **change}})


def test_other_loaders_see_a_model_type_they_do_not_know():
    config = quantize(build("retnet"), 8).config
    assert config.to_dict()["model_type"] == "retentive-quantized"
    assert "quantization" not in build("retnet").config.to_dict()
    baseline = matching_transformer(config)  # of equal size, not quantised itself
    assert baseline == matching_transformer(build("retnet").config)


# The command


@pytest.mark.parametrize("to", ["bf16", "int8", "int4"])
def test_every_command_opens_what_quantize_writes(folder, to, capsys):
    (folder / "tokenizer_config.json").write_text('{"bos_token": "a"}')
    assert main(["quantize", str(folder), "--to", to]) == 0
    out = folder.with_name(f"model-{to}")
    assert f"wrote {out}" in capsys.readouterr().out
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    sizes = [(f / "model.safetensors").stat().st_size for f in (out, folder)]
    assert sizes[0] < {"bf16": 0.6, "int8": 0.4, "int4": 0.35}[to] * sizes[1]
    assert main(["generate", str(out), "--prompt", "ab", "--max-new-tokens", "3"]) == 0
    assert main(["info", str(out)]) == 0
    assert "bits" in capsys.readouterr().out


def test_generate_goes_on_the_same_way_each_time(folder):
    tokenizer = load_tokenizer(folder)
    made = quantize(load(folder), 8)
    texts = [generate(made, tokenizer, "ab", max_new_tokens=5, temperature=0) for _ in range(2)]
    assert texts[0] == texts[1]


def test_a_folder_without_tokenizer_is_told(folder, tmp_path, capsys):
    (folder / "tokenizer.json").unlink()
    main(["quantize", str(folder), str(tmp_path / "out")])
    assert "holds no tokenizer.json" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["model", "out", "--to", "int9"], "unknown format 'int9' (did you mean 'int8'?)"),
        (["nothing", "out"], "there is no file or folder nothing"),
        (["model", "model"], "model exists already; name a new folder"),
        (["model", "far/out"], "far/out: there is no folder far"),
        (["quantised", "out"], "the model's weights have 8 bits already"),
        (["broken", "out"], "broken/config.json is truncated or no JSON"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(arguments, line, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder.parent)
    main(["quantize", "model", "quantised"])
    (folder.parent / "broken").mkdir()
    (folder.parent / "broken" / "config.json").write_text("{")
    before = sorted(folder.parent.rglob("*"))
    assert main(["quantize", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"retentive: {line}") and told.count("\n") == 1
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["save_model", "tokenizer"])
def test_a_failure_while_writing_leaves_nothing(failure, step, folder, monkeypatch, capsys):
    def fail(*arguments):
        raise failure

    name = "save_model" if step == "save_model" else "copy_tokenizer"
    monkeypatch.setattr(quantize_command, name, fail)
    code = main(["quantize", str(folder), str(folder.parent / "out")])
    monkeypatch.undo()
    assert code == (2 if isinstance(failure, OSError) else 130)
    if isinstance(failure, OSError):
        assert "out: No space left; nothing was written" in capsys.readouterr().err
    assert os.listdir(folder.parent) == ["model"]


def test_a_quantised_checkpoint_is_not_trained_on(folder):
    main(["quantize", str(folder), str(folder.parent / "out")])
    fields = json.loads((folder.parent / "out" / "config.json").read_text())
    assert fields["quantization"]["bits"] == 8
    assert fields["quantization"]["source"] == fingerprint(load(folder))
    with pytest.raises(InputError, match="cannot be trained"):
        load(folder.parent / "out").train()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_run(dtype, tied):
    torch.manual_seed(0)
    config = zoo.retnet(
        vocab_size=61, hidden_size=64, num_hidden_layers=1, num_heads=2, tie_word_embeddings=tied
    )
    model = RetNet(config).eval()
    quantized = quantize(model, 8)
    tokens = torch.randint(61, (2, 7))
    with torch.no_grad():
        expected, _ = quantized(tokens)
        logits, _ = quantized.to(dtype)(tokens)
    assert logits.dtype == dtype
    assert (logits - expected).norm() < 0.1 * expected.norm()


def test_new_weights_have_a_new_kernel_and_copies_their_own():
    torch.manual_seed(0)
    config = zoo.retnet(vocab_size=61, hidden_size=64, num_hidden_layers=1, num_heads=2)
    tokens = torch.randint(61, (1, 5))
    with torch.no_grad():
        one, other = (quantize(RetNet(config).eval(), 8) for _ in range(2))
        one(tokens)
        copied = copy.deepcopy(one)
        assert torch.equal(copied(tokens)[0], one(tokens)[0])
        one.load_state_dict(other.state_dict())
        assert torch.equal(one(tokens)[0], other(tokens)[0])


def test_negative_tokens_are_refused():
    config = zoo.retnet(vocab_size=61, hidden_size=64, num_hidden_layers=1, num_heads=2)
    for bits in (16, 8, 4):
        with pytest.raises(InputError, match="tokens run from -1"):
            quantize(RetNet(config).eval(), bits)(torch.tensor([[3, -1]]))
