"""How long properties of hostile input are tried: a fixed slice, or as long as is asked for."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

from hypothesis import HealthCheck, settings

#: Minutes that each property takes, with fresh examples; 0: the fixed slice, the same every time.
MINUTES = float(os.environ.get("GOATVIZ_FUZZ_MINUTES", "0"))


def fuzzed(examples: int) -> Callable[[Callable], Callable]:
    """Try a property on so many examples, again and again while there are minutes left."""
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    limits = settings(
        max_examples=examples, derandomize=not MINUTES, deadline=None, suppress_health_check=slow
    )

    def decorate(test: Callable) -> Callable:
        limited = limits(test)

        @functools.wraps(limited)
        def repeated(*args, **kwargs) -> None:
            end = time.monotonic() + 60 * MINUTES
            limited(*args, **kwargs)
            while time.monotonic() < end:
                limited(*args, **kwargs)

        return repeated

    return decorate
