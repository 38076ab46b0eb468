"""The embeddings of a large batch, in the memory of a small one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from dystress_plugin.checks import check_count


def embed_in_chunks(encoder: nn.Module, images: Any, chunk_size: int | None) -> Any:
    """[encoder(x_1); encoder(x_2); ...] for the parts x_k of a batch, with gradient and the activations of one part.

    The parts are of as equal sizes as can be, at most `chunk_size`. The backward pass embeds each again, with the
    random numbers (dropout, stochastic depth) and the autocast of the first time, which costs one more forward pass;
    where there is no gradient, nothing is embedded twice. Gradients are those of the whole batch: a contrastive loss of
    the result has all of its negatives, which accumulating gradients does not give.

    What changes: batch norm normalises by the statistics of a part, and its running ones move once a part, in the
    first pass alone. SyncBatchNorm, and DistributedDataParallel without `find_unused_parameters`, need as many parts on
    every rank.

    Gradient checkpointing, 2016, https://arxiv.org/abs/1604.06174, for each part; the idea for contrastive losses is
    GradCache's, 2021, https://arxiv.org/abs/2101.06983.

    Args:
        encoder: the network, in DistributedDataParallel or not.
        images: (batch, ...) tensor, or a nested tuple, list or dict of them, as the encoder takes it.
        chunk_size: images of a part at most, at least 1; None is all of them.

    Returns:
        What `encoder(images)` gives, a tensor or a structure of tensors with the batch first.

    Raises:
        TypeError: for what is no tensor, or none.
        ValueError: for a chunk_size that is no whole number or below 1, or tensors of different batches.

    Examples:
        >>> z0, z1 = (embed_in_chunks(encoder, view, 64) for view in views)
        >>> loss(z0, z1).backward()
    """
    if chunk_size is None:
        return encoder(images)
    chunk_size = check_count("chunk_size", chunk_size)
    leaves, structure = pytree.tree_flatten(images)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise TypeError("embed_in_chunks takes a tensor, or a structure of tensors, with the batch as first dimension.")
    sizes = {len(leaf) for leaf in leaves}
    if len(sizes) > 1:
        raise ValueError(f"The tensors are of different batches, {sorted(sizes)}: each must have the batch first.")
    parts = -(-sizes.pop() // chunk_size)
    if parts <= 1:
        return encoder(images)
    embedded = [
        _embed(encoder, lambda own: pytree.tree_unflatten(list(own), structure), part)
        for part in zip(*(leaf.tensor_split(parts) for leaf in leaves), strict=True)
    ]
    flat = [pytree.tree_flatten(part) for part in embedded]
    joined = [torch.cat(own) for own in zip(*(own for own, _ in flat), strict=True)]
    return pytree.tree_unflatten(joined, flat[0][1])


def check_chunks(chunk_size: int | None, *networks: nn.Module, name: str = "chunk_size") -> int | None:
    """The size of a chunk as a setting of a training, checked; None is none.

    Args:
        chunk_size: as given.
        *networks: what embeds in chunks.
        name: of the setting, for the messages.

    Raises:
        ValueError: if it is no whole number, below 1, or 1 with batch norm, which one image tells nothing.
    """
    if chunk_size is None:
        return None
    chunk_size = check_count(name, chunk_size)
    if chunk_size == 1 and any(isinstance(part, _BatchNorm) for network in networks for part in network.modules()):
        raise ValueError(f"{name}=1 leaves batch norm, which this network has, a single image: take 2 or more.")
    return chunk_size


class Encoder(nn.Module):
    """A function of images as `embed_in_chunks` takes it, with the networks that it calls."""

    def __init__(self, function: Callable[[Any], Any], *networks: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Any) -> Any:
        return self.function(images)


def _embed(encoder: nn.Module, structured: Callable[[Any], Any], part: tuple[Tensor, ...]) -> Any:
    if not torch.is_grad_enabled():
        return encoder(structured(part))
    # The network itself: what wraps it would meet the other ranks again, in the middle of their backward passes.
    network = encoder.module if isinstance(encoder, DistributedDataParallel) else encoder
    repeating = _Repeating(network)

    def embed(*own: Tensor) -> Any:
        return (network if repeating.entered else encoder)(structured(own))

    embedded = checkpoint(embed, *part, use_reentrant=False, context_fn=lambda: (nullcontext(), repeating))
    repeating.keep_what_changed()
    return embedded


class _Repeating:
    """Within it a network has copies of its buffers as they are now: what changes them leaves no trace.

    Batch norm in training only writes its own, so the present ones do. It can be entered again, for another backward
    pass.
    """

    def __init__(self, network: nn.Module) -> None:
        found = [
            (module, name, buffer)
            for module in network.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._versions = [(buffer, buffer._version) for _, _, buffer in found]
        self._places = [
            (module, name, None if isinstance(module, _NormBase) else buffer.detach().clone())
            for module, name, buffer in found
        ]
        self._kept: list[Tensor | None] = []
        self.entered = False

    def keep_what_changed(self) -> None:
        """Drops what the first pass has only read, such as masks: every part would hold a copy until its second."""
        self._places = [
            (module, name, before)
            for (module, name, before), (buffer, version) in zip(self._places, self._versions, strict=True)
            # Normalisation counts no versions of what it writes.
            if before is None or module._buffers[name] is not buffer or buffer._version != version
        ]
        self._versions = []

    def __enter__(self) -> None:
        self.entered = True
        self._kept = [module._buffers[name] for module, name, _ in self._places]
        for (module, name, before), kept in zip(self._places, self._kept, strict=True):
            module._buffers[name] = (kept if before is None else before).clone()  # type: ignore[union-attr]

    def __exit__(self, *error: object) -> None:
        for (module, name, _), kept in zip(self._places, self._kept, strict=True):
            module._buffers[name] = kept
        self.entered = False
