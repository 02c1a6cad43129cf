"""How long properties of hostile input are tried: a fixed slice, or as long as is asked for."""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable

from hypothesis import HealthCheck, seed, settings

#: Minutes that all properties together take, with fresh examples; 0: the fixed slice, always the
#: same. Their examples follow from the seed.
MINUTES = float(os.environ.get("GOATVIZ_FUZZ_MINUTES", "0"))
SEED = int(os.environ.get("GOATVIZ_FUZZ_SEED", "0"))
_properties: list[str] = []


def fuzzed(examples: int) -> Callable[[Callable], Callable]:
    """Try a property on so many examples, again and again while there are minutes left."""
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    limits = settings(
        max_examples=examples, derandomize=not MINUTES, deadline=None, suppress_health_check=slow
    )

    def decorate(test: Callable) -> Callable:
        limited = limits(test)
        _properties.append(test.__name__)

        @functools.wraps(limited)
        def repeated(*args, **kwargs) -> None:
            workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
            end = time.monotonic() + 60 * MINUTES * workers / len(_properties)
            for turn in itertools.count():
                attempt = seed(SEED + 1_000_003 * turn)(limited) if MINUTES else limited
                attempt(*args, **kwargs)
                if time.monotonic() >= end:
                    break
            if MINUTES:
                print(f"{test.__name__}: {(turn + 1) * examples} examples, seed {SEED}")

        return repeated

    return decorate
