"""What a training step costs by position scheme, and evaluation at 16,384 tokens by chunks.

Run with ``python benchmarks/training.py`` (add ``--device cuda`` on a GPU). Steps are whole ones of
the tiny recipe (3 layers, d = 128, 4 heads, content of 32, R = M = 4): drawing the batch, forward,
backward, clipping, AdamW. "goat" appends the prior's 9 lanes to a head's 32 channels of content;
"goat, 23 + 9" takes them from the head, as the package goat-attention does. "goat-attention" is the
same model with that package's module in place of our layer. Repeats are interleaved, so that a busy
machine slows all cases alike; times are medians. Peak memory is the growth of the resident peak
over one more step, in a process of its own after the imports; on a GPU, the allocator's peak.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version

import torch
from _measure import added_peak, interleaved
from goat import GoatAttention
from torch import Tensor, nn

from goatviz.attention.layer import LayerCache
from goatviz.models import CausalLM
from goatviz.tasks import Passkey
from goatviz.training import TrainConfig
from goatviz.training.evaluation import next_token_loss, sequence_loss
from goatviz.training.execution import Engine, Execution, start
from goatviz.training.presets import preset

UNIT = "rope"
PACKAGE = "goat-attention"
#: As the package splits it: the prior's lanes take their place from the content's 32.
SPLIT = "goat, 23 + 9"
CASES = (UNIT, "goat", SPLIT, "alibi", "none", PACKAGE)
#: Tokens in a batch, whatever the length.
BATCH_TOKENS = 4096
HEADER = (
    f"{'length':>7} {'batch':>5}  {'case':<16} {'seconds':>9} {'tokens/s':>9} {'ratio':>7} "
    f"{'peak':>10} {'parameters':>11}"
)


class PackageAttention(nn.Module):
    """goat-attention's module where a block expects our layer."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.module = GoatAttention(
            config.embed_dim,
            config.num_heads,
            bias=False,
            pos_rank=config.prior_rank,
            abs_rank=config.sink_rank,
            training_seq_len=config.task.length,
            batch_first=True,
            fuse_qkv=True,
        )

    def forward(
        self, x: Tensor, *, padding_mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        return self.module(x, x, x, need_weights=False, is_causal=True)[0]


def recipe(length: int, case: str) -> TrainConfig:
    """The tiny recipe on text-like sequences of that length."""
    return replace(
        preset("passkey"),
        task=Passkey(length=length, value_length=4),
        batch_size=max(1, BATCH_TOKENS // length),
        positions="goat" if case in (SPLIT, PACKAGE) else case,
        content_dim=None if case == SPLIT else preset("passkey").content_dim,
    )


def model_of(config: TrainConfig, case: str) -> CausalLM:
    """Seeded; with the package's attention where the case says so."""
    torch.manual_seed(0)
    model = CausalLM(config.model_config())
    if case == PACKAGE:
        for block in model.blocks:
            block.attention = PackageAttention(config)
    return model


def stepper(engine: Engine, length: int, case: str) -> tuple[Callable[[], object], CausalLM]:
    """A function that takes one training step, and the model that it trains."""
    config = recipe(length, case)
    model = model_of(config, case).to(engine.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    prepared, optimizer = engine.prepare(model, optimizer)
    data = torch.Generator().manual_seed(0)
    return lambda: engine.take_step(config, prepared, optimizer, data, 0), model


def evaluations(length: int, device: str) -> dict[str, Callable[[], Tensor]]:
    """Losses of one sequence, in one pass and through the cache."""
    config = recipe(length, "goat")
    model = model_of(config, "goat").to(device).eval()
    ids = config.task.sample(1, generator=torch.Generator().manual_seed(0)).to(device)

    def in_one_pass() -> Tensor:
        with torch.no_grad():
            return next_token_loss(model, ids)

    return {
        "one pass": in_one_pass,
        "chunks of 1,024": lambda: sequence_loss(model, ids),
        "chunks of 256": lambda: sequence_loss(model, ids, chunk=256),
    }


def own_peak(engine: Engine, kind: str, case: str, length: int) -> float:
    """MiB that one run of a case adds to this process's peak."""
    device = engine.device.type
    if kind == "step":
        # What every case shares, imports and first allocations, is no case's own.
        stepper(engine, 32, case)[0]()
        return added_peak(stepper(engine, length, case)[0], device)
    evaluations(64, device)[case]()
    return added_peak(evaluations(length, device)[case], device)


def peak_of(kind: str, case: str, length: int, device: str, wanted: bool) -> str:
    """A case's peak as a column, measured in a process of its own."""
    if not wanted:
        return f"{'-':>10}"
    run = subprocess.run(
        [sys.executable, __file__, "--alone", kind, case, str(length), "--device", device],
        capture_output=True,
        text=True,
        check=True,
    )
    return f"{float(run.stdout.split()[-1]):>6.0f} MiB"


def bench_steps(engine: Engine, lengths: list[int], repeats: int, memory: bool) -> list[str]:
    """Print the table of steps; what the targets say."""
    device = engine.device.type
    print(HEADER)
    said = []
    for length in lengths:
        built = {case: stepper(engine, length, case) for case in CASES}
        seconds = interleaved({case: run for case, (run, _) in built.items()}, repeats, device)
        batch = recipe(length, UNIT).batch_size
        for case, (_, model) in built.items():
            count = sum(p.numel() for p in model.parameters())
            print(
                f"{length:>7} {batch:>5}  {case:<16} {seconds[case]:>9.3f} "
                f"{batch * length / seconds[case]:>9,.0f} {seconds[case] / seconds[UNIT]:>6.2f}x "
                f"{peak_of('step', case, length, device, memory)} {count:>11,}"
            )
        for case in ("goat", SPLIT):
            slower = seconds[case] / seconds[UNIT]
            faster = seconds[PACKAGE] / seconds[case]
            said.append(
                f"{length} tokens, {case}: within 1.15 x rope: {verdict(slower <= 1.15)} "
                f"({slower:.2f} x); at least 1.2 x as fast as {PACKAGE}: "
                f"{verdict(faster >= 1.2)} ({faster:.2f} x)"
            )
    return said


def bench_evaluation(length: int, repeats: int, device: str, memory: bool) -> list[str]:
    """Print the table of evaluations; how far their losses are apart."""
    print(f"\n{'length':>7}  {'evaluation':<16} {'seconds':>9} {'ratio':>7} {'peak':>10}")
    runs = evaluations(length, device)
    seconds = interleaved(runs, repeats, device)
    unit = next(iter(runs))
    for case in runs:
        print(
            f"{length:>7}  {case:<16} {seconds[case]:>9.2f} {seconds[case] / seconds[unit]:>6.2f}x "
            f"{peak_of('evaluation', case, length, device, memory)}"
        )
    reference = runs[unit]()
    apart = max(float((run() - reference).abs().max()) for run in runs.values())
    return [f"losses of all evaluations agree to 1e-4: {verdict(apart <= 1e-4)} ({apart:.1e} nats)"]


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--evaluation-length", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--evaluation-repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    with start(Execution(device=given.device)) as engine:
        if given.alone:
            kind, case, length = given.alone
            print(own_peak(engine, kind, case, int(length)))
        else:
            report(engine, given)


def report(engine: Engine, given: argparse.Namespace) -> None:
    """All tables, then what the targets say."""
    machine = torch.cuda.get_device_name() if given.device == "cuda" else platform.machine()
    print(
        f"Training steps and evaluation, float32; {machine}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {PACKAGE} {version(PACKAGE)}"
    )
    said = bench_steps(engine, given.lengths, given.repeats, given.memory)
    said += bench_evaluation(
        given.evaluation_length, given.evaluation_repeats, given.device, given.memory
    )
    print("\ntargets:")
    for line in said:
        print(f"  {line}")


if __name__ == "__main__":
    main()
