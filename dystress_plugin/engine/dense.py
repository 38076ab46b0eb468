"""The dense engine: the whole matrix at once, in plain autograd. The reference; for small batches faster than tiles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dystress_plugin.layout import Alike, Excluded
from dystress_plugin.rows import NegativeStats
from dystress_plugin.temperature.maps import LogitMap

# Entries of the matrix up to which the dense engine is the faster one: measured on a CPU, where the two differ by a
# tenth below and the blockwise engine wins ever more clearly above.
ENTRIES = 2**16
# Bytes of the matrix up to which it is taken elsewhere: on an H100 the dense engine is a fifth faster at 16 MiB, 1024
# images in two views, and the blockwise one at 256 MiB, in a fifth of the memory.
BYTES_ELSEWHERE = 64 * 2**20


def most_entries(like: Tensor) -> int:
    """Entries up to which "auto" takes the matrix as a whole, in the dtype and on the device of `like`."""
    if like.device.type == "cpu":
        return ENTRIES
    return BYTES_ELSEWHERE // max(4, like.itemsize)  # half precisions are computed in float32


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
