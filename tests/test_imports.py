"""Who may import whom, and what `import retentive` needs."""

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import retentive

PACKAGE = Path(retentive.__file__).parent

EVERYONES = {"errors", "devices", "fields", "sequences", "transforms"}
ALLOWED = {  # a room or a module beside the rooms -> the rooms it may import, besides EVERYONES
    "errors": set(),
    "devices": set(),
    "fields": set(),
    "sequences": set(),
    "transforms": set(),
    "arguments": set(),
    "io": set(),
    "reports": set(),
    "data": {"io"},
    "kernels": set(),
    "ops": {"kernels"},
    "layers": {"kernels", "ops"},
    "mixers": {"kernels", "ops", "layers"},
    "models": {"ops", "layers", "mixers", "io"},
    "decoding": {"kernels", "ops", "layers", "mixers", "models"},
    "convert": {"ops", "layers", "mixers", "models", "data", "io", "arguments"},
    "info": {"ops", "models", "convert", "reports", "arguments"},
    "adapters": {"models", "mixers", "layers", "data", "io", "convert", "arguments"},
    "compress": {"models", "layers", "mixers", "data", "io", "convert", "arguments"},
    "inference": {"decoding", "models", "data", "adapters", "convert", "io", "arguments"},
    "eval": {"models", "layers", "decoding", "inference", "convert", "data", "io"}
    | {"reports", "arguments"},
    "train": {"models", "layers", "mixers", "inference", "adapters", "convert", "data", "io"}
    | {"reports", "arguments"},
    "hf": {"models", "layers", "data", "io"},
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


MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
}


def imported_modules(path: Path) -> set[str]:
    """The modules of `retentive` that a file imports, for types only or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & MODULES.keys()) or {node.module}
    return found & MODULES.keys()


def test_no_module_imports_itself_in_a_circle():
    """Neither at run time nor for types only: what two modules both need is a third one."""
    left = {name: imported_modules(path) - {name} for name, path in MODULES.items()}
    while left:
        needed = set().union(*left.values())
        free = {name for name in left if not left[name] & left.keys() or name not in needed}
        assert free, f"a circle among {sorted(left)}"
        left = {name: others for name, others in left.items() if name not in free}


KINDS = (
    r"RetNet|Transformer|(RetNet|Transformer|Model|Mixer|Retention|Attention)Config|"
    r"Mixer|MultiScaleRetention|Retention|Attention|KVCache|WindowCache|TensorState"
)
MAY_ASK_FOR_KINDS = ("mixers/", "models/config.py", "convert/", "hf/")


def test_nobody_asks_which_kind_a_model_config_or_mixer_is():
    """A mixer, and a model for its mixers, answers what it can do: `retentive.mixers.base`."""
    asked = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        if not str(path.relative_to(PACKAGE)).startswith(MAY_ASK_FOR_KINDS)
        for line in path.read_text().splitlines()
        if re.search(rf"isinstance\([^)]*\b({KINDS})\b", line)
    ]
    assert asked == []


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
