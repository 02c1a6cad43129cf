"""How exact attention under a prior is in float32, bfloat16 and float16: output and gradients.

Run with ``python benchmarks/precision.py`` (add ``--device cuda`` on a GPU). Numbers are
``||x - reference|| / ||reference||`` of the output at sampled queries and of the gradients of
q, k and v, for the worst head. The loss is a random projection of these queries' outputs, so that
a float64 reference, computed block by block from the definition, is affordable at any length. q, k
and v are standard normal, and the same numbers in every dtype. Up to ``--whole`` tokens one fused
causal call computes all queries; beyond, it computes the sampled ones alone, over all keys.

Key-only terms are the hard case: at 131,072 tokens the steepest of ALiBi's slopes spans 65,536
nats, of which a bfloat16 number keeps 8 bits. "no prior" is what the dtype costs anyway. The second
table is a control without lanes or kernels: the error that the gradients have in float64 if only
the output is rounded to the dtype. A fused backward pass reads it rounded, in
``dS = P (dP - <dout, out>)``, and where one key has nearly all mass these two cancel.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Sequence

import torch
from _report import Column, Report, arguments
from torch import Tensor

from goatviz.attention import prior_attention
from goatviz.models import goat_prior
from goatviz.priors import ALiBiPrior, Prior, SinkPrior, SpectralPrior

HEAD_DIM = 64
RANK = 4
TRAINING_LENGTH = 1024
TARGET = 1e-2
#: Heads of ALiBi's geometric slopes; with fewer, the steepest and the shallowest of them stay.
HEADS = 8
#: From here on, two heads.
FEW = 16_384
BUMP = 10.0
#: Numbers of the float64 reference that are held at once, for each tensor.
BLOCK_NUMBERS = 2**22
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTITIES = ("out", "dq", "dk", "dv")


def slopes(heads: int) -> list[float]:
    """The steepest and then the shallowest of ALiBi's slopes for 8 heads, nats per token."""
    each = [2.0 ** -(8 * (h + 1) / HEADS) for h in range(HEADS)]
    return each if heads == HEADS else each[: heads - 1] + each[-1:]


def sink(heads: int) -> Prior:
    prior = SinkPrior(heads, rank=RANK, training_length=TRAINING_LENGTH, init="uniform")
    torch.nn.init.constant_(prior.bump, BUMP)
    return prior


def high_frequencies(heads: int) -> Prior:
    """Two nats at each of four frequencies, whose periods are 4 to 6.3 tokens."""
    prior = SpectralPrior(heads, rank=RANK, init="uniform")
    prior.frequencies.copy_(torch.linspace(1.0, math.pi / 2, RANK))
    torch.nn.init.constant_(prior.alpha, 2.0)
    return prior


def goat(heads: int) -> Prior:
    """All terms at once: a random spectrum and sink, the bump, and ALiBi's slopes."""
    torch.manual_seed(0)
    prior = goat_prior(heads, rank=RANK, sink_rank=RANK, training_length=TRAINING_LENGTH)
    relative, key, recency = prior.parts
    for parameter in (relative.alpha, relative.beta, *key.mlp.parameters()):
        torch.nn.init.normal_(parameter, std=0.7)
    torch.nn.init.constant_(key.bump, BUMP)
    recency.raw_slope.data.copy_(torch.tensor(slopes(heads)).expm1().log())
    return prior


PRIORS: dict[str, Callable[[int], Prior | None]] = {
    "no prior": lambda heads: None,
    "sink": sink,
    "recency": lambda heads: ALiBiPrior(heads, slopes=slopes(heads)),
    "high frequencies": high_frequencies,
    "GOAT": goat,
}


