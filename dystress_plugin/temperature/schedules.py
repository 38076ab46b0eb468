"""Temperature schedules: one temperature per epoch."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import final

from dystress_plugin.checks import check_positive, check_range
from dystress_plugin.temperature.base import Batch, Temperature, given_epoch
from dystress_plugin.temperature.maps import LogitMaps, Scaled


class Schedule(Temperature):
    """a(s) = s / tau(e), tau(e) periodic in the epoch e, from tau_max over tau_min after half a period back.

    Args:
        tau_min: lowest temperature, above 0.
        tau_max: highest temperature, at least tau_min.
        period: epochs of one full cycle, above 0.
        per_step: whether the adapters pass the epoch with its fraction, so that the temperature moves at every step
            instead of every epoch. The loss itself takes either.
    """

    needs_epoch = True
    _arrival: str

    def __init__(
        self, tau_min: float = 0.1, tau_max: float = 1.0, period: float = 400.0, *, per_step: bool = False
    ) -> None:
        super().__init__()
        self.tau_min, self.tau_max = check_range(tau_min, tau_max)
        self.period = check_positive("period", period)
        self.per_step = bool(per_step)

    @abstractmethod
    def tau(self, epoch: float) -> float:
        """The temperature at an epoch."""

    def concerns(self, epochs: float) -> list[str]:
        if epochs > self.period / 2:
            return []
        return [
            f"The temperature never {self._arrival} tau_min={self.tau_min}: it takes half a period of "
            f"{self.period / 2:g} epochs, but training ends after {epochs:g}, at {self.tau(max(epochs - 1, 0)):.3g}. "
            f"Set period={epochs:g} for one full cycle."
        ]

    def prepare(self, batch: Batch) -> LogitMaps:
        map_ = Scaled(self.tau(given_epoch(batch.epoch, type(self).__name__)))
        return LogitMaps(map_, map_)


@final
class CosineSchedule(Schedule):
    """a(s) = s / tau(e), tau(e) = tau_min + (tau_max - tau_min) * (1 + cos(2 * pi * e / period)) / 2, e the epoch.

    It starts at tau_max, reaches tau_min after half a period and returns. The formula is evaluated at the epoch
    as given: adapters pass the library's current epoch, 0 first, while the paper's code counts from 1. The arguments
    are those of `Schedule`.

    Temperature Schedules, 2023, https://arxiv.org/abs/2303.13664 (0.1 to 1.0, period 400 epochs, which its code
    calls t_max=200, half the period; 2000 epochs on CIFAR, so training ends at tau_max).
    """

    _arrival = "comes down to"

    def tau(self, epoch: float) -> float:
        return self.tau_min + 0.5 * (self.tau_max - self.tau_min) * (1 + math.cos(2 * math.pi * epoch / self.period))


@final
class StepSchedule(Schedule):
    """a(s) = s / tau(e), tau(e) = tau_max in the first half of every period and tau_min in the second, e the epoch.

    Temperature Schedules, 2023, https://arxiv.org/abs/2303.13664, compares its cosine with a step; the released code
    has none, so this form is our definition. The arguments are those of `Schedule`.
    """

    _arrival = "changes to"

    def tau(self, epoch: float) -> float:
        return self.tau_max if epoch % self.period < self.period / 2 else self.tau_min
