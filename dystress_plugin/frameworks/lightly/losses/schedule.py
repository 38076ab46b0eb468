"""Temperature Schedules as a criterion: one temperature per epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor

from dystress_plugin.frameworks.lightly.losses.base import Criterion


@final
class TemperatureScheduleLoss(Criterion):
    """mean_i -log( exp(s_ip / tau_e) / (exp(s_ip / tau_e) + sum_n exp(s_in / tau_e)) ), tau_e from the epoch e.

    NT-Xent with tau_e = tau_min + (tau_max - tau_min) * (1 + cos(2 * pi * e / period)) / 2: tau_max at the start,
    tau_min after half a period.

    - [0] Temperature Schedules, 2023, https://arxiv.org/abs/2303.13664

    Attributes:
        tau_min:
            Lowest temperature. Range: (0, inf)
        tau_max:
            Highest temperature. Range: [tau_min, inf)
        period:
            Epochs of one full cycle. Range: (0, inf). A training shorter than half of it never reaches tau_min.
        memory_bank_size:
            Size of the memory bank as (num_features, dim) tuple, or 0 for none.
        gather_distributed:
            If True then negatives from all GPUs are gathered before the loss calculation.
        per_step:
            If True then `clock` counts parts of an epoch, so that the temperature moves at every step.
        objective:
            "ntxent", "macl", "sogclr", "dcl" or "dclw"; see `dystress_plugin.objectives`.
        sigma:
            For "dclw". Range: [0.01, inf). None takes 0.5.

    Raises:
        ValueError:
            If a value is out of its range, or for a memory bank without dimension.

    Examples:
        >>> # initialize the loss function
        >>> loss_fn = TemperatureScheduleLoss(period=400)
        >>>
        >>> for epoch in range(epochs):
        >>>     for t0, t1 in dataloader:
        >>>         z0, z1 = model(t0), model(t1)
        >>>         loss = loss_fn(z0, z1, epoch=epoch)
        >>>
        >>> # or, with per_step=True
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
        objective: str = "ntxent",
        sigma: float | None = None,
    ) -> None:
        super().__init__(
            "ts",
            memory_bank_size,
            gather_distributed,
            objective=objective,
            sigma=sigma,
            tau_min=tau_min,
            tau_max=tau_max,
            period=period,
            per_step=per_step,
        )

    def clock(self, epoch: int, batch: int, batches: int) -> float:
        """What to pass as the epoch at batch `batch` of the `batches` of an epoch, both 0 first; see `per_step`."""
        return self.loss.temperature.clock(epoch, batch, batches)

    def forward(self, z0: Tensor, z1: Tensor, epoch: float | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            z0: first view embeddings, (batch_size, embedding_size), not normalised.
            z1: second view embeddings, of the same shape.
            epoch: current epoch, 0 first; parts of an epoch are allowed.

        Raises:
            ValueError: without an epoch.
        """
        return self._value(z0, z1, epoch=epoch)
