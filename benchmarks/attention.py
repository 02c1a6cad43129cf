"""What a prior costs: attention forward and backward, a decoding step, a training step.

Run with ``python benchmarks/attention.py`` (add ``--device cuda`` on a GPU: bfloat16 and the
FlashAttention kernel join). Causal, batch 1, 64 per head, GOAT's prior with R = M = 4. Lanes
*beside* are added to 64 channels of content, lanes *inside* take their place from them. Ratios of
attention alone are to SDPA on rotated queries and keys (rotation counted, its tables not), those of
layers to one with RoPE. The training step is a whole one of the tiny presets: drawing the batch,
forward, backward, clipping, AdamW; "goat, 23 + 9" has its lanes inside, as goat-attention has.

Denormal numbers are flushed to zero, as `goatviz train` does: without that, weights below 1e-38,
which any prior that falls with the lag has, cost a processor several times the whole call (the
table "weights below 1e-38").

Repeats are interleaved, so that a busy machine slows all cases alike; times are medians. Peak
memory is the growth of the resident peak (on a GPU, the allocator's) over one call, in a process of
its own after a small warm-up. "Of ceiling" is what an attention without prior would have computed
in that time, as a share of what a large matrix product reaches in the same run.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from _contestants import (
    ATTENTION,
    COMPILED,
    DECODE,
    FLASH,
    FLEX,
    HEAD_DIM,
    LAYERS,
    LIMITS,
    PACKAGE,
    SPLIT,
    STEPS,
    Setting,
    operations,
    step_operations,
    stepper,
)
from _measure import Case, added_peak, interleaved, timed
from _report import Column, Report, arguments

from goatviz.training.execution import Engine, Execution, start

ALL = {**ATTENTION, **FLASH, **LAYERS}
FORWARD, BOTH, DECODING, STEP = "forward", "forward + backward", "decoding step", "training step"
OURS = ("goatviz, lanes beside", "goatviz, lanes inside")
ALIBI = "SDPA + ALiBi as a mask"
SMALL = ("kept", "flushed")
WARM_UP_LENGTH = 32
#: Fewer repeats from here on.
LONG = 8192
#: The longest call whose small weights are looked at.
MIDDLE = 2048
Options = argparse.Namespace
#: Seconds by metric, case and length.
Times = dict[tuple[str, str, int], float]


def unit(case: str) -> str:
    """The case that a case of attention or of layers is compared with."""
    return "layer: RoPE" if case.startswith("layer") else "SDPA + RoPE"


def affordable(cases: Sequence[str], length: int) -> list[str]:
    """The cases whose masks fit."""
    return [case for case in cases if length <= LIMITS.get(case, math.inf)]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ceiling(device: str, dtype: torch.dtype, size: int, clock: Callable[[], float]) -> float:
    """Operations per second of the best of ten products of two square matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2.0 * size**3 / min(timed(lambda: a @ b, device, clock) for _ in range(10))


# --- memory ---


def own_peak(engine: Engine, kind: str, case: str, length: int, options: Options) -> float:
    """MiB that one call of a case adds to the peak of this process."""
    device = options.device
    if kind == STEP:
        # What every case shares, imports and first allocations, is no case's own.
        stepper(engine, WARM_UP_LENGTH, case, WARM_UP_LENGTH)()
        return added_peak(stepper(engine, length, case, options.batch_tokens), device)
    dtype = getattr(torch, kind)
    ALL[case](Setting(WARM_UP_LENGTH, options.heads, device, dtype)).both()
    return added_peak(ALL[case](Setting(length, options.heads, device, dtype)).both, device)


