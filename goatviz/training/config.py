"""What determines a training run: task, model, optimiser, seed. Plain data, no torch objects."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from goatviz import checks
from goatviz.models import ModelConfig
from goatviz.tasks import TASKS, CopyMixture, Task


@dataclass(frozen=True)
class TrainConfig:
    """A recipe from which a run can be reproduced on one device.

    Attributes
    ----------
    task : Task
        The data: a `CopyMixture`, `Passkey`, `Needle`, `Text`, `DNA` or `Images`.
    positions : str
        Position scheme, one of `goatviz.models.POSITION_SCHEMES`.
    embed_dim, num_layers, num_heads, content_dim, mlp_ratio, skip
        See `ModelConfig`.
    prior_rank, sink_rank, prior_init
        The GOAT prior, see `ModelConfig`.
    steps, batch_size : int
        Number of optimiser steps, and of sequences in each.
    learning_rate : float
        Peak rate: linear warm-up over `warmup` steps, then a cosine down to a tenth.
    prior_learning_rate : float or None
        Peak rate of the prior's parameters; None: `learning_rate`.
    weight_decay : float
        Decay of matrices only, never of the prior.
    clip : float
        Largest gradient norm.
    seed : int
        Seed of the weights; the data use `seed + 1`, held-out data a stream of their own.
    """

    task: Task = field(default_factory=CopyMixture)
    positions: str = "goat"
    embed_dim: int = 64
    num_layers: int = 1
    num_heads: int = 2
    content_dim: int | None = None
    mlp_ratio: float = 4.0
    skip: bool = True
    prior_rank: int = 4
    sink_rank: int = 4
    prior_init: str = "seeded"
    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 3e-3
    prior_learning_rate: float | None = None
    weight_decay: float = 0.01
    warmup: int = 100
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.task) not in TASKS.values():
            raise TypeError(
                f"task must be one of {', '.join(t.__name__ for t in TASKS.values())}, "
                f"got {type(self.task).__name__}"
            )
        checks.integer_fields(self, steps=1, batch_size=1)
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.prior_learning_rate is not None and not self.prior_learning_rate > 0:
            raise ValueError(
                f"prior_learning_rate must be positive or None, got {self.prior_learning_rate}"
            )
        if self.weight_decay < 0 or self.warmup < 0:
            raise ValueError(
                f"weight_decay and warmup must be at least 0, got {self.weight_decay}, "
                f"{self.warmup}"
            )
        self.model_config()

    def model_config(self) -> ModelConfig:
        """The config of the model that this run trains."""
        return ModelConfig(
            vocab_size=self.task.vocab_size,
            training_length=self.task.length,
            embed_dim=self.embed_dim,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            content_dim=self.content_dim,
            mlp_ratio=self.mlp_ratio,
            skip=self.skip,
            positions=self.positions,
            prior_rank=self.prior_rank,
            sink_rank=self.sink_rank,
            prior_init=self.prior_init,
            patch=self.task.patch,
            channels=self.task.channels,
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, for JSON; those of the task include its name."""
        values = asdict(self)
        values["task"] = {"name": self.task.name, **values["task"]}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; a task without a name is a copy mixture.

        Raises
        ------
        ValueError
            If the task's name is unknown.
        """
        values = dict(values)
        task = dict(values["task"])
        name = task.pop("name", CopyMixture.name)
        if name not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
        values["task"] = TASKS[name](**task)
        return cls(**values)
