"""What a prior costs and how exact its lanes are: half precision, time and memory.

Run with ``python benchmarks/priors.py``. The first table gives the relative error
``||out - reference|| / ||reference||`` of bfloat16 attention under a seeded GOAT prior (ALiBi's
slopes), beside the package goat-attention; the second what one causal call costs in float32; the
third what it takes to take a prior apart, all heads or one head whose components are scaled.
Repeats are interleaved, so that a busy machine slows all cases alike; times are medians. Peak
memory is the growth of the resident peak during one forward and backward call, in a process of
its own after a small warm-up.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from _measure import interleaved
from goat import GoatAttention
from torch import Tensor

from goatviz.adapters import convert, read_goat_attention
from goatviz.analysis import prior_profile, prior_sources
from goatviz.analysis.prior_mix import PriorMixer
from goatviz.attention import Attention, prior_attention
from goatviz.models import goat_prior
from goatviz.priors import Prior

HEADS = 8
HEAD_DIM = 64
RANK = 4
TRAINING_LENGTH = 1024
TARGET = 1e-2
#: Queries of the reference that are held at once, over all keys.
BLOCK = 64
WARM_UP_LENGTH = 16

PRECISION_HEADER = f"{'length':>7}  {'attention':<30}  {'error':>8}  {'worst head':>10}"
COST_HEADER = (
    f"{'length':>7}  {'attention':<16}  {'forward':>11}  {'ratio':>7}  "
    f"{'with backward':>13}  {'ratio':>7}  {'peak':>9}"
)
PROFILE_HEADER = (
    f"{'length':>9}  {'heads':>5}  {'profile':>10}  {'a head':>10}  {'mixer':>10}  {'mix':>10}"
)


# --- precision ---


@dataclass(frozen=True)
class Case:
    """One problem for both libraries: the module, its prior, and tokens in bfloat16.

    The module's projections are the identity, so that query, key and value tokens are content
    queries, keys and values, bit for bit the same for everyone.
    """

    module: GoatAttention
    prior: Prior
    tokens: tuple[Tensor, Tensor, Tensor]

    def content(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Content queries, keys and values, shape (1, heads, length, d)."""
        q, k, v = (split_heads(each).to(dtype) for each in self.tokens)
        return q[..., : self.module.content_dim], k[..., : self.module.content_dim], v


def split_heads(tokens: Tensor) -> Tensor:
    """(batch, length, heads x d) to (batch, heads, length, d)."""
    return tokens.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)


def seeded_module() -> GoatAttention:
    """A GoatAttention with ALiBi's slopes whose parameters are the same numbers in bfloat16."""
    torch.manual_seed(0)
    module = GoatAttention(
        HEADS * HEAD_DIM,
        HEADS,
        batch_first=True,
        pos_rank=RANK,
        abs_rank=RANK,
        training_seq_len=TRAINING_LENGTH,
        prior_init="seeded",
    )
    for linear in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
        torch.nn.init.eye_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    # There and back, so that only the arithmetic is compared and not the rounding of parameters.
    return module.to(torch.bfloat16).to(torch.float32).eval()


def problem(length: int) -> Case:
    """A seeded problem of standard normal content."""
    module = seeded_module()
    generator = torch.Generator().manual_seed(length)
    tokens = tuple(
        torch.randn(1, length, HEADS * HEAD_DIM, generator=generator).bfloat16() for _ in range(3)
    )
    prior = read_goat_attention(module, causal=True).prior
    return Case(module, prior.requires_grad_(False), tokens)


def reference(case: Case, queries: Tensor, prior: Prior | None) -> Tensor:
    """The definition in float64 at some queries, block after block."""
    q, k, v = case.content(torch.float64)
    prior = copy.deepcopy(prior).double() if prior is not None else None
    blocks = [
        prior_attention(
            q[:, :, block],
            k,
            v,
            prior=prior,
            query_pos=block,
            key_pos=k.shape[2],
            impl="reference",
        )
        for block in queries.split(BLOCK)
    ]
    return torch.cat(blocks, dim=2)


