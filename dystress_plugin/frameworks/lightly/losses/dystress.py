"""DySTreSS as a criterion: a temperature for every pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor

from dystress_plugin.frameworks.lightly.losses.base import Criterion


@final
class DySTreSSLoss(Criterion):
    """mean_i -log( exp(s_ip / tau(s_ip)) / (exp(s_ip / tau(s_ip)) + sum_n exp(s_in / tau(s_in))) ).

    NT-Xent with a temperature for every pair, from the pair's own cosine similarity s: tau_max for s = -1 and 1,
    tau_min for s = 0, tau(s) = tau_min + (tau_max - tau_min) * (1 - cos(pi * s)) / 2 between them. With
    tau_min = tau_max it is lightly's NTXentLoss.

    - [0] DySTreSS, 2023, https://arxiv.org/abs/2308.01140

    Attributes:
        tau_min:
            Lowest temperature. Range: (0, inf)
        tau_max:
            Highest temperature. Range: [tau_min, inf). The paper has 0.1 and 0.2 for ImageNet, 0.07 and 0.2 for
            CIFAR.
        memory_bank_size:
            Size of the memory bank as (num_features, dim) tuple, or 0 for none. With a memory bank z0 are the
            queries, z1 the keys, and the bank's features the negatives, as in MoCo.
        gather_distributed:
            If True then negatives from all GPUs are gathered before the loss calculation. A memory bank always
            takes in the keys of all GPUs.
        profile:
            Shape of tau(s): "cosine", "shifted", "cosine_constant", "exponential" or "linear"; see
            `dystress_plugin.temperature.DySTreSS`, also for the next six.
        shift:
            For "shifted" and "cosine_constant". Range: [-1, 0]. None takes the profile's own.
        scale:
            For the same two. Range: (0, inf). None takes the profile's own.
        rate:
            For "exponential". Range: (0, inf). None takes the profile's own.
        detach:
            If True then tau(s) counts as a constant in the gradient, as in the authors' code.
        negative_range:
            Another (tau_min, tau_max) for the negatives.
        stabilise:
            Epochs over which tau_min rises to tau_max. Range: (0, inf). None leaves it; else the epoch has to be
            passed with every batch.
        objective:
            "ntxent", "macl", "sogclr", "dcl" or "dclw"; see `dystress_plugin.objectives`.
        sigma:
            For "dclw". Range: [0.01, inf). None takes 0.5.

    Raises:
        ValueError:
            If not 0 < tau_min <= tau_max, for an unknown profile, a parameter that the profile does not have, or a
            memory bank without dimension.

    Examples:
        >>> # initialize the loss function
        >>> loss_fn = DySTreSSLoss(tau_min=0.1, tau_max=0.2)
        >>>
        >>> # generate two random transforms of images
        >>> t0 = transforms(images)
        >>> t1 = transforms(images)
        >>>
        >>> # feed through SimCLR or MoCo model
        >>> z0, z1 = model(t0), model(t1)
        >>>
        >>> # calculate loss
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
        objective: str = "ntxent",
        sigma: float | None = None,
    ) -> None:
        super().__init__(
            "dystress",
            memory_bank_size,
            gather_distributed,
            tau_min=tau_min,
            tau_max=tau_max,
            profile=profile,
            shift=shift,
            scale=scale,
            rate=rate,
            detach=detach,
            negative_range=negative_range,
            stabilise=stabilise,
            objective=objective,
            sigma=sigma,
        )

    def forward(self, z0: Tensor, z1: Tensor, epoch: float | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            z0: first view embeddings, (batch_size, embedding_size), not normalised.
            z1: second view embeddings, of the same shape.
            epoch: current epoch, 0 first; only read with `stabilise`.

        Raises:
            ValueError: with `stabilise` and without an epoch.
        """
        return self._value(z0, z1, epoch=epoch)
