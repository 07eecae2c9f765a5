"""Who may import whom, and what `import retentive` needs."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import retentive

PACKAGE = Path(retentive.__file__).parent

EVERYONES = {"errors", "devices", "fields"}
ALLOWED = {  # a room or a module beside the rooms -> the rooms it may import, besides EVERYONES
    "errors": set(),
    "devices": set(),
    "fields": set(),
    "arguments": set(),
    "io": set(),
    "reports": set(),
    "ops": {"kernels"},
    "kernels": {"ops"},
    "layers": {"ops", "kernels", "models"},
    "mixers": {"layers", "ops", "models"},
    "models": {"mixers", "layers", "ops", "io"},
    "data": {"io"},
    "decoding": {"models", "mixers", "layers", "ops", "kernels"},
    "adapters": {"models", "mixers", "layers", "data", "io", "arguments"},
    "inference": {"decoding", "models", "data", "adapters", "arguments"},
    "train": {
        *("models", "layers", "data", "inference", "adapters"),
        *("io", "reports", "arguments"),
    },
    "info": {"models", "ops", "reports", "arguments"},
    "compress": {"models", "layers", "mixers", "data", "io", "arguments"},
    "hf": {"models", "layers", "data", "io"},
    "eval": {
        *("models", "layers", "ops", "data", "decoding", "inference"),
        *("io", "reports", "arguments"),
    },
    "convert": {"models", "ops", "data", "io", "arguments"},
}
MAY_IMPORT_ANYTHING = {"__init__", "__main__", "cli", "arena", "bench", "demo"}
OPTIONAL = {"safetensors", "tokenizers", "tyro", "pydantic", "rich", "matplotlib", "transformers"}
OPTIONAL |= {"accelerate", "peft", "numba", "llvmlite"}
OPTIONAL |= {"huggingface_hub", "triton", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "lm_eval"}


def room(module: Path) -> str:
    """ "ops" for retentive/ops/decay.py, "info" for retentive/info.py."""
    return module.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(module: Path) -> set[str]:
    """The parts of `retentive` that a file imports, at the top or anywhere inside."""
    names = []
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are written out, not relative"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "retentive" and len(part) > 1}


HELD = [path for path in sorted(PACKAGE.rglob("*.py")) if room(path) not in MAY_IMPORT_ANYTHING]


@pytest.mark.parametrize("module", HELD, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_the_rooms_below_it(module: Path):
    own = room(module)
    assert own in ALLOWED, f"{own} is a new room: write into ALLOWED what it may import"
    names = imported_rooms(module) - {"__version__", *retentive.__all__}
    assert names <= ALLOWED[own] | EVERYONES | {own}


def test_the_rooms_have_no_circle():
    order: list[str] = []
    while len(order) < len(ALLOWED):
        free = [name for name in ALLOWED if name not in order and ALLOWED[name] <= set(order)]
        assert free, f"a circle among {set(ALLOWED) - set(order)}"
        order += free


def run(code: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_package_and_its_op_and_models_need_torch_only():
    run(f"""
        import sys
        for name in {sorted(OPTIONAL)}:
            sys.modules[name] = None  # importing it raises ImportError
        import retentive
        for name in ("retention", "RetNetConfig", "RetNet", "Transformer", "MultiScaleRetention"):
            getattr(retentive, name)
    """)


def test_importing_the_package_imports_nothing_optional():
    run(f"""
        import sys
        import torch
        before = set(sys.modules)
        import retentive
        from retentive import RetNet, retention
        new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
        sys.exit(", ".join(new & {OPTIONAL}) or 0)
    """)


def test_public_names_exist():
    for name in retentive.__all__:
        assert getattr(retentive, name) is not None
    assert set(retentive.__all__) <= set(dir(retentive))
    with pytest.raises(AttributeError, match="no attribute 'retnet'"):
        _ = retentive.retnet
