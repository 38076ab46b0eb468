"""Positives by class: all pairs of a class, whose number differs between anchors, some rows of the matrix at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dystress_plugin import tracing
from dystress_plugin.engine.tiles import entries_of_a_tile
from dystress_plugin.layout import Alike
from dystress_plugin.objectives import Objective
from dystress_plugin.rows import RowStats
from dystress_plugin.temperature.maps import LogitMap

# From some anchors, all candidates, and which anchors these are, to numbers of each of them.
OfRows: TypeAlias = "Callable[[Tensor, Tensor, slice], tuple[Tensor, ...]]"


class PositiveStats(NamedTuple):
    """The members of `RowStats` that are of the positives' logits."""

    positive: Tensor
    positive_logit: Tensor
    soft_positive: Tensor | None = None


def positive_stats(
    anchors: Tensor, candidates: Tensor | None, alike: Alike, logit_map: LogitMap, *, ratio: float | None
) -> PositiveStats:
    """P_i = log sum_p exp(a(s_ip)) over the positives p of anchor i, all others of its class, and what goes with it.

    Args:
        anchors: (rows, dim), of length 1.
        candidates: (columns, dim), of length 1; None where they are the anchors themselves.
        alike: the classes of both.
        logit_map: a.
        ratio: by which to divide the logits for `soft_positive`; None for none.
    """

    def of_rows(anchors: Tensor, candidates: Tensor, rows: slice) -> tuple[Tensor, ...]:
        positive = alike.rows(rows).positives()
        logit = logit_map.rows(rows).logit(anchors @ candidates.T)
        mean = torch.where(positive, logit, 0.0).sum(1) / positive.sum(1)
        logit = logit.masked_fill(~positive, -math.inf)
        soft = () if ratio is None else (torch.logsumexp(logit.detach() / ratio, 1),)
        return torch.logsumexp(logit, 1), mean, *soft

    return PositiveStats(*_some_rows_at_a_time(of_rows, anchors, candidates))


def mean_loss(
    anchors: Tensor,
    candidates: Tensor | None,
    alike: Alike,
    logit_map: LogitMap,
    stats: RowStats,
    *,
    objective: Objective,
    settings: Mapping[str, float],
) -> Tensor:
    """The mean over an anchor's positives of the objective's loss of each alone, (rows,).

    The first four arguments are those of `positive_stats`; `stats` are of all positives joined, `settings` the
    objective's parameters.
    """

    def of_rows(anchors: Tensor, candidates: Tensor, rows: slice) -> tuple[Tensor, ...]:
        positive = alike.rows(rows).positives()
        cosine = anchors @ candidates.T
        logit = torch.where(positive, logit_map.rows(rows).logit(cosine), 0.0)
        terms = _of_pairs(stats.rows(rows), logit, cosine, objective, objective.ratio(settings))
        losses = torch.where(positive, objective.rows(terms, settings), 0.0)
        return (losses.sum(1) / positive.sum(1),)

    (losses,) = _some_rows_at_a_time(of_rows, anchors, candidates)
    return losses


def _of_pairs(stats: RowStats, logit: Tensor, cosine: Tensor, objective: Objective, ratio: float | None) -> RowStats:
    """The statistics of every positive alone, (rows, candidates)."""
    columns: Any = {name: value[:, None] for name, value in vars(stats).items() if isinstance(value, Tensor)}
    negative = columns["negative"]
    if objective.competing:  # with the other positives too: all there is, less the pair itself
        everything = torch.logaddexp(columns["positive"], negative)
        least = torch.finfo(logit.dtype).eps  # closer to all there is, the digits end
        negative = everything + (logit - everything).clamp(max=-least).expm1().neg().log()
    of_pair = {"positive": logit, "positive_logit": logit, "positive_cosine": cosine, "negative": negative}
    soft = {} if ratio is None else {"soft_positive": logit.detach() / ratio}
    return replace(stats, **columns | of_pair | soft, mean=partial(_no_mean, objective.name))


def _no_mean(name: str, _: Tensor) -> Tensor:
    raise ValueError(
        f"objective='{name}' weighs the positives of a whole batch against each other, and with labels they are never "
        "all there: use positives='sum'."
    )


def _some_rows_at_a_time(of_rows: OfRows, anchors: Tensor, candidates: Tensor | None) -> tuple[Tensor, ...]:
    """What `of_rows` returns of all anchors; computed again in the backward pass, so that no matrix is kept."""
    others = anchors if candidates is None else candidates
    step = max(1, entries_of_a_tile(anchors.device) // len(others))
    if len(anchors) <= step or not tracing.eager(anchors):
        return of_rows(anchors, others, slice(0, len(anchors)))
    again = partial(checkpoint, of_rows, use_reentrant=False, preserve_rng_state=False)
    spans = [slice(start, min(start + step, len(anchors))) for start in range(0, len(anchors), step)]
    return tuple(map(torch.cat, zip(*(again(anchors[rows], others, rows) for rows in spans), strict=True)))
