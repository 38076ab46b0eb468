"""MACL: one temperature per batch, from how well the model aligns positives."""

from __future__ import annotations

import warnings
from typing import final

from torch import Tensor

from dystress_plugin import tracing
from dystress_plugin.checks import check_at_least, check_between, check_positive
from dystress_plugin.hardware import Glance
from dystress_plugin.rows import RowStats
from dystress_plugin.temperature.base import Batch, Temperature
from dystress_plugin.temperature.maps import LogitMaps, Scaled

FLOOR = 0.1  # of tau; our choice, since the paper leaves the temperature free to become negative


@final
class ModelAware(Temperature):
    """a(s) = s / tau_a, tau_a = tau * (1 + alpha * (A - threshold)), A = mean cosine of the positives, detached.

    Well aligned positives raise the temperature. With gathered batches A is the mean over all ranks.

    MACL, 2023, https://arxiv.org/abs/2207.07874 (vision: tau 0.1, alpha 0.5, threshold 0; sentences in the
    DySTreSS code: 0.05, 2, 0.8).

    Args:
        tau: base temperature, above 0.
        alpha: how strongly the alignment acts, at least 0.
        threshold: alignment at which the temperature is tau, in [-1, 1]; A_0 in the paper.

    Warns:
        UserWarning: once, when the formula would fall below tau / 10, where it is held, in a batch that is learned
            from. For A <= threshold - 1/alpha it would even be negative. On CUDA it comes some batches later, as no
            step waits for the device, and on other accelerators not at all.
    """

    default_objective = "macl"

    def __init__(self, tau: float = 0.1, alpha: float = 0.5, threshold: float = 0.0) -> None:
        super().__init__()
        self.tau = check_positive("tau", tau)
        self.alpha = check_at_least("alpha", alpha, 0)
        self.threshold = check_between("threshold", threshold, -1, 1)  # it is compared with a mean cosine
        # Most settings cannot reach the floor at all; then no step pays for looking.
        self._watch_floor = 1 + self.alpha * (-1 - self.threshold) < FLOOR
        self._glance = Glance()

    def prepare(self, batch: Batch) -> LogitMaps:
        least = max(FLOOR, 1 + self.alpha * (-1 - self.threshold))
        map_ = Scaled(self.tau * self._factor(batch).clamp(min=least), least=self.tau * least)
        return LogitMaps(map_, map_)

    def update(self, stats: RowStats, batch: Batch) -> None:
        if not self._watch_floor or not tracing.eager(batch.positive_cosine):
            return
        factor = self._glance.at(self._factor(batch))
        if factor < FLOOR:
            self._watch_floor = False
            alignment = self.threshold + (factor - 1) / self.alpha
            warnings.warn(
                f"MACL's temperature tau*(1 + alpha*(A - threshold)) = {self.tau * factor:.4g} at alignment "
                f"A={alignment:.3f} is below tau/10 and is held at {self.tau * FLOOR:.4g}; a smaller alpha "
                f"(now {self.alpha}) or threshold (now {self.threshold}) avoids this.",
                stacklevel=2,
            )

    def _factor(self, batch: Batch) -> Tensor:
        return 1 + self.alpha * (batch.mean(batch.positive_cosine) - self.threshold)
