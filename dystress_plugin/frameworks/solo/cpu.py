"""Programs that say `.cuda()` whatever the machine, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class StayOnCPU(TorchFunctionMode):
    """Within this context `tensor.cuda()`, `tensor.to("cuda:0")` and the like of modules leave tensors on the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0].cpu()
        if func is torch.Tensor.to:
            args = tuple(_cpu(value) for value in args)
            kwargs = {name: _cpu(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _cpu(value: Any) -> Any:
    names_cuda = isinstance(value, (str, torch.device)) and torch.device(value).type == "cuda"
    return torch.device("cpu") if names_cuda else value
