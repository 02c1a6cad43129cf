"""What the watchers of all families share: replaced forwards, and how they report calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from goatviz.transport.visibility import split_mask

#: Gets what the kernel returned, shape (batch, query heads, n_queries, d_v), and may return the
#: output with which the layer continues instead.
Answer = Callable[[Tensor], Tensor | None]
#: observe(path, q, k, **options) gets the arguments of `AttentionCall.from_tensors`, and `gate`
#: where a layer multiplies the output of each head's queries by sigmoid(gate), (batch, heads,
#: n_queries), after the kernel.
Observe = Callable[..., Answer | None]


@contextmanager
def replaced_forwards(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Give each module a `forward` that hides its class's own until the block ends.

    Raises
    ------
    ValueError
        If a module already has a forward of its own.
    """
    with ExitStack() as stack:
        for module, forward in forwards:
            if "forward" in vars(module):
                raise ValueError(
                    f"{type(module).__name__} has a forward of its own already: it is being "
                    "captured, or something else replaced it"
                )
            module.forward = forward
            stack.callback(delattr, module, "forward")
        yield


def check_dropout(module: nn.Module, dropout: float) -> None:
    """Raise a ValueError if a module drops attention weights, which are then not the plan."""
    if module.training and dropout > 0:
        raise ValueError(
            f"{type(module).__name__} is in training mode with attention dropout p={dropout}: the "
            "weights it applies are not the plan; call model.eval() first"
        )


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are views of the same memory with the same layout."""
    if one is other:
        return True
    layouts = [(x.data_ptr(), x.shape, x.stride()) for x in (one, other)]
    return layouts[0] == layouts[1]


def allowed_by(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """`split_mask` of one of torch's masks, in which True forbids."""
    return split_mask(~mask if mask.dtype == torch.bool else mask)
