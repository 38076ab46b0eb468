"""The collectives of the losses, each an identity in a single process. Batches may differ between ranks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

_of_thread = threading.local()


def world_size() -> int:
    """Number of processes of the default group; 1 where none is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process; 0 where no group is initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextmanager
def batch_of(images: int, device: torch.device) -> Iterator[None]:
    """Within, ranks tell each other at most once how many images they have, for all that has a row for each of them."""
    before = getattr(_of_thread, "batch", None)
    _of_thread.batch = _Sizes(images, device)
    try:
        yield
    finally:
        _of_thread.batch = before


def share_of_batch() -> float:
    """Images of this rank over the mean of all ranks', within `batch_of`."""
    sizes = _of_thread.batch.sizes
    return float(sizes[rank()] * len(sizes) / sum(sizes))


def all_rows(*tensors: Tensor, of_batch: bool = False) -> tuple[Tensor, ...]:
    """Every tensor with the rows of all ranks, in order of rank; without gradient.

    Args:
        *tensors: of any shapes and dtypes, with the same number of rows.
        of_batch: whether these are the images of `batch_of`.
    """
    if world_size() == 1:
        return tensors
    sizes = _sizes_of(tensors[0], of_batch)
    # Together, as bytes: a collective costs more than what it carries.
    rows = [_apart(tensor.detach().reshape(len(tensor), -1)).view(torch.uint8) for tensor in tensors]
    parts = torch.cat(_all_gather(torch.cat(rows, dim=1), sizes)).split([own.shape[1] for own in rows], dim=1)
    return tuple(
        _apart(part).view(tensor.dtype).view(-1, *tensor.shape[1:]) for part, tensor in zip(parts, tensors, strict=True)
    )


def all_rows_with_gradient(tensor: Tensor, *, of_batch: bool = False) -> tuple[Tensor, int]:
    """The rows of all ranks, and where this rank's own begin; `of_batch` is that of `all_rows`.

    A row's gradient is the sum over all ranks, so that averaging parameter gradients over ranks, as
    DistributedDataParallel does, gives the gradient of the mean of the ranks' losses.
    """
    if world_size() == 1:
        return tensor, 0
    sizes = _sizes_of(tensor, of_batch)
    gathered: Tensor = _Gather.apply(tensor, sizes)  # type: ignore[no-untyped-call]
    return gathered, sum(sizes[: rank()])


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Mean of all entries on all ranks, each entry with the same weight; without gradient."""
    if world_size() == 1:
        return tensor.mean()
    total = torch.stack([tensor.sum().double(), tensor.new_tensor(tensor.numel(), dtype=torch.float64)])
    dist.all_reduce(total)
    return (total[0] / total[1]).to(tensor.dtype)


def from_rank_0(*tensors: Tensor) -> None:
    """Overwrites every tensor with rank 0's."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def with_mean_gradients(first: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """The same tensors; gradients of all but the first become their mean over ranks, in one collective.

    A parameter without gradient counts as 0 on that rank, and stays without where no rank has one. The mean is taken
    after the backward pass of all that was computed from `first`: what ranks computed in between, and in which order,
    may differ, as their batches do, but not the order of their collectives.
    """
    if world_size() == 1 or not parameters:
        return first, *parameters
    tensors: tuple[Tensor, ...] = _MeanGradients.apply(first, *parameters)  # type: ignore[no-untyped-call]
    return tensors


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        return torch.cat(_all_gather(tensor, sizes))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _OwnSum.apply(gradient, ctx.sizes), None  # type: ignore[no-untyped-call]


class _OwnSum(torch.autograd.Function):
    """This rank's own rows of the sum over ranks: the gradient of `_Gather`, whose gradient is `_Gather` again."""

    @staticmethod
    def forward(ctx: Any, everything: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        total = everything.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        start = sum(sizes[: rank()])
        return total[start : start + sizes[rank()]]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(gradient, ctx.sizes), None  # type: ignore[no-untyped-call]


class _MeanGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.parameters = [parameter.detach() for parameter in parameters]
        return first.view_as(first), *(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, first: Tensor | None, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        from torch.distributed.nn.functional import all_reduce  # with gradient; not every build of torch has it

        own = [torch.zeros_like(p) if g is None else g for p, g in zip(ctx.parameters, gradients, strict=True)]
        sizes = [gradient.numel() for gradient in own]
        found = own[0].new_tensor([gradient is not None for gradient in gradients], dtype=torch.float64)
        together = torch.cat([*(gradient.flatten().double() for gradient in own), found])
        *means, found = (all_reduce(together) / world_size()).split([*sizes, len(own)])
        return first, *(
            # Looking at `found` waits for a GPU, and is needed only where this rank has no gradient.
            None if gradient is None and not found[number] else mean.view_as(like).to(like.dtype)
            for number, (gradient, mean, like) in enumerate(zip(gradients, means, own, strict=True))
        )


def _apart(tensor: Tensor) -> Tensor:
    """A copy that begins at an address where any dtype may, and whose entries follow each other."""
    return tensor.clone(memory_format=torch.contiguous_format)


class _Sizes:
    """Of a batch, asked for when they are needed."""

    def __init__(self, images: int, device: torch.device) -> None:
        self.images, self.device = images, device

    @cached_property
    def sizes(self) -> list[int]:
        own = torch.tensor([self.images], device=self.device)
        sizes = [torch.empty_like(own) for _ in range(world_size())]
        dist.all_gather(sizes, own)
        return [int(size) for size in torch.cat(sizes).tolist()]


def _sizes_of(tensor: Tensor, of_batch: bool) -> list[int]:
    batch = getattr(_of_thread, "batch", None) if of_batch else None
    return (batch or _Sizes(len(tensor), tensor.device)).sizes


def _all_gather(tensor: Tensor, sizes: list[int]) -> list[Tensor]:
    # Collectives want equal shapes; the last batch of an epoch need not have them.
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]
