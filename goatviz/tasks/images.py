"""Images: rows of pixels, and the class as the number that follows them.

A model that classifies images is then trained, evaluated and swept over lengths like any other:
more tokens are the same image at a higher resolution.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from goatviz import checks
from goatviz.models import patches_across
from goatviz.tasks.base import Task

PARTS = ("train", "test")
_GREYS = 256


class Labelled(NamedTuple):
    """Images and their classes.

    Attributes
    ----------
    images : Tensor
        uint8, shape (images, channels, height, width).
    classes : Tensor
        int64, shape (images,).
    """

    images: Tensor
    classes: Tensor


@dataclass(frozen=True)
class Images(Task):
    """Square images and their classes, at any resolution.

    Attributes
    ----------
    source : str
        A .npz file with arrays x_train, y_train and x_test, y_test (whatever follows "test"):
        images as uint8 of shape (images, side, side) or (images, side, side, channels), and their
        classes as integers from 0.
    side : int
        Pixels along a side, to which images of the source are resized.
    patch : int
        Side of a square patch, pixels; `side` is a multiple of it.
    channels : int
        Numbers of a pixel: 1 for grey, 3 for colours.
    classes : int
        Number of classes.
    part : str
        "train" or "test", see `held_out`.

    Raises
    ------
    ValueError, TypeError
        For values out of range. The source is read when it is first used; one that is missing, no
        .npz file or without such arrays is an error then.

    Notes
    -----
    The vision experiment of Litman and Guo 2026 trains at 224 pixels and reads 384 and 512 without
    fine-tuning. Resizing is bilinear, with antialiasing where an image becomes smaller.

    Examples
    --------
    >>> Images(side=28, patch=4).length
    50
    """

    source: str = ""
    side: int = 28
    patch: int = 4
    channels: int = 1
    classes: int = 10
    part: str = "train"

    name: ClassVar[str] = "images"
    answer_length: ClassVar[int] = 1
    predicted: ClassVar[int] = 1

    def __post_init__(self) -> None:
        checks.instance("source", self.source, str, "text")
        checks.integer_fields(self, side=1, patch=1, channels=1, classes=2)
        checks.one_of("part", self.part, PARTS)
        if self.side % self.patch:
            raise ValueError(f"side must be a multiple of patch={self.patch}, got {self.side}")

    @property
    def vocab_size(self) -> int:
        """256 values of a pixel, or the number of classes if that is larger."""
        return max(_GREYS, self.classes)

    @property
    def length(self) -> int:
        """The class token and the patches."""
        return 1 + (self.side // self.patch) ** 2

    @property
    def chance(self) -> float:
        """Probability of guessing the class."""
        return 1 / self.classes

    @property
    def strict_chance(self) -> float:
        """Probability of guessing the class, which is the whole answer."""
        return self.chance

    def at_length(self, length: int) -> Self:
        """The same task at the resolution that has `length` tokens: 1 + n x n."""
        return replace(self, side=self.patch * patches_across(length))

    def held_out(self) -> Self:
        """The images of the part "test"."""
        return replace(self, part="test")

    def images(self) -> Labelled:
        """The images of this part as they are in the source, read once and kept in memory."""
        found = _labelled(self.source, self.part)
        if found.images.shape[1] != self.channels:
            raise ValueError(
                f"channels must be the {found.images.shape[1]} of {self.source}, "
                f"got {self.channels}"
            )
        if int(found.classes.max()) >= self.classes:
            raise ValueError(
                f"classes must exceed the largest class in {self.source}, "
                f"{int(found.classes.max())}, got {self.classes}"
            )
        return found

    def sample(self, count: int, *, generator: torch.Generator) -> Tensor:
        """Draw `count` images with replacement; the class comes last.

        Parameters
        ----------
        count : int
            Number of images, at least 1.
        generator : torch.Generator
            A generator on the CPU.

        Returns
        -------
        Tensor
            Shape (count, side x side x channels + 1).

        Raises
        ------
        ValueError
            If the source cannot be read.
        """
        checks.positive_int("count", count)
        images, classes = self.images()
        chosen = torch.randint(len(images), (count,), generator=generator)
        drawn = images[chosen]
        if drawn.shape[-2:] != (self.side, self.side):
            resized = torch.nn.functional.interpolate(
                drawn.float(), size=(self.side, self.side), mode="bilinear", antialias=True
            )
            drawn = resized.round().clamp(0, _GREYS - 1)
        rows = drawn.permute(0, 2, 3, 1).flatten(1).long()
        return torch.cat([rows, classes[chosen, None]], dim=1)


@lru_cache(maxsize=4)
def _labelled(source: str, part: str) -> Labelled:
    if not source:
        raise ValueError("images needs source, a .npz file of images and classes, got none")
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"source must be an existing file, got {source}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            held = {name: arrays[name] for name in arrays.files if name[1:].startswith(f"_{part}")}
            names = ", ".join(arrays.files)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"source {source} is not a readable .npz file: {error}") from error
    if sorted(name[0] for name in held) != ["x", "y"]:
        raise ValueError(
            f"source {source} must hold one array x_{part} and one y_{part}, got {names}"
        )
    images, classes = (held[name] for name in sorted(held))
    square = images.ndim in (3, 4) and images.shape[1] == images.shape[2]
    if images.dtype != np.uint8 or not square or not images.size:
        raise ValueError(
            f"source {source} must hold images as uint8 of shape (images, side, side) or (images, "
            f"side, side, channels), got {images.dtype} of shape {images.shape}"
        )
    if classes.shape != images.shape[:1] or classes.dtype.kind not in "iu" or classes.min() < 0:
        raise ValueError(
            f"source {source} must hold a class from 0 for each of {len(images)} images, got "
            f"{classes.dtype} of shape {classes.shape}"
        )
    pixels = torch.from_numpy(images if images.ndim == 4 else images[..., None])
    return Labelled(
        pixels.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(classes.astype(np.int64))
    )
