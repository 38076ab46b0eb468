"""What the criteria share: lightly's argument names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dystress_plugin.contrastive import ContrastiveLoss


class Criterion(nn.Module, ABC):
    """A method of the table as a criterion.

    Attributes:
        loss: the `ContrastiveLoss` that computes; `dystress_plugin.metrics.temperature_summary` takes it.
    """

    def __init__(
        self,
        method: str,
        memory_bank_size: int | Sequence[int],
        gather_distributed: bool,
        *,
        objective: str,
        sigma: float | None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if sigma is not None:
            settings["sigma"] = sigma
        self.loss = ContrastiveLoss(
            method,
            objective=objective,
            queue_size=_queue_size(memory_bank_size),
            gather_distributed=gather_distributed,
            **settings,
        )

    @abstractmethod
    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """The loss of a batch."""

    def _value(self, z0: Tensor, z1: Tensor, index: Tensor | None = None, epoch: float | None = None) -> Tensor:
        value: Tensor = self.loss(z0, z1, index=index, epoch=epoch)
        return value


def _queue_size(memory_bank_size: int | Sequence[int]) -> tuple[int, int] | None:
    if isinstance(memory_bank_size, int):
        if memory_bank_size == 0 and not isinstance(memory_bank_size, bool):
            return None
        raise ValueError(
            f"memory_bank_size={memory_bank_size!r} does not say how long a key is: pass the pair (num_features, dim), "
            "such as (4096, 128), or 0 for no memory bank."
        )
    sizes = tuple(memory_bank_size)
    if sizes and sizes[0] == 0:  # lightly reads (0, dim) as no bank
        return None
    if len(sizes) != 2:
        raise ValueError(
            f"memory_bank_size={memory_bank_size!r} must be the pair (num_features, dim), such as (4096, 128), or 0."
        )
    return sizes[0], sizes[1]
