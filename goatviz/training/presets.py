"""Recipes by task and size, for `goatviz train TASK --preset SIZE`.

"tiny" learns its task in minutes on two cores; "small" needs a quarter of an hour on a GPU;
"paper" is the setting of Litman and Guo 2026 where the paper has the task, for a GPU. In every
scheme the whole head is content and a prior's lanes are added to it, so that parameter counts
agree to 2 %.
"""

from __future__ import annotations

from dataclasses import replace

from goatviz.tasks import DNA, CopyMixture, Images, Needle, Passkey, Text
from goatviz.training.config import TrainConfig

_TINY = TrainConfig(
    embed_dim=128,
    num_layers=3,
    num_heads=4,
    content_dim=32,
    prior_rank=4,
    sink_rank=4,
    steps=1500,
    batch_size=32,
    learning_rate=1e-3,
    warmup=100,
)
_SMALL = replace(
    _TINY,
    embed_dim=256,
    num_layers=6,
    num_heads=8,
    prior_rank=8,
    sink_rank=8,
    steps=2000,
    learning_rate=5e-4,
)
_PAPER = replace(_SMALL, embed_dim=512, content_dim=64, num_layers=12, learning_rate=3e-4)
_DNA_PRIOR = {"prior_rank": 2, "sink_rank": 8, "prior_init": "uniform"}
_IMAGE_PRIOR = {"prior_rank": 16, "sink_rank": 2}

PRESETS: dict[str, dict[str, TrainConfig]] = {
    "copy-mixture": {
        "tiny": TrainConfig(
            task=CopyMixture(first=0.3, previous=0.4),
            content_dim=4,
            skip=False,
            steps=2000,
            batch_size=32,
            learning_rate=1e-3,
            prior_learning_rate=3e-2,
        )
    },
    "passkey": {
        "tiny": replace(_TINY, task=Passkey(length=64, value_length=4)),
        "small": replace(_SMALL, task=Passkey(length=256)),
        "paper": replace(_PAPER, task=Passkey(length=1024)),
    },
    "needle": {
        "tiny": replace(_TINY, task=Needle(length=64, value_length=4)),
        "small": replace(_SMALL, task=Needle(length=128)),
        "paper": replace(_PAPER, task=Needle(length=256)),
    },
    # Litman and Guo 2026 train 125 M parameters on 4 B tokens of C4 with R = M = 4 at 2,048:
    # --source hf:allenai/c4:en:train --validation hf:allenai/c4:en:validation --tokenizer FILE.
    "text": {
        "tiny": replace(_TINY, task=Text(length=256), batch_size=16),
        "small": replace(
            _SMALL,
            task=Text(length=1024),
            embed_dim=512,
            content_dim=64,
            prior_rank=4,
            sink_rank=4,
            steps=5000,
        ),
        "paper": replace(
            _PAPER,
            task=Text(length=2048, packed=True),
            embed_dim=768,
            num_heads=12,
            prior_rank=4,
            sink_rank=4,
            batch_size=256,
            steps=7630,
            learning_rate=6e-4,
            warmup=700,
        ),
    },
    # R = 2, M = 8 and the uniform start are those of the paper, with 6,000 or 12,000 bases.
    "dna": {
        "tiny": replace(_TINY, task=DNA(length=512), batch_size=8, **_DNA_PRIOR),
        "small": replace(_SMALL, task=DNA(length=2048), batch_size=16, **_DNA_PRIOR),
        "paper": replace(_PAPER, task=DNA(length=6000), batch_size=16, **_DNA_PRIOR),
    },
    # The paper's is ViT-S/16 with R = 16 and M = 2 on ImageNet, 300 epochs, with augmentation that
    # is not part of goatviz.
    "images": {
        # With the rate of the rest, 0.001, the prior is learned several times more slowly.
        "tiny": replace(
            _TINY, task=Images(side=28, patch=4), sink_rank=2, prior_learning_rate=3e-2
        ),
        "small": replace(
            _SMALL, task=Images(side=64, patch=8, channels=3), batch_size=128, **_IMAGE_PRIOR
        ),
        "paper": replace(
            _PAPER,
            task=Images(side=224, patch=16, channels=3, classes=1000),
            embed_dim=384,
            num_heads=6,
            batch_size=256,
            learning_rate=5e-4,
            weight_decay=0.05,
            **_IMAGE_PRIOR,
        ),
    },
}


def preset(task: str, size: str = "tiny") -> TrainConfig:
    """The recipe of a task at a size.

    Raises
    ------
    ValueError
        If there is no such task, or the task has no such size.

    Examples
    --------
    >>> preset("passkey").task.length
    64
    """
    if task not in PRESETS:
        raise ValueError(f"task must be one of {', '.join(PRESETS)}, got {task!r}")
    if size not in PRESETS[task]:
        raise ValueError(
            f"preset of {task} must be one of {', '.join(PRESETS[task])}, got {size!r}"
        )
    return PRESETS[task][size]
