"""The blockwise engine: tiles of similarities, computed, reduced and thrown away. Memory grows with the rows.

Two identities carry it. S = Z Z^T is symmetric, so where anchors and candidates are the same, each tile is computed
once and serves its row block and its column block: forward and backward together then cost two full matrix products
instead of four. And |s| <= 1 bounds the logits, so no maximum has to be found unless exp could leave its range.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dystress_plugin import tracing
from dystress_plugin.engine import dense
from dystress_plugin.engine.tiles import KEEP_BYTES, Passed, Plan, backward, entries_of_a_tile, forward
from dystress_plugin.layout import Alike, Excluded
from dystress_plugin.rows import NegativeStats
from dystress_plugin.temperature.maps import LogitMap, PartsReader

if tracing.HAS_OPERATIONS:
    from dystress_plugin.engine import compiled

# Entries of the largest matrix that is held as a whole where tiles cannot be: 4096 images in two views.
WHOLE_ENTRIES = 2**26

Tensors: TypeAlias = Sequence["Tensor | None"]


def negative_stats(
    anchors: Tensor,
    candidates: Tensor | None,
    excluded: Excluded | Alike,
    logit_map: LogitMap,
    *,
    want_cosine: bool,
    ratio: float | None = None,
    tile: int | None = None,
    keep_bytes: int = KEEP_BYTES,
) -> NegativeStats:
    """L_i = log sum_j exp(a(s_ij)) over the negatives j of anchor i, with s_ij = anchors_i . candidates_j.

    Gradients use the closed-form slope of the map; their own derivatives are autograd's, of a few rows at a time.

    Args:
        anchors: (rows, dim), of length 1.
        candidates: (columns, dim), of length 1; None where they are the anchors themselves, each of which then
            excludes those that exclude it.
        excluded: the columns that are not negatives of each row.
        logit_map: a.
        want_cosine: whether to return the negatives' mean cosine as well.
        ratio: by which to divide the logits, at least 1, for a second L without gradient; None for none.
        tile: rows of a tile, and columns unless there are fewer rows; None chooses for the device.
        keep_bytes: what all tiles together may take up to be kept between forward and backward pass.

    Raises:
        ValueError: where the whole matrix is needed, as below, and has more than 2^26 entries.

    Warns:
        UserWarning: for what tiles cannot do, so that the dense engine does it: the transforms of torch.func,
            forward-mode differentiation, and torch.compile of a map without parts.
    """
    if not in_tiles(anchors, candidates, logit_map):
        _check_whole(len(anchors) * len(anchors if candidates is None else candidates))
        return dense.negative_stats(anchors, candidates, excluded, logit_map, want_cosine=want_cosine, ratio=ratio)
    if tracing.compiled(anchors) and not tracing.HAS_OPERATIONS:
        given: Any = {"want_cosine": want_cosine, "ratio": ratio, "tile": tile, "keep_bytes": keep_bytes}
        stats: NegativeStats = _uncompiled(anchors, candidates, excluded, logit_map, **given)
        return stats
    trains = logit_map.parameter_term(anchors[:, 0]) is not None
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (anchors, candidates))
    kept = keep_bytes if learns else 0
    plan = Plan.make(anchors, candidates, excluded, logit_map, want_cosine or trains, ratio, tile, kept)
    if tracing.compiled(anchors):
        negative, cosine, soft = compiled.statistics(plan, anchors, candidates)
        term = logit_map.parameter_term(cosine)
        negative = negative if term is None else negative + term
    else:
        negative, cosine, soft = _Blockwise.apply(plan, anchors, candidates, *_tensors(logit_map))  # type: ignore[no-untyped-call]
    return NegativeStats(negative, cosine if want_cosine else None, soft)


# For torch before 2.4: outside of the compiled graph.
# `disable` imports the compiler, which takes a second.
_uncompiled = negative_stats if tracing.HAS_OPERATIONS else torch.compiler.disable(negative_stats)


def in_tiles(anchors: Tensor, candidates: Tensor | None, logit_map: LogitMap) -> bool:
    """Whether tiles can be computed, and not only the whole matrix by plain operations."""
    if tracing.compiled(anchors) and logit_map.parts() is None:
        return False
    return not tracing.transformed(anchors, candidates, *_tensors(logit_map))


def _tensors(logit_map: LogitMap) -> tuple[Tensor, ...]:
    parts = logit_map.parts()
    return () if parts is None else parts.tensors


def _check_whole(entries: int) -> None:
    what = "torch.func, forward-mode differentiation, and torch.compile of a map without parts need the whole matrix"
    if entries > WHOLE_ENTRIES:
        raise ValueError(
            f"{what}, and {entries} entries are more than {WHOLE_ENTRIES}: use smaller batches, torch.autograd in "
            "their stead, or engine='dense' if the memory suffices."
        )
    warnings.warn(f"{what}: engine='blockwise' computes it as engine='dense' does.", stacklevel=3)


class _Blockwise(torch.autograd.Function):
    """L and N of all rows, and the second L, from the embeddings and the tensors of the map."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, anchors: Tensor, candidates: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        negative, cosine, soft, passed = forward(plan, anchors, candidates)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        by_tensors = any(ctx.needs_input_grad[3:])
        ctx.save_for_backward(*passed, cosine if by_tensors else None, anchors, candidates, *tensors)
        if soft is not None:
            ctx.mark_non_differentiable(soft)
        return negative, cosine, soft

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor | None) -> Tensors:
        total, shift, kept, cosine, *inputs = ctx.saved_tensors
        arriving = arriving[:2]  # none for the second L
        if tracing.transformed(*arriving) or tracing.batched(*arriving):  # by autograd.grad(..., is_grads_batched=True)
            return None, *_plain_gradient(ctx.plan, arriving, inputs)
        known = ctx.plan, Passed(total, shift, kept), cosine, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # create_graph=True
            return None, *_Gradient.apply(*known, *arriving, *inputs)  # type: ignore[no-untyped-call]
        return None, *_closed_form(*known, *arriving, *inputs)  # type: ignore[arg-type]  # anchors are a tensor


