"""The objective axis: how the statistics of a row become its loss. Pure functions of `RowStats`.

With P and L the logsumexp of the positives' and of the negatives' logits and d = L - P:

    ntxent   log(1 + exp(d))                                  SimCLR, 2020, https://arxiv.org/abs/2002.05709
    macl     log(1 + exp(d)) / sg[sigmoid(d)]                 MACL, 2023, https://arxiv.org/abs/2207.07874
    sogclr   w N - s, w = sg[g / running mean of g]           iSogCLR, 2023, https://arxiv.org/abs/2305.11965
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dystress_plugin.engine.rows import RowStats


def ntxent(stats: RowStats) -> Tensor:
    """-log(positive / (positive + negatives)), the cross-entropy of every anchor."""
    # Not F.softplus: above its threshold it returns d itself, which is wrong in the ninth digit.
    return -F.logsigmoid(stats.positive - stats.negative)


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

    Without a running mean s = g, and the weights are the softmax of the negatives. For a temperature that is the
    same for a whole row the gradient is tau times that of w L - P.
    """
    assert stats.negative_cosine is not None  # Objective.needs_negative_cosine; narrows the type
    if stats.log_s is None:
        return stats.negative_cosine - stats.positive_cosine
    log_g = stats.negative.detach() - math.log(stats.num_negatives)
    return torch.exp(log_g - stats.log_s) * stats.negative_cosine - stats.positive_cosine


@dataclass(frozen=True)
class Objective:
    """A row's loss and how rows are joined.

    Attributes:
        row_loss: from the statistics to (rows,).
        needs_negative_cosine: whether it reads `RowStats.negative_cosine`.
        sum_over_views: sum over the views of an image instead of their mean; always the mean over images.
    """

    row_loss: Callable[[RowStats], Tensor]
    needs_negative_cosine: bool = False
    sum_over_views: bool = False


OBJECTIVES: dict[str, Objective] = {
    "ntxent": Objective(ntxent),
    "macl": Objective(macl),
    "sogclr": Objective(sogclr, needs_negative_cosine=True, sum_over_views=True),
}
