"""iSogCLR: a learned temperature for every sample of the data set."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, final

import torch
from torch import Tensor

from dystress_plugin import tracing
from dystress_plugin.checks import (
    check_at_least,
    check_between,
    check_fraction,
    check_positive,
    check_range,
    unknown_name,
)
from dystress_plugin.hardware import wide, widest
from dystress_plugin.rows import RowStats
from dystress_plugin.temperature.base import Batch, Temperature
from dystress_plugin.temperature.maps import LogitMaps, Scaled
from dystress_plugin.temperature.tables import (
    by_sample,
    check_length,
    checked_index,
    keep_double,
    log_mean,
    moved_mean,
    warn_of_reach,
)


class _Seen(NamedTuple):
    """What a batch shows of its samples, (rows,) each, in the letters of `Individual`; `log_s` is its new s_v."""

    sample: Tensor
    tau: Tensor
    positive: Tensor
    log_g: Tensor
    log_s: Tensor


@final
class Individual(Temperature):
    """a(s) = s / tau_i, with tau_i learned for sample i from the distribution of its negatives.

    After each batch that is learned from, for image i with views v (anchors), n negatives s_j each:

        g_v   = mean_j exp(s_j / tau_i)
        s_v   = (1 - gamma) S_i + gamma g_v, but g_v at the first visit
        w_v   = g_v / s_v                                    S_i <- mean_v s_v
        G     = mean_v( log s_v + rho - w_v sum_j softmax_j(s_j / tau_i) s_j / tau_i ), held in [-clip, clip]
        u_i  <- (1 - beta) u_i + beta G                      tau_i <- tau_i - eta u_i, held in [tau_min, tau_max]

    S is kept as its logarithm, so no tau overflows it. A batch uses the tau_i from before it. A sample that occurs
    several times in a batch is updated once, with the mean over its occurrences. Where torch.distributed runs, every
    rank applies the updates of all ranks, so the tables stay equal (DistributedDataParallel would otherwise
    overwrite them with rank 0's). The released code never reaches its first-visit rule and so starts from
    s_v = gamma * g_v; this is corrected here.

    iSogCLR, 2023, https://arxiv.org/abs/2305.11965 (the defaults are its recipe for CIFAR-100; its constructor has
    rho 6, eta 0.001, beta 0.9; of image and text, by name with the layout "both_ways": tau from 0.01 in [0.005, 1],
    rho 6, gamma 0.8, beta 0.9, eta 0.03, clip 5).

    Args:
        num_samples: size of the data set; indices run from 0 to num_samples - 1.
        tau_init: temperature of every sample at the start, in [tau_min, tau_max].
        tau_min: lowest temperature, above 0.
        tau_max: highest temperature.
        rho: Kullback-Leibler distance of the negatives' weights from uniform that tau_i is driven to, above 0 and
            below log(n). A larger rho gives smaller temperatures.
        gamma: share of the new batch in S, in (0, 1].
        beta: share of the new gradient in u, in (0, 1].
        eta: step size of tau, at least 0.
        clip: bound of G, above 0.
        gradient: "cosine" as above, the unimodal code's form, whose loss is w N - s_p, N = sum_j softmax_j s_j and p
            the positive. "difference" computes S, w and G from s_j - s_p instead, as the formula in the paper and
            the bimodal code do, and the loss is w (N - s_p). They agree at the first visit. None is "difference"
            with the layout "both_ways" and with `released`, else "cosine".
        released: compute S as the released bimodal code does, with the positive counted among the negatives, of which
            there are n nevertheless, and gamma g at the first visit. With few, dissimilar negatives its e^0 dominates
            g, so the published numbers belong to it. Kept in log space, without that code's 1e-10 and its bound that
            only grows.

    Attributes:
        tau, log_s, u, visited: buffers of length num_samples, so that a checkpoint resumes. The first three keep
            float64 when the module is moved to half precision: a moving average would be lost there.

    Raises:
        ValueError: if a value is out of its range, or at an index outside of the tables.

    Warns:
        UserWarning: at the first batch that is learned from, when rho >= log(n): no distribution over n negatives is
            that far from uniform, so every temperature would sink to tau_min.
    """

    needs_index = True
    needs_negative_cosine = True
    per_side = True
    default_objective = "sogclr"

    tau: Tensor
    log_s: Tensor
    u: Tensor
    visited: Tensor

    def __init__(
        self,
        num_samples: int,
        tau_init: float = 0.1,
        tau_min: float = 0.05,
        tau_max: float = 1.0,
        rho: float = 0.4,
        gamma: float = 0.8,
        beta: float = 0.5,
        eta: float = 0.03,
        clip: float = 3.0,
        *,
        gradient: str | None = None,
        released: bool = False,
    ) -> None:
        super().__init__()
        self.tau_min, self.tau_max = check_range(tau_min, tau_max)
        self.tau_init = check_between("tau_init", tau_init, self.tau_min, self.tau_max, "[tau_min, tau_max]")
        self.rho = check_positive("rho", rho)
        self.gamma = check_fraction("gamma", gamma)
        self.beta = check_fraction("beta", beta)
        if not self.gamma or not self.beta:
            raise ValueError(f"gamma={gamma} and beta={beta} must be above 0: at 0 nothing is ever learned.")
        self.eta = check_at_least("eta", eta, 0)
        self.clip = check_positive("clip", clip)
        if gradient not in (None, "cosine", "difference"):
            raise ValueError(unknown_name("gradient", gradient, ["cosine", "difference"]))
        if released and gradient == "cosine":
            raise ValueError("released=True is of the bimodal code, whose gradient is 'difference', not 'cosine'.")
        self.gradient, self.released = gradient, bool(released)
        self._rho_checked = False
        self.resize(num_samples)

    @property
    def num_samples(self) -> int:
        return len(self.tau)

    @property
    def has_learned(self) -> bool:
        return bool(self.visited.any())

    def resize(self, num_samples: int) -> None:
        num_samples = check_length(num_samples)
        device = (self.tau if "tau" in self._buffers else torch.empty(0)).device

        def table(value: float) -> Tensor:
            return torch.full((num_samples,), value, dtype=widest(device), device=device)

        self.register_buffer("tau", table(self.tau_init))
        self.register_buffer("log_s", table(0.0))
        self.register_buffer("u", table(0.0))
        self.register_buffer("visited", torch.zeros(num_samples, dtype=torch.bool, device=device))

    def prepare(self, batch: Batch) -> LogitMaps:
        tau = tracing.read(self.tau[self._checked(batch.index)]).to(batch.positive_cosine.dtype)
        map_ = Scaled(tau[:, None], least=self.tau_min)
        return LogitMaps(map_, map_)

    def by_difference(self, batch: Batch) -> bool:
        default = "difference" if self.released or batch.layout == "both_ways" else "cosine"
        return (self.gradient or default) == "difference"

    @torch.no_grad()
    def running_mean(self, stats: RowStats, batch: Batch) -> Tensor:
        seen = self._seen(stats, batch)
        return tracing.read((seen.log_s + seen.positive / seen.tau).to(stats.negative.dtype))

    @torch.no_grad()
    def update(self, stats: RowStats, batch: Batch) -> None:
        if not self._rho_checked and tracing.eager(stats.negative):
            self._check_rho(stats.num_negatives)
        seen = self._seen(stats, batch)
        assert stats.negative_cosine is not None  # needs_negative_cosine; narrows the type
        weight = torch.exp(seen.log_g - seen.log_s)
        cosine = wide(stats.negative_cosine.detach())
        gradient = seen.log_s + self.rho - weight * (cosine - seen.positive) / seen.tau
        self._write(seen.sample, seen.log_s, gradient, batch.views)

    def _seen(self, stats: RowStats, batch: Batch) -> _Seen:
        index = self._checked(batch.index)
        tau = self.tau[index]
        # mean_j exp((s_j - s_p) / tau) is exp(-s_p / tau) times that of the cosines themselves. Detached, as no_grad
        # leaves forward-mode differentiation on.
        positive = wide(stats.positive_cosine.detach()) if self.by_difference(batch) else torch.zeros_like(tau)
        log_sum = wide(stats.negative.detach()) - positive / tau
        log_g = log_sum - stats.log_num_negatives
        counted, first = log_g, 0.0
        if self.released:
            counted = torch.logaddexp(log_sum, torch.zeros_like(tau)) - stats.log_num_negatives
            first = math.log(self.gamma)
        log_s = moved_mean(self.log_s[index], self.visited[index], counted, self.gamma, first)
        return _Seen(index, tau, positive, log_g, log_s)

    def _check_rho(self, num_negatives: int | Tensor) -> None:
        self._rho_checked = True
        what = f"every temperature sinks to tau_min={self.tau_min}"
        advice = "Use a smaller rho (the paper's CIFAR recipe has 0.4) or a larger batch."
        warn_of_reach(self.rho, num_negatives, what, advice)

    def _write(self, index: Tensor, log_s: Tensor, gradient: Tensor, views: int) -> None:
        gradient = gradient.view(views, -1).mean(0).clamp(-self.clip, self.clip)
        images, log_s, gradient = by_sample(index.view(views, -1)[0], log_mean(log_s, views), gradient)
        u = (1 - self.beta) * self.u[images] + self.beta * gradient
        self.log_s[images] = log_s
        self.u[images] = u
        self.tau[images] = (self.tau[images] - self.eta * u).clamp(self.tau_min, self.tau_max)
        self.visited.index_fill_(0, images, True)

    def _checked(self, index: Tensor | None) -> Tensor:
        return checked_index(index, self.num_samples, "Individual")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Individual:
        keep_double(self, fn, "tau", "log_s", "u")
        return self
