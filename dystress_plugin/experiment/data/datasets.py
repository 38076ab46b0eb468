"""Images with labels: scikit-learn's digits, CIFAR, or a folder; all or a long-tailed part of them."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from lightly.transforms.utils import IMAGENET_NORMALIZE
from PIL import Image
from torch.utils.data import Dataset, DistributedSampler
from torchvision.datasets.folder import IMG_EXTENSIONS

from dystress_plugin import distributed
from dystress_plugin.experiment import places
from dystress_plugin.experiment.data import folders
from dystress_plugin.experiment.data import selection as tails
from dystress_plugin.experiment.data.scan import read as read_scan
from dystress_plugin.experiment.io import pictures
from dystress_plugin.experiment.spec import DataSpec, RunSpec

PILImage: TypeAlias = Any  # PIL.Image.Image

HELD_OUT = 0.25  # of data that comes without a test part


@dataclass(frozen=True)
class Images:
    """Labelled images, loaded when asked for.

    Attributes:
        source: (images, ...) pixels, or (images,) paths of files.
        labels: (images,) int64, classes from 0.
    """

    source: np.ndarray
    labels: np.ndarray

    @property
    def files(self) -> np.ndarray | None:
        """(images,) paths, where the images are files."""
        return self.source if self.source.ndim == 1 else None

    def load(self, i: int) -> PILImage:
        """The image at a position, as an RGB picture."""
        return Image.fromarray(self.source[i]).convert("RGB") if self.files is None else pictures.read(self.files[i])

    def subset(self, positions: np.ndarray) -> Images:
        """Only some of the images, in the order given."""
        return Images(self.source[positions], self.labels[positions])


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

    def __init__(self, images: Images, transform: Callable[[PILImage], Any], seed: int | None = None) -> None:
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
    file means; they are paths below the folder.

    Raises:
        ValueError: for a folder that is not there, has no images or a single class, cannot be read, or not without
            doubt (`folders.read`), for CIFAR
            that is neither there nor to be downloaded, a `long_tail` outside of (0, 1], or an index file that
            does not fit.
    """
    data = _folder(Path(name), without) if name not in BUILTIN else BUILTIN[name](root, download)
    labels = data.train.labels
    chosen = tails.select(labels, indices=indices, long_tail=long_tail, seed=seed, profile=long_tail_profile)
    if chosen is not None:
        data = replace(data, train=data.train.subset(chosen))
    if data.train.files is not None:
        without = {str(Path(name, file)) for file in without}
        data = replace(data, train=_usable(data.train, without, data), test=_usable(data.test, without, data))
    return data


def load_for(spec: DataSpec, seed: int, *, without: Collection[str] = (), whole: bool = False) -> Data:
    """The data of a run, without the files that its scan left out; `whole`: before a long tail was cut."""
    return load(
        spec.name,
        root=spec.data_root,
        download=spec.download,
        long_tail=None if whole else spec.long_tail,
        long_tail_profile=spec.long_tail_profile,
        indices=None if whole else spec.indices,
        seed=seed,
        without=without,
    )


class Shown(NamedTuple):
    """What a trained network is shown.

    Attributes:
        spec: its run, with this data.
        data: the images.
        own: whether it was trained on them.
    """

    spec: RunSpec
    data: Data
    own: bool


def load_for_run(
    run: Path,
    trained: RunSpec,
    *,
    data: str | None = None,
    data_root: str | None = None,
    download: bool | None = None,
    whole: bool = False,
) -> Shown:
    """The data of a run, as it was trained on it, or other data, whose tail nobody cut.

    Args:
        run: its folder.
        trained: it, as `read_config` gives it.
        data: None for its own, which also has other spellings, or another place if it was moved.
        data_root: None for its own.
        download: None for its own.
        whole: its own before a long tail was cut.

    Raises:
        ValueError: as `load`; for data that is not there any more; for a part of data that is not the same any more.
    """
    asked = trained.data
    folder = asked.name not in places.NAMED
    scan = read_scan(run) if folder else None
    if folder and not Path(asked.name).is_dir():
        if data is None:
            raise ValueError(
                f"{run} was trained on data={asked.name}, which is not there. Put it, or a link to it, there; "
                "`dystress evaluate` and `dystress inspect` also take data=FOLDER."
            )
        if scan is not None and is_folder(data) and scan.fits(data):
            say(f"data={data} has the very files that {run} was trained on in {asked.name}, and is taken for it.")
            asked = replace(asked, name=data)
    shown = asked.on(data, data_root, asked.download if download is None else download)
    own = places.same(shown.name, asked.name)
    if not own and (asked.cut or (scan is not None and scan.bad)):
        say(f"data={shown.name} is not what {run} was trained on: no long tail, indices or skipped files are left out.")
    if own and asked.indices is not None:
        tails.check_unchanged(run, asked.indices)
    if own and scan is not None and not scan.fits(shown.name):
        changed = f"data={shown.name} has other images, or other splits, than {run} was trained on"
        if asked.cut:  # positions in it mean other images now
            raise ValueError(f"{changed}, and only a part of those was used. Put them back as they were.")
        say(f"{changed}.")
    without = scan.left_out if own and scan is not None else ()
    images = load_for(shown, trained.seed, without=without, whole=whole)
    return Shown(replace(trained, data=shown), images, own)


