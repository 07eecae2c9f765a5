"""Whatever is wrong with a checkpoint is one line, exit code 2, and no DST."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file

import retentive
from retentive.cli import main
from retentive.convert import conversion, writer
from retentive.data.tokenizer import byte_tokenizer, save_tokenizer
from retentive.errors import InputError
from retentive.models.checkpoint import save_model


@pytest.fixture
def source(golden, tmp_path) -> Path:
    """A checkpoint of flash-linear-attention's, to be spoiled."""
    (tmp_path / "source").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(golden / "D6_fla_hybrid" / name, tmp_path / "source" / name)
    return tmp_path / "source"


@pytest.fixture
def refused(tmp_path, capsys):
    """Converting is refused with a line that has these words in it."""

    def check(source: Path | str, *words: str, options: tuple[str, ...] = ()) -> None:
        out = tmp_path / "out"
        before = sorted(tmp_path.iterdir())
        assert main(["convert", str(source), str(out), *options]) == 2
        line = capsys.readouterr().err
        assert line.startswith("retentive: ") and line.count("\n") == 1
        assert all(word in line for word in words), line
        assert sorted(tmp_path.iterdir()) == before

    return check


def change_config(source: Path, **fields) -> None:
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_tensors(source: Path, change) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


Q = "model.layers.0.attn.q_proj.weight"


def test_the_source_is_fine_before_it_is_spoiled(source, tmp_path):
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    assert retentive.load(tmp_path / "out").config.other_layers == (1,)


def test_a_source_that_is_not_there(refused, tmp_path):
    refused(tmp_path / "nothing", "there is no file or folder", "nothing")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no weights", "model.safetensors")
    (tmp_path / "notes.txt").write_text("text")
    refused(tmp_path / "notes.txt", "no file of weights", ".bin")


def test_an_unknown_dialect(source, refused):
    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("attn.", "mixer.").replace("model.", "backbone.")] = tensors.pop(
                name
            )

    change_tensors(source, rename)
    refused(source, "no dialect known here", "backbone.embeddings.weight", "flash-linear-attention")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(Q), ("lacks", Q)),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), ("1 tensors", "such as extra")),
        (lambda tensors: tensors.update({Q: torch.zeros(64, 32)}), (Q, "(64, 32)", "(64, 64)")),
        (lambda tensors: tensors.update({Q: torch.zeros(64)}), (Q, "(64,)", "(64, 64)")),
        (lambda tensors: tensors.update({Q: torch.tensor(1.0)}), (Q, "()", "(64, 64)")),
    ],
)
def test_tensors_that_do_not_fit(source, refused, change, words):
    change_tensors(source, change)
    refused(source, *words, "must come from one model")


def test_a_dtype_that_is_none_of_ours(source, refused):
    change_tensors(source, lambda x: x.update({Q: x[Q].to(torch.float8_e4m3fn)}))
    refused(source, Q, "F8_E4M3")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    refused(source, Q, "float8_e4m3fn", "BF16")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 4}, ("3 layers", "4")),
        ({"num_hidden_layers": 10**9}, ("3 layers",)),
        ({"hidden_size": 32}, ("(97, 64)", "(97, 32)")),
        ({"hidden_size": 10**9}, ("no tensor as large as hidden_size 1000000000",)),
        ({"hidden_size": 0}, ("config.json", "hidden_size is 0")),
        ({"expand_k": float("nan")}, ("config.json", "NaN")),
        ({"num_heads": 7}, ("config.json", "num_heads 7")),
        ({"num_heads": "four"}, ("config.json", "num_heads is 'four'", "a whole number")),
        ({"attn": None}, ("lacks model.layers.1.attn.g_proj.weight",)),
        ({"attn": {"layers": [9], "num_heads": 4}}, ("attention_layers",)),
        ({"attn": {"layers": [1]}}, ("attn lacks 'num_heads'",)),
        ({"attn": {"layers": 1, "num_heads": 4}}, ("layers is 1", "a list")),
        ({"tie_word_embeddings": True}, ("a head of its own", "lm_head.weight")),
        ({"elementwise_affine": False}, ("no part of", "g_norm_swish_gate")),
        ({"use_short_conv": True}, ("use_short_conv is True", "only False")),
        ({"feature_map": "relu"}, ("feature_map is 'relu'",)),
    ],
)
def test_a_config_that_disagrees(source, refused, fields, words):
    change_config(source, **fields)
    refused(source, *words)


