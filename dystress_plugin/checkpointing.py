"""Activation checkpointing computes a loss twice: how its state moves once, and its gradient fits its value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from dystress_plugin import tracing

# The node within which a reentrant checkpoint computes again; copies of it in other libraries kept its name.
REENTRANT = "CheckpointFunctionBackward"


@dataclass(eq=False)
class _Pass:
    mark: Tensor
    value: Tensor


class Passes:
    """Tells the forward passes that move a loss's state from those that a checkpoint only repeats.

    Without reentry (`use_reentrant=False`) the first pass counts. The second, within the backward pass, repeats it, and
    has to give the same value though the state has moved; it is known by its embeddings. With reentry the first pass
    has no gradient, as if it were a validation batch, and the second counts: it has to find the state that the first
    one found.

    A compiler and torch.func know none of this: what is compiled must not stand within a checkpoint that is not.
    """

    def __init__(self) -> None:
        self._with_gradient: WeakSet[_Pass] = WeakSet()
        self._without_gradient: tuple[Tensor, list[tuple[int, int]]] | None = None

    def __reduce__(self) -> Any:
        return Passes, ()  # a copy has seen nothing

    def value(self, compute: Callable[[], Tensor], units: Tensor, state: Sequence[Tensor], *, learns: bool) -> Tensor:
        """What `compute` makes of `units` and `state`, or made of them when it was called for the same pass before.

        Without any `state` that it reads, and moves if the pass is learned from, every pass is computed as it is.

        Raises:
            ValueError: for a pass that a checkpoint repeats where it cannot be told what it repeats, or if the state
                has moved since the first pass of a reentrant one.
        """
        if not state or not tracing.eager(units):
            return compute()
        if not learns:
            self._without_gradient = _mark(units), _versions(state)
            return compute()
        node = torch._C._current_autograd_node()
        if node is not None and type(node).__name__ != REENTRANT:
            return self._repeated(units)
        if node is not None:
            self._check_reentry(units, state)
        # A checkpoint would drop what is saved for the backward pass, and compute it again from another state.
        # Detached: a result that its own node saves would keep itself, for good where no backward pass comes by.
        with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _itself):
            value = compute()
        if value.grad_fn is not None:
            this = _Pass(_mark(units), value.detach().clone())
            self._with_gradient.add(this)
            # For as long as there is a graph to differentiate. The stubs take the property for a method.
            value.grad_fn.metadata[self] = this  # type: ignore[index]
        return value

    def _repeated(self, units: Tensor) -> Tensor:
        mark = _mark(units)
        values = [first.value for first in self._with_gradient if _equal(first.mark, mark)]
        if not values or any(value != values[0] for value in values[1:]):
            raise ValueError(
                f"A loss with a queue or tables is computed within a backward pass, from embeddings that {len(values)} "
                "of its forward passes had: a checkpoint has to compute the same embeddings again (with "
                "preserve_rng_state=True), and others in each call."
            )
        return values[0].detach().requires_grad_().clone()  # as an operation's result, which may be written into

    def _check_reentry(self, units: Tensor, state: Sequence[Tensor]) -> None:
        first, self._without_gradient = self._without_gradient, None
        if first is None or first[1] != _versions(state) or not _equal(first[0], _mark(units)):
            raise ValueError(
                "A loss with a queue or tables was called again before the backward pass of a checkpoint with "
                "use_reentrant=True, which finds another state now: use checkpoint(..., use_reentrant=False)."
            )


def _versions(state: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in state]


def _mark(units: Tensor) -> Tensor:
    """What tells one batch from another, small enough to be kept with a value that somebody adds up over an epoch."""
    return units.detach().sum(dim=1).nan_to_num()  # with mixed precision a step may overflow


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.to(b).equal(b)


def _itself(tensor: Tensor) -> Tensor:
    return tensor
