"""Temperature schedules: one temperature per epoch."""

from __future__ import annotations

import math
from abc import abstractmethod
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from dystress_plugin.checks import check_positive, check_range
from dystress_plugin.temperature.base import Batch, Temperature, given_epoch
from dystress_plugin.temperature.maps import LogitMaps, Scaled
from dystress_plugin.temperature.tables import checked_index


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


@final
class CosineSchedule(Schedule):
    """a(s) = s / tau(e), tau(e) = tau_min + (tau_max - tau_min) * (1 + cos(2 * pi * e / period)) / 2, e the epoch.

    It starts at tau_max, reaches tau_min after half a period and returns. The formula is evaluated at the epoch
    as given: adapters pass the library's current epoch, 0 first, while the paper's code counts from 1. The arguments
    are those of `Schedule`, and two more.

    With `offset` an anchor of sample i has its own: c_i + amplitude * cos(2 * pi * e / period) / 2, held in [tau_min,
    tau_max], c_i from tau_min for the samples with the least count linearly to tau_max for those with the most. What is
    frequent has a high temperature. With two sides each anchor has that of its own sample, while the released code
    takes one side's for both.

    Temperature Schedules, 2023, https://arxiv.org/abs/2303.13664 (0.1 to 1.0, period 400 epochs, which its code
    calls t_max=200, half the period; 2000 epochs on CIFAR, so training ends at tau_max). The offset is of MM-TS, 2026,
    https://arxiv.org/abs/2603.08202 (images with captions, 0.01 to 0.02, counts those of clusters of captions).

    Args:
        offset: (num_samples,) whole numbers, such as the size of every sample's class or cluster, or the path of a .npy
            file of them, for hosts that are told parameters as text; None for one temperature for all.
        amplitude: of the cosine's whole swing, above 0, with `offset`; None is tau_max - tau_min.

    Raises:
        ValueError: for counts that are all the same, or an amplitude without them.
        TypeError: for counts that are no whole numbers.
    """

    _arrival = "comes down to"

    counts: Tensor

    def __init__(
        self,
        tau_min: float = 0.1,
        tau_max: float = 1.0,
        period: float = 400.0,
        *,
        per_step: bool = False,
        offset: Any = None,
        amplitude: float | None = None,
    ) -> None:
        super().__init__(tau_min, tau_max, period, per_step=per_step)
        self.needs_index = offset is not None
        self.amplitude = amplitude
        if offset is None:
            if amplitude is not None:
                raise ValueError(f"amplitude={amplitude} is of the swing around an offset: give offset=counts.")
            return
        self.amplitude = self.tau_max - self.tau_min if amplitude is None else check_positive("amplitude", amplitude)
        counts = _counts(offset)
        self._range = counts.min().item(), counts.max().item()
        self.register_buffer("counts", counts, persistent=False)  # a setting, as the others are

    @property
    def num_samples(self) -> int | None:
        return len(self.counts) if self.needs_index else None

    def tau(self, epoch: float) -> float:
        return self.tau_min + 0.5 * (self.tau_max - self.tau_min) * (1 + self._wave(epoch))

    def concerns(self, epochs: float) -> list[str]:
        return [] if self.needs_index else super().concerns(epochs)

    def prepare(self, batch: Batch) -> LogitMaps:
        epoch = given_epoch(batch.epoch, "CosineSchedule")
        if not self.needs_index:
            return _same_for_all(self.tau(epoch))
        index = checked_index(batch.index, len(self.counts), "CosineSchedule with offset")
        least, most = self._range
        share = (self.counts[index] - least).to(batch.positive_cosine.dtype) / (most - least)
        wave = 0.5 * self.amplitude * self._wave(epoch)  # type: ignore[operator]  # no longer None
        tau = share * (self.tau_max - self.tau_min) + (self.tau_min + wave)
        map_ = Scaled(tau.clamp(self.tau_min, self.tau_max)[:, None], least=self.tau_min)
        return LogitMaps(map_, map_)

    def _wave(self, epoch: float) -> float:
        return math.cos(2 * math.pi * epoch / self.period)

    def extra_repr(self) -> str:
        own: dict[str, Any] = {
            "tau_min": self.tau_min,
            "tau_max": self.tau_max,
            "period": self.period,
            "per_step": self.per_step,
        }
        if self.needs_index:
            own |= {"offset": f"{self.num_samples} counts", "amplitude": self.amplitude}
        return ", ".join(f"{name}={value}" for name, value in own.items())


def _counts(given: Any) -> Tensor:
    """int64, (num_samples,), or an error that says what was given."""
    counts = torch.as_tensor(np.load(given) if isinstance(given, (str, Path)) else given)
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise TypeError(f"offset holds {counts.dtype}, and must be whole numbers, a count for every sample.")
    if counts.dim() != 1 or len(counts) == 0:
        raise ValueError(f"offset has shape {tuple(counts.shape)}, and must be (num_samples,).")
    if counts.min() == counts.max():
        raise ValueError(f"offset is {counts[0].item()} for every sample, which sets none apart: leave it out.")
    return counts.to(torch.int64, copy=True)


def _same_for_all(tau: float) -> LogitMaps:
    map_ = Scaled(tau)
    return LogitMaps(map_, map_)


@final
class StepSchedule(Schedule):
    """a(s) = s / tau(e), tau(e) = tau_max in the first half of every period and tau_min in the second, e the epoch.

    Temperature Schedules, 2023, https://arxiv.org/abs/2303.13664, compares its cosine with a step; the released code
    has none, so this form is our definition. The arguments are those of `Schedule`.
    """

    _arrival = "changes to"

    def tau(self, epoch: float) -> float:
        return self.tau_max if epoch % self.period < self.period / 2 else self.tau_min

    def prepare(self, batch: Batch) -> LogitMaps:
        return _same_for_all(self.tau(given_epoch(batch.epoch, "StepSchedule")))