@functools.cache
def say(line: str) -> None:
    """Prints a line for the user, once, however often the data is loaded."""
    print(f"dystress: {line}", file=sys.stderr)


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
    images = Images(gray, labels.astype(np.int64))
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
        train, test = (Images(part.data, np.asarray(part.targets, dtype=np.int64)) for part in halves)
        return Data(
            train=train,
            test=test,
            image_size=32,
            normalize={"mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616]},
            augmentation={},
            classes=tuple(halves[0].classes),
        )

    return build


BUILTIN = {"cifar10": _cifar("CIFAR10"), "cifar100": _cifar("CIFAR100"), "digits": _digits}


def is_folder(name: str) -> bool:
    """Whether a data set is a folder of images, and not one with a name of its own."""
    return name not in places.NAMED and Path(name).is_dir()


def _folder(path: Path, without: Collection[str]) -> Data:
    if not path.is_dir():
        raise ValueError(f"data={path} is neither a folder nor one of {', '.join(BUILTIN)}.")
    layout = folders.read(path)
    without = {str(path / name) for name in without}
    images, classes = _image_folder(layout.train, without)
    if layout.held_out is not None:
        train = images
        test, test_classes = _image_folder(layout.held_out, without)
        if classes != test_classes:
            raise ValueError(
                f"{layout.train} and {layout.held_out} have different class folders: "
                f"{', '.join(sorted(set(classes) ^ set(test_classes)))} only in one of them."
            )
        say(str(layout))
    else:
        train_positions, test_positions = split(images.labels)
        train, test = images.subset(train_positions), images.subset(test_positions)
    return Data(train, test, 224, IMAGENET_NORMALIZE, {}, tuple(classes))


def _image_folder(path: Path, without: Collection[str]) -> tuple[Images, list[str]]:
    """What torchvision's ImageFolder finds, without hidden folders, and the names of the classes."""
    listed, faults = folders.class_files(path)
    if place := next((place for place in faults if place not in without), None):
        raise ValueError(f"{place} cannot be listed: {faults[place]}. Fix or remove it.")
    found = {name: list(filter(folders.named_as_image, files)) for name, files in listed.items()}
    if not found or not all(found.values()):
        empty = ", ".join(name for name, files in found.items() if not files)
        reason = f"no images in {empty}; remove what is no class" if empty else "it has no class folders"
        raise ValueError(
            f"{path} is no readable folder of class folders with images: {reason}. Names of images end in "
            f"{', '.join(IMG_EXTENSIONS)}."
        )
    classes = list(found)
    if len(classes) < 2:
        raise ValueError(
            f"{path} has the single class '{classes[0]}'; accuracies need at least two. If the classes are in there, "
            f"give data={path / classes[0]}"
        )
    files = np.asarray([file for files in found.values() for file in files])
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(files) for files in found.values()])
    return Images(files, labels), classes


def _usable(images: Images, without: Collection[str], data: Data) -> Images:
    """Images but those left out; a ValueError for a class of which nothing, or nothing readable, is left."""
    kept = images.subset(np.flatnonzero(~np.isin(images.source, list(without)))) if without else images
    for label in np.unique(images.labels):
        positions = np.flatnonzero(kept.labels == label)
        if not len(positions):
            folder = Path(images.source[np.argmax(images.labels == label)]).parent
            raise ValueError(
                f"Class '{data.classes[label]}' has no image left: none of those in {folder} can be used. "
                "Fix them, or remove the folder."
            )
        kept.load(int(positions[0]))
    return kept
