"""Drop-in criteria with lightly's argument names: an `NTXentLoss` goes out, one of these comes in.

They hold no formula: each is `dystress_plugin.ContrastiveLoss` under the name and with the arguments that lightly's
users know. As lightly's own they are 0 for a batch of one image without negatives, and take into a memory bank what is
trained on alone.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, final

from torch import Tensor, nn
from torch import distributed as dist

from dystress_plugin.checks import check_number, check_positive
from dystress_plugin.contrastive import ContrastiveLoss
from dystress_plugin.embeddings import check_view
from dystress_plugin.key_queue import KeyQueue
from dystress_plugin.objectives import Objective
from dystress_plugin.training import loss_or_zero


class Criterion(nn.Module, ABC):
    """A loss under lightly's names.

    Args:
        method: name in `dystress_plugin.recipes.METHODS`.
        arguments: those of the subclass by name, which is its `locals()`.
        **names: what the temperature calls an argument that lightly calls otherwise.

    Attributes:
        loss: the `ContrastiveLoss` that computes; `dystress_plugin.metrics.temperature_summary` takes it.
    """

    def __init__(self, method: str, arguments: Mapping[str, Any], **names: str) -> None:
        super().__init__()
        # Not all of `arguments`: among the locals is `self`.
        settings = {names.get(name, name): arguments[name] for name in inspect.signature(type(self)).parameters}
        if settings["gather_distributed"] and not dist.is_available():
            raise ValueError(
                "gather_distributed=True needs torch.distributed, which this build of torch does not have."
            )
        if settings["sigma"] is None:  # which one objective alone has
            del settings["sigma"]
        keys, dim = _bank_size(settings.pop("memory_bank_size", 0))
        self.loss = ContrastiveLoss(method, queue_size=(keys, dim) if keys and dim is not None else None, **settings)
        self._open_keys = keys if dim is None else 0  # of a bank that the first batch, or a state, tells the dim

    @abstractmethod
    def forward(self, z0: Tensor, z1: Tensor, *, labels: Tensor | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            z0: first view embeddings, (batch_size, embedding_size), not normalised.
            z1: second view embeddings, of the same shape.
            labels: (batch_size,) int64 classes, of which all embeddings are positives; not with a memory bank.
        """

    def _value(self, z0: Tensor, z1: Tensor, **more: Any) -> Tensor:
        if self._open_keys:
            self._open_bank(z0)
        return loss_or_zero(self.loss, z0, z1, **more)

    def _open_bank(self, z0: Tensor) -> None:
        check_view(0, z0, z0)
        if self.loss.queue is None:
            self.loss.queue = KeyQueue(self._open_keys, z0.shape[1])
        self.loss.queue.to(z0.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self._open_keys:  # a state from before the first batch has no bank
            keys = state_dict.get(f"{prefix}loss.queue.keys")
            self.loss.queue = None if keys is None else KeyQueue(self._open_keys, keys.shape[1])
            self.loss._begun = False  # ranks draw a new bank each
        super()._load_from_state_dict(state_dict, prefix, *args)


@final
class DySTreSSLoss(Criterion):
    """mean_i -log( exp(s_ip / tau(s_ip)) / (exp(s_ip / tau(s_ip)) + sum_n exp(s_in / tau(s_in))) ).

    NT-Xent with a temperature for every pair, from the pair's own cosine similarity s: tau_max for s = -1 and 1,
    tau_min for s = 0, tau(s) = tau_min + (tau_max - tau_min) * (1 - cos(pi * s)) / 2 between them. With
    tau_min = tau_max it is lightly's NTXentLoss.

    - [0] DySTreSS, 2023, https://arxiv.org/abs/2308.01140

    Args:
        tau_min: Lowest temperature, in (0, inf).
        tau_max: Highest temperature, in [tau_min, inf). The paper has 0.1 and 0.2 for ImageNet, 0.07 and 0.2 for CIFAR.
        memory_bank_size: (num_features, dim) of a memory bank, num_features alone for the dim of the first batch, or 0
            for none. With one z0 are the queries, z1 the keys, and the bank's features the negatives, as in MoCo.
        gather_distributed: Compare with the batches of all GPUs. A memory bank always takes in the keys of all GPUs.
        profile: Shape of tau(s): "cosine", "shifted", "cosine_constant", "exponential", "linear" or "root".
        shift, scale: Of "shifted" and "cosine_constant"; None is the profile's own. See
            `dystress_plugin.temperature.DySTreSS`, also for the next three.
        rate: Of "exponential"; None is the profile's own.
        detach: Take tau(s) for a constant in the gradient, as in the authors' code.
        negative_range: Another (tau_min, tau_max) for the negatives.
        stabilise: Epochs over which tau_min rises to tau_max; the epoch is then needed with every batch. None: never.
        objective: "ntxent", "macl", "sogclr", "dcl", "dclw" or "dual"; see `dystress_plugin.objectives`.
        sigma: Of "dclw", in [0.01, inf); None is 0.5.
        positives: How several positives are joined, which batches with labels have: "sum", or "mean" as in SupCon.

    Raises:
        ValueError: If not 0 < tau_min <= tau_max, for an unknown profile, a parameter that the profile does not have,
            or a memory bank of no such size.

    Examples:
        >>> loss_fn = DySTreSSLoss(tau_min=0.1, tau_max=0.2)
        >>>
        >>> # two random transforms of images, through a SimCLR or MoCo model
        >>> z0, z1 = model(transforms(images)), model(transforms(images))
        >>> loss = loss_fn(z0, z1)
    """

    def __init__(
        self,
        tau_min: float = 0.1,
        tau_max: float = 0.2,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        profile: str = "cosine",
        shift: float | None = None,
        scale: float | None = None,
        rate: float | None = None,
        detach: bool = True,
        negative_range: tuple[float, float] | None = None,
        stabilise: float | None = None,
        objective: str | Objective = "ntxent",
        sigma: float | None = None,
        positives: str = "sum",
    ) -> None:
        super().__init__("dystress", locals())

    def forward(self, z0: Tensor, z1: Tensor, epoch: float | None = None, *, labels: Tensor | None = None) -> Tensor:
        """The loss of a batch; `stabilise` alone reads the epoch, 0 first, and needs it."""
        return self._value(z0, z1, epoch=epoch, labels=labels)


@final
class MACLLoss(Criterion):
    """mean_i -sg[1 / (1 - p_i)] log p_i, p_i = exp(s_ip / tau_a) / (exp(s_ip / tau_a) + sum_n exp(s_in / tau_a)).

    The temperature is one per batch, tau_a = temperature * (1 + alpha * (A - A_0)), with A the mean cosine similarity
    s_ip of the positives, without gradient. What lightly's own MACLLoss does not have: a memory bank, gathered
    negatives (A is then the mean over all GPUs), any alpha >= 0, and exact values and gradients where p_i rounds to 1,
    for which lightly adds 1e-8 to the divisor.

    - [0] Model-Aware Contrastive Learning, 2023, https://arxiv.org/abs/2207.07874

    Args:
        temperature: Base temperature, in (0, inf).
        alpha: How strongly the alignment acts, in [0, inf). The paper has 0.5 for images, 2 for sentences.
        A_0: Alignment at which the temperature is the base temperature, in [-1, 1]. 0 for images, 0.8 for sentences.
        memory_bank_size: As for `DySTreSSLoss`; likewise the three below.
        gather_distributed: Compare with the batches of all GPUs.
        objective: Of `dystress_plugin.objectives`.
        sigma: Of objective "dclw".
        positives: As for `DySTreSSLoss`.

    Raises:
        ValueError: If a value is out of its range, or for a memory bank of no such size.

    Examples:
        >>> loss_fn = MACLLoss(temperature=0.1, alpha=0.5)
        >>> loss = loss_fn(z0, z1)
    """

    def __init__(
        self,
        temperature: float = 0.1,
        alpha: float = 0.5,
        A_0: float = 0.0,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        objective: str | Objective = "macl",
        sigma: float | None = None,
        positives: str = "sum",
    ) -> None:
        # The temperature checks both under its own names, tau and threshold, which nobody typed here.
        check_positive("temperature", temperature)
        if not -1 <= check_number("A_0", A_0) <= 1:
            raise ValueError(f"A_0={A_0} must lie in [-1, 1]: it is compared with a mean cosine.")
        super().__init__("macl", locals(), temperature="tau", A_0="threshold")

    def forward(self, z0: Tensor, z1: Tensor, *, labels: Tensor | None = None) -> Tensor:
        return self._value(z0, z1, labels=labels)


@final
class TemperatureScheduleLoss(Criterion):
    """mean_i -log( exp(s_ip / tau_e) / (exp(s_ip / tau_e) + sum_n exp(s_in / tau_e)) ), tau_e from the epoch e.

    NT-Xent with tau_e = tau_min + (tau_max - tau_min) * (1 + cos(2 * pi * e / period)) / 2: tau_max at the start,
    tau_min after half a period.

    - [0] Temperature Schedules, 2023, https://arxiv.org/abs/2303.13664

    Args:
        tau_min: Lowest temperature, in (0, inf).
        tau_max: Highest temperature, in [tau_min, inf).
        period: Epochs of one full cycle, in (0, inf). A training shorter than half of it never reaches tau_min.
        memory_bank_size: As for `DySTreSSLoss`; likewise `gather_distributed`, `objective` and `sigma`.
        gather_distributed: Compare with the batches of all GPUs.
        per_step: `clock` counts parts of an epoch, so that the temperature moves at every step.
        offset: (num_samples,) counts, such as the size of every image's class: each image then has a schedule of its
            own, and `index` is needed. See `dystress_plugin.temperature.CosineSchedule`, also for the next one.
        amplitude: Of that schedule; None is tau_max - tau_min.
        objective: Of `dystress_plugin.objectives`.
        sigma: Of objective "dclw".
        positives: As for `DySTreSSLoss`.

    Raises:
        ValueError: If a value is out of its range, or for a memory bank of no such size.

    Examples:
        >>> loss_fn = TemperatureScheduleLoss(period=400)
        >>> for epoch in range(epochs):
        >>>     for batch, (t0, t1) in enumerate(dataloader):
        >>>         loss = loss_fn(model(t0), model(t1), epoch=loss_fn.clock(epoch, batch, len(dataloader)))
    """

    def __init__(
        self,
        tau_min: float = 0.1,
        tau_max: float = 1.0,
        period: float = 400.0,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        per_step: bool = False,
        offset: Tensor | Sequence[int] | None = None,
        amplitude: float | None = None,
        objective: str | Objective = "ntxent",
        sigma: float | None = None,
        positives: str = "sum",
    ) -> None:
        super().__init__("ts", locals())

    def clock(self, epoch: int, batch: int, batches: int) -> float:
        """What to pass as the epoch at batch `batch` of the `batches` of an epoch, both 0 first; see `per_step`."""
        return self.loss.temperature.clock(epoch, batch, batches)

    def forward(
        self,
        z0: Tensor,
        z1: Tensor,
        epoch: float | None = None,
        *,
        index: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch in an epoch, 0 first, parts of one allowed; without it a ValueError.

        With `offset` it needs index too, (batch_size,) int64, the numbers of the images.
        """
        return self._value(z0, z1, index=index, epoch=epoch, labels=labels)


@final
class TemperatureFreeLoss(Criterion):
    """mean_i -log( exp(a(s_ip)) / (exp(a(s_ip)) + sum_n exp(a(s_in))) ), a(s) = log((1 + s) / (1 - s)).

    NT-Xent with the log-odds of the cosine similarity instead of a quotient, so that there is no temperature to
    choose. Its gradient is large for nearly equal negatives: clip gradients.

    - [0] Temperature-Free Loss Function for Contrastive Learning, 2025, https://arxiv.org/abs/2501.17683

    Args:
        clamp: How far |s| stays below 1, in [1e-6, 0.5].
        memory_bank_size: As for `DySTreSSLoss`; likewise the three below.
        gather_distributed: Compare with the batches of all GPUs.
        objective: Of `dystress_plugin.objectives`.
        sigma: Of objective "dclw".
        positives: As for `DySTreSSLoss`.

    Raises:
        ValueError: If clamp is out of its range, or for a memory bank of no such size.

    Examples:
        >>> loss_fn = TemperatureFreeLoss()
        >>> loss = loss_fn(z0, z1)
    """

    def __init__(
        self,
        clamp: float = 1e-6,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        objective: str | Objective = "ntxent",
        sigma: float | None = None,
        positives: str = "sum",
    ) -> None:
        super().__init__("tempfree", locals())

    def forward(self, z0: Tensor, z1: Tensor, *, labels: Tensor | None = None) -> Tensor:
        return self._value(z0, z1, labels=labels)


@final
class ISogCLRLoss(Criterion):
    """mean_i sum_v ( sum_n w_vn s_vn - s_vp ), w_vn = sg[ exp(s_vn / tau_i) / (N * running mean of the same) ].

    v runs over the two views of image i, n over its N negatives. Every image of the data set has its own temperature
    tau_i, which is learned from how similar its negatives are. The tables are part of the state dict: save the
    criterion with the model, and resume with it. They change only in train mode and for embeddings with gradient.

    - [0] iSogCLR, 2023, https://arxiv.org/abs/2305.11965

    Args:
        num_samples: Number of images in the data set; `index` runs from 0 to num_samples - 1.
        tau_init: Temperature of every image at the start, in [tau_min, tau_max].
        tau_min: Lowest temperature, in (0, inf).
        tau_max: Highest temperature, in [tau_min, inf).
        rho: How far from uniform the weights of the negatives shall be, as a Kullback-Leibler distance, in
            (0, log(number of negatives)); larger means smaller temperatures.
        gamma: Share of the batch in the running mean, in (0, 1].
        beta: Share of the batch in the temperature's averaged gradient, in (0, 1].
        eta: Step size of the temperatures, in [0, inf).
        clip: Bound of a temperature's gradient, in (0, inf).
        gather_distributed: Compare with the batches of all GPUs.
        gradient: "cosine" or "difference", see `dystress_plugin.temperature.Individual`.
        objective: Of `dystress_plugin.objectives`; likewise `sigma`, of "dclw".
        positives: As for `DySTreSSLoss`.
        sigma: As for `DySTreSSLoss`.

    Raises:
        ValueError: If a value is out of its range.

    Examples:
        >>> loss_fn = ISogCLRLoss(num_samples=len(dataset))
        >>> # the dataset returns its index with the two views of an image
        >>> for t0, t1, index in dataloader:
        >>>     loss = loss_fn(model(t0), model(t1), index=index)
    """

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
        gather_distributed: bool = False,
        *,
        gradient: str = "cosine",
        objective: str | Objective = "sogclr",
        sigma: float | None = None,
        positives: str = "sum",
    ) -> None:
        super().__init__("isogclr", locals())

    def forward(self, z0: Tensor, z1: Tensor, index: Tensor | None = None, *, labels: Tensor | None = None) -> Tensor:
        """The loss of a batch; index, (batch_size,) int64, numbers its images in the data set, a ValueError without."""
        return self._value(z0, z1, index=index, labels=labels)


def _bank_size(memory_bank_size: int | Sequence[int]) -> tuple[int, int | None]:
    """(num_features, dim) of a memory bank; no features for none, no dim where the first batch has to tell it."""
    sizes = tuple(memory_bank_size) if isinstance(memory_bank_size, Iterable) else (memory_bank_size,)
    whole = all(isinstance(size, Integral) and not isinstance(size, bool) and size >= 0 for size in sizes)
    if not whole or len(sizes) not in (1, 2):
        raise ValueError(
            f"memory_bank_size={memory_bank_size!r} must be the pair (num_features, dim), such as (4096, 128), "
            "num_features alone, whose dim is the first batch's, or 0 for no memory bank."
        )
    return int(sizes[0]), int(sizes[1]) if len(sizes) == 2 else None
