"""What a temperature would do to the similarities of a network's embeddings: weights, gradients and order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dystress_plugin.contrastive import ContrastiveLoss
from dystress_plugin.diagnostics import summaries
from dystress_plugin.embeddings import normalize
from dystress_plugin.engine import RowStats
from dystress_plugin.objectives import OBJECTIVES
from dystress_plugin.temperature import Constant
from dystress_plugin.temperature.base import Batch
from dystress_plugin.temperature.maps import LogitMap, LogitMaps

HARDEST = {"hardest_1_percent": 0.01, "hardest_10_percent": 0.1}  # of an anchor's negatives

BALANCED = (0.05, 0.5)  # of the negatives are effective: below, a few decide; above, nearly all count alike

SHUFFLES = 16  # of the candidates, to compare each with another one

GRID = 2001  # cosines between -1 and 1


class Similarities(NamedTuple):
    """The cosines of a batch, anchor by anchor, and what a temperature may ask about it.

    Attributes:
        positive: (anchors, 1).
        negative: (anchors, negatives).
        images: how many images the anchors show, view by view.
        numbers: (images,) int64, of the images among the training images.
        epoch: 0 first.
        anchors: (anchors, dim) of length 1.
    """

    positive: Tensor
    negative: Tensor
    images: int
    numbers: Tensor
    epoch: float
    anchors: Tensor

    @property
    def batch(self) -> Batch:
        """As a temperature sees it."""
        views = len(self.positive) // self.images
        index = self.numbers.repeat(views)
        return Batch(self.positive, index, self.epoch, views, torch.mean, anchors=self.anchors)


@dataclass(frozen=True)
class Effect:
    """What one temperature does.

    Attributes:
        maps: from cosine to logit.
        weight: (anchors, negatives) softmax of the negatives' logits; 1 for every anchor.
        push: (anchors, negatives) derivative of the anchor's loss by the cosine of each negative.
        pull: (anchors, 1) the same for the positive, negative where the loss attracts.
        measures: what `measure` made of them.
    """

    maps: LogitMaps
    weight: Tensor
    push: Tensor
    pull: Tensor
    measures: dict[str, Any]


def similarities(z0: Tensor, z1: Tensor, *, index: Tensor, epoch: float) -> Similarities:
    """All cosines of a batch, in double: every view against both views of all other images.

    Args:
        z0: (images, dim), any scale.
        z1: (images, dim), the other view of each.
        index: as for the loss.
        epoch: as for the loss.
    """
    z = z0.double(), z1.double()
    pairs = ContrastiveLoss(Constant(1.0)).pairs(*z)
    positive = pairs.positive_cosine[:, None]
    negative = pairs.negative_cosine.view(len(positive), -1)
    return Similarities(positive, negative, len(z0), index, epoch, normalize(torch.cat(z)))


def describe(z0: Tensor, z1: Tensor) -> dict[str, dict[str, float]]:
    """Mean, min and max of the cosines of `positive` and `negative` pairs."""
    found = summaries(ContrastiveLoss(Constant(1.0)), z0, z1, max_images=len(z0))
    return {s.pairs: s.statistics for s in found if s.quantity == "similarity"}


def effect(loss: ContrastiveLoss, seen: Similarities) -> Effect:
    """What the loss's temperature and objective do to these pairs; changes no state.

    Args:
        loss: its engine, layout and queue play no part.
        seen: the pairs.
    """
    batch = seen.batch
    with torch.no_grad():
        maps = loss.temperature.prepare(batch)
    positive, negative = (cosine.detach().requires_grad_() for cosine in (seen.positive, seen.negative))
    logits = maps.negative.logit(negative)
    weight = torch.softmax(logits.detach(), dim=1)
    stats = RowStats(
        positive=torch.logsumexp(maps.positive.logit(positive), dim=1),
        positive_logit=maps.positive.logit(positive).mean(dim=1),
        negative=torch.logsumexp(logits, dim=1),
        positive_cosine=positive.mean(dim=1),
        negative_cosine=(weight * negative).sum(dim=1),
        num_negatives=negative.shape[1],
    )
    difference = torch.full_like(stats.negative, loss.temperature.by_difference(batch), dtype=torch.bool)
    stats = replace(stats, log_s=loss.temperature.running_mean(stats, batch), difference=difference)
    objective = OBJECTIVES[loss.objective]
    if (ratio := objective.ratio(loss.objective_settings)) is not None:
        soft = torch.logsumexp(maps.positive.logit(positive).detach() / ratio, dim=1)
        stats = replace(stats, soft_positive=soft, soft_negative=torch.logsumexp(logits.detach() / ratio, dim=1))
    rows = objective.rows(stats, loss.objective_settings)
    pull, push = torch.autograd.grad(rows.sum(), (positive, negative))
    return Effect(maps, weight, push, pull, measure(maps, weight, push, seen))


@torch.no_grad()
def measure(maps: LogitMaps, weight: Tensor, push: Tensor, seen: Similarities) -> dict[str, Any]:
    """The numbers that describe an effect; means over the anchors.

    tau_positive_*, tau_negative_*   mean, min and max of the temperatures of the pairs
    effective_negatives              1 / sum_j w_j^2: how many equal weights would be as concentrated
    hardest_1_percent, _10_percent   percent of the push on the most similar 1 % and 10 % of an anchor's negatives,
                                     at least one of them
    push_cosine                      mean cosine of the negatives, weighted by their push
    inverted_percent                 percent of pairs of an anchor's candidates whose logits are not in the order of
                                     their cosines; a sample with a fixed seed
    falling                          [from, to] of the cosines where a more similar negative has a smaller logit
    falling_percent                  percent of the negative pairs there
    """
    strength = push.abs()
    total = strength.sum(dim=1, keepdim=True)
    # At a tiny temperature the push of an anchor far ahead of its negatives underflows; its shares tend to the weights.
    share = torch.where(total > 0, strength / total, weight)
    ranked = share.gather(1, seen.negative.argsort(dim=1, descending=True))
    found: dict[str, Any] = {}
    for pairs, tau in (
        ("positive", maps.positive.temperature(seen.positive)),
        ("negative", maps.negative.temperature(seen.negative)),
    ):
        found |= {f"tau_{pairs}_{how}": float(getattr(tau, how)()) for how in ("mean", "min", "max")}
    found["effective_negatives"] = float((1 / weight.square().sum(dim=1)).mean())
    for name, part in HARDEST.items():
        first = max(1, round(part * ranked.shape[1]))
        found[name] = 100 * float(ranked[:, :first].sum(dim=1).mean())
    found["push_cosine"] = float((share * seen.negative).sum(dim=1).mean())
    found["inverted_percent"] = 100 * inverted_share(
        torch.cat([seen.positive, seen.negative], dim=1),
        torch.cat([maps.positive.logit(seen.positive), maps.negative.logit(seen.negative)], dim=1),
    )
    found["falling"] = falling(maps.negative, len(seen.positive))
    inside = sum(((low < seen.negative) & (seen.negative < high)).sum() for low, high in found["falling"])
    found["falling_percent"] = 100 * float(inside) / seen.negative.numel()
    return found


def inverted_share(cosine: Tensor, logit: Tensor) -> float:
    """Share of pairs of a row whose logits are in the other order than their cosines; of a fixed random sample.

    Args:
        cosine: (rows, candidates).
        logit: (rows, candidates).
    """
    generator = torch.Generator().manual_seed(0)
    wrong = compared = 0
    for _ in range(SHUFFLES):
        other = torch.randperm(cosine.shape[1], generator=generator).to(cosine.device)
        closer, larger = cosine - cosine[:, other], logit - logit[:, other]
        wrong += int((closer * larger < 0).sum())
        compared += int((closer != 0).sum())
    return wrong / max(1, compared)


def on_grid(map_: LogitMap, anchors: int, what: str) -> tuple[Tensor, Tensor]:
    """Cosines from -1 to 1, (points,), and `logit` or `temperature` there, (1 or anchors, points)."""
    grid = torch.linspace(-1, 1, GRID, dtype=torch.float64)
    rows = 1 if map_.rowless else anchors
    with torch.no_grad():
        return grid, getattr(map_, what)(grid.expand(rows, GRID))


def falling(map_: LogitMap, anchors: int) -> list[list[float]]:
    """The ranges of cosines, rounded to the grid, in which the logit of some anchor falls as the cosine grows."""
    grid, logit = on_grid(map_, anchors, "logit")
    down = (logit.diff(dim=1) < 0).any(dim=0).tolist()
    ranges: list[list[float]] = []
    for low, high, falls, fell in zip(grid.tolist(), grid[1:].tolist(), down, [False, *down], strict=False):
        if falls and fell:
            ranges[-1][1] = round(high, 3)
        elif falls:
            ranges.append([round(low, 3), round(high, 3)])
    return ranges


def relative_weight(found: Effect, seen: Similarities) -> tuple[Tensor, Tensor]:
    """Cosines in the range of the negatives, and the weight of a negative there over the mean negative's.

    Of the median anchor: n exp(a(s) - L) with L the logsumexp of its n negatives' logits.
    """
    grid, logit = on_grid(found.maps.negative, len(seen.positive), "logit")
    with torch.no_grad():
        level = torch.logsumexp(found.maps.negative.logit(seen.negative), dim=1) - math.log(seen.negative.shape[1])
    inside = (grid >= seen.negative.min()) & (grid <= seen.negative.max())
    return grid[inside], torch.exp(logit[:, inside] - level[:, None]).median(dim=0).values


def advice(title: str, measures: dict[str, Any], reference: dict[str, Any], name: str, negatives: int) -> str:
    """One sentence: what this temperature would change against the reference.

    Args:
        title: of the method.
        measures: of its effect.
        reference: the measures of what it is compared with.
        name: what the reference is called.
        negatives: how many each anchor has.
    """
    hard, before = measures["hardest_1_percent"], reference["hardest_1_percent"]
    number, number_before = measures["effective_negatives"], reference["effective_negatives"]
    if measures is reference:
        start = f"{title} is what the others are compared with: the most similar 1 % of the negatives get {hard:.0f} %"
        middle = f"of the push, and the weights are as concentrated as {number:.0f} equal ones of {negatives}"
    elif abs(hard - before) < 1 and abs(number / number_before - 1) < 0.05:
        start = f"{title} would change little against {name}: the most similar 1 % get {hard:.0f} % of the push"
        middle = f"({before:.0f} %), and {number:.0f} negatives are effective ({number_before:.0f})"
    else:
        kind = "concentrate the push on" if hard > before else "spread the push away from"
        start = f"{title} would {kind} the hardest negatives: the most similar 1 % get {hard:.0f} % of it"
        middle = (
            f"({name}: {before:.0f} %), and {number:.0f} of {negatives} negatives are effective ({number_before:.0f})"
        )
    return f"{start} {middle}{_order(measures)}."


class First(NamedTuple):
    """What to try first: its name, None for nothing, and why, a sentence."""

    name: str | None
    sentence: str


def first_to_try(
    candidates: Mapping[str, dict[str, Any]], reference: dict[str, Any], name: str, negatives: int
) -> First:
    """By a rule of thumb: of what neither a few negatives nor all decide, what changes the push on the hardest most.

    Args:
        candidates: the measures of the effects to choose from.
        reference: as for `advice`.
        name: as for `advice`.
        negatives: as for `advice`.
    """
    low, high = BALANCED
    balanced = f"keeps the order of similarities with {100 * low:.0f} to {100 * high:.0f} % of the negatives effective"
    likely = {
        title: its
        for title, its in candidates.items()
        if not its["falling"] and low <= its["effective_negatives"] / negatives <= high
    }
    hard = {title: its["hardest_1_percent"] for title, its in likely.items()}
    before = reference["hardest_1_percent"]
    best = max(hard, key=lambda title: abs(hard[title] - before), default=None)
    if best is None or abs(hard[best] - before) < 1:
        return First(None, f"Nothing to try first: no other method here {balanced} and differs from {name}.")
    return First(
        best,
        f"Try first: {best}. Of what {balanced}, it differs most from {name}: the most similar "
        f"1 % get {hard[best]:.0f} % of the push instead of {before:.0f} %. Whether that helps, only training "
        "shows.",
    )


def _order(measures: dict[str, Any]) -> str:
    if not measures["falling"]:
        return ""
    where = " and ".join(f"{low:.2f} to {high:.2f}" for low, high in measures["falling"])
    return (
        f"; between cosines {where} a more similar negative gets a smaller logit, which puts "
        f"{measures['inverted_percent']:.2g} % of the pairs in the wrong order"
    )
