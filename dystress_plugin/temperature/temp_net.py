"""TempNet: a temperature for every anchor, which a small network sees in its embedding."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dystress_plugin import distributed, tracing
from dystress_plugin.checks import check_between, check_count, check_positive, check_range
from dystress_plugin.hardware import wide
from dystress_plugin.rows import RowStats
from dystress_plugin.temperature.base import Batch, Temperature, given_index
from dystress_plugin.temperature.maps import LogitMaps, Scaled
from dystress_plugin.temperature.robust_global import positive_logit, robust_gradient
from dystress_plugin.temperature.tables import RunningMeans, check_length, warn_of_reach

PROTOTYPES = 256


@final
class TempNet(Temperature):
    """a(s) = s / tau_i, tau_i = tau_min + (tau_max - tau_min) sigmoid(r_i), r_i a network of anchor i's embedding e.

        x = dropout(sigmoid(W e + b))        p = x . c_m / |c_m|, for 256 prototypes c_m
        r = sum_m v_m (w_m - 1/256) sigmoid(p_m) + v_0,        w = softmax(p / exp(scaler))

    The embedding is detached. With h_j = s_j - s_p for the n negatives j, p the positive:

        g_i   = mean_j exp(h_j / tau_i)
        u_i  <- (1 - gamma) u_i + gamma g_i, but g_i at the first visit
        w_j   = exp(h_j / tau_i) / (n u_i)
        G_i   = rho + log u_i - sum_j w_j h_j / tau_i                the gradient of tau_i

    Embeddings get that of sum_j w_j h_j, as `Individual` has it with two sides: the objective "sogclr". With gamma = 1
    it needs neither an index nor a table. With the layout "both_ways" each side has a network. Prototypes start as the
    first embeddings that anchors are compared with, of all ranks: for images captions, and for captions images.
    Dropout, of a half, is on in train mode where gradients are.

    The parameters belong to the loss: give `loss.parameters()` to the optimizer too, without weight decay, in a group
    of their own: the paper has Adam at 3e-5.

    TempNet, 2024, https://arxiv.org/abs/2404.04575 (dim 256, rho 7, gamma 0.8; 131,586 parameters a side).

    Args:
        dim: numbers in an embedding.
        rho: Kullback-Leibler distance that tau_i is driven to, above 0; a larger one gives smaller temperatures. None
            is 7 with running means, and 0.4 without.
        gamma: share of the batch in u, in (0, 1].
        num_samples: size of the data set; not needed, and without effect, for gamma = 1.
        tau_min: lowest temperature, above 0.
        tau_max: highest temperature.

    Raises:
        ValueError: for running means without num_samples, at an index outside of them, or for embeddings of another
            length.

    Warns:
        UserWarning: at the first batch that is learned from, where gamma = 1 and rho >= log(n): no distribution over n
            negatives is that far from uniform, so every temperature would only sink.
    """

    needs_negative_cosine = True
    per_side = True
    default_objective = "sogclr"

    begun: Tensor

    def __init__(
        self,
        dim: int,
        rho: float | None = None,
        gamma: float = 1.0,
        num_samples: int | None = None,
        tau_min: float = 0.005,
        tau_max: float = 0.05,
    ) -> None:
        super().__init__()
        self.dim = check_count("dim", dim)
        self.gamma = check_between("gamma", check_positive("gamma", gamma), 0, 1)
        self.needs_index = self.gamma < 1
        self.rho = check_positive("rho", (7.0 if self.needs_index else 0.4) if rho is None else rho)
        self.tau_min, self.tau_max = check_range(tau_min, tau_max)
        if self.needs_index and num_samples is None:
            raise ValueError(f"gamma={gamma} keeps a running mean of every sample: give num_samples=len(dataset).")
        self.transform = nn.Linear(self.dim, self.dim)
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, self.dim))
        self.scaler = nn.Parameter(torch.tensor(math.log(0.01)))
        self.head = nn.Linear(PROTOTYPES, 1)
        nn.init.ones_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))
        self._begun = self._rho_checked = False  # known without looking, which on a GPU would wait
        self.means: RunningMeans | None = None
        if self.needs_index:
            self.resize(num_samples)  # type: ignore[arg-type]  # a number by now

    @property
    def num_samples(self) -> int | None:
        return None if self.means is None else len(self.means.log_s)

    @property
    def has_learned(self) -> bool:
        return self.means is not None and bool(self.means.visited.any())

    def resize(self, num_samples: int) -> None:
        if not self.needs_index:
            super().resize(num_samples)
        self.means = RunningMeans(check_length(num_samples)).to(self.scaler.device)

    @torch.no_grad()
    def begin(self, opposite: Tensor) -> None:
        if self._begun or tracing.transformed(self.prototypes):  # torch.func changes no parameter
            return
        (first,) = distributed.all_rows(opposite[:PROTOTYPES].detach())
        first = first[:PROTOTYPES].to(self.prototypes.dtype)
        start = torch.cat([first, self.prototypes[len(first) :]])
        self.prototypes.copy_(torch.where(self.begun, self.prototypes, start))
        self.begun.fill_(True)
        self._begun = tracing.eager(opposite)

    def prepare(self, batch: Batch) -> LogitMaps:
        tau = self._tau(batch)
        map_ = Scaled(tau.detach(), least=self.tau_min * (1 - 1e-6), trained=tau)
        return LogitMaps(map_, map_)

    def _tau(self, batch: Batch) -> Tensor:
        """(rows, 1), in the dtype of the embeddings, with the graph of the parameters."""
        anchors = batch.anchors
        if anchors is None or anchors.shape[1] != self.dim:
            given = "none" if anchors is None else anchors.shape[1]
            raise ValueError(f"TempNet's dim={self.dim} is not that of the embeddings, {given}: build it with theirs.")

        def linear(x: Tensor, layer: nn.Linear) -> Tensor:
            return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))

        x = torch.sigmoid(linear(anchors.detach(), self.transform))
        # What only looks at a batch draws no random number.
        x = F.dropout(x, 0.5, training=self.training and torch.is_grad_enabled())
        p = x @ F.normalize(self.prototypes.to(x.dtype), dim=1).T
        weight = torch.softmax(p / self.scaler.to(x.dtype).exp(), dim=1)
        r = linear((weight - 1 / PROTOTYPES) * torch.sigmoid(p), self.head)
        return self.tau_min + (self.tau_max - self.tau_min) * torch.sigmoid(r)

    def by_difference(self, batch: Batch) -> bool:
        return True

    def own_loss(self, maps: LogitMaps, stats: RowStats, batch: Batch) -> Tensor:
        assert isinstance(maps.negative, Scaled)  # as `prepare` gives it; narrows the types
        assert maps.negative.trained is not None
        tau = maps.negative.trained.flatten()
        return robust_gradient(stats, tau.detach(), self.rho) * (tau - tau.detach())

    @torch.no_grad()
    def running_mean(self, stats: RowStats, batch: Batch) -> Tensor | None:
        if self.means is None:
            return None
        return tracing.read((self._moved(self.means, stats, batch) + positive_logit(stats)).to(stats.negative.dtype))

    @torch.no_grad()
    def update(self, stats: RowStats, batch: Batch) -> None:
        if self.means is not None:
            self.means.write(given_index(batch.index, "TempNet"), self._moved(self.means, stats, batch), batch.views)
        elif not self._rho_checked and tracing.eager(stats.negative):
            self._rho_checked = True
            what = f"every temperature sinks to tau_min={self.tau_min}"
            warn_of_reach(self.rho, stats.num_negatives, what, "Use a smaller rho or a larger batch.")

    def _moved(self, means: RunningMeans, stats: RowStats, batch: Batch) -> Tensor:
        log_g = wide(stats.negative.detach()) - stats.log_num_negatives - positive_logit(stats)
        return means.moved(given_index(batch.index, "TempNet"), log_g, self.gamma)

    def _load_from_state_dict(self, *state: Any) -> None:
        self._begun = False  # as far as is known
        super()._load_from_state_dict(*state)

    def extra_repr(self) -> str:
        names = ("dim", "rho", "gamma", "num_samples", "tau_min", "tau_max")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