def test_a_config_that_is_broken_or_missing(source, refused):
    path = source / "config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole)[:-5])
    refused(source, "config.json", "truncated or no JSON")
    path.write_text("[]")
    refused(source, "config.json", "no object")
    del whole["hidden_size"]
    path.write_text(json.dumps(whole))
    refused(source, "lacks 'hidden_size'")
    path.unlink()
    refused(source, "has no config.json")


def test_decays_that_are_not_the_configs(golden, tmp_path, refused):
    shutil.copytree(golden / "D4_syncdoth_v2_lnemb", tmp_path / "source")
    change_config(tmp_path / "source", use_lm_decay=True)
    refused(tmp_path / "source", "retnet_rel_pos.decay", "not the one of its config.json")


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_safetensors(source, refused, kept):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(source, "model.safetensors", "truncated")


@pytest.mark.parametrize("kept", [0, 7, 1000, -1])
def test_a_truncated_file_of_torch(golden, tmp_path, refused, kept):
    shutil.copytree(golden / "D4_syncdoth_v2_tied", tmp_path / "source")
    path = tmp_path / "source" / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:kept])
    refused(tmp_path / "source", "pytorch_model.bin", "truncated")


class Attack:
    """Unpickled without care it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_run_code(golden, tmp_path, refused, zipped):
    shutil.copytree(golden / "D4_syncdoth_v2_tied", tmp_path / "source")
    content = {"model.x": torch.zeros(2), "attack": Attack(tmp_path / "owned")}
    path = tmp_path / "source" / "pytorch_model.bin"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    refused(tmp_path / "source", "wants to run code", "posix.system")
    path.write_bytes(pickle.dumps(Attack(tmp_path / "owned"), protocol=2))
    refused(tmp_path / "source", "wants to run code", "posix.system")


def test_a_pickle_without_tensors(golden, tmp_path, refused):
    shutil.copytree(golden / "D4_syncdoth_v2_tied", tmp_path / "source")
    for content in ([torch.zeros(2)], {"step": 3}, {"model": {}}, {0: torch.zeros(2)}):
        torch.save(content, tmp_path / "source" / "pytorch_model.bin")
        refused(tmp_path / "source", "no tensors by name")


def shard(source: Path) -> dict:
    """Split the source's weights into two files with an index."""
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for file, part in zip(files, (names[:9], names[9:]), strict=True):
        save_file({name: tensors[name] for name in part}, source / file)
    (source / "model.safetensors").unlink()
    index = {"weight_map": {name: files[name not in names[:9]] for name in names}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards(source, refused, tmp_path):
    whole = retentive.load(source).state_dict()
    index = shard(source)
    assert main(["convert", str(source), str(tmp_path / "made")]) == 0
    made = load_file(tmp_path / "made" / "model.safetensors")
    assert all(torch.equal(made[name], whole[name]) for name in whole)

    path = source / "model.safetensors.index.json"
    second = source / "model-00002-of-00002.safetensors"
    first = second.with_name("model-00001-of-00002.safetensors").read_bytes()
    whole_second = second.read_bytes()
    second.write_bytes(first)
    refused(source, "in two files")
    second.unlink()
    refused(source, "model-00002-of-00002.safetensors does not exist")
    second.write_bytes(whole_second)
    path.write_text(json.dumps({}))
    refused(source, "no weight_map")
    path.write_text(json.dumps({"weight_map": {}}))
    refused(source, "an empty weight_map")
    index["weight_map"][Q] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    refused(source, "outside of its folder")
    path.unlink()
    refused(source, "several files of weights")


def test_places_that_cannot_be_written(source, refused, tmp_path, monkeypatch, capsys):
    def refused_at(out: Path, *words: str) -> None:
        assert main(["convert", str(source), str(out)]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and all(word in line for word in words)

    (tmp_path / "there").mkdir()
    refused_at(tmp_path / "there", "exists already")
    refused_at(tmp_path / "no" / "where", "no folder")
    (tmp_path / "file").write_text("")
    refused_at(tmp_path / "file", "exists already")
    refused_at(tmp_path / "file" / "out", "no folder")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anywhere
    refused(source, "no permission")


def test_a_full_disk(source, refused, monkeypatch):
    class Full:
        free = 1000

    with monkeypatch.context() as patch:
        patch.setattr(writer.shutil, "disk_usage", lambda folder: Full)
        refused(source, "take 0.00 GB", "0.00 GB free")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer.os, "fsync", full)
    refused(source, "No space left on device", "nothing was written")


def test_ctrl_c_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "bring_tokenizer", interrupted)
    before = sorted(tmp_path.iterdir())
    assert main(["convert", str(source), str(tmp_path / "out")]) == 130
    assert sorted(tmp_path.iterdir()) == before


