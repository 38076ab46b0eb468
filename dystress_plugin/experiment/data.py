"""Images with labels: scikit-learn's digits, CIFAR, or a folder; all or a long-tailed part of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from lightly.transforms.utils import IMAGENET_NORMALIZE
from PIL import Image
from torch.utils.data import Dataset, DistributedSampler

from dystress_plugin.experiment import long_tail as tails

Picture: TypeAlias = Any  # PIL.Image.Image
Load: TypeAlias = Callable[[int], Picture]

HELD_OUT = 0.25  # of data that comes without a test part


@dataclass(frozen=True)
class Images:
    """Labelled images, loaded when asked for.

    Attributes:
        load: from a position in `range(len(labels))` to an RGB picture.
        labels: (images,) int64, classes from 0.
    """

    load: Load
    labels: np.ndarray

    def subset(self, positions: np.ndarray) -> Images:
        """Only some of the images, in the order given."""
        load = self.load
        return Images(lambda i: load(int(positions[i])), self.labels[positions])


@dataclass(frozen=True)
class Data:
    """A data set as the command uses it.

    Attributes:
        train: images to pretrain on, and the memory of the kNN.
        test: images that accuracies are measured on.
        num_classes: number of classes.
        image_size: pixels of a view, unless set otherwise.
        normalize: `mean` and `std` of a colour channel, each three numbers.
        augmentation: values that differ from those of natural images.
        classes: a name for every class, in the order of the labels, which is their alphabetical one.
    """

    train: Images
    test: Images
    num_classes: int
    image_size: int
    normalize: dict[str, list[float]]
    augmentation: dict[str, float]
    classes: tuple[str, ...]


class Views(Dataset[tuple[Any, int, int]]):
    """(transformed picture, label, number) of every image; the number is what iSogCLR's table is indexed by.

    Args:
        images: what to show.
        transform: from a picture to whatever the loader collates.
        seed: where the transform is random: item `epoch * len + i` is image i with the random numbers of (seed, epoch,
            i), whichever process loads it and whatever came before. `EpochOrder` asks for such items.
    """

    def __init__(self, images: Images, transform: Callable[[Picture], Any], seed: int | None = None) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, item: int) -> tuple[Any, int, int]:
        epoch, i = divmod(item, len(self))
        if self.seed is not None:
            seed_cpu(self.seed, epoch, i)
        return self.transform(self.images.load(i)), int(self.images.labels[i]), i


class EpochOrder(DistributedSampler[int]):
    """A new order every epoch, from the seed and the epoch alone; its items tell `Views` the epoch."""

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * len(self.dataset)  # type: ignore[arg-type]
        return (first + i for i in super().__iter__())


def seed_cpu(*words: int) -> None:
    """Seeds torch on the CPU, Python and NumPy from several non-negative numbers."""
    for_torch, for_python, for_numpy = np.random.SeedSequence(words).generate_state(3).tolist()
    torch.default_generator.manual_seed(for_torch)
    random.seed(for_python)
    np.random.seed(for_numpy)


def load(
    name: str,
    *,
    root: str,
    download: bool,
    long_tail: float | None,
    seed: int,
    long_tail_profile: str = "exponential",
    indices: str | None = None,
) -> Data:
    """A data set by name, or from a folder of images; its training images those that `long_tail.select` chooses.

    Raises:
        ValueError: for a folder that is not there, has no images or a single class, or cannot be read, for CIFAR
            that is neither there nor to be downloaded, a `long_tail` outside of (0, 1], or an index file that
            does not fit.
    """
    builtin = {"digits": _digits, "cifar10": _cifar("CIFAR10"), "cifar100": _cifar("CIFAR100")}
    data = builtin[name](root, download) if name in builtin else _folder(Path(name), sorted(builtin))
    labels = data.train.labels
    chosen = tails.select(labels, indices=indices, long_tail=long_tail, seed=seed, profile=long_tail_profile)
    if chosen is not None:
        data = replace(data, train=data.train.subset(chosen))
    return data


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions to train on and held-out ones: a quarter of every class, always the same."""
    from sklearn.model_selection import train_test_split

    try:
        train, test = train_test_split(np.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=0)
    except ValueError as error:
        raise ValueError(f"A quarter of every class is held out for testing, but: {error}") from None
    return np.sort(train), np.sort(test)


def _digits(_root: str, _download: bool) -> Data:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    gray = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = Images(lambda i: Image.fromarray(gray[i]).convert("RGB"), labels.astype(np.int64))
    train, test = split(images.labels)
    return Data(
        train=images.subset(train),
        test=images.subset(test),
        num_classes=10,
        image_size=8,
        normalize={"mean": [0.3] * 3, "std": [0.37] * 3},
        # A mirrored or strongly cropped digit is another digit, and there is no colour.
        augmentation={"min_scale": 0.5, "grayscale": 0.0, "flip": 0.0, "rotate": 15.0},
        classes=tuple("0123456789"),
    )


def _cifar(class_name: str) -> Callable[[str, bool], Data]:
    def build(root: str, download: bool) -> Data:
        import torchvision

        dataset = getattr(torchvision.datasets, class_name)
        try:
            parts = [dataset(root, train=train, download=download) for train in (True, False)]
        except RuntimeError as error:
            raise ValueError(
                f"data={class_name.lower()} is not in data_root={root}: {error} Set data_root, or download=true."
            ) from None
        train, test = (_array(part.data, part.targets) for part in parts)
        return Data(
            train=train,
            test=test,
            num_classes=len(parts[0].classes),
            image_size=32,
            normalize={"mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616]},
            augmentation={},
            classes=tuple(parts[0].classes),
        )

    return build


def _array(pixels: np.ndarray, labels: Sequence[int]) -> Images:
    return Images(lambda i: Image.fromarray(pixels[i]), np.asarray(labels, dtype=np.int64))


def _folder(path: Path, builtin: list[str]) -> Data:
    if not path.is_dir():
        raise ValueError(f"data={path} is neither a folder nor one of {', '.join(builtin)}.")
    held_out = next((path / name for name in ("val", "test") if (path / name).is_dir()), None)
    if (path / "train").is_dir() and held_out is not None:
        train, classes = _image_folder(path / "train")
        test, test_classes = _image_folder(held_out)
        if classes != test_classes:
            raise ValueError(
                f"{path / 'train'} and {held_out} have different class folders: "
                f"{', '.join(sorted(set(classes) ^ set(test_classes)))} only in one of them."
            )
    else:
        images, classes = _image_folder(path)
        train_positions, test_positions = split(images.labels)
        train, test = images.subset(train_positions), images.subset(test_positions)
    return Data(train, test, len(classes), 224, IMAGENET_NORMALIZE, {}, tuple(classes))


def _image_folder(path: Path) -> tuple[Images, list[str]]:
    from torchvision.datasets import ImageFolder

    try:
        folder = ImageFolder(str(path))
    except (FileNotFoundError, PermissionError) as error:
        raise ValueError(f"{path} is no readable folder of class folders with images: {error}") from None
    if len(folder.classes) < 2:
        raise ValueError(f"{path} has the single class '{folder.classes[0]}'; accuracies need at least two.")
    labels = np.asarray(folder.targets, dtype=np.int64)
    for c in range(len(folder.classes)):
        file = folder.samples[int(np.argmax(labels == c))][0]
        try:
            folder.loader(file)
        except OSError as error:
            raise ValueError(f"{file} cannot be read as an image: {error}") from None
    return Images(lambda i: folder.loader(folder.samples[i][0]), labels), folder.classes
