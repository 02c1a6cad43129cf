"""Training: configs as data, a loop, and checkpoints with a card that says where they come from.

Models live in `goatviz.models`, tasks in `goatviz.tasks`.
"""

from goatviz.training.checkpoint import (
    Checkpoint,
    list_pretrained,
    load_checkpoint,
    load_pretrained,
    save_checkpoint,
)
from goatviz.training.config import TrainConfig
from goatviz.training.evaluation import AnswerAccuracy, evaluate, evaluate_answers, prefill
from goatviz.training.execution import Execution
from goatviz.training.loop import OutOfTime, TrainResult, train

__all__ = [
    "AnswerAccuracy",
    "Checkpoint",
    "Execution",
    "OutOfTime",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "evaluate_answers",
    "list_pretrained",
    "load_checkpoint",
    "load_pretrained",
    "prefill",
    "save_checkpoint",
    "train",
]
