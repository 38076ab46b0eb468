"""What an engine computes: a few numbers per anchor, and a double loop that says so slowly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
        num_negatives: how many negatives each anchor has.
        log_s: log of the running mean of exp(logit) over i's negatives that SogCLR divides by; None is the batch's
            own mean.
        mean: mean of a tensor over the batch; over all ranks where the batch is gathered from them.
    """

    positive: Tensor
    negative: Tensor
    positive_cosine: Tensor
    negative_cosine: Tensor | None
    num_negatives: int
    log_s: Tensor | None = None
    mean: Callable[[Tensor], Tensor] = torch.mean


class NegativeStats(NamedTuple):
    """The two members of `RowStats` that need the matrix of similarities: all that an engine returns."""

    negative: Tensor
    negative_cosine: Tensor | None


def naive_row_stats(
    anchors: Sequence[Sequence[float]],
    candidates: Sequence[Sequence[float]],
    positives: Sequence[Sequence[int]],
    excluded: Sequence[Sequence[int]],
    logit: Callable[[float], float],
) -> list[tuple[float, float, float, float]]:
    """(P, L, s, N) of every anchor in plain Python: the definition that engines are tested against.

    Args:
        anchors: vectors of length 1.
        candidates: vectors of length 1.
        positives: for every anchor the candidates that show the same image.
        excluded: for every anchor the candidates that are not negatives: itself and its positives.
        logit: from cosine to logit.
    """
    result = []
    for i, anchor in enumerate(anchors):
        cosine = [sum(a * c for a, c in zip(anchor, candidate, strict=True)) for candidate in candidates]
        negatives = [j for j in range(len(candidates)) if j not in excluded[i]]
        total = sum(math.exp(logit(cosine[j])) for j in negatives)
        result.append(
            (
                math.log(sum(math.exp(logit(cosine[j])) for j in positives[i])),
                math.log(total),
                sum(cosine[j] for j in positives[i]) / len(positives[i]),
                sum(math.exp(logit(cosine[j])) * cosine[j] for j in negatives) / total,
            )
        )
    return result
