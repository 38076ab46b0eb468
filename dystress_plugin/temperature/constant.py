"""A constant temperature, the baseline of every comparison."""

from __future__ import annotations

from typing import final

from dystress_plugin.checks import check_positive
from dystress_plugin.temperature.base import Batch, Temperature
from dystress_plugin.temperature.maps import LogitMaps, Scaled


@final
class Constant(Temperature):
    """a(s) = s / tau with one fixed number.

    SimCLR, 2020, https://arxiv.org/abs/2002.05709 (0.1 for ImageNet, 0.5 for CIFAR-10).

    Args:
        tau: temperature, above 0.
    """

    def __init__(self, tau: float = 0.1) -> None:
        super().__init__()
        self.tau = check_positive("tau", tau)

    def prepare(self, batch: Batch) -> LogitMaps:
        map_ = Scaled(self.tau)
        return LogitMaps(map_, map_)
