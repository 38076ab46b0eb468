"""Who runs the code: Python itself, or something that reads or transforms it and has no values to look at."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Since torch 2.4: operations that a compiler does not look into.
HAS_OPERATIONS = hasattr(torch.library, "custom_op")

_functorch = torch._C._functorch
_BATCHED = torch._C._dispatch_key_parse("Batched")
# torch 2.1 has the first elsewhere, and not the second.
_is_compiling = torch.compiler.is_compiling if hasattr(torch.compiler, "is_compiling") else torch._utils.is_compiling
if hasattr(_functorch, "get_dynamic_layer_stack_depth"):
    _transforms = _functorch.get_dynamic_layer_stack_depth
else:

    def _transforms() -> int:
        return int(_functorch.peek_interpreter_stack() is not None)


def compiled(*tensors: Tensor) -> bool:
    """Whether torch.compile or torch.export reads the code, or a tensor is a compiler's own, without numbers."""
    return _is_compiling() or any(type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__ for x in tensors)


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform of torch.func is running, or forward-mode differentiation of one of the tensors.

    Both know plain operations, but not those that write into memory of their own.
    """
    if _transforms() > 0:
        return True
    if _is_compiling():
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def batched(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors is a batch of them, which autograd.grad(..., is_grads_batched=True) lets arrive."""
    return any(x is not None and torch._C._dispatch_keys(x).has(_BATCHED) for x in tensors)


def eager(*tensors: Tensor) -> bool:
    """Whether nobody reads or transforms the code, so that values can be looked at, and what is created kept."""
    return not compiled(*tensors) and _transforms() == 0 and torch._C._len_torch_dispatch_stack() == 0


def captured(tensors: Iterable[Tensor]) -> bool:
    """Whether a transform of torch.func is running that was not given all of these, and so would not change them."""
    return _transforms() > 0 and not all(_functorch.is_functorch_wrapped_tensor(x) for x in tensors)


def read(tensor: Tensor) -> Tensor:
    """The tensor, read from state that this step will change.

    A compiler may read it again in the backward pass, after the change, unless an operation of ours stands between.
    """
    return _read(tensor) if HAS_OPERATIONS and compiled(tensor) else tensor


if HAS_OPERATIONS:

    @torch.library.custom_op("dystress_plugin::read", mutates_args=(), schema="(Tensor x) -> Tensor")
    def _read(x: Tensor) -> Tensor:
        if torch._C._current_autograd_node() is not None:  # read again, after the change
            raise ValueError(
                "A compiled loss with a queue or tables cannot be computed again by a checkpoint, which would find "
                "another state: leave the loss out of the checkpoint, or do not compile it."
            )
        return x.clone()

    @_read.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)
