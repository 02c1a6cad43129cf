"""Tasks: seeded sources of token sequences of any length; an image is one, too.

A task knows its data and, where there is one, the loss of the best possible predictor; training
knows neither.
"""

from goatviz.tasks.base import Task
from goatviz.tasks.copy_mixture import CopyMixture
from goatviz.tasks.corpus import DNA, Text
from goatviz.tasks.images import Images
from goatviz.tasks.retrieval import Needle, Passkey

#: Every task by its name.
TASKS: dict[str, type] = {
    task.name: task for task in (CopyMixture, Passkey, Needle, Text, DNA, Images)
}

__all__ = ["DNA", "TASKS", "CopyMixture", "Images", "Needle", "Passkey", "Task", "Text"]
