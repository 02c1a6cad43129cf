"""How a run is carried out: device, processes, precision, memory. The computation stays the same.

Built on accelerate. Every process draws the whole batch of a step and works on its own rows, each
weighted as in the whole batch, so any number of processes and micro-batches follows the same
gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from goatviz import checks
from goatviz.models import Transformer
from goatviz.training.config import TrainConfig
from goatviz.training.evaluation import loss_weights, task_loss

if TYPE_CHECKING:
    from accelerate import Accelerator


#: Backend of torch.compile.
COMPILER = "inductor"


@dataclass(frozen=True)
class Execution:
    """How to carry out a run; none of this is part of its recipe.

    Attributes
    ----------
    device : {"cpu", "cuda"} or None
        None: a GPU if there is one. CUDA_VISIBLE_DEVICES chooses among several or, for several
        processes, accelerate does.
    mixed_precision : {"no", "bf16"} or None
        Precision of the forward and backward pass; weights stay float32. None: the setting of
        `accelerate launch`, or "no" without it.
    accumulation : int
        Number of micro-batches in a step, one after the other: less memory for the same batch.
    compile : bool
        Use torch.compile.
    checkpoint_activations : bool
        Recompute each block in the backward pass: less memory, about a third more time.

    Raises
    ------
    TypeError, ValueError
        If a value is not one of these.

    Examples
    --------
    >>> Execution(accumulation=4).mixed_precision is None
    True
    """

    device: Literal["cpu", "cuda"] | None = None
    mixed_precision: Literal["no", "bf16"] | None = None
    accumulation: int = 1
    compile: bool = False
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda", None):
            raise ValueError(f"device must be cpu, cuda or None, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be cpu where there is no GPU, got 'cuda'")
        if self.mixed_precision not in ("no", "bf16", None):
            raise ValueError(f"mixed_precision must be no or bf16, got {self.mixed_precision!r}")
        checks.integer_fields(self, accumulation=1)


class Engine:
    """One process's part of a run; made by `start`."""

    def __init__(self, accelerator: Accelerator, execution: Execution) -> None:
        self.accelerator = accelerator
        self.execution = execution

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return self.accelerator.device

    @property
    def processes(self) -> int:
        """Number of processes."""
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.accelerator.is_main_process

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in any process; all processes have to ask."""
        if self.processes == 1:
            return flag
        count = torch.tensor(float(flag), device=self.device)
        return bool(self.accelerator.reduce(count, "sum"))

    def describe(self) -> dict[str, Any]:
        """The execution, for the card of a run."""
        return {
            "processes": self.processes,
            "mixed_precision": self.accelerator.mixed_precision,
            "accumulation": self.execution.accumulation,
            "compile": self.execution.compile,
            "checkpoint_activations": self.execution.checkpoint_activations,
        }

    def check(self, config: TrainConfig) -> None:
        """Raise a ValueError unless the batch can be shared out."""
        parts = self.processes * self.execution.accumulation
        if config.batch_size % parts:
            raise ValueError(
                f"batch_size must be a multiple of processes x accumulation = {self.processes} x "
                f"{self.execution.accumulation}, got {config.batch_size}"
            )

    def prepare(
        self, model: Transformer, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model and optimiser to train with; `model` stays plain and shares the weights."""
        model.checkpoint_activations = self.execution.checkpoint_activations
        return self.accelerator.prepare(model, optimizer)

    def release(self, prepared: nn.Module, model: Transformer) -> None:
        """Undo what `prepare` did to `model`."""
        self.accelerator.unwrap_model(prepared, keep_fp32_wrapper=False, keep_torch_compile=False)
        model.checkpoint_activations = False

    def take_step(
        self,
        config: TrainConfig,
        prepared: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: torch.Generator,
        step: int,
    ) -> float:
        """Take one optimiser step on the next batch; return the loss of the batch in nats."""
        ids = config.task.sample(config.batch_size, generator=data).to(self.device)
        weights = loss_weights(ids, config.task)
        rows = slice(self.accelerator.process_index, None, self.processes)
        parts = self.execution.accumulation
        pairs = list(zip(ids[rows].chunk(parts), weights[rows].chunk(parts), strict=True))
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for part, (some, share) in enumerate(pairs):
            wait = part < len(pairs) - 1
            with self.accelerator.no_sync(prepared) if wait else nullcontext():
                loss = task_loss(prepared, some, config.task, weights=share)
                total = total + loss.detach()
                # accelerate averages gradients over processes, but these parts must be summed.
                self.accelerator.backward(loss * self.processes)
        total = self.accelerator.reduce(total, "sum")
        if not bool(torch.isfinite(total)):
            raise FloatingPointError(f"the loss is {total.item()} at step {step}")
        self.accelerator.clip_grad_norm_(prepared.parameters(), config.clip)
        optimizer.step()
        return total.item()


@contextmanager
def start(execution: Execution) -> Iterator[Engine]:
    """An engine for this process, alone or launched by accelerate or torchrun.

    Raises
    ------
    ValueError
        If the settings of the launcher contradict `execution`.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import TorchDynamoPlugin

    ours = not PartialState._shared_state
    cpu = execution.device == "cpu" or not torch.cuda.is_available()
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=execution.mixed_precision,
            dynamo_plugin=TorchDynamoPlugin(backend=COMPILER if execution.compile else "no"),
        )
        if accelerator.mixed_precision not in ("no", "bf16"):
            raise ValueError(
                f"mixed_precision must be no or bf16, got {accelerator.mixed_precision!r}"
            )
        if accelerator.gradient_accumulation_steps != 1:
            raise ValueError(
                "accumulation is an option of the run: leave gradient accumulation out of "
                f"accelerate's settings, got {accelerator.gradient_accumulation_steps} steps there"
            )
        yield Engine(accelerator, execution)
    finally:
        # accelerate keeps one state per process, and would refuse another device or precision to
        # the next run. A state from before is not ours, and several processes stay connected.
        if ours and PartialState._shared_state and PartialState().num_processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
