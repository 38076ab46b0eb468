"""What an engine computes: a few numbers per anchor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowStats:
    """Everything an objective reads, one entry per anchor i, each of shape (rows,).

    Attributes:
        positive: P_i, logsumexp of the logits of i's positives.
        negative: L_i, logsumexp of the logits of i's negatives.
        positive_cosine: s_i, mean cosine of i with its positives.
        negative_cosine: N_i, mean cosine of i with its negatives, weighted by the softmax of their logits. The
            weights are detached: its gradient with respect to a cosine is that negative's softmax weight.
            None unless asked for. N_i / tau is also the mean logit, which the gradient of a temperature needs.
        num_negatives: how many negatives each anchor has; (rows,) where their number differs, as with classes.
        log_s: log of the running mean of exp(logit) over i's negatives that SogCLR divides by; None is the batch's
            own mean.
        difference: for which anchors SogCLR is of the negatives' cosines less the positive's, weights and loss alike;
            None is for none.
        positive_logit: mean logit of i's positives, as far as something reads it.
        soft_positive, soft_negative: P_i and L_i of all logits over a second temperature's ratio to the first,
            detached. None unless asked for.
        mean: mean of a tensor over the batch; over all ranks where the batch is gathered from them.
    """

    positive: Tensor
    negative: Tensor
    positive_cosine: Tensor
    negative_cosine: Tensor | None
    num_negatives: int | Tensor
    log_s: Tensor | None = None
    difference: Tensor | None = None
    positive_logit: Tensor | None = None
    soft_positive: Tensor | None = None
    soft_negative: Tensor | None = None
    mean: Callable[[Tensor], Tensor] = torch.mean

    @property
    def log_num_negatives(self) -> float | Tensor:
        """The logarithm of `num_negatives`."""
        if isinstance(self.num_negatives, Tensor):
            return self.num_negatives.to(self.negative.dtype).log()
        return math.log(self.num_negatives)

    def rows(self, rows: slice) -> RowStats:
        """Those of some of the anchors."""
        if (rows.start, rows.stop) == (0, len(self.positive)):
            return self
        cut: dict[str, Any] = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **cut)


class NegativeStats(NamedTuple):
    """The members of `RowStats` that need the matrix of similarities: all that an engine returns."""

    negative: Tensor
    negative_cosine: Tensor | None
    soft_negative: Tensor | None = None