def one_lane(case: Case) -> Tensor:
    """Our lanes in float32, rounded to bfloat16 without being split: the control."""
    q, k, v = case.content(torch.bfloat16)
    scale = 1 / math.sqrt(q.shape[-1])
    lanes = case.prior.lanes(q.shape[2], k.shape[2], dtype=torch.float32, scale=scale)
    q = torch.cat([q, lanes.query.to(q.dtype).unsqueeze(0)], dim=-1)
    k = torch.cat([k, lanes.key.to(k.dtype).unsqueeze(0)], dim=-1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def package(case: Case, dtype: torch.dtype) -> Tensor:
    """goat-attention's own output."""
    module = copy.deepcopy(case.module).to(dtype)
    query, key, value = (each.to(dtype) for each in case.tokens)
    return split_heads(module(query, key, value, is_causal=True, need_weights=False)[0])


def ours(case: Case, dtype: torch.dtype, prior: Prior | None) -> Tensor:
    """One fused call."""
    q, k, v = case.content(dtype)
    return prior_attention(q, k, v, prior=prior, impl="sdpa")


def errors(out: Tensor, exact: Tensor, queries: Tensor) -> tuple[float, float]:
    """Relative error over all heads, and of the worst head."""
    difference = out[:, :, queries].double() - exact
    heads = torch.linalg.vector_norm(difference, dim=(0, 2, 3))
    heads = heads / torch.linalg.vector_norm(exact, dim=(0, 2, 3))
    return float(difference.norm() / exact.norm()), float(heads.max())


@torch.no_grad()
def measure_precision(length: int, sample: int) -> float:
    """Print the lines of one length; return the error of our bfloat16."""
    case = problem(length)
    generator = torch.Generator().manual_seed(0)
    queries = torch.randperm(length, generator=generator)[:sample].sort().values
    exact = reference(case, queries, case.prior)
    flat = reference(case, queries, None)
    half = copy.deepcopy(case.prior).to(torch.bfloat16)
    lines: list[tuple[str, Callable[[], Tensor], Tensor]] = [
        ("goatviz bf16", lambda: ours(case, torch.bfloat16, case.prior), exact),
        ("goatviz bf16, prior in bf16", lambda: ours(case, torch.bfloat16, half), exact),
        ("goatviz bf16, lanes not split", lambda: one_lane(case), exact),
        ("goat-attention bf16", lambda: package(case, torch.bfloat16), exact),
        ("no prior bf16", lambda: ours(case, torch.bfloat16, None), flat),
        ("goatviz float32", lambda: ours(case, torch.float32, case.prior), exact),
        ("goat-attention float32", lambda: package(case, torch.float32), exact),
    ]
    found = {}
    for name, compute, against in lines:
        found[name], worst = errors(compute(), against, queries)
        print(f"{length:>7}  {name:<30}  {found[name]:>8.1e}  {worst:>10.1e}", flush=True)
    return found["goatviz bf16"]


# --- cost ---


def costs(length: int) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """Calls of equal width, by name, and the tensors whose gradient each is asked for.

    "plain", "lanes" and "bias" are attention alone; the layers add the four projections.
    """
    torch.manual_seed(0)
    module = seeded_module()
    prior = read_goat_attention(module, causal=True).prior
    uniform = Attention(HEADS * HEAD_DIM, HEADS)
    ours = convert(module)
    wide = [torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3)]
    content = [torch.randn(1, HEADS, length, module.content_dim) for _ in range(2)]
    q, k, v = (each.requires_grad_() for each in (*content, wide[2]))
    x = torch.randn(1, length, HEADS * HEAD_DIM, requires_grad=True)
    learned = list(prior.parameters())
    return {
        "plain": (lambda: F.scaled_dot_product_attention(*wide, is_causal=True), wide),
        "lanes": (lambda: prior_attention(q, k, v, prior=prior, impl="sdpa"), [q, k, v, *learned]),
        "bias": (
            lambda: prior_attention(q, k, v, prior=prior, impl="sdpa_bias"),
            [q, k, v, *learned],
        ),
        "uniform layer": (lambda: uniform(x), [x, *uniform.parameters()]),
        "goatviz layer": (lambda: ours(x), [x, *ours.parameters()]),
        "goat-attention": (
            lambda: module(x, x, x, is_causal=True, need_weights=False)[0],
            # Gates that the module leaves unused have no gradient.
            [x, *(p for n, p in module.named_parameters() if not n.startswith("prior_gate"))],
        ),
    }


BASELINES = {
    "plain": "plain",
    "lanes": "plain",
    "bias": "plain",
    "uniform layer": "uniform layer",
    "goatviz layer": "uniform layer",
    "goat-attention": "uniform layer",
}


def backward(compute: Callable[[], Tensor], wanted: Sequence[Tensor]) -> None:
    """Forward, and the gradient of the output's sum."""
    torch.autograd.grad(compute().sum(), wanted)


