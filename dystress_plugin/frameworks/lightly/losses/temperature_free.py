"""The temperature-free loss as a criterion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor

from dystress_plugin.frameworks.lightly.losses.base import Criterion


@final
class TemperatureFreeLoss(Criterion):
    """mean_i -log( exp(a(s_ip)) / (exp(a(s_ip)) + sum_n exp(a(s_in))) ), a(s) = log((1 + s) / (1 - s)).

    NT-Xent with the log-odds of the cosine similarity instead of a quotient, so that there is no temperature to
    choose. Its gradient is large for nearly equal negatives: clip gradients.

    - [0] Temperature-Free Loss Function for Contrastive Learning, 2025, https://arxiv.org/abs/2501.17683

    Attributes:
        clamp:
            How far |s| stays below 1. Range: [1e-6, 0.5]
        memory_bank_size:
            Size of the memory bank as (num_features, dim) tuple, or 0 for none.
        gather_distributed:
            If True then negatives from all GPUs are gathered before the loss calculation.
        objective:
            "ntxent", "macl", "sogclr", "dcl" or "dclw"; see `dystress_plugin.objectives`.
        sigma:
            For "dclw". Range: [0.01, inf). None takes 0.5.

    Raises:
        ValueError:
            If clamp is out of its range, or for a memory bank without dimension.

    Examples:
        >>> # initialize the loss function
        >>> loss_fn = TemperatureFreeLoss()
        >>>
        >>> # feed two views through SimCLR or MoCo model
        >>> z0, z1 = model(t0), model(t1)
        >>>
        >>> # calculate loss
        >>> loss = loss_fn(z0, z1)
    """

    def __init__(
        self,
        clamp: float = 1e-6,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        objective: str = "ntxent",
        sigma: float | None = None,
    ) -> None:
        super().__init__(
            "tempfree", memory_bank_size, gather_distributed, objective=objective, sigma=sigma, clamp=clamp
        )

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            z0: first view embeddings, (batch_size, embedding_size), not normalised.
            z1: second view embeddings, of the same shape.
        """
        return self._value(z0, z1)
