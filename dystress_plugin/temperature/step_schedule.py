"""A temperature that alternates between two values."""

from __future__ import annotations

from typing import final

from dystress_plugin.checks import check_positive, check_range
from dystress_plugin.temperature.base import Batch, Temperature
from dystress_plugin.temperature.maps import LogitMaps, Scaled


@final
class StepSchedule(Temperature):
    """a(s) = s / tau(e), tau(e) = tau_max in the first half of every period and tau_min in the second, e the epoch.

    Temperature Schedules, 2023, https://arxiv.org/abs/2303.13664, compares its cosine with a step; the released code
    has none, so this form is our definition.

    Args:
        tau_min: lower temperature, above 0.
        tau_max: higher temperature, at least tau_min.
        period: epochs of one full cycle, above 0.
        per_step: whether adapters pass the epoch with its fraction; see `CosineSchedule`.

    Raises:
        ValueError: if a value is out of its range.
    """

    needs_epoch = True

    def __init__(
        self, tau_min: float = 0.1, tau_max: float = 1.0, period: float = 400.0, *, per_step: bool = False
    ) -> None:
        super().__init__()
        self.tau_min, self.tau_max = check_range(tau_min, tau_max)
        self.period = check_positive("period", period)
        self.per_step = bool(per_step)

    def tau(self, epoch: float) -> float:
        """The temperature at an epoch."""
        return self.tau_max if epoch % self.period < self.period / 2 else self.tau_min

    def concerns(self, epochs: float) -> list[str]:
        if epochs > self.period / 2:
            return []
        return [
            f"The temperature never changes to tau_min={self.tau_min}: it does after half a period of "
            f"{self.period / 2:g} epochs, but training ends after {epochs:g}. Set period={epochs:g} for one full cycle."
        ]

    def prepare(self, batch: Batch) -> LogitMaps:
        if batch.epoch is None:
            raise ValueError("StepSchedule needs the epoch: call loss(z0, z1, epoch=current_epoch).")
        map_ = Scaled(self.tau(batch.epoch))
        return LogitMaps(map_, map_)

    def extra_repr(self) -> str:
        return f"tau_min={self.tau_min}, tau_max={self.tau_max}, period={self.period}, per_step={self.per_step}"
