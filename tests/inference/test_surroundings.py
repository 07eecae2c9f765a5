"""Generation in a process that has set torch or itself up otherwise: the same tokens, or a line."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import zoo

from retentive.data.tokenizer import byte_tokenizer, save_tokenizer
from retentive.models.build import build_model
from retentive.models.checkpoint import save_model

SIZES = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2}
GENERATE = """
    import torch, retentive
    model, tokenizer = retentive.load(FOLDER), retentive.load_tokenizer(FOLDER)

    def text():
        return retentive.generate(model, tokenizer, ["one", "another"], max_new_tokens=6, seed=1)
"""


@pytest.fixture(scope="module", params=["retnet", "hybrid"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    hybrid = {"attention_layers": (1,), "attention": {"num_heads": 2, "window": 4}}
    fields = hybrid if request.param == "hybrid" else {}
    model = build_model(zoo.retnet(**SIZES, **fields))
    model.init_weights(seed=0)
    folder = tmp_path_factory.mktemp(request.param)
    save_model(model, folder)
    save_tokenizer(byte_tokenizer(), folder)
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A program behind GENERATE, in a process of its own: a signal may kill it."""

    def call(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        program = textwrap.dedent(GENERATE) + textwrap.dedent(code)
        program = program.replace("FOLDER", repr(str(folder)))
        root = Path(zoo.__file__).parents[1]
        found = os.environ | {"PYTHONPATH": str(root)} | environment
        command = [sys.executable, "-c", program]
        return subprocess.run(
            command, env=found, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )

    return call


@pytest.mark.parametrize(
    "around",
    [
        "torch.set_default_dtype(torch.bfloat16)",
        "torch.set_default_dtype(torch.float16)",
        "torch.set_default_dtype(torch.float64)",
        "torch.set_default_device('meta')",
    ],
)
def test_other_defaults_of_torch_change_nothing(run, around):
    result = run(f"""
    expected = text()
    {around}
    assert text() == expected
    """)
    assert result.returncode == 0, result.stderr[-2000:]


def test_a_forked_child_generates(run):
    """The threads of the pool are not in it."""
    result = run(
        """
    import os
    torch.set_num_threads(2)
    expected = text()
    child = os.fork()
    if not child:
        os._exit(0 if text() == expected else 3)
    assert os.waitpid(child, 0)[1] == 0
    """,
        OMP_NUM_THREADS="2",
    )
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("how", ["disabled", "broken"])
def test_without_compiled_kernels_it_generates_by_the_modules(run, tmp_path, how):
    environment = {}
    if how == "disabled":
        environment["NUMBA_DISABLE_JIT"] = "1"
    else:
        (tmp_path / "numba").mkdir()
        (tmp_path / "numba" / "__init__.py").write_text("raise AttributeError('an old coverage')")
    result = run("print(len(text()))", **environment)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == "2\n"
    said = [line for line in result.stderr.splitlines() if "numba" in line.lower()]
    assert len(said) == 1, result.stderr
