"""What is written: ours from theirs, theirs from ours, to the bit; and how much memory it takes."""

import argparse
import json
import shutil
import subprocess
import sys
import textwrap
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import zoo
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import retentive
from retentive.cli import main
from retentive.convert.conversion import convert
from retentive.convert.plan import plan
from retentive.convert.source import open_source
from retentive.convert.weight_files import Stored, TorchFile
from retentive.convert.writer import write_safetensors
from retentive.data.tokenizer import byte_tokenizer, load_tokenizer, save_tokenizer
from retentive.models.checkpoint import load_config, save_model

FIXTURES = sorted((Path(__file__).parent / "golden").iterdir())
WRITTEN = {  # fixture: the dialect it can be written as
    "D6_fla_hybrid": "fla",
    "D6_fla_fused_gate": "fla",
    "D4_syncdoth_v2_lnemb": "torchscale",
    "D4_syncdoth_v2_tied": "torchscale",
    "D1_torchscale_deepnorm": "torchscale",
}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    for name in ("pytorch_model.bin", "checkpoint.pt"):
        if (folder / name).exists():
            return torch.load(folder / name, weights_only=True)
    return load_file(folder / "model.safetensors")


def same(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return given.keys() == expected.keys() and all(
        given[name].dtype == expected[name].dtype and torch.equal(given[name], expected[name])
        for name in expected
    )


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, Stored]:
    return {name: Stored(tuple(x.shape), x.dtype) for name, x in tensors.items()}


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_a_converted_folder_is_the_model_that_load_gives(folder, tmp_path, capsys):
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert f"{folder} is " in told and "it holds " in told and "tensors, " in told
    made, direct = retentive.load(tmp_path / "out"), retentive.load(folder)
    assert made.config == direct.config
    assert same(made.state_dict(), direct.state_dict())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", WRITTEN)
def test_there_and_back_is_the_same_to_the_bit(golden, name, tmp_path):
    ours, back = tmp_path / "ours", tmp_path / "back"
    convert(golden / name, ours)
    convert(ours, back, to=WRITTEN[name])
    expected = stored(golden / name)
    if name == "D6_fla_fused_gate":  # which is written as it has been since
        for key in [key for key in expected if ".gate_proj." in key]:
            gate, up = expected[key].chunk(2)
            expected |= {key: gate, key.replace("gate_proj", "up_proj"): up}
    if name.startswith("D4"):
        expected = {key.removeprefix("model."): value for key, value in expected.items()}
        expected["output_projection.weight"] = expected.pop("lm_head.weight")
    assert same(load_file(back / "model.safetensors"), expected)
    given, meant = (json.loads((x / "config.json").read_text()) for x in (back, golden / name))
    for key in given.keys() & meant.keys() - {
        "architectures",
        "model_type",
        "subln",
        "hidden_ratio",
    }:
        assert given[key] == meant[key], key

    convert(back, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        ours / "model.safetensors"
    ).read_bytes()
    assert load_config(tmp_path / "again") == load_config(ours)

    convert(golden / name, tmp_path / "direct", to=WRITTEN[name])
    assert (tmp_path / "direct" / "model.safetensors").read_bytes() == (
        back / "model.safetensors"
    ).read_bytes()


SIZES = {"vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 3, "num_heads": 4}
FLA = SIZES | {
    "rotation": "rope",
    "head_norm": "rmsnorm",
    "norm": "rmsnorm",
    "gated_ffn": True,
    "hidden_act": "swish",
}
ATTENTION = {"num_heads": 2, "num_kv_heads": 1, "qkv_bias": True, "window": 5, "rope_theta": 5e5}
TORCHSCALE = FLA | {"rotation": "official", "row_scale": True}
DEEPNORM = {"residual_scale": 6**0.25}
POST_NORM = {"block": "post-norm", "final_norm": False}


@pytest.mark.parametrize(
    ("to", "options"),
    [
        ("fla", FLA | {"head_norm_affine": True, "gate": False}),
        ("fla", FLA | {"num_kv_heads": 2, "qk_dim": 40, "value_dim": 88}),
        ("fla", FLA | {"norm_eps": 1e-5, "head_norm_eps": 1e-5, "tie_word_embeddings": True}),
        ("fla", FLA | {"attention_layers": (0, 2), "attention": ATTENTION}),
        ("torchscale", TORCHSCALE | DEEPNORM),
        ("torchscale", TORCHSCALE | DEEPNORM | POST_NORM | {"hidden_act": "gelu"}),
        ("torchscale", TORCHSCALE | POST_NORM | {"tie_word_embeddings": True}),
        ("torchscale", TORCHSCALE | {"hidden_act": "relu"}),
        ("torchscale", TORCHSCALE | {"embed_scale": 24**0.5, "embed_norm": True, "value_dim": 40}),
    ],
)
def test_every_option_of_a_target_comes_back(tmp_path, to, options):
    save_model(retentive.RetNet(zoo.retnet(**options)), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to=to)
    convert(tmp_path / "theirs", tmp_path / "back")
    assert load_config(tmp_path / "back") == load_config(tmp_path / "ours")
    expected = load_file(tmp_path / "ours" / "model.safetensors")
    assert same(load_file(tmp_path / "back" / "model.safetensors"), expected)


def test_a_head_norm_that_was_not_fused(golden, tmp_path):
    """fuse_norm false gives the same tensor another name."""
    fused = golden / "D6_fla_hybrid"
    weights = {
        name.replace("g_norm_swish_gate", "g_norm"): tensor
        for name, tensor in stored(fused).items()
    }
    save_file(weights, tmp_path / "model.safetensors")
    config = json.loads((fused / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "fuse_norm": False}))
    assert same(retentive.load(tmp_path).state_dict(), retentive.load(fused).state_dict())


