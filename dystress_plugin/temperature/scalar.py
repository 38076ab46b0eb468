"""One temperature for all pairs: a constant, the baseline of every comparison; or learned, as CLIP has it."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

from dystress_plugin import tracing
from dystress_plugin.checks import check_between, check_positive, check_range
from dystress_plugin.temperature.base import Batch, Temperature
from dystress_plugin.temperature.maps import LogitMaps, Scaled


@final
class Constant(Temperature):
    """a(s) = s / tau with one fixed number.

    SimCLR, 2020, https://arxiv.org/abs/2002.05709 (0.1 for ImageNet, 0.5 for CIFAR-10); SimCo, 2022,
    https://arxiv.org/abs/2203.17248 (0.1, with the objective "dual").

    Args:
        tau: temperature, above 0.
    """

    def __init__(self, tau: float = 0.1) -> None:
        super().__init__()
        self.tau = check_positive("tau", tau)

    def prepare(self, batch: Batch) -> LogitMaps:
        map_ = Scaled(self.tau)
        return LogitMaps(map_, map_)


class LearnedScalar(Temperature):
    """tau = exp(log_tau), one parameter, held in [tau_min, tau_max]."""

    scalar = "log_tau"

    def __init__(self, tau: float, tau_min: float, tau_max: float) -> None:
        super().__init__()
        self.tau_min, self.tau_max = check_range(tau_min, tau_max)
        tau = check_between("tau", check_positive("tau", tau), self.tau_min, self.tau_max, "[tau_min, tau_max]")
        self.log_tau = nn.Parameter(torch.tensor(math.log(tau)))

    @property
    def least(self) -> float:
        """What it is never below, as rounded."""
        return self.tau_min * (1 - 1e-6)

    @torch.no_grad()
    def hold_parameters(self) -> None:
        # As in CLIP; else it would go on outside, and be long on its way back.
        if not tracing.transformed(self.log_tau):  # torch.func changes no parameter
            self.log_tau.copy_(self._held())

    def _held(self) -> Tensor:
        return self.log_tau.detach().clamp(math.log(self.tau_min), math.log(self.tau_max))

    def _tau(self, batch: Batch) -> Tensor:
        """The temperature in the dtype of a batch, with gradient."""
        # Held in its range by value alone: a clamp in the graph would leave it without gradient outside, for good.
        held = self._held() + (self.log_tau - self.log_tau.detach())
        return held.to(batch.positive_cosine.dtype).exp()


@final
class Learnable(LearnedScalar):
    """a(s) = s / tau, tau = exp(log_tau) one parameter, trained with the model and held in [tau_min, tau_max].

    With L the logsumexp of an anchor's negative logits, dL / dlog_tau = -(mean of those logits under their softmax).
    The parameter belongs to the loss: give `loss.parameters()` to the optimizer too, without weight decay.

    CLIP, 2021, https://arxiv.org/abs/2103.00020 (0.07 at the start, never below 0.01).

    Args:
        tau: temperature at the start, in [tau_min, tau_max].
        tau_min: lowest temperature, above 0.
        tau_max: highest temperature.
    """

    def __init__(self, tau: float = 0.07, tau_min: float = 0.01, tau_max: float = 1.0) -> None:
        super().__init__(tau, tau_min, tau_max)

    def prepare(self, batch: Batch) -> LogitMaps:
        map_ = Scaled(self._tau(batch), least=self.least)
        return LogitMaps(map_, map_)

    def extra_repr(self) -> str:
        return f"tau={math.exp(float(self.log_tau.detach())):.4g}, tau_min={self.tau_min}, tau_max={self.tau_max}"