class Problem:
    """Seeded q, k, v and the loss's weights, and which queries count."""

    def __init__(self, length: int, heads: int, sample: int, device: str) -> None:
        generator = torch.Generator().manual_seed(length)

        def normal(*shape: int) -> Tensor:
            # Numbers that bfloat16 and float16 both hold, so that only arithmetic is compared.
            each = torch.randn(1, heads, *shape, generator=generator).bfloat16().half()
            return each.to(device)

        self.length, self.device = length, device
        self.queries = torch.randperm(length, generator=generator)[:sample].sort().values
        self.q, self.k, self.v = (normal(length, HEAD_DIM) for _ in range(3))
        self.weights = normal(len(self.queries), HEAD_DIM)

    def reference(
        self, prior: Prior | None, dtypes: Sequence[torch.dtype]
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """The output at the sampled queries and the gradients, in float64 from the definition.

        Beside them, for each dtype, the gradients of q and k if only the output is rounded to it.
        """
        prior = None if prior is None else copy.deepcopy(prior).double()
        k, v = (each.double().requires_grad_() for each in (self.k, self.v))
        outs, dqs = [], []
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        rounded: list[tuple[list[Tensor], Tensor]] = [([], torch.zeros_like(k)) for _ in dtypes]
        rows = max(1, BLOCK_NUMBERS // (k.shape[1] * self.length))
        blocks = self.queries.split(rows), self.weights.double().split(rows, dim=2)
        for at, weights in zip(*blocks, strict=True):
            q = self.q[:, :, at].double().requires_grad_()
            places = {"query_pos": at, "key_pos": self.length, "impl": "reference"}
            out = prior_attention(q, k, v, prior=prior, **places)
            gradients = torch.autograd.grad((out * weights).sum(), (q, k, v))
            outs.append(out.detach())
            dqs.append(gradients[0])
            dk += gradients[1]
            dv += gradients[2]
            # A changed <dout, out> changes dS by -P times the change: dq by that times P k, dk by
            # its product with q.
            values = k.detach().clone().requires_grad_()
            mean_key = prior_attention(q.detach(), k.detach(), values, prior=prior, **places)
            for dtype, (changed_q, changed_k) in zip(dtypes, rounded, strict=True):
                change = (weights * (out.to(dtype).double() - out)).sum(-1, keepdim=True).detach()
                change = change / math.sqrt(HEAD_DIM)
                changed_q.append(gradients[0] - change * mean_key.detach())
                loss = (mean_key * change * q.detach()).sum()
                changed_k -= torch.autograd.grad(loss, values, retain_graph=True)[0]
        exact = [torch.cat(outs, dim=2), torch.cat(dqs, dim=2), dk, dv]
        return exact, [[torch.cat(some, dim=2), dk + more] for some, more in rounded]

    def fused(self, prior: Prior | None, dtype: torch.dtype, whole: bool) -> list[Tensor]:
        """The same from one fused call in a dtype."""
        at = self.queries.to(self.device)
        q = (self.q if whole else self.q[:, :, at]).to(dtype).requires_grad_()
        k, v = (each.to(dtype).requires_grad_() for each in (self.k, self.v))
        if whole:
            out = prior_attention(q, k, v, prior=prior, impl="sdpa")[:, :, at]
        else:
            out = prior_attention(
                q, k, v, prior=prior, query_pos=self.queries, key_pos=self.length, impl="sdpa"
            )
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), self.weights.to(dtype))
        return [out.detach(), dq[:, :, at] if whole else dq, dk, dv]


def error(value: Tensor, exact: Tensor) -> float:
    """Relative error of the worst head."""
    difference = torch.linalg.vector_norm(value.detach().double() - exact, dim=(0, 2, 3))
    return float((difference / torch.linalg.vector_norm(exact, dim=(0, 2, 3))).max())


def columns(dtypes: Sequence[str], quantities: Sequence[str], what: str = "") -> list[Column]:
    """A column for each dtype and quantity; `what` tells metrics of several tables apart."""
    names = [f"{dtype} {quantity}" for dtype in dtypes for quantity in quantities]
    return [Column(name + what, "", ".1e", name) for name in names]


def measure(options: argparse.Namespace, report: Report) -> list[tuple[float, str]]:
    """Fill the tables; return every error with what it is of."""
    dtypes = options.dtypes
    table = report.table(
        "Relative error of the worst head, against float64",
        columns(dtypes, QUANTITIES),
        ratio=False,
        width=16,
    )
    errors: list[tuple[float, str]] = []
    floors: list[tuple[int, str, list[float]]] = []
    for length in options.lengths:
        heads = HEADS if length < FEW else 2
        sample = options.sample if length <= options.whole else options.long_sample
        problem = Problem(length, heads, sample, options.device)
        for case in options.priors:
            prior = PRIORS[case](heads)
            if prior is not None:
                prior = prior.to(options.device).requires_grad_(False)
            exact, rounded = problem.reference(prior, [DTYPES[dtype] for dtype in dtypes])
            values, floor = [], []
            for dtype, gradients in zip(dtypes, rounded, strict=True):
                found = problem.fused(prior, DTYPES[dtype], length <= options.whole)
                each = [error(*pair) for pair in zip(found, exact, strict=True)]
                floor += [error(*pair) for pair in zip(gradients, exact[1:3], strict=True)]
                errors += [
                    (value, f"{case}, {dtype} {quantity} at {length:,} tokens")
                    for value, quantity in zip(each, QUANTITIES, strict=True)
                ]
                values += each
            table.add(case, *values, length=length)
            floors.append((length, case, floor))
    control = report.table(
        "The same in float64, with only the output rounded to the dtype",
        columns(dtypes, ("dq", "dk"), ", rounded output"),
        ratio=False,
        width=16,
    )
    for length, case, floor in floors:
        control.add(case, *floor, length=length)
    return errors


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 4096, 16_384, 65_536, 131_072]
    )
    parser.add_argument("--sample", type=int, default=128, help="queries that count")
    parser.add_argument("--long-sample", type=int, default=32, help="the same beyond --whole")
    parser.add_argument("--whole", type=int, default=16_384, help="longest call of all queries")
    parser.add_argument("--priors", nargs="+", choices=list(PRIORS), default=list(PRIORS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    options = arguments(
        parser,
        argv,
        quick={"lengths": [48, 96], "sample": 8, "long_sample": 4, "whole": 64},
        devices=("cpu", "cuda"),
    )
    report = Report(
        "precision",
        f"Precision of lanes: {HEAD_DIM} per head, {HEADS} heads (2 from {FEW:,} tokens on), "
        f"causal, {options.sample} queries ({options.long_sample} beyond {options.whole:,} tokens)",
        options,
    )
    errors = measure(options, report)
    for dtype in options.dtypes:
        worst, what = max(each for each in errors if f" {dtype} " in each[1])
        report.target(f"{dtype}, the worst: {what}", worst, TARGET)
    report.finish()


if __name__ == "__main__":
    main()
