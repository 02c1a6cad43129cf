"""What exact diagnostics cost, in units of one attention call: time and peak memory.

Run with ``python benchmarks/diagnostics.py`` (add ``--device cuda`` on a GPU). 64 dimensions a
head, float32, causal. Repeats are interleaved, so that a busy machine slows all cases alike; times
are medians. Peak memory is the growth of the resident peak during one call, in a process of its
own after a small warm-up; on a GPU, the allocator's peak. From 32,768 tokens on each case runs
once, in that process. The dense cases hold heads x length x length numbers and run where these
fit.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from _measure import resident_peak, timed
from _report import Column, Report, Table, arguments
from torch import Tensor
from transformers.models.llama.modeling_llama import eager_attention_forward

from goatviz.models import goat_prior
from goatviz.transport import CHEAP_STATISTICS, AttentionCall, incoming_mass, row_statistics
from goatviz.transport.statistics import all_of

HEAD_DIM = 64
#: The cheap set of the targets: what one fused call and one look at chosen keys yield.
CHEAP = CHEAP_STATISTICS[:6]
#: Longest dense plan that is formed: beyond, it takes tens of gigabytes.
DENSE_LIMIT = 8192
#: From here on one repeat, and without the cases that take minutes.
ONCE = 32_768
SLOW = (
    "cheap set, GOAT prior, blocks",
    "full set, GOAT prior",
    "incoming mass, fused",
    "incoming mass, GOAT prior",
    "incoming mass, GOAT prior, fused",
    "incoming mass by backward",
    "block-wise dense, cheap + incoming",
)
#: The same from here on.
SOME = 131_072
SLOWER = (
    *SLOW,
    "cheap set, blocks",
    "cheap set, fused",
    "cheap set, GOAT prior, fused",
    "full set + incoming mass",
    "block-wise dense, full + incoming",
)
#: Gigabytes that come and go would disturb what runs next: these run alone, once.
HEAVY = ("dense plan, cheap + incoming", "transformers eager, with weights")
BLOCK = 256
UNIT = "one SDPA forward"


def inputs(length: int, heads: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal q, k, v, shape (1, heads, length, 64)."""
    generator = torch.Generator().manual_seed(length)
    return tuple(
        torch.randn(1, heads, length, HEAD_DIM, generator=generator).to(device) for _ in range(3)
    )


def prior(heads: int, device: str):
    """A GOAT prior of rank 4 with a gentle recency, seeded."""
    torch.manual_seed(0)
    learned = goat_prior(heads, rank=4, sink_rank=4, training_length=2048).requires_grad_(False)
    for name, parameter in learned.named_parameters():
        if "raw_slope" in name:
            torch.nn.init.constant_(parameter, -9.0)
        else:
            torch.nn.init.normal_(parameter, std=0.3)
    return learned.to(device)


def dense_plan(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """The whole plan, and the cheap set read from it."""
    length = q.shape[2]
    scores = q @ k.mT * HEAD_DIM**-0.5
    scores.masked_fill_(causal(0, length, length, q.device), -torch.inf)
    lse = scores.logsumexp(-1)
    weights = scores.softmax(-1)
    score = (weights * scores.masked_fill(weights == 0, 0.0)).sum(-1)
    visible = torch.arange(1, length + 1, device=q.device).log()
    return lse, lse - score, score, visible - lse + score, weights[..., 0], weights.sum(-2)


def blockwise_dense(q: Tensor, k: Tensor, *, everything: bool) -> tuple[Tensor, ...]:
    """The same, 256 queries at a time over the keys that they see: the honest opponent."""
    length = q.shape[2]
    incoming = torch.zeros(q.shape[:3], device=q.device)
    index = torch.arange(length, device=q.device, dtype=q.dtype)
    rows = []
    for a in range(0, length, BLOCK):
        b = min(a + BLOCK, length)
        scores = q[:, :, a:b] @ k[:, :, :b].mT * HEAD_DIM**-0.5
        hidden = causal(a, b, b, q.device)
        content_low = scores.masked_fill(hidden, torch.inf).amin(-1) if everything else None
        scores.masked_fill_(hidden, -torch.inf)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.unsqueeze(-1)).exp()
        incoming[:, :, :b] += weights.sum(-2)
        score = (weights * scores.masked_fill(hidden, 0.0)).sum(-1)
        found = [lse, lse - score, score, index[a:b].add(1).log() - lse + score, weights[..., 0]]
        if everything:
            mean = (weights * index[:b]).sum(-1)
            spread = (weights * (index[:b] - mean.unsqueeze(-1)) ** 2).sum(-1).sqrt()
            near = (index[a:b, None] - index[:b]) < 128
            found += [mean, spread, (weights * near).sum(-1), weights.amax(-1)]
            found.append(scores.amax(-1) - content_low)
        rows.append(found)
    return (*(torch.cat(parts, -1) for parts in zip(*rows, strict=True)), incoming)


