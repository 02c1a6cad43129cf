"""Clocks and memory that benchmarks share."""

from __future__ import annotations

import ctypes
import resource
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch

Case = TypeVar("Case", bound=Hashable)


def settle(device: str) -> None:
    """Wait for a GPU's work."""
    if device != "cpu":
        torch.cuda.synchronize()


def timed(
    run: Callable[[], object], device: str = "cpu", clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of one call; `time.process_time` counts those of all threads, and no waiting."""
    settle(device)
    start = clock()
    run()
    settle(device)
    return clock() - start


def interleaved(
    runs: Mapping[Case, Callable[[], object]],
    repeats: int,
    device: str = "cpu",
    *,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Case, float]:
    """Median seconds of each, one repeat of all before the next; a first one warms up."""
    taken: dict[Case, list[float]] = {case: [] for case in runs}
    for repeat in range(repeats + warm_up):
        for case, run in runs.items():
            seconds = timed(run, device, clock)
            if repeat >= warm_up:
                taken[case].append(seconds)
    return {case: statistics.median(each) for case, each in taken.items()}


def resident_peak() -> float:
    """MiB of this process's own peak (ru_maxrss would start from its parent's)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return float(lines["VmHWM"].split()[0]) / 1024


def forget_peak() -> None:
    """Let the peak of this process be what it needs now, where Linux allows it."""
    # What was freed and kept for later would hide what a call adds.
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def added_peak(run: Callable[[], object], device: str = "cpu") -> float:
    """MiB that one call adds to the peak; on a GPU, to what was allocated before."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    forget_peak()
    before = resident_peak()
    run()
    return resident_peak() - before
