"""docs/huggingface.md does what it says."""

import re
from pathlib import Path

import pytest

import retentive

DOCUMENT = Path(__file__).parents[2] / "docs" / "huggingface.md"


@pytest.mark.filterwarnings(  # PEFT asks the newest transformers by an old name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")  # Trainer on a CPU
def test_its_program_runs(make_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    make_folder("retnet").rename("runs/demo")
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    names: dict = {}
    exec(compile("\n".join(blocks), DOCUMENT.name, "exec"), names)
    assert isinstance(names["merged"], retentive.RetNet)
    assert (tmp_path / "runs" / "hf" / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert retentive.load_tokenizer("runs/tuned").get_vocab_size() == 257
