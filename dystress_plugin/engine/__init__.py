"""Engines compute row statistics from embeddings; nothing else ever holds the matrix of similarities."""

from __future__ import annotations

from torch import Tensor

from dystress_plugin.engine import blockwise, dense
from dystress_plugin.engine.positives import PositiveStats, mean_loss, positive_stats
from dystress_plugin.layout import Alike, Excluded
from dystress_plugin.rows import NegativeStats, RowStats
from dystress_plugin.temperature.maps import LogitMap


def auto(
    anchors: Tensor,
    candidates: Tensor | None,
    excluded: Excluded | Alike,
    logit_map: LogitMap,
    *,
    want_cosine: bool,
    ratio: float | None = None,
) -> NegativeStats:
    """The faster of the two engines for this size, or the one that can."""
    entries = len(anchors) * len(anchors if candidates is None else candidates)
    whole = entries <= dense.most_entries(anchors) or (
        entries <= blockwise.WHOLE_ENTRIES and not blockwise.in_tiles(anchors, candidates, logit_map)
    )
    engine = dense if whole else blockwise
    stats: NegativeStats = engine.negative_stats(
        anchors, candidates, excluded, logit_map, want_cosine=want_cosine, ratio=ratio
    )
    return stats


ENGINES = {"auto": auto, "dense": dense.negative_stats, "blockwise": blockwise.negative_stats}

__all__ = ["ENGINES", "NegativeStats", "PositiveStats", "RowStats", "mean_loss", "positive_stats"]