def resident_peak() -> int:
    """Bytes. Not ru_maxrss: a child process starts with its parent's."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 2**10


def report_peak(name: str, length: int) -> None:
    """Print what one call adds to the resident peak of this process, in bytes."""
    backward(*costs(WARM_UP_LENGTH)[name])
    # The other cases' inputs are not part of this one's memory.
    compute, wanted = costs(length)[name]
    before = resident_peak()
    backward(compute, wanted)
    print(json.dumps(resident_peak() - before))


def peak_of(name: str, length: int) -> int:
    """`report_peak` in a process of its own, bytes."""
    command = [sys.executable, str(Path(__file__)), "--peak-of", name, str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout))


def measure_cost(length: int, names: Sequence[str], repeats: int, memory: bool) -> None:
    """Print the lines of one length."""
    cases = {name: call for name, call in costs(length).items() if name in names}
    forward: dict[str, list[float]] = {name: [] for name in cases}
    both: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(repeats + 1):
        for name, (compute, wanted) in cases.items():
            with torch.no_grad():
                start = time.perf_counter()
                compute()
                first = time.perf_counter() - start
            start = time.perf_counter()
            backward(compute, wanted)
            second = time.perf_counter() - start
            if repeat:  # the first round fills caches
                forward[name].append(first)
                both[name].append(second)
    for name in cases:
        cells = []
        for times in (forward, both):
            seconds = statistics.median(times[name])
            base = times.get(BASELINES[name])
            ratio = f"{seconds / statistics.median(base):.2f}x" if base else "-"
            cells.append((f"{1e3 * seconds:.1f} ms", ratio))
        (ahead, ahead_ratio), (full, full_ratio) = cells
        peak = f"{peak_of(name, length) / 2**20:.0f} MiB" if memory else "-"
        print(
            f"{length:>7}  {name:<16}  {ahead:>11}  {ahead_ratio:>7}  "
            f"{full:>13}  {full_ratio:>7}  {peak:>9}",
            flush=True,
        )


def affordable(names: Sequence[str], length: int, bias_limit: int) -> Iterator[str]:
    """The cases to run at a length: the dense bias only as far as it is allowed."""
    for name in names:
        if name == "bias" and length > bias_limit:
            print(f"{length:>7}  {name:<16}  not run: heads x length x length numbers")
        else:
            yield name


# --- analysis ---


def measure_profile(length: int, repeats: int) -> None:
    """Print the lines of one length: a profile of all heads, and a mixer of one of them."""
    for heads in (1, HEADS):
        torch.manual_seed(0)
        prior = goat_prior(heads, rank=RANK, sink_rank=RANK, training_length=TRAINING_LENGTH)
        for parameter in prior.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
        (source,) = prior_sources(prior)
        mixer = PriorMixer(source, length=length)
        mixer.mix()
        scales = itertools.cycle([0.5, 1.5])
        seconds = interleaved(
            {
                "profile": lambda prior=prior: prior_profile(prior, length=length),
                "mixer": lambda source=source: PriorMixer(source, length=length).mix(),
                "mix": lambda mixer=mixer, scales=scales: mixer.mix(sink=next(scales)),
            },
            repeats,
        )
        cells = [seconds["profile"], seconds["profile"] / heads, seconds["mixer"], seconds["mix"]]
        print(
            f"{length:>9,}  {heads:>5}  " + "  ".join(f"{1e3 * cell:>7.0f} ms" for cell in cells),
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Exactness and cost of a prior's lanes.")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096, 16384])
    parser.add_argument("--sample", type=int, default=512, help="queries compared")
    parser.add_argument("--cost-lengths", type=int, nargs="*", default=[1024, 4096, 8192])
    parser.add_argument("--profile-lengths", type=int, nargs="*", default=[1024, 32768, 1_000_000])
    parser.add_argument("--cases", nargs="+", choices=list(BASELINES), default=list(BASELINES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--bias-limit", type=int, default=4096, help="longest dense bias, tokens")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--peak-of", nargs=2, metavar=("CASE", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.peak_of:
        report_peak(options.peak_of[0], int(options.peak_of[1]))
        return
    print(
        f"Python {platform.python_version()}, torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads, goat-attention {version('goat-attention')}, "
        f"{os.cpu_count()} cores; {HEADS} heads x {HEAD_DIM}, R = M = {RANK}, causal, batch 1, "
        "seeded prior with ALiBi's slopes"
    )
    if options.lengths:
        print(
            f"\nPrecision: against float64 at {options.sample} random queries (all, if fewer); "
            "same q, k, v in bfloat16 for all;\n'no prior' is against its own reference: what "
            "bfloat16 costs anyway"
        )
        print(PRECISION_HEADER)
        found = {length: measure_precision(length, options.sample) for length in options.lengths}
        longest = max(found)
        verdict = "met" if found[longest] <= TARGET else "MISSED"
        print(f"target: goatviz bf16 at most {TARGET:.0e} at {longest} tokens: {verdict}")
    if options.cost_lengths:
        print(
            f"\nCost: float32, medians of {options.repeats} interleaved repeats; ratios to "
            "'plain' (attention alone) and\nto 'uniform layer' (with projections); peak of one "
            "forward and backward call, its inputs not counted"
        )
        print(COST_HEADER)
        for length in options.cost_lengths:
            names = list(affordable(options.cases, length, options.bias_limit))
            measure_cost(length, names, options.repeats, not options.no_memory)
    if options.profile_lengths:
        print(
            f"\nAnalysis: medians of {options.repeats} interleaved repeats; 'mixer' evaluates one "
            "head and mixes it as\nlearned, 'mix' is another scale of its sink"
        )
        print(PROFILE_HEADER)
        for length in options.profile_lengths:
            measure_profile(length, options.repeats)


if __name__ == "__main__":
    main()
