"""The objective axis: how the statistics of a row become its loss. Pure functions of `RowStats`.

With P and L the logsumexp of the positives' and of the negatives' logits and d = L - P:

    ntxent   log(1 + exp(d))                                  SimCLR, 2020, https://arxiv.org/abs/2002.05709
    macl     log(1 + exp(d)) / sg[sigmoid(d)]                 MACL, 2023, https://arxiv.org/abs/2207.07874
    sogclr   w N - s, w = sg[g / running mean of g]           iSogCLR, 2023, https://arxiv.org/abs/2305.11965
    gcl      the same, but the mean over views or sides       FastCLIP, 2024, https://arxiv.org/abs/2407.01445
    dcl      d                                                DCL, 2021, https://arxiv.org/abs/2110.06848
    dclw     L - w P, w = sg[2 - e^(s/sigma) / mean of it]    the same paper
    dual     macl's, times sg[1 - p at a second temperature]  SimCo, 2022, https://arxiv.org/abs/2203.17248
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from dystress_plugin.checks import check_at_least
from dystress_plugin.hardware import wide
from dystress_plugin.rows import RowStats


def ntxent(stats: RowStats) -> Tensor:
    """-log(positive / (positive + negatives)), the cross-entropy of every anchor."""
    # Above its threshold softplus returns d itself: at 20, its default, that is wrong in the ninth digit.
    return F.softplus(stats.negative - stats.positive, threshold=80)


def macl(stats: RowStats) -> Tensor:
    """-V log p with p the positive's probability and V = sg[1 / (1 - p)].

    The gradient is exactly that of d = L - P, so only the value is computed from p, and where p rounds to 1
    (d below -30) it is its limit 1 instead of 0/0.
    """
    d = stats.negative - stats.positive
    held = d.detach().clamp(min=-30)
    value = torch.where(d.detach() < -30, 1.0, -F.logsigmoid(-held) / torch.sigmoid(held))
    return value + (d - d.detach())


def sogclr(stats: RowStats) -> Tensor:
    """sum_j w_j s_j - s_positive with w_j = sg[exp(a_j) / (n s)], s a running mean of the batch's g = mean_j exp(a_j).

    Where s is one of mean_j exp(a_j - a_positive) it is sum_j w_j (s_j - s_positive). Without a running mean s = g, and
    the weights are the softmax of the negatives. For a temperature that is the same for a whole row the gradient is tau
    times that of w L - P.
    """
    assert stats.negative_cosine is not None  # Objective.needs_negative_cosine; narrows the type
    if stats.log_s is None:
        return stats.negative_cosine - stats.positive_cosine
    log_g = stats.negative.detach() - stats.log_num_negatives
    weight = torch.exp(log_g - stats.log_s)
    towards = 1.0 if stats.difference is None else torch.where(stats.difference, weight, 1.0)
    return weight * stats.negative_cosine - towards * stats.positive_cosine


def dcl(stats: RowStats) -> Tensor:
    """L - P: NT-Xent without the positive among the terms it competes with.

    One logsumexp over all negatives. The released DySTreSS code adds one over those of the same view and one over
    those of the other, which an old version of lightly had taken from nowhere in the paper; that is not offered.
    """
    return stats.negative - stats.positive


def dclw(stats: RowStats, *, sigma: float) -> Tensor:
    """L - w P with von Mises-Fisher weights w_i = 2 - exp(s_i / sigma) / mean_k exp(s_k / sigma), detached.

    s is the raw cosine of an anchor with its positives, and k runs over the whole batch: pairs that are already
    close weigh less. As sigma grows w tends to 1, and the objective to `dcl`.
    """
    # Wide: for a small sigma the exponentials of a batch lie far apart.
    e = torch.exp((wide(stats.positive_cosine.detach()) - 1) / sigma)
    weight = 2 - e / stats.mean(e)
    return stats.negative - weight.to(stats.positive.dtype) * stats.positive


def dual(stats: RowStats) -> Tensor:
    """-sg[(1 - p_soft) / (1 - p)] log p, p the positive's probability and p_soft that of all logits over a ratio.

    The gradient is 1 - p_soft times that of d = L - P: how an anchor weighs in the batch does not depend on the
    temperature that tells its negatives apart. SimCo's negatives are those of the other view alone, which is the
    layout "both_ways" of the two (temperature 0.1, ratio 10).
    """
    assert stats.soft_negative is not None  # Objective.softened_by; narrows the types
    assert stats.soft_positive is not None
    return torch.sigmoid(stats.soft_negative - stats.soft_positive) * macl(stats)


@dataclass(frozen=True)
class Objective:
    """A row's loss and how rows are joined.

    One of your own is a function of `RowStats`, which autograd differentiates: `ContrastiveLoss("dystress",
    objective=Objective("mine", row_loss))`.

    Attributes:
        name: what a user types.
        row_loss: from the statistics, and the parameters but `softened_by` by keyword, to (rows,).
        needs_negative_cosine: whether it reads `RowStats.negative_cosine`.
        sum_over_views: sum over the views of an image instead of their mean; always the mean over images.
        parameters: its own parameters with their defaults, positive numbers.
        softened_by: the parameter that says by what logits are divided in `RowStats.soft_positive` and `soft_negative`;
            None where it reads neither.
        competing: whether the positives of an anchor that are taken one by one are compared with each other too.
        slope: the derivative of a row's loss by d = L - P, from d and the parameters by keyword, where the loss is a
            function of it alone. Small batches go by it; engine="dense" differentiates `row_loss` itself.
    """

    name: str
    row_loss: Callable[..., Tensor]
    needs_negative_cosine: bool = False
    sum_over_views: bool = False
    parameters: Mapping[str, float] = field(default_factory=dict)
    softened_by: str | None = None
    competing: bool = False
    slope: Callable[..., Tensor] | None = None

    @property
    def has_closed_form(self) -> bool:
        """Whether P and L are all that the loss is of, and the derivative is known."""
        reads_more = self.needs_negative_cosine or self.softened_by is not None
        return self.slope is not None and not (reads_more or self.sum_over_views)

    def checked(self, settings: Mapping[str, float]) -> dict[str, float]:
        """All parameters, those in `settings` replaced; a ValueError unless each is in [0.01, inf), or in [1, inf)."""
        # Below, the weights of a batch underflow, and exp(logit / ratio) overflows.
        least = {name: 1.0 if name == self.softened_by else 0.01 for name in self.parameters}
        found = {n: check_at_least(n, settings.get(n, value), least[n]) for n, value in self.parameters.items()}
        if self.has_closed_form and OBJECTIVES.get(self.name) is not self:
            self._check_slope(found)
        return found

    def _check_slope(self, settings: Mapping[str, float]) -> None:
        """A ValueError unless `slope` is the derivative of `row_loss`, and that of d alone: a wrong one would train."""
        assert self.slope is not None  # has_closed_form; narrows the type
        with torch.inference_mode(False), torch.enable_grad():
            positive, negative, cosine = leaves = [
                torch.tensor(x, dtype=torch.float64, device="cpu", requires_grad=True)
                for x in ([0.0, 1.0, -2.0], [-1.5, 1.5, 0.5], [0.1, 0.7, -0.4])
            ]
            rows = self.row_loss(RowStats(positive, negative, cosine, None, 3), **settings)
            by_positive, by_negative, by_cosine = torch.autograd.grad(
                rows.sum(), leaves, allow_unused=True, materialize_grads=True
            )
            found = self.slope((negative - positive).detach(), **settings)
        fits = isinstance(found, Tensor) and found.shape == by_negative.shape and not by_cosine.any()
        if not (fits and all(torch.allclose(found.to(right), right) for right in (by_negative, -by_positive))):
            raise ValueError(
                f"Objective '{self.name}': at d = [-1.5, 0.5, 2.5] its slope is {found}, but row_loss has derivatives "
                f"by L, P and the cosine of {by_negative.tolist()}, {by_positive.tolist()} and {by_cosine.tolist()}: "
                "correct it, or leave slope out."
            )

    def rows(self, stats: RowStats, settings: Mapping[str, float]) -> Tensor:
        """The loss of every row."""
        return self.row_loss(stats, **{name: value for name, value in settings.items() if name != self.softened_by})

    def ratio(self, settings: Mapping[str, float]) -> float | None:
        """By what logits are divided for the softened statistics; None where they are not wanted."""
        return None if self.softened_by is None else settings[self.softened_by]


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective("ntxent", ntxent, slope=torch.sigmoid, competing=True),
        Objective("macl", macl, slope=torch.ones_like),
        Objective("sogclr", sogclr, needs_negative_cosine=True, sum_over_views=True),
        Objective("gcl", sogclr, needs_negative_cosine=True),
        Objective("dcl", dcl, slope=torch.ones_like),
        Objective("dclw", dclw, parameters={"sigma": 0.5}),
        Objective("dual", dual, parameters={"ratio": 10.0}, softened_by="ratio"),
    )
}
