"""What depends on the device: how wide its numbers are, and what the host may know without a wait."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Types of devices without float64.
NARROW = {"mps"}


def widest(device: torch.device) -> torch.dtype:
    """float64, which sums and running means are kept in, or float32 on a device that has none."""
    return torch.float32 if device.type in NARROW else torch.float64


def wide(x: Tensor) -> Tensor:
    """The tensor in the widest dtype of its device."""
    return x.to(widest(x.device))


def moved(given: Tensor, device: torch.device) -> Tensor:
    """The tensor on that device; what a data loader has pinned goes to CUDA without a wait."""
    return given.to(device, non_blocking=device.type == "cuda" and given.device.type == "cpu")


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Where operations keep the dtypes that they are given."""
    if device.type == "meta" or _has_no_autocast(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _has_no_autocast(device_type: str) -> bool:
    """Whether there is no autocast anyway; to ask takes a tenth of the time to enter, where it can be asked for."""
    if not hasattr(torch, "get_autocast_dtype") or torch.compiler.is_compiling():  # before torch 2.4
        return False
    return not torch.is_autocast_enabled(device_type)


class Glance:
    """Looks at a number without waiting for the device: on CUDA at what an earlier step has sent, else NaN."""

    def __init__(self) -> None:
        self._sent: Tensor | None = None

    def __reduce__(self) -> Any:
        return Glance, ()  # pinned memory is not copied as such

    def at(self, number: Tensor) -> float:
        """The number, or of an earlier call's what has arrived by now; NaN where nothing has, or none can be sent."""
        if number.device.type == "cpu":
            return number.item()
        if number.device.type != "cuda":
            return math.nan
        if self._sent is None:
            self._sent = torch.full((), math.nan, dtype=number.dtype, pin_memory=True)
        arrived = self._sent.item()
        self._sent.copy_(number, non_blocking=True)
        return arrived
