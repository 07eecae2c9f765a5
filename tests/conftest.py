"""For every test: one thread, a fresh cache folder, no display, hypothesis without deadlines."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

# Tiny tensors run up to 100x slower on threads that wait for each other; subprocesses inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.pop("COLUMNS", None)  # of the terminal, from pytest-xdist: reports would wrap by it

import hypothesis
import pytest
import torch
import zoo

from retentive.models.language_model import LanguageModel

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
hypothesis.settings.register_profile("repository", deadline=None)
hypothesis.settings.load_profile("repository")

if find_spec("triton") and not torch.cuda.is_available():
    # Whether kernels run on the CPU it asks once, when imported; others may import it before
    # tests/kernels/triton does. To all else it is the same.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton  # noqa: F401


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETENTIVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(params=zoo.CONFIGS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return zoo.build(request.param)


@pytest.fixture(params=[name for name in zoo.CONFIGS if "transformer" not in name])
def retnet(request: pytest.FixtureRequest) -> LanguageModel:
    return zoo.build(request.param)


@pytest.fixture(params=["transformer", "transformer-gqa"])
def transformer(request: pytest.FixtureRequest) -> LanguageModel:
    return zoo.build(request.param)


@pytest.fixture
def make_model():
    """`zoo.build`, for tests that change a config."""
    return zoo.build


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, zoo.SMALL["vocab_size"], (3, 11), generator=torch.manual_seed(1))
