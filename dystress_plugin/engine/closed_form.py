"""The loss of a small batch in closed form: one node of autograd's graph, as many take longer than the arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dystress_plugin import hardware, tracing
from dystress_plugin.embeddings import gradient_of_rows, lengths_of, stacked
from dystress_plugin.engine import dense
from dystress_plugin.engine.tiles import UNSHIFTED
from dystress_plugin.layout import Excluded
from dystress_plugin.objectives import Objective
from dystress_plugin.rows import RowStats
from dystress_plugin.temperature import Temperature
from dystress_plugin.temperature.base import Batch
from dystress_plugin.temperature.maps import LogitMap


class Step(NamedTuple):
    """What a loss gives for a batch.

    Attributes:
        temperature: one without state.
        objective, settings: one that has a closed form, and its parameters.
        epoch: the current epoch, or None.
        learns: whether the batch is learned from.
        again: the loss of the views by autograd, for derivatives of the gradient.
    """

    temperature: Temperature
    objective: Objective
    settings: dict[str, float]
    epoch: float | None
    learns: bool
    again: Callable[..., Tensor]


def takes(views: Sequence[Tensor]) -> bool:
    """Whether these are two views in eager code, few enough to hold the matrix."""
    return (
        len(views) == 2
        and 4 * len(views[0]) ** 2 <= dense.most_entries(views[0])
        and tracing.eager(*views)
        and not tracing.transformed(*views)
    )


def value(step: Step, views: Sequence[Tensor]) -> Tensor:
    """The loss of views that it takes, all of whose anchors have one positive and all views of others as negatives."""
    found: Tensor = _ClosedForm.apply(step, *views)  # type: ignore[no-untyped-call]
    return found


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Step, *views: Tensor) -> Tensor:
        with hardware.without_autocast(views[0].device):
            units, length = lengths_of(*stacked(views))
            rows, batch = units.flatten(0, 1), len(views[0])
            if step.learns:
                step.temperature.begin(units[0])
            cosine = (units[0] * units[1]).sum(1, keepdim=True)
            cosine = torch.cat([cosine, cosine])
            seen = Batch(cosine, index=None, epoch=step.epoch, views=2, mean=torch.mean, anchors=rows)
            maps = step.temperature(seen)
            logit, ctx.positive_slope = maps.positive.logit_and_slope(cosine * maps.positive.gain)
            positive = logit.squeeze(1)
            negative, total, tile = _over_negatives(rows, maps.negative, Excluded(batch, batch, 0, 2))
            stats = RowStats(positive, negative, cosine.squeeze(1), None, 2 * batch - 2, positive_logit=positive)
            loss = step.objective.rows(stats, step.settings).mean()
            if step.learns:
                step.temperature.update(stats, seen)
        assert step.objective.slope is not None  # Objective.has_closed_form; narrows the type
        ctx.again, ctx.slope, ctx.maps = step.again, partial(step.objective.slope, **step.settings), maps
        ctx.save_for_backward(units, length, negative - positive, total, tile, *views)
        return loss

    @staticmethod
    def backward(ctx: Any, arriving: Tensor) -> tuple[Tensor | None, ...]:
        units, length, difference, total, tile, *views = ctx.saved_tensors
        if torch.is_grad_enabled() or tracing.transformed(arriving) or tracing.batched(arriving):
            return None, *_by_autograd(ctx.again, views, arriving)
        rows = units.flatten(0, 1)
        by_negative = ctx.slope(difference) * (arriving / len(rows))
        # dL_i/ds_ij = e_ij a'(s_ij) / total_i, of the row and of the column that j is.
        negative = ctx.maps.negative
        weight = by_negative * negative.gain / total
        if negative.rowless and negative.bound <= UNSHIFTED:  # the tile is symmetric
            by_cosine = (weight[:, None] + weight).mul_(tile)
        else:
            of_rows = tile * weight[:, None]
            by_cosine = of_rows + of_rows.T
        by_units = torch.mm(by_cosine, rows).view_as(units)
        by_positive = ctx.positive_slope(by_negative[:, None]).view(2, -1, 1).sum(0) * ctx.maps.positive.gain
        by_units -= units.flip(0) * by_positive
        by_views = gradient_of_rows(units, length, by_units)
        return None, *(by_view.to(view.dtype) for by_view, view in zip(by_views, views, strict=True))


def _over_negatives(rows: Tensor, negative: LogitMap, excluded: Excluded) -> tuple[Tensor, Tensor, Tensor]:
    """L of every row, and of its exponentials the sum and, times the slope, all of them."""
    scaled = torch.mm(rows * negative.gain, rows.T)
    logit, multiply_by_slope = negative.logit_and_slope(scaled, (scaled, torch.empty_like(scaled)))
    shift = None
    if negative.bound > UNSHIFTED:
        shift = excluded.fill_(logit, -torch.inf).amax(1)
        logit = logit.sub_(shift[:, None])
    tile = excluded.fill_(torch.exp(logit, out=scaled), 0.0)
    total = tile.sum(1)
    log_total = total.log() if shift is None else total.log() + shift
    return log_total, total, multiply_by_slope(tile)


def _by_autograd(again: Callable[..., Tensor], views: Sequence[Tensor], arriving: Tensor) -> list[Tensor | None]:
    """The gradient by the views, which autograd may differentiate further where that is asked for."""
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        apart = [view.view_as(view) for view in views]  # one may have been computed from the other
        needed = [view for view in apart if view.requires_grad]
        found = iter(torch.autograd.grad(again(*apart), needed, arriving, create_graph=further))
    return [next(found) if view.requires_grad else None for view in apart]
