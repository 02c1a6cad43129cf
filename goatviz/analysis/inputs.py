"""What users hand to a model, as a sequence of forward passes without padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def forward_calls(inputs: Any, tokenizer: Any = None) -> Iterator[dict[str, Any] | Tensor]:
    """The arguments of each forward pass: tensors, or keyword arguments, free of padding.

    Parameters
    ----------
    inputs : Tensor, mapping, str, or sequence of them
        Batch first; padded rows of a mapping with an attention_mask come one by one, cut.
    tokenizer : callable, optional
        For texts: tokenizer(text, return_tensors="pt").

    Raises
    ------
    TypeError
        If inputs are missing, texts without a tokenizer, or of another kind.
    ValueError
        If a tensor is empty or not batch first, or a mask hides a whole row.
    """
    if inputs is None:
        raise TypeError("inputs must be given with a model: what it is called with")
    if isinstance(inputs, str):
        inputs = [inputs]
    if isinstance(inputs, Tensor):
        yield _batch_first(inputs)
        return
    if isinstance(inputs, Mapping):
        yield from _unpadded(dict(inputs))
        return
    if not isinstance(inputs, Sequence) or not len(inputs):
        raise TypeError(
            "inputs must be a Tensor, a mapping of keyword arguments, texts, or a sequence of "
            f"them, got {'nothing' if isinstance(inputs, Sequence) else type(inputs).__name__}"
        )
    for one in inputs:
        if isinstance(one, str):
            if tokenizer is None:
                raise TypeError("inputs are texts: pass tokenizer=, or token ids as a Tensor")
            yield from _unpadded(dict(tokenizer(one, return_tensors="pt")))
        elif isinstance(one, Tensor):
            yield _batch_first(one.unsqueeze(0) if one.ndim == 1 else one)
        elif isinstance(one, Mapping):
            yield from _unpadded(dict(one))
        else:
            raise TypeError(
                f"inputs hold a {type(one).__name__}: wanted Tensors, mappings or texts"
            )


def _batch_first(inputs: Tensor) -> Tensor:
    if inputs.ndim < 2 or 0 in inputs.shape:
        raise ValueError(
            f"inputs must be batch first, shape (batch, length, ...), got {tuple(inputs.shape)}"
        )
    return inputs


def _unpadded(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of a padded batch one by one, cut to their real tokens; other batches as they are."""
    for name in ("attention_mask", "padding_mask"):
        mask = arguments.get(name)
        if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.bool().all()):
            continue
        for row, real in enumerate(mask.bool()):
            if not bool(real.any()):
                raise ValueError(f"{name} hides every token of row {row}")
            yield {
                key: _row(value, row, real, len(mask))
                for key, value in arguments.items()
                if key != name
            }
        return
    yield arguments


def _row(value: Any, row: int, real: Tensor, batch: int) -> Any:
    """What belongs to one row of a batch, cut where it has one entry for each token."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if len(value) == batch:
        value = value[row : row + 1]
    per_token = value.ndim > 1 and len(value) == 1 and value.shape[1] == len(real)
    return value[:, real] if per_token else value


@torch.no_grad()
def run_model(model: nn.Module, arguments: Tensor | Mapping[str, Any]) -> Any:
    """One forward pass on what `forward_calls` yields."""
    return model(arguments) if isinstance(arguments, Tensor) else model(**arguments)


def token_ids(arguments: Tensor | Mapping[str, Any]) -> Tensor | None:
    """Token ids of a forward pass, shape (batch, length), if it is called with any."""
    ids = arguments
    if not isinstance(arguments, Tensor):
        ids = arguments.get("input_ids", arguments.get("ids"))
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        return None
    return ids


def token_texts(
    tokenizer: Any, arguments: Tensor | Mapping[str, Any], batch: int = 0
) -> list[str] | None:
    """The tokens of one sequence in words, if the tokenizer can name them."""
    ids = token_ids(arguments)
    if ids is None or not hasattr(tokenizer, "convert_ids_to_tokens"):
        return None
    return [str(token) for token in tokenizer.convert_ids_to_tokens(ids[batch].tolist())]


def text_array(tokens: Sequence[Any]) -> np.ndarray:
    r"""Tokens as an array of str that netCDF can hold: lone surrogates and NUL are spelt out.

    Examples
    --------
    >>> print(*text_array(["the", chr(0xD800)]))
    the \ud800
    """
    texts = [str(token).encode("utf-8", "backslashreplace").decode() for token in tokens]
    return np.array([text.replace("\0", "\\x00") for text in texts], dtype=object).astype(str)
