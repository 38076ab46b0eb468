"""Temperature-free InfoNCE: the log-odds of the cosine instead of a quotient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from dystress_plugin.checks import check_between
from dystress_plugin.temperature.base import Batch, Temperature
from dystress_plugin.temperature.maps import LogitMap, LogitMaps, Parts, PartsReader


@dataclass(frozen=True)
class LogOddsMap(LogitMap):
    """a(s) = 2 artanh(s), with s held in [-1 + clamp, 1 - clamp]; no gradient beyond."""

    clamp: float

    def logit(self, cosine: Tensor) -> Tensor:
        # `where`, since releases of torch differ in the gradient of `clamp` at its very end.
        held = cosine.detach().clamp(self.clamp - 1, 1 - self.clamp)
        return 2 * torch.atanh(torch.where(self._inside(cosine), cosine, held))

    def slope(self, cosine: Tensor) -> Tensor:
        # (1 - s)(1 + s) keeps the digits near 1 that 1 - s*s loses.
        return torch.where(self._inside(cosine), 2 / ((1 - cosine) * (1 + cosine)), 0.0)

    def temperature(self, cosine: Tensor) -> Tensor:
        held = cosine.clamp(self.clamp - 1, 1 - self.clamp)
        return (1 - held) * (1 + held) / 2

    def parts(self) -> Parts:
        return Parts((self.kind,), (self.clamp,), ())

    @classmethod
    def from_parts(cls, parts: PartsReader) -> LogOddsMap:
        return LogOddsMap(next(parts.numbers))

    @property
    def bound(self) -> float:
        return 2 * math.atanh(1 - self.clamp)

    def _inside(self, cosine: Tensor) -> Tensor:
        return cosine.abs() < 1 - self.clamp


@final
class TemperatureFree(Temperature):
    """a(s) = log((1 + s) / (1 - s)) = 2 artanh(s); the local temperature, 1 / a'(s), is (1 - s^2) / 2.

    An almost, but not quite, identical negative has a gradient of 2 / angle, up to about 1400 at the default
    clamp: clip gradients where a batch may hold near-duplicates.

    Temperature-Free Loss Function for Contrastive Learning, 2025, https://arxiv.org/abs/2501.17683 (no parameter;
    it prescribes no clamp that we could find).

    Args:
        clamp: how far |s| stays below 1, in [1e-6, 0.5]; the least that float32 resolves well.
    """

    def __init__(self, clamp: float = 1e-6) -> None:
        super().__init__()
        self.clamp = check_between("clamp", clamp, 1e-6, 0.5)

    def prepare(self, batch: Batch) -> LogitMaps:
        map_ = LogOddsMap(self.clamp)
        return LogitMaps(map_, map_)
