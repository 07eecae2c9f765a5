"""Config files and command lines: what is read, and what is said where it cannot be."""

from pathlib import Path
from typing import Any

import pytest

from retentive.errors import InputError
from retentive.models.config import RetNetConfig, TransformerConfig
from retentive.models.counts import parameters
from retentive.train.command import keys_help, split_overrides
from retentive.train.config import RunConfig, load_config, options

CONFIGS = Path(__file__).parents[2] / "configs"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_a_file_gives_what_it_says_and_defaults_for_the_rest(tmp_path: Path):
    text = '[model]\nsize = "demo"\nhidden_size = 64\n[train]\nsteps = 7\n[optimizer]\nlr = 1e-3\n'
    config = load_config(write(tmp_path, text))
    assert config.train.steps == 7
    assert config.optimizer.lr == 1e-3
    assert config.optimizer.betas == (0.9, 0.98)
    model = config.model.build(vocab_size=300)
    assert isinstance(model, RetNetConfig)
    assert (model.hidden_size, model.mixer.value_dim, model.vocab_size) == (64, 128, 300)


def test_a_table_survives_the_way_through_json(table: dict[str, Any]):
    table["model"] |= {"decay": [-0.1, -0.2], "tie_word_embeddings": True}
    config = RunConfig.from_table(table)
    assert RunConfig.from_table(config.to_table()) == config


def test_the_transformer_takes_the_same_table():
    table = {"model": {"size": "200m", "kind": "transformer", "num_kv_heads": 4}}
    model = RunConfig.from_table(table).model.build(vocab_size=1000)
    assert isinstance(model, TransformerConfig)
    assert model.mixer.num_kv_heads == 4
    retnet = RetNetConfig.named("200m", vocab_size=1000)
    assert sum(parameters(model).values()) == pytest.approx(
        sum(parameters(retnet).values()), rel=0.01
    )


def test_every_key_can_be_given_on_the_command_line(tmp_path: Path):
    path = write(tmp_path, '[model]\nsize = "demo"\n[data]\nsources = ["stdlib"]\n')
    argv = "--optimizer.lr 3e-4 run.toml --data.sources a.txt 7 --out x --train.compile"
    argv += " --optimizer.weight-decay=0 --optimizer.betas 0.8 0.9 --model.decay [-0.5,-1,-2,-3]"
    argv += " --model.kind retnet --data.tokenizer 123 --train.sample_prompt [a --resume"
    overrides, rest = split_overrides(argv.split())
    assert rest == ["run.toml", "--out", "x", "--resume"]
    config = load_config(path, overrides)
    assert config.optimizer.lr == 3e-4
    assert config.optimizer.weight_decay == 0
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.data.sources == ("a.txt", "7")
    assert config.data.tokenizer == "123"
    assert config.train.compile is True
    assert config.train.sample_prompt == "[a"
    assert config.model.build(1).mixer.decay == (-0.5, -1, -2, -3)


def test_a_switch_takes_true_or_false_or_nothing():
    assert split_overrides(["--train.compile", "run.toml"]) == ({"train.compile": []}, ["run.toml"])
    assert split_overrides(["--train.compile", "false"]) == ({"train.compile": ["false"]}, [])


def test_help_lists_every_key():
    text = keys_help()
    assert all(f"--{key} " in text for key in options())