class _Gradient(torch.autograd.Function):
    """The closed form, with a derivative of its own: autograd's, of a few rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, passed: Passed, cosine: Tensor | None, needed: Sequence[bool], *given: Tensor | None
    ) -> Tensors:
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given)
        return _closed_form(plan, passed, cosine, needed, *given)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor | None) -> Tensors:
        again = torch.is_grad_enabled()

        def of_rows(rows: slice) -> Tensors:
            gradient = _gradient_of_rows(ctx.plan, rows, given[:2], given[2:], again=True)
            return _gradient_of(gradient, given, arriving, again=again)

        with torch.enable_grad():
            given = _apart(ctx.saved_tensors)
            return None, None, None, None, *_sum_over_rows(ctx.plan, given[2], of_rows)


def _closed_form(
    plan: Plan,
    passed: Passed,
    cosine: Tensor | None,
    needed: Sequence[bool],
    grad_negative: Tensor | None,
    grad_cosine: Tensor | None,
    anchors: Tensor,
    candidates: Tensor | None,
    *tensors: Tensor,
) -> Tensors:
    """The gradients by the embeddings and by the tensors of the map, those that are `needed`."""
    by_anchors = by_candidates = None
    if any(needed[:2]):
        by_anchors, by_candidates = backward(
            plan, anchors, candidates, passed, grad_negative, grad_cosine, by_candidates=needed[1]
        )
    by_tensors: Tensors = (None,) * len(tensors)
    if cosine is not None:
        with torch.enable_grad():
            term = plan.logit_map.parameter_term(cosine)
        by_tensors = _gradient_of([term], _tensors(plan.logit_map), [grad_negative], again=False)
    return by_anchors, by_candidates, *by_tensors


def _plain_gradient(plan: Plan, arriving: Tensors, inputs: Tensors) -> Tensors:
    """What the closed form computes, by autograd."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        apart = _apart(inputs)
        return _sum_over_rows(plan, apart[0], lambda rows: _gradient_of_rows(plan, rows, arriving, apart, again=again))


def _gradient_of_rows(plan: Plan, rows: slice, arriving: Tensors, inputs: Tensors, *, again: bool) -> Tensors:
    """The same of some rows' statistics."""
    anchors, candidates, *tensors = inputs
    assert anchors is not None  # narrows the type
    logit_map, parts = plan.logit_map, plan.logit_map.parts()
    if parts is not None:
        logit_map = PartsReader(parts.words, parts.numbers, tensors).map()  # type: ignore[arg-type]
    found = dense.negative_stats(
        anchors[rows],
        anchors if candidates is None else candidates,
        plan.excluded.rows(rows),
        logit_map.rows(rows),
        want_cosine=plan.want_cosine,
    )
    return _gradient_of(found[:2], inputs, [None if x is None else x[rows] for x in arriving], again=again)


def _gradient_of(results: Tensors, inputs: Tensors, arriving: Tensors, *, again: bool) -> Tensors:
    """autograd.grad of the results that have one; None by inputs that need none."""
    pairs = [(x, g) for x, g in zip(results, arriving, strict=True) if x is not None and g is not None]
    pairs = [(x, g) for x, g in pairs if x.requires_grad]
    needed = [x for x in inputs if x is not None and x.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    outputs, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, needed, grads, create_graph=again, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]


def _apart(tensors: Tensors) -> Tensors:
    """The same tensors as if none of them had been computed from another."""
    return [None if x is None else x.view_as(x) for x in tensors]


def _sum_over_rows(plan: Plan, anchors: Tensor | None, of_rows: Callable[[slice], Tensors]) -> Tensors:
    assert anchors is not None  # narrows the type
    step = max(1, entries_of_a_tile(anchors.device) // plan.columns)
    sums = of_rows(slice(0, step))
    for start in range(step, plan.rows, step):
        found = of_rows(slice(start, start + step))
        sums = [b if a is None else a if b is None else a + b for a, b in zip(sums, found, strict=True)]
    return sums
