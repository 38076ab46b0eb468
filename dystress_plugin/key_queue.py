"""A first-in-first-out queue of keys, as MoCo uses for its negatives."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from dystress_plugin import distributed, tracing
from dystress_plugin.checks import check_count


@final
class KeyQueue(nn.Module):
    """The last `size` keys, oldest overwritten first; a batch that does not fit at the end goes on at the start.

    It begins full of random directions, as MoCo's does, so that the number of negatives never changes. Where
    torch.distributed runs, the keys of all ranks enter in order of rank, so that every rank holds the same queue.

    MoCo, 2020, https://arxiv.org/abs/1911.05722 (65536 keys of 128 numbers).

    Args:
        size: number of keys, at least 1.
        dim: numbers in a key, at least 1.

    Attributes:
        keys: (size, dim) buffer of vectors of length 1.
        position: () int64 buffer, where the next key goes.

    Raises:
        ValueError: if a size is not positive.
    """

    keys: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        given = f"queue_size=({size!r}, {dim!r})"
        size, dim = check_count("keys", size, given=given), check_count("dim", dim, given=given)
        self.register_buffer("keys", nn.functional.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def read(self, max_keys: int | None = None) -> Tensor:
        """A copy of the keys: the queue may be written to before the backward pass reads them.

        Args:
            max_keys: how many at most, at even distances so that old and new ones are among them; None: all of them.
        """
        step = 1 if max_keys is None else -(-len(self.keys) // check_count("max_keys", max_keys))
        return tracing.read(self.keys[::step].clone())

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Takes in the keys of all ranks, (batch, dim) of length 1; of more than `size` the last ones stay."""
        (keys,) = distributed.all_rows(keys.detach(), of_batch=True)
        size, new = len(self.keys), len(keys)
        slots = (self.position + torch.arange(new, device=self.keys.device)) % size
        kept = slice(max(0, new - size), None)
        self.keys[slots[kept]] = keys[kept].to(self.keys.dtype)
        self.position.copy_((self.position + new) % size)

    def extra_repr(self) -> str:
        return f"keys={self.keys.shape[0]}, dim={self.keys.shape[1]}"
