"""The loss of a small batch in closed form: one node of autograd's graph, as many take longer than the arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dystress_plugin import hardware, tracing
from dystress_plugin.embeddings import by_peak, gradient_of_rows, lengths_of, stacked
from dystress_plugin.engine import dense
from dystress_plugin.engine.tiles import UNSHIFTED
from dystress_plugin.layout import Excluded
from dystress_plugin.objectives import Objective
from dystress_plugin.rows import RowStats
from dystress_plugin.temperature import Temperature
from dystress_plugin.temperature.base import Batch
from dystress_plugin.temperature.maps import LogitMap, LogitMaps


class Step(NamedTuple):
    """What a loss gives for a batch.

    Attributes:
        temperature: one without tensors of its own.
        objective, settings: one that has a closed form, and its parameters.
        epoch: the current epoch, or None.
        learns: whether the batch is learned from.
    """

    temperature: Temperature
    objective: Objective
    settings: dict[str, float]
    epoch: float | None
    learns: bool

    def rows(self, positive: Tensor, negative: Tensor, cosine: Tensor) -> tuple[Tensor, RowStats]:
        """The loss of every row, and its statistics."""
        stats = RowStats(positive, negative, cosine, None, len(cosine) - 2, positive_logit=positive)
        return self.objective.rows(stats, self.settings), stats


def takes(views: Sequence[Tensor]) -> bool:
    """Whether these are two views in eager code, few enough to hold the matrix."""
    return (
        len(views) == 2
        and 4 * len(views[0]) ** 2 <= dense.most_entries(views[0])
        and tracing.eager(*views)
        and not tracing.transformed(*views)
    )


def value(step: Step, views: Sequence[Tensor]) -> Tensor | None:
    """The loss of views that it takes, each anchor's positive its other view, its negatives all views of others.

    None where the maps have something to train, which autograd has to see.
    """
    z, peak, ordinary = stacked(views)
    with hardware.without_autocast(z.device):
        with torch.no_grad():
            units, length = lengths_of(z, peak, ordinary)
            cosine = _positive_cosine(units)
        seen = Batch(cosine, index=None, epoch=step.epoch, views=2, mean=torch.mean, anchors=units.flatten(0, 1))
        maps = step.temperature(seen)
        if any(_trained(each, cosine) for each in maps):
            return None
    found: Tensor = _ClosedForm.apply(z, (peak, ordinary), step, seen, maps, units, length)  # type: ignore[no-untyped-call]
    return found


def _trained(logit_map: LogitMap, cosine: Tensor) -> bool:
    parts = logit_map.parts()
    if parts is None:
        return logit_map.logit(cosine).requires_grad
    return any(tensor.requires_grad for tensor in parts.tensors)


def _positive_cosine(units: Tensor) -> Tensor:
    """(rows, 1) cosines of the two views of every image, for the rows of both."""
    cosine = (units[0] * units[1]).sum(1, keepdim=True)
    return torch.cat([cosine, cosine])


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, peaks: Any, step: Step, seen: Batch, maps: LogitMaps, units: Tensor, length: Tensor
    ) -> Tensor:
        with hardware.without_autocast(z.device):
            logit, positive_slope = maps.positive.logit_and_slope(seen.positive_cosine * maps.positive.gain)
            positive = logit.squeeze(1)
            negative, total, tile = _over_negatives(units, maps.negative, slope=ctx.needs_input_grad[0])
            rows, stats = step.rows(positive, negative, seen.positive_cosine.squeeze(1))
            if step.learns:
                step.temperature.update(stats, seen)
        ctx.step, ctx.maps, ctx.peaks, ctx.positive_slope = step, maps, peaks, positive_slope
        ctx.save_for_backward(units, length, negative - positive, total, tile, z)
        return rows.mean()

    @staticmethod
    def backward(ctx: Any, arriving: Tensor) -> tuple[Tensor | None, ...]:
        units, length, difference, total, tile, z = ctx.saved_tensors
        with hardware.without_autocast(z.device):
            if torch.is_grad_enabled() or tracing.transformed(arriving) or tracing.batched(arriving):
                by_z = _by_autograd(ctx.step, ctx.maps, z, ctx.peaks, arriving)
            else:
                by_negative = ctx.step.objective.slope(difference, **ctx.step.settings) * (arriving / len(difference))
                by_units = _of_negatives(units, ctx.maps.negative, tile, by_negative / total)
                by_positive = ctx.positive_slope(by_negative[:, None]).view(2, -1, 1).sum(0) * ctx.maps.positive.gain
                by_units -= units.flip(0) * by_positive
                by_z = gradient_of_rows(units, length, by_units)
        return by_z, *[None] * 6


def _over_negatives(units: Tensor, negative: LogitMap, *, slope: bool) -> tuple[Tensor, Tensor, Tensor]:
    """L of every row, and of its exponentials the sum and, times the slope where that is asked for, all of them."""
    rows, excluded = units.flatten(0, 1), _excluded(units)
    scaled = torch.mm(rows * negative.gain, rows.T)
    logit, multiply_by_slope = negative.logit_and_slope(scaled, (scaled, torch.empty_like(scaled)))
    shift = None
    if negative.bound > UNSHIFTED:
        logit = excluded.fill_(logit.clone(), -torch.inf)  # the map's slope may be made of its logit
        shift = logit.amax(1)
        logit -= shift[:, None]
    tile = excluded.fill_(torch.exp(logit, out=scaled), 0.0)
    total = tile.sum(1)
    log_total = total.log() if shift is None else total.log() + shift
    return log_total, total, multiply_by_slope(tile) if slope else tile


def _of_negatives(units: Tensor, negative: LogitMap, tile: Tensor, weight: Tensor) -> Tensor:
    """The gradient by the units: of dL_i/ds_ij = e_ij a'(s_ij) / total_i, by the row and by the column that j is."""
    weight = weight * negative.gain
    if negative.rowless and negative.bound <= UNSHIFTED:  # the tile is symmetric
        by_cosine = (weight[:, None] + weight).mul_(tile)
    else:
        of_rows = tile * weight[:, None]
        by_cosine = of_rows + of_rows.T
    return torch.mm(by_cosine, units.flatten(0, 1)).view_as(units)


def _excluded(units: Tensor) -> Excluded:
    return Excluded(units.shape[1], units.shape[1], 0, 2)


def _by_autograd(step: Step, maps: LogitMaps, z: Tensor, peaks: Any, arriving: Tensor) -> Tensor:
    """The gradient by z, which autograd may differentiate further where that is asked for."""
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        units = by_peak(z, *peaks)
        cosine = _positive_cosine(units)
        positive = maps.positive.logit(cosine).squeeze(1)
        anchors = units.flatten(0, 1)
        found = dense.negative_stats(anchors, None, _excluded(units), maps.negative, want_cosine=False)
        rows, _ = step.rows(positive, found.negative, cosine.squeeze(1))
        (by_z,) = torch.autograd.grad(rows.mean(), z, arriving, create_graph=further)
    return by_z
