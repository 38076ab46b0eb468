"""Engines compute row statistics from embeddings; nothing else ever holds the matrix of similarities."""

from __future__ import annotations

from dystress_plugin.engine.dense import negative_stats as _dense
from dystress_plugin.engine.rows import NegativeStats, RowStats

ENGINES = {"dense": _dense, "auto": _dense}

__all__ = ["ENGINES", "NegativeStats", "RowStats"]