DEMO = '[model]\nsize = "demo"\n'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            DEMO + "[optimizer]\nlrr = 1",
            "unknown key 'optimizer.lrr' (did you mean 'optimizer.lr'?)",
        ),
        (DEMO + "[train]\nlr = 1", "unknown key 'train.lr' (did you mean 'optimizer.lr'?)"),
        (
            DEMO + "hiden_size = 8",
            "unknown key 'model.hiden_size' (did you mean 'model.hidden_size'?)",
        ),
        (DEMO + "[optimiser]\nlr = 1", "unknown table 'optimiser' (did you mean 'optimizer'?)"),
        (DEMO + '[train]\nsteps = "3"', "train.steps is '3'; it must be a valid integer"),
        (DEMO + "[train]\nsteps = 1e3", "train.steps is 1000.0; it must be a valid integer"),
        (DEMO + "[train]\ncompile = 1", "train.compile is 1; it must be a valid boolean"),
        (DEMO + "[train]\nsteps = 0", "train.steps is 0; it must be at least 1"),
        (DEMO + "[train]\nmicro_batch = 0", "train.micro_batch is 0; it must be at least 1"),
        (DEMO + "[optimizer]\nbetas = [0.9]", "optimizer.betas is [0.9]; it must be a tuple"),
        (DEMO + "[optimizer]\nbetas = [0.9, 1]", "optimizer.betas is (0.9, 1)"),
        (DEMO + "[optimizer]\nlr = nan", "optimizer.lr is nan; it must be finite"),
        (DEMO + "[optimizer]\nweight_decay = inf", "optimizer.weight_decay is inf; it must be fin"),
        (DEMO + "[train]\nsample_prompt = ''", "train.sample_prompt is empty"),
        (DEMO + '[optimizer]\nschedule = "cos"', "it must be 'linear', 'cosine' or 'constant'"),
        ('[model]\nsize = "2b"', "unknown model size '2b' (did you mean '2.7b'?)"),
        (DEMO + "num_heads = 7", "not divisible by num_heads 7"),
        (DEMO + "num_kv_heads = 3", "num_heads 4 is not divisible by num_kv_heads 3"),
        (
            DEMO
            + "attention = {num_heads = 4}\nattention_layers = [1]\n[train]\ncarry_state = true",
            "train.carry_state needs a state of fixed size",
        ),
        ("[model]\nhidden_size = 8", "neither a size nor num_hidden_layers, mixer.num_heads"),
        ("", "neither a size nor"),
        ("model = 3", "model is 3; it must be a table, [model]"),
        ("[model", "is not valid TOML"),
    ],
)
def test_a_mistake_in_the_file_is_named_in_one_line(tmp_path: Path, text: str, complaint: str):
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path, text))
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--optimizer.lrr", "1"], "did you mean 'optimizer.lr'"),
        (["--optimizer.lrr=1"], "did you mean 'optimizer.lr'"),
        (["--optimizer.lr", "fast"], "optimizer.lr is 'fast'; it must be a valid number"),
        (["--optimizer.lr"], "--optimizer.lr needs a value"),
        (["--train.seed", "9" * 23], r"train.seed is 9+; it must be below 2\*\*64"),
        (["--train.compile=maybe"], "train.compile is 'maybe'; it must be a valid boolean"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(tmp_path: Path, argv: list[str], complaint: str):
    with pytest.raises(InputError, match=complaint):
        load_config(write(tmp_path, DEMO), split_overrides(argv)[0])


def test_an_override_of_what_is_no_table(tmp_path: Path):
    with pytest.raises(InputError, match=r"train is 3; it must be a table, \[train\]"):
        load_config(write(tmp_path, "train = 3\n" + DEMO), {"train.steps": ["5"]})


def test_a_gradient_may_be_left_unclipped(tmp_path: Path):
    config = load_config(write(tmp_path, DEMO + "[optimizer]\nclip = inf"))
    assert config.optimizer.clip == float("inf")


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(InputError, match="no such config file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(InputError, match="is a folder"):
        load_config(tmp_path)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    model = RunConfig.from_table({"model": {"size": "demo", "vocab_size": 100}}).model
    with pytest.raises(InputError, match="the tokenizer has 257 entries"):
        model.build(257)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("demo", None),
        ("books-30m", 0.03),
        ("200m", 0.3),
        ("1.3b", 1.4),
        ("2.7b", 2.8),
        ("6.7b", 6.9),
        ("13b", 13.1),
    ],
)
def test_the_configs_that_come_with_the_package(name: str, billions: float | None):
    config = load_config(CONFIGS / f"{name}.toml")
    count = sum(parameters(config.model.build(config.data.vocab_size)).values())
    if billions:
        assert count == pytest.approx(billions * 1e9, rel=0.1)