def test_dtypes(golden, tmp_path):
    folder = golden / "D4_syncdoth_v2_lnemb"
    convert(folder, tmp_path / "half", dtype="bfloat16")
    made = load_file(tmp_path / "half" / "model.safetensors")
    kept = retentive.load(folder).state_dict()
    assert same(made, {name: value.bfloat16() for name, value in kept.items()})
    convert(tmp_path / "half", tmp_path / "back", to="torchscale")  # stays bfloat16
    dtypes = {x.dtype for x in load_file(tmp_path / "back" / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16, torch.float32}  # weights; angles and decays


def test_a_folder_of_ours_is_copied(tmp_path):
    config = zoo.retnet(vocab_size=257, hidden_size=16, num_hidden_layers=2, num_heads=2)
    model = retentive.RetNet(config)
    save_model(model, tmp_path / "ours")
    save_tokenizer(byte_tokenizer(), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "out")
    assert same(retentive.load(tmp_path / "out").state_dict(), model.state_dict())
    assert load_tokenizer(tmp_path / "out").get_vocab_size() == 257

    other = tmp_path / "other"  # the same in torch's own file
    other.mkdir()
    torch.save(model.state_dict(), other / "pytorch_model.bin")
    shutil.copyfile(tmp_path / "ours" / "config.json", other / "config.json")
    assert same(retentive.load(other).state_dict(), model.state_dict())


def test_what_fairseq_wraps_around_a_decoder(golden, tmp_path):
    """{"model": {"decoder.x": ...}, "args": Namespace}, the model's options among many others."""
    folder = golden / "D1_torchscale_deepnorm"
    options = json.loads((folder / "config.json").read_text())
    del options["vocab_size"]  # that is in a dictionary of words
    weights = {f"decoder.{name}": value for name, value in stored(folder).items()}
    args = argparse.Namespace(**options, lr=[1e-3], seed=1)
    for cut in (
        {"args": args},
        {"args": None, "cfg": {"model": args}},
        {"cfg": {"model": vars(args)}},
    ):
        torch.save({"model": weights, **cut}, tmp_path / "checkpoint_best.pt")
        model = retentive.load(tmp_path / "checkpoint_best.pt")
        assert same(model.state_dict(), retentive.load(folder).state_dict())


def test_a_wrapped_decoder_in_safetensors(golden, tmp_path):
    folder = golden / "D1_torchscale_deepnorm"
    weights = {f"decoder.{name}": value for name, value in stored(folder).items()}
    save_file(weights, tmp_path / "model.safetensors")
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    assert same(retentive.load(tmp_path).state_dict(), retentive.load(folder).state_dict())


@pytest.fixture
def yet_another_in_shards(golden, tmp_path) -> Path:
    """The first shard holds `decoder.layers` only: that they are wrapped in nothing, others say."""
    folder = golden / "D7_yet_another_retnet_normlast"
    weights = torch.load(folder / "model.pt", weights_only=True)
    weight_map = {}
    for number, inner in enumerate((True, False), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        part = {key: x for key, x in weights.items() if key.startswith("decoder.") == inner}
        torch.save(part, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    return tmp_path


def test_a_shard_of_layers_only(golden, yet_another_in_shards):
    whole = retentive.load(golden / "D7_yet_another_retnet_normlast").state_dict()
    assert same(retentive.load(yet_another_in_shards).state_dict(), whole)


def test_tensors_come_in_the_order_of_the_file(golden, tmp_path):
    tensors = load_file(golden / "D6_fla_hybrid" / "model.safetensors")
    path = tmp_path / "model.safetensors"
    write_safetensors(path, shapes(tensors), iter(tensors.items()))  # norms last: half as wide
    torch.save(dict(reversed(tensors.items())), tmp_path / "reversed.pt")
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    del header["__metadata__"]
    names = sorted(header, key=lambda name: header[name]["data_offsets"])
    streamed = open_source(path).stream(tensors.keys())
    assert [name for name, _ in streamed] == names
    streamed = open_source(tmp_path / "reversed.pt").stream(tensors.keys())
    assert [name for name, _ in streamed] == list(reversed(tensors))


def test_files_are_opened_only_for_what_they_hold(yet_another_in_shards, monkeypatch):
    source, opened = open_source(yet_another_in_shards), []
    opening = TorchFile.opened

    def counted(file):
        opened.append(file.path.name[14:19])
        return opening(file)

    monkeypatch.setattr(TorchFile, "opened", counted)
    source.read("embedding.weight")
    assert opened == ["00002"]
    plan(source)  # compares what each layer has stored of angles
    assert opened == ["00002", "00001"]


def test_torch_files_of_old(golden, tmp_path):
    """As torch wrote them before 1.6: not a zip file, so not to be mapped."""
    shutil.copyfile(golden / "D4_syncdoth_v2_tied" / "config.json", tmp_path / "config.json")
    weights = stored(golden / "D4_syncdoth_v2_tied")
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    expected = retentive.load(golden / "D4_syncdoth_v2_tied").state_dict()
    assert same(retentive.load(tmp_path).state_dict(), expected)


def test_a_name_on_the_hub(golden, tmp_path, monkeypatch):
    """Only safetensors are fetched where a repository has them, and never code."""
    asked = []

    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            asked.append(allow_patterns)
            return str(tmp_path / name)

    for name, files in {
        "a/safe": ("D6_fla_hybrid/config.json", "D6_fla_hybrid/model.safetensors"),
        "a/pickled": ("D4_syncdoth_v2_tied/config.json", "D4_syncdoth_v2_tied/pytorch_model.bin"),
    }.items():
        (tmp_path / name).mkdir(parents=True)
        for file in files:
            shutil.copy(golden / file, tmp_path / name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    monkeypatch.chdir(golden)
    retentive.load("a/safe")
    assert len(asked) == 1
    retentive.load("a/pickled")
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in asked[0] + asked[1])
    assert "*.bin" in asked[2]
    assert not any(pattern.endswith(".py") or pattern == "*" for x in asked for pattern in x)


def test_the_tokenizer_comes_along(golden, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(golden / "D6_fla_hybrid", source)
    save_tokenizer(byte_tokenizer(), source)
    settings = {"eos_token": "</s>", "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    assert "257 ids and the model 97" in capsys.readouterr().out
    assert load_tokenizer(tmp_path / "out").get_vocab_size() == 257
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {
        "eos_token": "</s>"
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)

    (source / "tokenizer.json").write_text("{")
    assert main(["convert", str(source), str(tmp_path / "broken")]) == 0
    assert f"{source / 'tokenizer.json'} is no tokenizer.json" in capsys.readouterr().out


def test_broken_settings_of_a_tokenizer_are_left_out(golden, tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(golden / "D6_fla_hybrid", source)
    save_tokenizer(byte_tokenizer(), source)
    (source / "tokenizer_config.json").write_text('{"eos_token": ')
    assert main(["convert", str(source), str(out)]) == 0
    told = capsys.readouterr().out
    assert f"{source / 'tokenizer_config.json'} is truncated" in told
    assert "257 ids and the model 97" in told
    assert retentive.load(out).config.vocab_size == 97
    assert load_tokenizer(out).get_vocab_size() == 257
    assert not (out / "tokenizer_config.json").exists()


def test_a_slow_tokenizer_becomes_a_fast_one(golden, tmp_path, capsys, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(golden / "D6_fla_hybrid", source)
    letters = ["<|endoftext|>", "a", "b", "ab"]
    (source / "vocab.json").write_text(json.dumps({x: i for i, x in enumerate(letters)}))
    (source / "merges.txt").write_text("#version: 0.2\na b\n")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    assert load_tokenizer(tmp_path / "out").encode("abb").tokens == ["ab", "b"]

    capsys.readouterr()
    (source / "tokenizer.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert main(["convert", str(source), str(tmp_path / "spm")]) == 0
    assert "pip install sentencepiece" in capsys.readouterr().out
    assert not (tmp_path / "spm" / "tokenizer.json").exists()
    (source / "tokenizer.model").unlink()

    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["convert", str(source), str(tmp_path / "plain")]) == 0
    told = capsys.readouterr().out
    assert "vocab.json, merges.txt" in told and 'pip install "retentive[hf]"' in told


def test_a_tokenizer_that_reads_otherwise_than_sentencepiece_is_not_kept(
    golden, tmp_path, capsys, monkeypatch
):
    from transformers import AutoTokenizer  # takes seconds

    source = tmp_path / "source"
    shutil.copytree(golden / "D6_fla_hybrid", source)
    (source / "tokenizer.model").write_bytes(b"")

    class Processor:
        def __init__(self, model_file):
            assert Path(model_file).name == "tokenizer.model"

        def encode(self, text):
            ids = byte_tokenizer().encode(text).ids
            return ids if agrees else ids[1:]

    pieces = ModuleType("sentencepiece")
    pieces.__spec__ = ModuleSpec("sentencepiece", None)
    monkeypatch.setattr(pieces, "SentencePieceProcessor", Processor, raising=False)
    monkeypatch.setitem(sys.modules, "sentencepiece", pieces)
    made = SimpleNamespace(backend_tokenizer=byte_tokenizer())
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda folder: made)
    for agrees in (True, False):
        assert main(["convert", str(source), str(tmp_path / f"{agrees}")]) == 0
        assert ("reads texts otherwise" in capsys.readouterr().out) != agrees
        assert (tmp_path / f"{agrees}" / "tokenizer.json").exists() == agrees


def test_a_file_is_written_as_the_library_writes_it(tmp_path):
    tensors = {
        "z.weight": torch.randn(3, 5),
        "a.norm": torch.randn(7).bfloat16(),
        "m.scale": torch.randn(4).double(),
        "b.codes": torch.randint(0, 9, (3, 3), dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "library.safetensors", {"format": "pt"})
    write_safetensors(tmp_path / "ours.safetensors", shapes(tensors), reversed(tensors.items()))
    assert same(load_file(tmp_path / "ours.safetensors"), tensors)
    ours, library = (tmp_path / f"{x}.safetensors" for x in ("ours", "library"))
    assert ours.stat().st_size == library.stat().st_size


MEASURED = """
    import sys
    from pathlib import Path
    from retentive.convert.conversion import convert

    def peak():
        status = dict(line.split(":") for line in Path("/proc/self/status").open())
        return int(status["VmHWM"].split()[0]) // 1024

    warm_up, *folders = sys.argv[1:]
    convert(warm_up, folders[0] + "/warm-up")  # imports take more than weights do here
    before = peak()
    for folder in folders:
        convert(folder, folder + "/out")
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_is_at_most_about_a_shard(golden, tmp_path):
    """Eight shards of 16 MB and one of 8: of all, 136 MB, less than three may be held at a time."""
    config = {
        "model_type": "retnet",
        "vocab_size": 4096,
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "num_heads": 4,
        "expand_v": 1,
        "intermediate_size": 1024,
        "tie_word_embeddings": True,
    }
    square = torch.zeros(1024, 1024, dtype=torch.float16)
    layer = {f"attn.{x}_proj.weight": square for x in "qkvgo"}
    layer |= {f"mlp.{x}_proj.weight": square for x in ("gate", "up", "down")}
    layer |= {f"{x}_norm.weight": square[0] for x in ("attn", "mlp")}
    layer["attn.g_norm_swish_gate.weight"] = square[0, :256]
    shards = [
        {f"model.layers.{n}.{name}": tensor.clone() for name, tensor in layer.items()}
        for n in range(8)
    ]
    shards.append({"model.embeddings.weight": square.repeat(4, 1)})
    shards[-1]["model.norm.weight"] = square[0].clone()
    folders = []
    for stem, suffix, save in (
        ("model", "safetensors", save_file),
        ("pytorch_model", "bin", torch.save),
    ):
        folder = tmp_path / suffix
        folder.mkdir()
        folders.append(str(folder))
        weight_map = {}
        for n, shard in enumerate(shards, 1):
            save(shard, folder / f"{stem}-{n:05}-of-00009.{suffix}")
            weight_map |= dict.fromkeys(shard, f"{stem}-{n:05}-of-00009.{suffix}")
        index = folder / f"{stem}.{suffix}.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", textwrap.dedent(MEASURED)]
    command += [str(golden / "D6_fla_hybrid"), *folders]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for folder in folders:
        assert Path(folder, "out", "model.safetensors").stat().st_size > 120 * 2**20
    assert int(result.stdout) < 48
