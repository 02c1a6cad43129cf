"""What every test gets: hypothesis profiles, a fixed seed, one thread each for torch."""

import os

import pytest
import torch
from hypothesis import settings

# Derandomised, so that a red run is red again when repeated; no deadline, as no test may depend
# on the speed of the machine. HYPOTHESIS_PROFILE=thorough hunts with fresh examples.
settings.register_profile("default", derandomize=True, deadline=None)
settings.register_profile("thorough", derandomize=False, deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# The workers of pytest-xdist share the cores; threads on top of them only wait for one another.
torch.set_num_threads(1)

BROWSER_FIXTURES = {"offline_context", "offline_page", "lab", "own_lab"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as ``browser`` whatever uses a browser fixture, so that no test can forget to."""
    for item in items:
        if BROWSER_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.browser)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
