"""What sweeps over models and lengths share: checks of their arguments, and a cache of cells.

A cell is the measurement of one model at one length, or on one forward pass. With a cache folder it
is a file, named by a digest of everything it depends on, so that an interrupted run resumes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from goatviz import checks
from goatviz.attention.positions import LearnedEmbedding
from goatviz.files import whole_file
from goatviz.models import CausalLM, ImageClassifier, Transformer
from goatviz.tasks import Task

#: Length of a SHA-256 in hexadecimal.
_SUM = 64
#: Types whose values are fully described by their repr.
_PLAIN = (bool, int, float, str, tuple, type(None), torch.dtype)

Models = Mapping[str, Transformer | Sequence[Transformer]]


def check_models(models: Models, task: Task) -> dict[str, list[Transformer]]:
    """Lists of models by scheme, after checking that every vocabulary holds the task's tokens."""
    wanted = "a mapping of scheme names to models, such as {'goat': model}"
    if not checks.instance("models", models, Mapping, wanted):
        raise ValueError(f"models must be {wanted}, got none")
    kind, one = (CausalLM, "a CausalLM")
    if task.patch is not None:
        kind, one = (ImageClassifier, "an ImageClassifier")
    runs = {}
    for scheme, given in models.items():
        name = f"models[{scheme!r}]"
        if isinstance(given, Transformer):
            given = [given]
        run = list(checks.instance(name, given, Iterable, f"{one} or a sequence of them"))
        if not run:
            raise ValueError(f"{name} must hold at least one model, got none")
        for model in run:
            checks.instance(name, model, kind, one)
            if model.config.vocab_size < task.vocab_size:
                raise ValueError(
                    f"{name} must have a vocabulary of at least the task's {task.vocab_size} "
                    f"tokens, got {model.config.vocab_size}"
                )
        runs[str(scheme)] = run
    return runs


def check_lengths(lengths: Sequence[int]) -> list[int]:
    """The lengths as a list, after checking that they are increasing positive integers."""
    wanted = "increasing positive integers"
    checks.instance("lengths", lengths, Iterable, wanted)
    numbers = [checks.positive_int("lengths", length) for length in lengths]
    if not numbers or sorted(set(numbers)) != numbers:
        raise ValueError(f"lengths must be {wanted}, got {numbers}")
    return numbers


def check_cache(cache: str | os.PathLike | None) -> Path | None:
    """The folder of a cache, after checking that it exists; None for no cache."""
    return None if cache is None else checks.existing_folder("cache", cache)


def model_digest(model: nn.Module) -> str:
    """SHA-256 of a model's configuration, weights and buffers, and of its modules' settings.

    Train or eval mode does not count, nor does the code of forward methods: a class that changes
    and keeps its name also keeps its digest.
    """
    digest = hashlib.sha256(repr(getattr(model, "config", None)).encode())
    for path, module in model.named_modules():
        # Watching a model leaves attributes that are None, so None counts as missing.
        settings = {
            name: value
            for name, value in sorted(vars(module).items())
            if isinstance(value, _PLAIN) and value is not None
            if name != "training" and not name.startswith("_")
        }
        digest.update(f"{path} {type(module).__qualname__} {settings}".encode())
    for name, value in sorted([*model.named_parameters(), *model.named_buffers()]):
        digest.update(f"{name} {inputs_digest(value)}".encode())
    return digest.hexdigest()


def inputs_digest(value: Any) -> str:
    """SHA-256 of tensors, plain values, and mappings and sequences of them.

    Raises
    ------
    TypeError
        For anything else, whose content cannot be compared.
    """
    if isinstance(value, Tensor):
        digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
        plain = value.detach().cpu().contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
    if isinstance(value, Mapping):
        value = [f"{name!r} {inputs_digest(part)}" for name, part in sorted(value.items())]
    elif isinstance(value, list | tuple):
        value = [inputs_digest(part) for part in value]
    elif not isinstance(value, _PLAIN):
        raise TypeError(
            "inputs must be tensors and plain values to be kept in a cache, got "
            f"{type(value).__name__}"
        )
    return hashlib.sha256(repr(value).encode()).hexdigest()


def trained_lengths(models: Mapping[str, Sequence[CausalLM]]) -> str:
    """The training lengths of all models, increasing, as an attribute of a result."""
    lengths = {model.config.training_length for run in models.values() for model in run}
    return ", ".join(map(str, sorted(lengths)))


def each_model(
    models: Mapping[str, Sequence[CausalLM]],
) -> Iterator[tuple[int, int, str, CausalLM]]:
    """Every model with the numbers of its scheme and run, and the scheme's name."""
    for number, (scheme, runs) in enumerate(models.items()):
        for run, model in enumerate(runs):
            yield number, run, scheme, model


def exceeds_positions(model: Transformer, length: int) -> bool:
    """Whether the model has learned positions, and none for this length."""
    embedding = model.position_embedding
    return isinstance(embedding, LearnedEmbedding) and length > embedding.max_length


def _read_json(path: Path, name: str) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, name: str, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _read_arrays(path: Path, name: str) -> dict[str, np.ndarray]:
    whole = path.read_bytes()
    content, stored = whole[:-_SUM], whole[-_SUM:]
    if hashlib.sha256(content).hexdigest().encode() != stored:
        raise ValueError("its checksum does not match its content")
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = {entry: file[entry] for entry in file.files}
    if str(arrays.pop("cell")) != name:
        raise ValueError("it holds another measurement")
    return arrays


def _write_arrays(path: Path, name: str, value: Mapping[str, np.ndarray]) -> None:
    content = io.BytesIO()
    np.savez(content, cell=np.array(name), **value)
    content = content.getvalue()
    path.write_bytes(content + hashlib.sha256(content).hexdigest().encode())


class Form(NamedTuple):
    """A format of cells: the file's ending, and the functions that read and write it."""

    ending: str
    read: Callable[[Path, str], Any]
    write: Callable[[Path, str, Any], None]


#: JSON values.
JSON = Form("json", _read_json, _write_json)
#: A mapping of names to numpy arrays; the file holds the cell's name, and ends in its SHA-256.
ARRAYS = Form("npz", _read_arrays, _write_arrays)


def cached(
    folder: Path | None, label: str, key: Any, measure: Callable[[], Any], *, form: Form = JSON
) -> Any:
    """The value of `measure()`, read from the cell's file if it was measured before.

    Parameters
    ----------
    folder : Path or None
        An existing folder of cells; None keeps nothing.
    label : str
        Beginning of the cell's file name, for people.
    key : JSON values
        Everything that the cell depends on.
    measure : callable
        Function that measures the cell and returns JSON values; called if there is no such file.
    form : Form
        Format of the file: `JSON`, or `ARRAYS` if `measure` returns a mapping of arrays.

    Raises
    ------
    ValueError
        If the cell's file is damaged.
    """
    if folder is None:
        return measure()
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = folder / f"{label}-{name[:24]}.{form.ending}"
    if path.exists():
        try:
            return form.read(path, name)
        except Exception as error:
            # A damaged file can raise any kind of error.
            raise ValueError(f"cell {path} is damaged, remove it: {error}") from error
    value = measure()
    with whole_file(path) as temporary:
        form.write(temporary, name, value)
    return value
