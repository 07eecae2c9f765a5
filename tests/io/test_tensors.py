"""Files of tensors."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from retentive.io.atomic import write_text
from retentive.io.tensors import write_tensors


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_have_the_mode_of_the_umask(umask: int, tmp_path: Path):
    write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(2)}, {})
    write_text(tmp_path / "x.json", "{}")
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~umask}
