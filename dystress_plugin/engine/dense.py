"""The dense engine: the whole matrix at once, in plain autograd. The reference, and the fastest for small batches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dystress_plugin.layout import Alike, Excluded
from dystress_plugin.rows import NegativeStats
from dystress_plugin.temperature.maps import LogitMap


def negative_stats(
    anchors: Tensor,
    candidates: Tensor | None,
    excluded: Excluded | Alike,
    logit_map: LogitMap,
    *,
    want_cosine: bool,
    ratio: float | None = None,
) -> NegativeStats:
    """L_i = log sum_j exp(a(s_ij)) over the negatives j of anchor i; the arguments are those of `blockwise`."""
    cosine = anchors @ (anchors if candidates is None else candidates).T
    logit = logit_map.logit(cosine).masked_fill(excluded.mask(len(anchors), cosine.shape[1], cosine.device), -math.inf)
    mean_cosine = None
    if want_cosine:
        weight = torch.softmax(logit.detach(), dim=1)
        mean_cosine = (weight * cosine).sum(1)
    soft = None if ratio is None else torch.logsumexp(logit.detach() / ratio, dim=1)
    return NegativeStats(torch.logsumexp(logit, dim=1), mean_cosine, soft)
