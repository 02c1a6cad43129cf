"""What every test gets: hypothesis profiles, a fixed seed, one thread each for torch."""

import os

import pytest
import torch
from hypothesis import settings

from goatviz.examples import load_example
from goatviz.paper import gallery
from goatviz.paper.claims import judge_claims
from goatviz.paper.exhibit import Exhibit
from goatviz.paper.judging import Judged

# Derandomised, so that a red run is red again when repeated; no deadline, as no test may depend
# on the speed of the machine. HYPOTHESIS_PROFILE=thorough hunts with fresh examples.
settings.register_profile("default", derandomize=True, deadline=None)
settings.register_profile("thorough", derandomize=False, deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# The workers of pytest-xdist share the cores; threads on top of them only wait for one another. So
# do servers and kernels that tests start, whose numbers would differ in their last bits otherwise.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

#: Marks, and the fixtures whose tests have them, so that no test can forget to.
MARKS = {
    "browser": {"offline_context", "offline_page", "lab", "own_lab"},
    "notebooks": {"own_lab", "served", "kernel", "benchmark", "exhibits", "slow"},
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their fixtures, and begin with those that share a browser.

    A worker begins with a stretch of the list, and takes over what another has not begun from its
    end: so they stay together, and one of the workers opens a browser.
    """
    for item in items:
        for mark, fixtures in MARKS.items():
            if fixtures & set(getattr(item, "fixturenames", ())):
                item.add_marker(mark)
    items.sort(key=lambda item: "browser" not in item.keywords)


@pytest.fixture
def slow() -> None:
    """For a test that takes as long as a notebook."""


@pytest.fixture(scope="session")
def exhibits() -> list[Exhibit]:
    """Every exhibit of the gallery, computed once."""
    return gallery.make_exhibits()


@pytest.fixture(scope="session")
def judged() -> list[Judged]:
    """Every claim of the paper, judged once."""
    return judge_claims()


@pytest.fixture(scope="session")
def smollm2() -> tuple[torch.nn.Module, object]:
    """A real pretrained model and its tokenizer, loaded once."""
    return load_example()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
