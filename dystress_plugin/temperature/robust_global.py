"""FastCLIP: one learned temperature that descends on a distributionally robust loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from dystress_plugin import tracing
from dystress_plugin.checks import check_between, check_positive
from dystress_plugin.hardware import wide
from dystress_plugin.rows import RowStats
from dystress_plugin.temperature.base import Batch, given_epoch, given_index
from dystress_plugin.temperature.maps import LogitMaps, Scaled
from dystress_plugin.temperature.scalar import LearnedScalar
from dystress_plugin.temperature.tables import RunningMeans, check_length, warn_of_reach


@final
class RobustGlobal(LearnedScalar):
    """a(s) = s / tau, tau = exp(log_tau) one parameter for all pairs that descends on tau mean_i log u_i + rho tau.

    For every anchor i, of both sides, with h_j = s_j - s_p for its n negatives j, p its positive:

        g_i   = mean_j exp(h_j / tau)
        u_i  <- (1 - gamma) u_i + gamma g_i, but g_i at the first visit
        w_j   = exp(h_j / tau) / (n u_i)
        G     = rho + mean_i( log u_i - sum_j w_j h_j / tau )        the gradient of tau

    Embeddings get the gradient of the same loss, mean_i sum_j w_j dh_j: the objective "gcl". With gamma = 1 it needs
    neither an index nor a table, and G is rho less the mean Kullback-Leibler distance of the weights from uniform.
    The parameter belongs to the loss: give `loss.parameters()` to the optimizer too, without weight decay.

    FastCLIP-v3, 2024, https://arxiv.org/abs/2407.01445 (CC3M: rho 6.5, gamma down to 0.2 over half of the epochs, a
    learning rate of 2e-4 for tau and of a third of it below 0.03; CC12M: rho 8.5, 1e-4; LAION: rho 16, gamma 0.8).

    Args:
        tau: temperature at the start, in [tau_min, 1], where it is held, as CLIP holds its own.
        rho: Kullback-Leibler distance that tau is driven to, above 0; a larger one gives a smaller temperature. None is
            6.5 with running means, and 0.4 without.
        gamma: share of the batch in u, in (0, 1].
        gamma_epochs: epochs over which gamma comes down from 1 on half a cosine; None: it is the same all along.
        num_samples: size of the data set, or a pair of them where the sides are numbered apart; not needed, and
            without effect, for gamma = 1.
        tau_min: lowest temperature, above 0.
        released: count the second term of G twice, as the released code does; the published rho belong to it.

    Raises:
        ValueError: for running means without num_samples, or at an index outside of them.

    Warns:
        UserWarning: at the first batch that is learned from, where gamma = 1 and rho >= log(n): no distribution over n
            negatives is that far from uniform, so the temperature would only sink.
    """

    needs_negative_cosine = True
    default_objective = "gcl"

    def __init__(
        self,
        tau: float = 0.07,
        rho: float | None = None,
        gamma: float = 1.0,
        gamma_epochs: float | None = None,
        num_samples: int | tuple[int, int] | None = None,
        tau_min: float = 0.01,
        released: bool = False,
    ) -> None:
        super().__init__(tau, tau_min, 1.0)
        self.gamma = check_between("gamma", check_positive("gamma", gamma), 0, 1)
        self.gamma_epochs = None if gamma_epochs is None else check_positive("gamma_epochs", gamma_epochs)
        self.needs_index = self.gamma < 1
        self.needs_epoch = self.gamma_epochs is not None
        self.rho = check_positive("rho", (6.5 if self.needs_index else 0.4) if rho is None else rho)
        self.released = bool(released)
        self._rho_checked = False
        if self.gamma == 1 and self.gamma_epochs is not None:
            raise ValueError(f"gamma_epochs={gamma_epochs} is how long gamma comes down from 1: give a gamma below 1.")
        if self.needs_index and num_samples is None:
            raise ValueError(f"gamma={gamma} keeps a running mean of every sample: give num_samples=len(dataset).")
        self.means: nn.ModuleList | tuple[()] = ()  # of each side
        if self.needs_index:
            self.resize(num_samples)  # type: ignore[arg-type]  # a number or two by now

    @property
    def num_samples(self) -> int | None:
        return self.table_lengths[0] if self.needs_index else None

    @property
    def table_lengths(self) -> tuple[int, ...]:
        return tuple(len(side.log_s) for side in self.means)  # type: ignore[arg-type]

    @property
    def has_learned(self) -> bool:
        return any(bool(side.visited.any()) for side in self.means)  # type: ignore[operator, union-attr]

    def resize(self, num_samples: int | Sequence[int]) -> None:
        if not self.needs_index:
            raise TypeError("RobustGlobal with gamma=1 keeps no table of samples.")
        pair = isinstance(num_samples, (tuple, list)) and len(num_samples) == 2
        lengths: Any = num_samples if pair else (num_samples, num_samples)
        self.means = nn.ModuleList(RunningMeans(check_length(length)) for length in lengths)
        self.means.to(self.log_tau.device)

    def gamma_at(self, epoch: float | None) -> float:
        """The share of the batch in u at an epoch."""
        if self.gamma_epochs is None:
            return self.gamma
        share = min(1.0, given_epoch(epoch, "RobustGlobal with gamma_epochs") / self.gamma_epochs)
        return self.gamma + 0.5 * (1 - self.gamma) * (1 + math.cos(math.pi * share))

    def concerns(self, epochs: float) -> list[str]:
        if self.gamma_epochs is None or epochs > self.gamma_epochs:
            return []
        return [
            f"The share of the batch never comes down to gamma={self.gamma}: it takes gamma_epochs="
            f"{self.gamma_epochs:g}, but training ends after {epochs:g}."
        ]

    def prepare(self, batch: Batch) -> LogitMaps:
        tau = self._tau(batch)
        map_ = Scaled(tau.detach(), least=self.least, trained=tau)
        return LogitMaps(map_, map_)

    def by_difference(self, batch: Batch) -> bool:
        return True

    @torch.no_grad()
    def running_mean(self, stats: RowStats, batch: Batch) -> Tensor | None:
        if not self.needs_index:
            return None
        log_u = torch.cat([log_u for _, _, log_u in self._moved(stats, batch)])
        return tracing.read((log_u + positive_logit(stats)).to(stats.negative.dtype))

    def own_loss(self, maps: LogitMaps, stats: RowStats, batch: Batch) -> Tensor:
        assert isinstance(maps.negative, Scaled)  # as `prepare` gives it; narrows the types
        assert maps.negative.trained is not None
        tau = maps.negative.trained
        return robust_gradient(stats, tau.detach(), self.rho, 2 if self.released else 1) * (tau - tau.detach())

    @torch.no_grad()
    def update(self, stats: RowStats, batch: Batch) -> None:
        if self.gamma == 1 and not self._rho_checked and tracing.eager(stats.negative):
            self._rho_checked = True
            advice = "Use a smaller rho or a larger batch."
            warn_of_reach(self.rho, stats.num_negatives, f"tau only sinks, to tau_min={self.tau_min}", advice)
        if self.needs_index:
            sides = self._moved(stats, batch)
            for means, index, log_u in sides:
                means.write(index, log_u, batch.views if len(sides) == 1 else 1)

    def _moved(self, stats: RowStats, batch: Batch) -> list[tuple[RunningMeans, Tensor, Tensor]]:
        """Of every side its means, its samples, and the logarithms of where the batch moves these, (rows,)."""
        log_g = wide(stats.negative.detach()) - stats.log_num_negatives - positive_logit(stats)
        index, gamma = given_index(batch.index, "RobustGlobal"), self.gamma_at(batch.epoch)
        sides = batch.views if batch.layout == "both_ways" else 1
        each = zip(self.means, index.chunk(sides), log_g.chunk(sides), strict=False)  # the second for two sides
        return [(means, own, means.moved(own, log_g, gamma)) for means, own, log_g in each]  # type: ignore[operator, misc]

    def extra_repr(self) -> str:
        own = {"tau": f"{math.exp(float(self.log_tau.detach())):.4g}", "rho": self.rho, "gamma": self.gamma}
        own |= {"gamma_epochs": self.gamma_epochs, "num_samples": self.num_samples, "tau_min": self.tau_min}
        return ", ".join(f"{name}={value}" for name, value in own.items()) + f", released={self.released}"


def positive_logit(stats: RowStats) -> Tensor:
    """s_p / tau, which exp(h / tau) has less than exp(s / tau) in its exponent."""
    assert stats.positive_logit is not None  # a loss always gives it; narrows the type
    return wide(stats.positive_logit.detach())


def robust_gradient(stats: RowStats, tau: Tensor, rho: float, times: int = 1) -> Tensor:
    """log u_i + rho - times sum_j w_j h_j / tau of every anchor, see `RobustGlobal`; detached."""
    assert stats.negative_cosine is not None  # needs_negative_cosine; narrows the type
    log_g = stats.negative.detach() - stats.log_num_negatives
    log_s = log_g if stats.log_s is None else stats.log_s
    h = stats.negative_cosine.detach() - stats.positive_cosine.detach()
    return log_s - positive_logit(stats).to(log_s.dtype) + rho - times * torch.exp(log_g - log_s) * h / tau
