"""The tiles as one operation, which a compiler puts into its graph without reading them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dystress_plugin.engine.tiles import Passed, Plan, backward, forward
from dystress_plugin.hardware import widest
from dystress_plugin.layout import Alike, Excluded
from dystress_plugin.temperature.maps import PartsReader

# The same for both passes: embeddings, pieces of the map, and the rest of a plan. Numbers come as a tensor, since a
# compiler would make another graph for each of a schedule's.
_GIVEN = (
    "Tensor anchors, Tensor? candidates, SymInt[] excluded, Tensor[] classes, str words, Tensor numbers, "
    "Tensor[] tensors, SymInt row_tile, SymInt column_tile, bool want_cosine, float? ratio, int keep_bytes"
)


def statistics(plan: Plan, anchors: Tensor, candidates: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """L, N and the second L of all rows, with gradients by the embeddings, not by the tensors of the map."""
    parts = plan.logit_map.parts()
    assert parts is not None  # as `blockwise.in_tiles` asks; narrows the type
    negative, cosine, soft, *_ = _tiles(
        anchors,
        candidates,
        *_in_pieces(plan.excluded),
        " ".join(parts.words),
        torch.stack([torch.zeros((), dtype=torch.float64) + x for x in parts.numbers]),
        [tensor.detach() for tensor in parts.tensors],
        plan.row_tile,
        plan.column_tile,
        plan.want_cosine,
        plan.ratio,
        plan.keep_bytes,
        plan.rows if plan.shifted else 0,
        plan.kept_entries(anchors),
    )
    return negative, cosine, None if plan.ratio is None else soft.detach()


def _plan(
    anchors: Tensor,
    candidates: Tensor | None,
    excluded: list[int],
    classes: list[Tensor],
    words: str,
    numbers: Tensor,
    tensors: list[Tensor],
    row_tile: int,
    column_tile: int,
    *rest: Any,
) -> Plan:
    logit_map = PartsReader(words.split(), numbers.tolist(), tensors).map()
    columns = len(anchors if candidates is None else candidates)
    sizes = len(anchors), columns, candidates is None, row_tile, column_tile
    return Plan(*sizes, Alike(*classes) if classes else Excluded(*excluded), logit_map, *rest)


def _in_pieces(excluded: Excluded | Alike) -> tuple[list[int], list[Tensor]]:
    # Where a gradient is asked for, no numbers at all would be taken for no tensors.
    return ([0], list(excluded)) if isinstance(excluded, Alike) else (list(excluded), [])


@torch.library.custom_op(
    "dystress_plugin::tiles",
    mutates_args=(),
    schema=f"({_GIVEN}, SymInt shifts, SymInt kept) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _tiles(*given: Any) -> tuple[Tensor, ...]:
    """L, N, the second L, and what the backward pass needs: tensors only, so empty ones stand for None."""
    *planned, _, _ = given
    anchors, candidates, *_ = planned
    *found, passed = forward(_plan(*planned), anchors, candidates)
    return tuple(anchors.new_empty(0) if x is None else x for x in (*found, *passed))


@_tiles.register_fake
def _(anchors: Tensor, *given: Any) -> tuple[Tensor, ...]:
    *_, want_cosine, ratio, _, shifts, kept = given
    rows = len(anchors)
    total = anchors.new_empty(rows, dtype=widest(anchors.device))
    return (
        anchors.new_empty(rows),
        anchors.new_empty(rows if want_cosine else 0),
        anchors.new_empty(0 if ratio is None else rows),
        total,
        anchors.new_empty(shifts),
        anchors.new_empty(kept),
    )


@torch.library.custom_op(
    "dystress_plugin::tiles_backward",
    mutates_args=(),
    schema=f"({_GIVEN}, Tensor total, Tensor shift, Tensor kept, Tensor? grad_negative, Tensor? grad_cosine, "
    "bool by_candidates) -> (Tensor, Tensor)",
)
def _tiles_backward(*given: Any) -> tuple[Tensor, Tensor]:
    *planned, total, shift, kept, grad_negative, grad_cosine, by_candidates = given
    anchors, candidates, *_ = planned
    passed = Passed(total, *(x if len(x) else None for x in (shift, kept)))
    by_anchors, found = backward(
        _plan(*planned), anchors, candidates, passed, grad_negative, grad_cosine, by_candidates=by_candidates
    )
    return by_anchors, anchors.new_empty(0) if found is None else found


@_tiles_backward.register_fake
def _(anchors: Tensor, candidates: Tensor | None, *given: Any) -> tuple[Tensor, Tensor]:
    *_, by_candidates = given
    others = candidates if by_candidates else None
    return torch.empty_like(anchors), anchors.new_empty(0) if others is None else torch.empty_like(others)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    anchors, candidates, excluded, classes, words, numbers, tensors, *sizes, _, _ = inputs
    _, _, _, *passed = output
    ctx.excluded, ctx.classes, ctx.words, ctx.sizes = excluded, len(classes), words, sizes
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*passed, anchors, candidates, numbers, *classes, *tensors)


def _backward(ctx: Any, grad_negative: Tensor | None, grad_cosine: Tensor | None, *_: None) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "Compiled tiles have no second derivative: call the loss uncompiled, or build it with engine='dense'."
        )
    *passed, anchors, candidates, numbers = ctx.saved_tensors[:6]
    of_lists = list(ctx.saved_tensors[6:])
    classes, tensors = of_lists[: ctx.classes], of_lists[ctx.classes :]
    by_candidates = ctx.needs_input_grad[1]
    given = anchors, candidates, ctx.excluded, classes, ctx.words, numbers, tensors, *ctx.sizes
    by_anchors, found = _tiles_backward(*given, *passed, grad_negative, grad_cosine, by_candidates)
    by_lists = [None] * len(classes), None, None, [None] * len(tensors)
    return by_anchors, found if by_candidates else None, None, *by_lists, *[None] * (len(ctx.sizes) + 2)


_tiles.register_autograd(_backward, setup_context=_setup_context)