def peak_of(kind: str, case: str, length: int, options: Options) -> float:
    """`own_peak` in a process of its own."""
    command = [sys.executable, __file__, "--alone", kind, case, str(length)]
    command += ["--device", options.device, "--heads", str(options.heads)]
    command += ["--batch-tokens", str(options.batch_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def peaks_of(kind: str, cases: Sequence[str], options: Options) -> dict[tuple[str, int], float]:
    """The peak of each case at each length; where nothing is timed, processes may be several."""
    wanted = [(c, length) for length in options.memory_lengths for c in affordable(cases, length)]
    with ThreadPoolExecutor(4 if options.device == "cpu" else 1) as pool:
        found = pool.map(lambda each: peak_of(kind, *each, options), wanted)
        return dict(zip(wanted, found, strict=True))


# --- time ---


class Bench:
    """One run: measures memory and compiles when it is made, so that only timing is left."""

    def __init__(self, engine: Engine, options: Options, report: Report) -> None:
        self.options, self.report = options, report
        self.times: Times = {}
        self.clock = time.process_time if options.clock == "processor" else time.perf_counter
        self.dtypes = [torch.float32]
        if options.device == "cuda":
            self.dtypes.append(torch.bfloat16)
        self.peaks = {
            dtype: peaks_of(name_of(dtype), self.cases(dtype), options) for dtype in self.dtypes
        }
        # What a compiler takes is no peak of the step.
        eager = [case for case in options.steps if case != COMPILED]
        self.step_peaks = peaks_of(STEP, eager, options)
        self.steps = {
            (case, length): stepper(engine, length, case, options.batch_tokens)
            for length in options.lengths
            for case in self.step_cases(length)
        }
        for (case, _), run in self.steps.items():
            if case == COMPILED:
                run()  # compiles

    def cases(self, dtype: torch.dtype) -> list[str]:
        """Cases of attention and of layers; the flash kernel takes no float32."""
        alone = self.options.attention
        return [*alone, *(FLASH if dtype != torch.float32 else ()), *LAYERS]

    def step_cases(self, length: int) -> list[str]:
        """Cases of a training step; a compiler takes minutes, and works where it is asked to."""
        left_out = () if length in self.options.compiled_lengths else (COMPILED,)
        return [case for case in self.options.steps if case not in left_out]

    def repeats(self, length: int) -> int:
        return self.options.repeats if length < LONG else self.options.long_repeats

    def interleaved(
        self, runs: Mapping[Case, Callable[[], object]], repeats: int, *, warm_up: bool = True
    ) -> dict[Case, float]:
        """Median seconds of each by this run's clock."""
        device = self.options.device
        return interleaved(runs, repeats, device, warm_up=warm_up, clock=self.clock)

    def ceiling(self) -> None:
        """Measure what a matrix product reaches."""
        columns = [Column("ceiling", "GFLOP/s", ",.0f")]
        size = self.options.matrix
        table = self.report.table(
            f"product of two matrices of {size:,} x {size:,}", columns, lengths=False, ratio=False
        )
        self.top = {d: ceiling(self.options.device, d, size, self.clock) for d in self.dtypes}
        for dtype, top in self.top.items():
            table.add(name_of(dtype), top / 1e9)

    def attention(self, dtype: torch.dtype) -> Times:
        """Time attention and layers in a dtype, and fill two tables."""
        options = self.options
        times: Times = {}
        for length in (*options.lengths, *options.forward_lengths):
            setting = Setting(length, options.heads, options.device, dtype)
            backward = length in options.lengths
            torch.manual_seed(0)
            runs: dict[tuple[str, str], Callable[[], object]] = {}
            for case in affordable(self.cases(dtype), length):
                if not backward and case in LAYERS:
                    continue
                call = ALL[case](setting)
                runs[FORWARD, case] = call.forward
                if backward and call.wanted:
                    runs[BOTH, case] = call.both
            repeats = self.repeats(length) if backward else 1
            seconds = self.interleaved(runs, repeats, warm_up=backward)
            times |= {(metric, case, length): s for (metric, case), s in seconds.items()}
        for metric in (FORWARD, BOTH):
            self._attention_table(metric, dtype, times)
        return times

    def _attention_table(self, metric: str, dtype: torch.dtype, times: Times) -> None:
        what = metric if dtype == torch.float32 else f"{metric}, {name_of(dtype)}"
        columns = [
            Column(what, "ms", ",.2f", "time"),
            Column(f"{what}: share", "%", ".0f", "of ceiling"),
        ]
        table = self.report.table(f"{metric}, {name_of(dtype)}", columns, peak=metric == BOTH)
        for (which, case, length), seconds in times.items():
            if which != metric:
                continue
            setting = Setting(length, self.options.heads)
            reached = operations(setting, case, backward=metric == BOTH) / seconds
            table.add(
                case,
                1e3 * seconds,
                100 * reached / self.top[dtype],
                length=length,
                ratio=seconds / times[metric, unit(case), length],
                peak=self.peaks[dtype].get((case, length)),
            )

    def decoding(self) -> None:
        """Time one more token of layers that hold a cache of `length`."""
        options = self.options
        table = self.report.table(
            f"{DECODING} of a layer, float32",
            [Column(DECODING, "ms", ",.3f", "time")],
            length="cache",
        )
        for length in options.lengths:
            setting = Setting(length, options.heads, options.device)
            torch.manual_seed(0)
            runs = {case: build(setting).forward for case, build in DECODE.items()}
            seconds = self.interleaved(runs, options.decode_repeats)
            for case, s in seconds.items():
                self.times[DECODING, case, length] = s
                table.add(case, 1e3 * s, length=length, ratio=s / seconds[unit(case)])

    def training(self) -> None:
        """Time whole training steps."""
        options = self.options
        columns = [
            Column(STEP, "ms", ",.0f", "time"),
            Column(f"{STEP}: share", "%", ".0f", "of ceiling"),
        ]
        title = f"{STEP}, float32; 3 layers, d = 128, {options.batch_tokens:,} tokens or a sequence"
        table = self.report.table(title, columns, peak=True)
        for length in options.lengths:
            runs = {case: self.steps[case, length] for case in self.step_cases(length)}
            seconds = self.interleaved(runs, self.repeats(length))
            done = step_operations(length, options.batch_tokens)
            for case, s in seconds.items():
                self.times[STEP, case, length] = s
                table.add(
                    case,
                    1e3 * s,
                    100 * done / s / self.top[torch.float32],
                    length=length,
                    ratio=s / seconds["rope"],
                    peak=self.step_peaks.get((case, length)),
                )

    def denormals(self) -> None:
        """Time calls whose small weights are kept, and are flushed to zero.

        On one thread: the setting is each thread's own, and others take it when they begin.
        """
        length = max(n for n in self.options.lengths if n <= MIDDLE)
        threads = torch.get_num_threads()
        columns = [Column(f"{BOTH}, small weights {what}", "ms", ",.1f", what) for what in SMALL]
        table = self.report.table(
            f"weights below 1e-38, {BOTH}, float32, one thread", columns, ratio=False
        )
        torch.manual_seed(0)
        setting = Setting(length, self.options.heads, "cpu")
        calls = {case: ATTENTION[case](setting).both for case in ("SDPA + RoPE", ALIBI, *OURS)}

        def run(case: str, kept: bool) -> None:
            torch.set_flush_denormal(not kept)
            calls[case]()

        torch.set_num_threads(1)
        runs = {(c, kept): partial(run, c, kept) for c in calls for kept in (True, False)}
        seconds = self.interleaved(runs, self.options.repeats)
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)
        for case in calls:
            both = (1e3 * seconds[case, kept] for kept in (True, False))
            table.add(case, *both, length=length)


# --- what the times say ---


def slope(times: Times, metric: str, case: str) -> float | None:
    """Of log time over log length, between the two longest lengths."""
    found = sorted((n, s) for (m, c, n), s in times.items() if (m, c) == (metric, case))
    if len(found) < 2:
        return None
    (short, before), (long, after) = found[-2:]
    return math.log(after / before) / math.log(long / short)


def growth(times: Times, report: Report) -> None:
    """A table of slopes: 1 is linear in the length, 2 is its square."""
    metrics = (FORWARD, BOTH, DECODING, STEP)
    table = report.table(
        "growth: slope of log time over log length, between the two longest lengths of each",
        [Column(f"{metric}: slope", "", ".2f", metric) for metric in metrics],
        lengths=False,
        ratio=False,
    )
    for case in dict.fromkeys(case for _, case, _ in times):
        table.add(case, *(slope(times, metric, case) for metric in metrics))


def targets(times: Times, options: Options, report: Report) -> None:
    """Targets on a CPU and, in float32, on a GPU."""

    def against(metric: str, case: str, other: str, length: int) -> float:
        return times[metric, case, length] / times[metric, other, length]

    for length in (n for n in options.lengths if n >= 2048):
        for case in OURS:
            for metric, limit in ((FORWARD, 1.05), (BOTH, 1.10)):
                ratio = against(metric, case, unit(case), length)
                report.target(f"{length:,} tokens, {metric}, {case} / RoPE", ratio, limit)
    length = max(options.lengths)
    for case in ("layer: goatviz, beside", "layer: goatviz, inside"):
        ratio = against(DECODING, case, unit(case), length)
        report.target(f"{length:,} tokens, {DECODING}, {case} / RoPE", ratio, 1.10)
    for length in options.lengths:
        what = f"{length:,} tokens, {STEP}"
        for case in (each for each in ("goat", SPLIT) if each in options.steps):
            report.target(f"{what}, {case} / rope", against(STEP, case, "rope", length), 1.10)
            if PACKAGE in options.steps:
                faster = against(STEP, PACKAGE, case, length)
                report.target(f"{what}, {PACKAGE} / {case}", faster, 1.2, least=True)
        if (STEP, COMPILED, length) in times:
            faster = against(STEP, "goat", COMPILED, length)
            report.target(f"{what}, goat / {COMPILED}", faster, 1.15, least=True)


def flash_targets(times: Times, report: Report) -> None:
    """Targets of bfloat16 on a GPU."""
    (rival,) = FLASH
    for metric in (FORWARD, BOTH):
        for case in OURS:
            for length in (8192, 16_384):
                if (metric, case, length) in times:
                    ratio = times[metric, case, length] / times[metric, rival, length]
                    what = f"bfloat16, {length:,} tokens, {metric}, {case} / {rival}"
                    report.target(what, ratio, 1.05)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", help="default: 512 to 8192 (GPU: 16384)")
    parser.add_argument("--forward-lengths", type=int, nargs="*", default=[32_768], help="run once")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--compiled-lengths", type=int, nargs="*", default=[2048])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--attention", nargs="+", choices=ATTENTION, default=list(ATTENTION))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--long-repeats", type=int, default=3, help=f"from {LONG:,} tokens on")
    parser.add_argument("--decode-repeats", type=int, default=50)
    parser.add_argument("--batch-tokens", type=int, default=4096, help="of a training step")
    parser.add_argument("--matrix", type=int, default=2048, help="rows of the ceiling's matrices")
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="processor: seconds of the processor, for one thread on a busy machine",
    )
    parser.add_argument(
        "--memory-lengths", type=int, nargs="*", default=[8192], help="where peaks are measured"
    )
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    quick = {
        "lengths": [48, 64],
        "forward_lengths": [96],
        "heads": 2,
        # A compiler takes half a minute.
        "attention": [case for case in ATTENTION if case != FLEX],
        "steps": ["rope", "goat", SPLIT, PACKAGE],
        "repeats": 1,
        "long_repeats": 1,
        "decode_repeats": 1,
        "batch_tokens": 128,
        "matrix": 64,
        "memory_lengths": [],
    }
    options = arguments(parser, argv, quick=quick, devices=("cpu", "cuda"))
    if options.lengths is None:
        options.lengths = [512, 2048, 8192] + ([16_384] if options.device == "cuda" else [])
    if options.clock == "processor" and (options.device != "cpu" or torch.get_num_threads() > 1):
        parser.error("--clock processor needs a CPU and one thread (OMP_NUM_THREADS=1)")
    if "rope" not in options.steps:
        parser.error("--steps must include rope, which is the unit")
    # Before there are threads, which take the setting over.
    torch.set_flush_denormal(True)
    with start(Execution(device=options.device)) as engine:
        if options.alone:
            kind, case, length = options.alone
            print(own_peak(engine, kind, case, int(length), options))
        else:
            bench(engine, options)


def bench(engine: Engine, options: Options) -> None:
    """All tables, then what the targets say."""
    report = Report(
        "attention",
        f"What a prior costs: {options.heads} heads x {HEAD_DIM}, R = M = 4, causal, batch 1; "
        f"medians of {options.repeats} interleaved repeats ({options.long_repeats} from {LONG:,} "
        f"tokens on, {options.decode_repeats} of decoding), {options.clock} time",
        options,
    )
    run = Bench(engine, options, report)
    run.ceiling()
    run.times |= run.attention(torch.float32)
    run.decoding()
    run.training()
    if options.device == "cpu":
        run.denormals()
    growth(run.times, report)
    targets(run.times, options, report)
    if options.device == "cuda":
        flash_targets(run.attention(torch.bfloat16), report)
    report.finish()


if __name__ == "__main__":
    main()