def causal(first: int, last: int, keys: int, device: torch.device) -> Tensor:
    """True at keys after the query, shape (last - first, keys)."""
    return torch.arange(keys, device=device) > torch.arange(first, last, device=device)[:, None]


def backward_incoming(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Incoming mass as the gradient of the summed outputs with respect to the values."""
    v = torch.ones_like(v).requires_grad_()
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    (gradient,) = torch.autograd.grad(out[..., 0].sum(), v)
    return gradient[..., 0]


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """transformers' eager attention, weights returned (output_attentions=True)."""
    length = q.shape[2]
    mask = torch.zeros(1, 1, length, length, device=q.device)
    mask.masked_fill_(causal(0, length, length, q.device), torch.finfo(q.dtype).min)
    module = SimpleNamespace(num_key_value_groups=1, training=False)
    return eager_attention_forward(module, q, k, v, mask, scaling=HEAD_DIM**-0.5)[1]


def cases(length: int, heads: int, device: str) -> dict[str, Callable[[], object]]:
    """Everything that is compared at one length."""
    q, k, v = inputs(length, heads, device)
    learned = prior(heads, device)
    found = {
        "one SDPA forward": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "cheap set": lambda: row_statistics(q, k, statistics=CHEAP),
        "cheap set, blocks": lambda: row_statistics(q, k, statistics=CHEAP, impl="blockwise"),
        "cheap set, fused": lambda: row_statistics(q, k, statistics=CHEAP, impl="fused"),
        "cheap set, GOAT prior": lambda: row_statistics(q, k, prior=learned, statistics=CHEAP),
        "cheap set, GOAT prior, blocks": lambda: row_statistics(
            q, k, prior=learned, statistics=CHEAP, impl="blockwise"
        ),
        "cheap set, GOAT prior, fused": lambda: row_statistics(
            q, k, prior=learned, statistics=CHEAP, impl="fused"
        ),
        "full set": lambda: row_statistics(q, k),
        "full set, GOAT prior": lambda: row_statistics(q, k, prior=learned),
        "incoming mass": lambda: incoming_mass(q, k),
        "incoming mass, fused": lambda: incoming_mass(q, k, impl="fused"),
        "incoming mass, GOAT prior": lambda: incoming_mass(q, k, prior=learned),
        "incoming mass, GOAT prior, fused": lambda: incoming_mass(
            q, k, prior=learned, impl="fused"
        ),
        "incoming mass by backward": lambda: backward_incoming(q, k, v),
        "full set + incoming mass": lambda: all_of(AttentionCall.from_tensors(q, k)),
        "block-wise dense, cheap + incoming": lambda: blockwise_dense(q, k, everything=False),
        "block-wise dense, full + incoming": lambda: blockwise_dense(q, k, everything=True),
    }
    if length <= DENSE_LIMIT:
        found["dense plan, cheap + incoming"] = lambda: dense_plan(q, k)
        found["transformers eager, with weights"] = lambda: eager(q, k, v)
    left_out = SLOWER if length >= SOME else SLOW if length >= ONCE else ()
    return {name: run for name, run in found.items() if name not in left_out}


def alone(case: str, length: int, heads: int, device: str) -> tuple[float, float]:
    """Seconds of one call, and MiB that it adds to the peak, in a process of its own."""
    own = str(Path(__file__).resolve())
    place = [str(length), str(heads), device, case]
    run = subprocess.run(
        [sys.executable, own, "--alone", *place], capture_output=True, text=True, check=True
    )
    seconds, peak = run.stdout.split()
    return float(seconds), float(peak)


def own_cost(length: int, heads: int, device: str, case: str) -> tuple[float, float]:
    """What `alone` prints."""
    cases(64, heads, device)[case]()
    run = cases(length, heads, device)[case]
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = timed(run, device)
        return seconds, (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resident_peak()
    seconds = timed(run, device)
    return seconds, resident_peak() - before


def measure(
    table: Table, length: int, heads: int, options: argparse.Namespace
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds and peak MiB of every case; fills the table as it goes."""
    repeats, device, memory = options.repeats, options.device, options.memory
    runs = cases(length, heads, device)
    seconds, peaks = {}, {}
    if length < ONCE:
        times: dict[str, list[float]] = {name: [] for name in runs}
        for run in cases(64, heads, device).values():
            run()
        for _ in range(repeats):
            for name, run in runs.items():
                if name not in HEAVY:
                    times[name].append(timed(run, device))
        seconds = {name: statistics.median(found) for name, found in times.items() if found}
    for name in runs:
        if memory or name not in seconds:
            once, peaks[name] = alone(name, length, heads, device)
            seconds.setdefault(name, once)
        ratio = seconds[name] / seconds[UNIT]
        table.add(name, seconds[name], heads, length=length, ratio=ratio, peak=peaks.get(name))
    return seconds, peaks


def targets(
    length: int, seconds: dict[str, float], peaks: dict[str, float], report: Report
) -> None:
    """Add what the targets say of one length."""
    ours, theirs = "full set + incoming mass", "block-wise dense, full + incoming"
    dense = "dense plan, cheap + incoming"
    at = f"{length:,} tokens"
    for case in ("cheap set", "cheap set, GOAT prior"):
        report.target(f"{at}, {case} / {UNIT}", seconds[case] / seconds[UNIT], 2.5)
    report.target(f"{at}, full set / {UNIT}", seconds["full set"] / seconds[UNIT], 6.0)
    if theirs in seconds:
        report.target(f"{at}, {ours} / {theirs}", seconds[ours] / seconds[theirs], 1.0)
    if dense in seconds and length == DENSE_LIMIT:
        faster = seconds[dense] / seconds["cheap set"]
        report.target(f"{at}, {dense} / cheap set", faster, 20.0, least=True)
    if peaks and length >= SOME:
        most = max(peaks[name] for name in ("cheap set", "full set", "incoming mass"))
        report.target(f"{at}, peak in GiB", most / 1024, 4.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 8192, 32_768])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--single-head-lengths", type=int, nargs="*", default=[131_072])
    parser.add_argument("--repeats", type=int, default=3, help="below 32,768 tokens")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--alone", nargs=4, help=argparse.SUPPRESS)
    quick = {"lengths": [64], "single_head_lengths": [], "heads": 2, "repeats": 1, "memory": False}
    options = arguments(parser, argv, quick=quick, devices=("cpu", "cuda"))
    if options.alone:
        length, heads, device, case = options.alone
        print(*own_cost(int(length), int(heads), device, case))
        return
    about = f"Exact diagnostics, float32, {HEAD_DIM} per head, causal"
    report = Report("diagnostics", about, options, ("transformers",))
    columns = [Column("seconds", "s", ".3f"), Column("heads", "", ".0f")]
    table = report.table("statistics beside one attention call", columns, peak=True, width=34)
    sizes = [(n, options.heads) for n in options.lengths]
    sizes += [(n, 1) for n in options.single_head_lengths]
    for length, heads in sizes:
        targets(length, *measure(table, length, heads, options), report)
    report.finish()


if __name__ == "__main__":
    main()
