"""The inputs of a model as a sequence of forward passes without padding."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from goatviz.models import CausalLM
from goatviz.training.checkpoint import Checkpoint

#: Data types in which torch multiplies matrices.
_COMPUTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: White space as it is shown.
_VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})
#: A byte as a piece of SentencePiece, and bytes that are not part of a character.
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_ESCAPED = re.compile("[\udc80-\udcff]+")


def named_model(source: nn.Module | Checkpoint) -> tuple[str, nn.Module]:
    """What a result calls a model, and the model."""
    if isinstance(source, Checkpoint):
        return source.name, source.model
    if not isinstance(source, nn.Module):
        raise TypeError(
            f"source must be a model, a Checkpoint or a Record, got {type(source).__name__}"
        )
    return type(source).__name__, source


def forward_calls(inputs: Any, tokenizer: Any = None) -> Iterator[dict[str, Any] | Tensor]:
    """The arguments of each forward pass: tensors, or keyword arguments, free of padding.

    Parameters
    ----------
    inputs : Tensor, mapping, str, or sequence of them
        Inputs, batch first. The rows of a mapping whose attention_mask has padding come one by
        one, without it.
    tokenizer : callable, optional
        Tokenizer of texts: tokenizer(text, return_tensors="pt").

    Raises
    ------
    TypeError
        If inputs are missing, are texts without a tokenizer, or are of another kind.
    ValueError
        If a tensor is empty or not batch first, or a mask hides a whole row.
    """
    if inputs is None:
        raise TypeError("inputs must be given with a model")
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
                f"inputs must hold Tensors, mappings or texts, got {type(one).__name__}"
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
    """The part of an argument that belongs to one row, cut where it has an entry per token."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if len(value) == batch:
        value = value[row : row + 1]
    per_token = value.ndim > 1 and len(value) == 1 and value.shape[1] == len(real)
    return value[:, real] if per_token else value


class Pass(NamedTuple):
    """One forward pass: the model's arguments, and the places of its inputs in the given order.

    Rows that were given together have one place.
    """

    arguments: dict[str, Any] | Tensor
    places: tuple[int, ...]


def forward_passes(inputs: Any, tokenizer: Any = None, batch_size: int | None = None) -> list[Pass]:
    """`forward_calls` as passes, as given or in batches of sequences of equal length: never padded.

    Parameters
    ----------
    inputs, tokenizer
        As in `forward_calls`.
    batch_size : int, optional
        Largest number of sequences in a pass. Sequences of the same shapes and types run together.
        Default: as they were given.
    """
    calls = list(forward_calls(inputs, tokenizer))
    if batch_size is None:
        return [Pass(arguments, (place,)) for place, arguments in enumerate(calls)]
    alike: dict[str, list[tuple[int, Any]]] = {}
    rows = (row for arguments in calls for row in _rows(arguments))
    for place, row in enumerate(rows):
        alike.setdefault(_kind(row), []).append((place, row))
    passes = []
    for group in alike.values():
        for start in range(0, len(group), batch_size):
            places, some = zip(*group[start : start + batch_size], strict=True)
            passes.append(Pass(_joined(some), places))
    return sorted(passes, key=lambda one: one.places)


def _rows(arguments: dict[str, Any] | Tensor) -> Iterator[dict[str, Any] | Tensor]:
    """The sequences of a forward pass one by one."""
    if isinstance(arguments, Tensor):
        yield from arguments.split(1)
        return
    batch = sequences(arguments)
    for row in range(batch):
        yield {
            name: value[row : row + 1] if _per_row(value) and len(value) == batch else value
            for name, value in arguments.items()
        }


def sequences(arguments: Tensor | Mapping[str, Any]) -> int:
    """Number of sequences in the arguments of a forward pass."""
    if isinstance(arguments, Tensor):
        return len(arguments)
    return max((len(one) for one in arguments.values() if _per_row(one)), default=1)