def test_sigterm_leaves_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(
        conversion, "bring_tokenizer", lambda *given: signal.raise_signal(signal.SIGTERM)
    )
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(source), str(tmp_path / "out")])
    assert caught.value.code == 128 + signal.SIGTERM
    assert sorted(tmp_path.iterdir()) == before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_killed_processes_left_is_removed(source, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stale, ours, running, others = (
        tmp_path / f".{name}.{process}.partial"
        for name, process in (
            ("out[1]", ended.pid),
            ("out[1]", os.getpid()),
            ("out[1]", os.getppid()),
            ("out1", ended.pid),
        )
    )
    for folder in (stale, ours, running, others):
        folder.mkdir()
    assert main(["convert", str(source), str(tmp_path / "out[1]")]) == 0
    there = {folder.name for folder in tmp_path.iterdir()}
    assert there == {"source", "out[1]", running.name, others.name}


def test_options(source, refused):
    refused(source, "unknown target 'torchscal'", "'torchscale'", options=("--to", "torchscal"))
    refused(source, "unknown dtype", options=("--dtype", "fp32"))


def test_values_that_the_dtype_cannot_say(source, refused, tmp_path):
    change_tensors(source, lambda tensors: tensors[Q][3, 5].fill_(-7e4))
    refused(source, "layers.0.retention.q_proj.weight holds 7e+04", options=("--dtype", "float16"))
    refused(source, "choose bfloat16", options=("--dtype", "float16"))
    assert main(["convert", str(source), str(tmp_path / "b"), "--dtype", "bfloat16"]) == 0
    change_tensors(source, lambda tensors: tensors[Q][3, 5].fill_(-float("inf")))  # theirs already
    assert main(["convert", str(source), str(tmp_path / "h"), "--dtype", "float16"]) == 0


def test_names_on_the_hub(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("someone/some-retnet", "there is no file or folder", 'pip install "retentive[hf]"')


def test_what_the_hub_refuses(refused, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    answer = SimpleNamespace(headers={}, request=None)
    told = "401 Client Error. (Request ID: Root=1-ab)\n\nRepository Not Found for url: https://..."
    for error, reason in (
        (ConnectionError("no network\nand a long story"), "no network"),
        (ConnectionError(), "ConnectionError"),
        (RepositoryNotFoundError(told, response=answer), "it has no repository of that name"),
        (GatedRepoError(told, response=answer), "it is gated; ask for access on its page"),
    ):

        def refuse(name, allow_patterns, error=error):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        refused("someone/some-retnet", f"the Hub does not give it: {reason}")


SMALL = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2}


def test_models_that_the_target_cannot_hold(tmp_path, refused):
    save_model(retentive.RetNet(zoo.retnet(**SMALL)), tmp_path / "ours")
    to_fla, to_torchscale = ("--to", "fla"), ("--to", "torchscale")
    refused(tmp_path / "ours", "fla cannot hold", "norm is 'layernorm'", options=to_fla)
    refused(tmp_path / "ours", "torchscale cannot hold", "norm is", options=to_torchscale)
    save_model(retentive.Transformer(zoo.transformer(**SMALL)), tmp_path / "transformer")
    refused(tmp_path / "transformer", "holds RetNets, which", options=to_fla)
    save_tokenizer(byte_tokenizer(), tmp_path / "ours")
    assert main(["quantize", str(tmp_path / "ours"), str(tmp_path / "int8")]) == 0
    refused(tmp_path / "int8", "no quantised weights", options=to_fla)
    refused(tmp_path / "int8", "quantised weights", options=("--dtype", "float32"))


def test_load_refuses_in_the_same_words(source):
    change_tensors(source, lambda tensors: tensors.pop(Q))
    with pytest.raises(InputError, match=f"lacks {Q}"):
        retentive.load(source)
    with pytest.raises(InputError, match="there is no file or folder"):
        retentive.load(source / "nothing")
