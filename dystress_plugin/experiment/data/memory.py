"""Images of one size that stay in memory as uint8, on the training device, and batches of them as a loader gives."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from dystress_plugin.experiment.data.datasets import Images, Views
from dystress_plugin.experiment.data.transforms import plain_tensor, plain_view
from dystress_plugin.experiment.io import pictures

IN_MEMORY = 2 * 2**30  # bytes of a data set that may stay there: CIFAR has 0.2 GB, and 14,000 images of 224 pixels fit

REMEMBERED = 8  # data sets of this process


class MemoryLoader:
    """(pixels, labels, numbers) of every image, a batch at a time, on a device: what a `DataLoader` of `Views` gives.

    Args:
        pixels: (images, 3, height, width) uint8.
        labels: (images,).
        batch_size: images in a batch.
        device: says, when they are first asked for, where the images stay.
        sampler: which images, in which order, of which the last that fill no batch are dropped; as `EpochOrder` its
            items are `epoch * images + number`. None: all of them as they come.
        finish: what becomes of pixels before they are given.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        batch_size: int,
        device: Callable[[], torch.device],
        *,
        sampler: Sampler[int] | None = None,
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.pixels, self.labels = pixels, labels
        self.batch_size = batch_size
        self.device = device
        self.sampler = self.batch_sampler = sampler  # by both names, as Lightning looks for them
        self.finish = finish

    def __len__(self) -> int:
        if self.sampler is None:
            return -(-len(self.labels) // self.batch_size)
        return len(self.sampler) // self.batch_size  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        device, images = self.device(), len(self.labels)
        self.pixels, self.labels = self.pixels.to(device), self.labels.to(device)
        items = torch.arange(images) if self.sampler is None else torch.tensor(list(self.sampler)) % images
        for numbers in items.to(device).split(self.batch_size)[: len(self)]:
            pixels = self.pixels[numbers]
            yield pixels if self.finish is None else self.finish(pixels), self.labels[numbers], numbers


def batches(
    images: Images, batch_size: int, device: Callable[[], torch.device], *, sampler: Sampler[int], **options: Any
) -> MemoryLoader | DataLoader[Any]:
    """Whole images as uint8 in the order of a sampler: from memory where they fit, else from a `DataLoader`.

    Raises:
        ValueError: for images of different sizes.
    """
    height, width = _size(images, 0)
    if fits(len(images.labels), height, width):
        return MemoryLoader(remembered(images), _labels(images), batch_size, device, sampler=sampler)
    for number in range(len(images.labels)):
        _check_size(images, number, _size(images, number), (height, width))
    return DataLoader(Views(images, _pixels), batch_size, sampler=sampler, drop_last=True, **options)


def plain_batches(
    images: Images,
    batch_size: int,
    device: Callable[[], torch.device],
    *,
    image_size: int,
    normalize: dict[str, list[float]],
) -> MemoryLoader | None:
    """The images as `plain_transform` shows them, to the last digit, in their order; None where they do not fit."""
    if not fits(len(images.labels), image_size, image_size):
        return None
    finish = functools.partial(plain_tensor, normalize=normalize)
    return MemoryLoader(remembered(images, image_size), _labels(images), batch_size, device, finish=finish)


def fits(images: int, height: int, width: int) -> bool:
    """Whether so many images may stay in memory."""
    return images * 3 * height * width <= IN_MEMORY


def remembered(images: Images, image_size: int | None = None) -> Tensor:
    """(images, 3, height, width) uint8: whole images or, with a size, as `plain_view` shows them.

    The last `REMEMBERED` of them are kept: a run needs some three times, and a process may have several runs.
    """
    content = hashlib.sha256(images.source.tobytes()).hexdigest()
    return _decoded(_Key(images, (content, image_size)))


class _Key:
    """Images to decode, equal to others by `name`."""

    def __init__(self, images: Images, name: tuple[str, int | None]) -> None:
        self.images, self.name = images, name

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.name == other.name


@functools.lru_cache(REMEMBERED)
def _decoded(key: _Key) -> Tensor:
    images, size = key.images, key.name[1]
    view = (lambda picture: picture) if size is None else plain_view(size)
    first = _pixels(view(images.load(0)))
    pixels = torch.empty((len(images.labels), *first.shape), dtype=torch.uint8)
    for number in range(len(pixels)):
        its = _pixels(view(images.load(number)))
        _check_size(images, number, its.shape[1:], first.shape[1:])
        pixels[number] = its
    return pixels


def _pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _labels(images: Images) -> Tensor:
    return torch.from_numpy(images.labels)


def _check_size(images: Images, number: int, size: Sequence[int], first: Sequence[int]) -> None:
    """Raises a ValueError for a file of another size than the first one's, of which no batch could be made."""
    if tuple(size) != tuple(first):
        assert images.files is not None  # arrays are of one size
        raise ValueError(
            f"augment=batch needs images of one size, but {images.files[0]} has {first[1]}x{first[0]} pixels and "
            f"{images.files[number]} has {size[1]}x{size[0]}. Leave augment out."
        )


def _size(images: Images, number: int) -> tuple[int, int]:
    """Height and width of an image."""
    if images.files is None:
        height, width = images.source.shape[1:3]
        return height, width
    return pictures.size(images.files[number])