def _per_row(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1


def _kind(row: dict[str, Any] | Tensor) -> str:
    """What sequences must share to run together: everything but the numbers in their tensors."""
    if isinstance(row, Tensor):
        return f"{tuple(row.shape)} {row.dtype} {row.device}"
    return str({name: _kind(v) if _per_row(v) else repr(v) for name, v in sorted(row.items())})


def _joined(rows: Sequence[dict[str, Any] | Tensor]) -> dict[str, Any] | Tensor:
    if isinstance(rows[0], Tensor):
        return torch.cat(list(rows))
    return {
        name: torch.cat([row[name] for row in rows]) if _per_row(value) else value
        for name, value in rows[0].items()
    }


@torch.no_grad()
def run_model(model: nn.Module, arguments: Tensor | Mapping[str, Any]) -> Any:
    """One forward pass on the arguments that `forward_calls` yields, without gradients.

    Raises
    ------
    TypeError
        If it fails and weights are of a dtype that torch cannot multiply.
    """
    try:
        return model(arguments) if isinstance(arguments, Tensor) else model(**arguments)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        dtypes = {str(one.dtype) for one in model.parameters() if one.dtype not in _COMPUTED}
        if not dtypes:
            raise
        raise TypeError(
            f"model must have weights that give float scores, got {', '.join(sorted(dtypes))}: "
            f"load it dequantised, dtype=torch.float32 ({error})"
        ) from error


def token_ids(arguments: Tensor | Mapping[str, Any]) -> Tensor | None:
    """Token ids of a forward pass, shape (batch, length); None if it has none."""
    ids = arguments
    if not isinstance(arguments, Tensor):
        ids = arguments.get("input_ids", arguments.get("ids"))
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        return None
    return ids


def check_fits(model: nn.Module, arguments: Tensor | Mapping[str, Any]) -> None:
    """Check that the token ids of a forward pass fit a model's vocabulary and its positions.

    Raises
    ------
    ValueError
        If they do not. `goatviz.capture` itself leaves out this check: how far rotary positions
        reach is a separate question.
    """
    ids = token_ids(arguments)
    if ids is None or ids.is_meta or not ids.numel():
        return
    config = getattr(model, "config", None)
    vocabulary = _vocabulary(model, config)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        wanted = "of at least 0" if vocabulary is None else f"in 0 .. {vocabulary - 1}"
        raise ValueError(
            f"inputs must hold token ids {wanted} (the model's embeddings), got "
            f"{low if low < 0 else high}: is the tokenizer the model's own?"
        )
    if isinstance(model, CausalLM):
        learned = config.positions == "learned"
        positions = config.training_length if learned else None
    else:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and ids.shape[1] > positions:
        raise ValueError(
            f"inputs must hold at most {positions} tokens (the model's positions), "
            f"got {ids.shape[1]}: cut the text"
        )


def _vocabulary(model: nn.Module, config: Any) -> int | None:
    """Size of a language model's vocabulary; None if it is unknown."""
    if isinstance(model, CausalLM):
        return config.vocab_size
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return getattr(table, "num_embeddings", None)


def token_texts(
    tokenizer: Any, arguments: Tensor | Mapping[str, Any], batch: int = 0
) -> list[str] | None:
    """The tokens of one sequence as readable text; None if the tokenizer cannot name them.

    Special tokens stay as they are, other pieces are read by `piece_text`, and an id that the
    tokenizer does not know is "⟨id 99999⟩".

    Parameters
    ----------
    tokenizer : object
        A tokenizer of transformers, or any object with convert_ids_to_tokens(ids).
    arguments : Tensor or mapping
        Arguments of a forward pass, as `forward_calls` yields them.
    batch : int
        Number of the sequence in that pass.
    """
    ids = token_ids(arguments)
    if ids is None or not hasattr(tokenizer, "convert_ids_to_tokens"):
        return None
    numbers = ids[batch].tolist()
    byte_level, special, added = _alphabet(tokenizer)
    texts = []
    for number, piece in zip(numbers, tokenizer.convert_ids_to_tokens(numbers), strict=True):
        if piece is None:
            texts.append(f"⟨id {number}⟩")
        elif piece in special:
            texts.append(str(piece))
        else:
            texts.append(piece_text(str(piece), byte_level=byte_level and piece not in added))
    return texts


def piece_text(piece: str, *, byte_level: bool = False) -> str:
    r"""A piece of a tokenizer's vocabulary as readable text.

    A space is "␣", a line feed "⏎", a tab "⇥". Bytes that are no UTF-8 by themselves, such as parts
    of a character that is split over several tokens, are hexadecimal: "⟨E2 80⟩".

    Parameters
    ----------
    piece : str
        Its entry in the vocabulary.
    byte_level : bool
        Whether each character stands for a byte, as in GPT-2 ("Ġ" is a space). Otherwise "▁" is a
        space and a piece such as "<0xE2>" is one byte, as in SentencePiece.

    Examples
    --------
    >>> print(piece_text("Ġquick", byte_level=True), piece_text("▁quick"), piece_text("<0xE2>"))
    ␣quick ␣quick ⟨E2⟩
    >>> print(piece_text("ĠâĢĶ", byte_level=True), piece_text("ĠâĢ", byte_level=True))
    ␣— ␣⟨E2 80⟩
    """
    data = None
    if byte_level and set(piece) <= _BYTES.keys():
        data = bytes(_BYTES[character] for character in piece)
    elif not byte_level and _BYTE.fullmatch(piece):
        data = bytes([int(piece[3:5], 16)])
    elif not byte_level:
        piece = piece.replace("▁", " ")
    if data is not None:
        piece = data.decode("utf-8", "surrogateescape")
    piece = piece.translate(_VISIBLE)
    return piece if data is None else _ESCAPED.sub(_hexadecimal, piece)


def _hexadecimal(escaped: re.Match[str]) -> str:
    return f"⟨{escaped[0].encode('utf-8', 'surrogateescape').hex(' ').upper()}⟩"


def _byte_characters() -> dict[str, int]:
    """Bytes by the characters for them in byte-level pieces: their own, or from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(0x100) if byte not in own)
    return {chr(byte): byte for byte in own} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTES = _byte_characters()


def _alphabet(tokenizer: Any) -> tuple[bool, set[str], set[str]]:
    """Whether pieces are of the byte level, special tokens, and all tokens that were added."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    # Tokenizers without a backend that work on bytes hold the table itself.
    byte_level = "ByteLevel(" in repr(decoder) or hasattr(tokenizer, "byte_decoder")
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {str(token) for token in added if token.special}
    special |= set(getattr(tokenizer, "all_special_tokens", ()))
    return byte_level, special, {str(token) for token in added}


def text_array(tokens: Sequence[Any]) -> np.ndarray:
    r"""Tokens as an array of str that netCDF can hold: lone surrogates and NUL are spelt out.

    Examples
    --------
    >>> print(*text_array(["the", chr(0xD800)]))
    the \ud800
    """
    texts = [str(token).encode("utf-8", "backslashreplace").decode() for token in tokens]
    return np.array([text.replace("\0", "\\x00") for text in texts], dtype=object).astype(str)
