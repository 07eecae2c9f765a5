"""Checkpoints as their own code saved them (`golden/`), and smaller ones made here."""

from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden() -> Path:
    return GOLDEN
