"""Tables of samples: what a temperature remembers of every image of the data set, the same on every rank."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from dystress_plugin import distributed, tracing
from dystress_plugin.checks import plain
from dystress_plugin.hardware import wide, widest
from dystress_plugin.temperature.base import given_index


@final
class RunningMeans(nn.Module):
    """For every sample the logarithm of a running mean of exp(log_g), so that nothing overflows.

    Attributes:
        log_s, visited: buffers of length num_samples. The first keeps float64, see `keep_double`.
    """

    log_s: Tensor
    visited: Tensor

    def __init__(self, num_samples: int) -> None:
        super().__init__()
        self.register_buffer("log_s", wide(torch.zeros(num_samples)))
        self.register_buffer("visited", torch.zeros(num_samples, dtype=torch.bool))

    def moved(self, index: Tensor, log_g: Tensor, gamma: float) -> Tensor:
        """Where a batch moves the means of its samples, (rows,)."""
        index = checked_index(index, len(self.log_s), "A running mean")
        return moved_mean(self.log_s[index], self.visited[index], log_g, gamma)

    def write(self, index: Tensor, log_s: Tensor, views: int) -> None:
        """Moves them there, with the mean over the views of an image."""
        images, log_s = by_sample(index.view(views, -1)[0], log_mean(log_s, views))
        self.log_s[images] = log_s
        self.visited.index_fill_(0, images, True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningMeans:
        keep_double(self, fn, "log_s")
        return self


def check_length(num_samples: int) -> int:
    """`num_samples` as an int, or an error that names it unless it is one of at least 1."""
    num_samples = plain(num_samples)
    if isinstance(num_samples, bool) or not isinstance(num_samples, int):
        raise TypeError(f"num_samples={num_samples!r} must be an int, the size of the data set.")
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1, the size of the data set.")
    return num_samples


def checked_index(index: Tensor | None, num_samples: int, needed_by: str) -> Tensor:
    """The index, or a ValueError where it is missing or runs beyond a table of `num_samples`."""
    given: Tensor = given_index(index, needed_by)
    # On CUDA indexing itself fails, and looking would wait for the device.
    if given.device.type == "cpu" and tracing.eager(given):
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= num_samples:
            raise ValueError(
                f"index runs from {low} to {high}, but num_samples={num_samples} has tables for 0 to "
                f"{num_samples - 1}; pass num_samples=len(dataset)."
            )
    return given


def moved_mean(log_s: Tensor, visited: Tensor, log_g: Tensor, gamma: float, log_first: float = 0.0) -> Tensor:
    """log((1 - gamma) s + gamma g) for s that was visited, log(g) + log_first before."""
    moved = torch.logaddexp(_log(1 - gamma) + log_s, _log(gamma) + log_g)
    return torch.where(visited, moved, log_g + log_first)


def log_mean(x: Tensor, views: int) -> Tensor:
    """log mean_v exp(x_v) over the views of every image."""
    return torch.logsumexp(x.view(views, -1), 0) - math.log(views)


def by_sample(images: Tensor, log_s: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Of the images of all ranks: their numbers, the log of the mean of exp(log_s), and the means of others.

    Means are over the occurrences of a sample, each of which gets its sample's: how many samples there are is no shape
    that a compiler could know.
    """
    images, log_s, *rest = distributed.all_rows(images, log_s, *others, of_batch=True)
    # Sorting makes the sums over duplicates run in one fixed order, on every device and every rank.
    order = torch.argsort(images, stable=True)
    images = images[order]
    sample = torch.cat([torch.zeros_like(images[:1]), (images[1:] != images[:-1]).long()]).cumsum(0)
    counts = torch.zeros_like(sample).scatter_add_(0, sample, torch.ones_like(sample))

    def per_sample(values: Tensor, reduce: str) -> Tensor:
        # Unsafe only leaves out a check of the lengths, which waits for a GPU and which torch 2.1 cannot trace.
        return torch.segment_reduce(values, reduce, lengths=counts, unsafe=True)[sample]

    peak = per_sample(log_s[order], "max")
    log_s = peak + per_sample(torch.exp(log_s[order] - peak), "mean").log()
    return images, log_s, *(per_sample(other[order], "mean") for other in rest)


def keep_double(module: nn.Module, fn: Callable[[Tensor], Tensor], *names: str) -> None:
    """For `Module._apply`: takes the tables along to another device.

    Not to .half() or precision="bf16-true", which would round a moving average away.
    """
    device = fn(torch.empty(0, device=module.visited.device)).device  # type: ignore[union-attr, arg-type]
    for name in names:
        module._buffers[name] = module._buffers[name].to(device, widest(device))  # type: ignore[union-attr]
    module.visited = module.visited.to(device)  # type: ignore[operator]


def warn_of_reach(rho: float, num_negatives: int | Tensor, what: str, advice: str) -> None:
    """A UserWarning when no weights over so many negatives are as far from uniform as rho."""
    if isinstance(num_negatives, Tensor):
        return  # as many as a batch happens to have of other classes; looking would wait for a device
    if rho >= (log_n := math.log(num_negatives)):
        warnings.warn(
            f"rho={rho} is at least log(n) = {log_n:.3f} for n={num_negatives} negatives: no weights over them are "
            f"that far from uniform, so {what}. {advice}",
            stacklevel=3,
        )


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
