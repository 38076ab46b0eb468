"""Images with labels: scikit-learn's digits, CIFAR, or a folder; all or a long-tailed part of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from lightly.transforms.utils import IMAGENET_NORMALIZE
from PIL import Image
from torch.utils.data import Dataset, DistributedSampler

from dystress_plugin import distributed
from dystress_plugin.experiment import long_tail as tails
from dystress_plugin.experiment.images import parts
from dystress_plugin.experiment.settings import PretrainSettings

Picture: TypeAlias = Any  # PIL.Image.Image
Load: TypeAlias = Callable[[int], Picture]

HELD_OUT = 0.25  # of data that comes without a test part


@dataclass(frozen=True)
class Images:
    """Labelled images, loaded when asked for.

    Attributes:
        load: from a position in `range(len(labels))` to an RGB picture; a function that can be pickled, as processes
            that load images may be spawned.
        labels: (images,) int64, classes from 0.
        files: (images,) paths, where the images are files.
    """

    load: Load
    labels: np.ndarray
    files: np.ndarray | None = None

    def subset(self, positions: np.ndarray) -> Images:
        """Only some of the images, in the order given."""
        files = None if self.files is None else self.files[positions]
        return Images(partial(_load_of_subset, self.load, positions), self.labels[positions], files)


@dataclass(frozen=True)
class Data:
    """A data set as the command uses it.

    Attributes:
        train: images to pretrain on, and the memory of the kNN.
        test: images that accuracies are measured on.
        image_size: pixels of a view, unless set otherwise.
        normalize: `mean` and `std` of a colour channel, each three numbers.
        augmentation: values that differ from those of natural images.
        classes: a name for every class, in the order of the labels, which is their alphabetical one.
    """

    train: Images
    test: Images
    image_size: int
    normalize: dict[str, list[float]]
    augmentation: dict[str, float]
    classes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.classes)


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
        if distributed.world_size() > 1:
            # A process that is spawned for training gets it from the first one, as that one's.
            self.rank = distributed.rank()
        first = self.epoch * len(self.dataset)  # type: ignore[arg-type]
        return (first + i for i in super().__iter__())


class OwnGenerator(torch.Generator):
    """A generator for a loader, which is pickled as a new one: torch's cannot be sent to a process that is spawned."""

    def __reduce__(self) -> Any:
        return type(self), ()


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
    without: Collection[str] = (),
) -> Data:
    """A data set by name, or from a folder of images; its training images those that `long_tail.select` chooses.

    The files in `without` are left out last, so that they change neither which images are held out nor what an index
    file means.

    Raises:
        ValueError: for a folder that is not there, has no images or a single class, or cannot be read, for CIFAR
            that is neither there nor to be downloaded, a `long_tail` outside of (0, 1], or an index file that
            does not fit.
    """
    data = _folder(Path(name)) if name not in BUILTIN else BUILTIN[name](root, download)
    labels = data.train.labels
    chosen = tails.select(labels, indices=indices, long_tail=long_tail, seed=seed, profile=long_tail_profile)
    if chosen is not None:
        data = replace(data, train=data.train.subset(chosen))
    if data.train.files is not None:
        data = replace(data, train=_usable(data.train, without, data), test=_usable(data.test, without, data))
    return data


def load_for(settings: PretrainSettings, *, without: Collection[str] = (), whole: bool = False) -> Data:
    """The data of a run, without the files that its scan left out; `whole`: before a long tail was cut."""
    return load(
        settings.data,
        root=settings.data_root,
        download=settings.download,
        long_tail=None if whole else settings.long_tail,
        long_tail_profile=settings.long_tail_profile,
        indices=None if whole else settings.indices,
        seed=settings.seed,
        without=without,
    )


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
    images = Images(partial(_pixels, gray), labels.astype(np.int64))
    train, test = split(images.labels)
    return Data(
        train=images.subset(train),
        test=images.subset(test),
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
            halves = [dataset(root, train=train, download=download) for train in (True, False)]
        except RuntimeError as error:
            raise ValueError(
                f"data={class_name.lower()} is not in data_root={root}: {error} Set data_root, or download=true."
            ) from None
        train, test = (_array(part.data, part.targets) for part in halves)
        return Data(
            train=train,
            test=test,
            image_size=32,
            normalize={"mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616]},
            augmentation={},
            classes=tuple(halves[0].classes),
        )

    return build


def _array(pixels: np.ndarray, labels: Sequence[int]) -> Images:
    return Images(partial(_pixels, pixels), np.asarray(labels, dtype=np.int64))


BUILTIN = {"cifar10": _cifar("CIFAR10"), "cifar100": _cifar("CIFAR100"), "digits": _digits}


def is_folder(name: str) -> bool:
    """Whether a data set is a folder of images, and not one with a name of its own."""
    return name not in BUILTIN and Path(name).is_dir()


def _folder(path: Path) -> Data:
    if not path.is_dir():
        raise ValueError(f"data={path} is neither a folder nor one of {', '.join(BUILTIN)}.")
    first, *held_out = parts(path)
    images, classes = _image_folder(first)
    if held_out:
        train = images
        test, test_classes = _image_folder(held_out[0])
        if classes != test_classes:
            raise ValueError(
                f"{first} and {held_out[0]} have different class folders: "
                f"{', '.join(sorted(set(classes) ^ set(test_classes)))} only in one of them."
            )
    else:
        train_positions, test_positions = split(images.labels)
        train, test = images.subset(train_positions), images.subset(test_positions)
    return Data(train, test, 224, IMAGENET_NORMALIZE, {}, tuple(classes))


def _image_folder(path: Path) -> tuple[Images, list[str]]:
    from torchvision.datasets import ImageFolder

    try:
        folder = ImageFolder(str(path))
    except (FileNotFoundError, PermissionError) as error:
        raise ValueError(f"{path} is no readable folder of class folders with images: {error}") from None
    if len(folder.classes) < 2:
        raise ValueError(f"{path} has the single class '{folder.classes[0]}'; accuracies need at least two.")
    files = np.asarray([file for file, _ in folder.samples])
    return Images(partial(_file, files), np.asarray(folder.targets, dtype=np.int64), files), folder.classes


def _usable(images: Images, without: Collection[str], data: Data) -> Images:
    """Images but those left out; a ValueError for a class of which nothing, or nothing readable, is left."""
    assert images.files is not None  # narrows the type
    kept = images.subset(np.flatnonzero(~np.isin(images.files, list(without)))) if without else images
    assert kept.files is not None  # as above
    for label in np.unique(images.labels):
        positions = np.flatnonzero(kept.labels == label)
        if not len(positions):
            folder = Path(images.files[np.argmax(images.labels == label)]).parent
            raise ValueError(
                f"Class '{data.classes[label]}' has no image left: none of those in {folder} can be used. "
                "Mend them, or remove the folder."
            )
        _picture(kept.files[positions[0]])
    return kept


def _load_of_subset(load: Load, positions: np.ndarray, i: int) -> Picture:
    return load(int(positions[i]))


def _pixels(pixels: np.ndarray, i: int) -> Picture:
    return Image.fromarray(pixels[i]).convert("RGB")


def _file(files: np.ndarray, i: int) -> Picture:
    return _picture(files[i])


def _picture(file: str) -> Picture:
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as an image: {error}") from None
