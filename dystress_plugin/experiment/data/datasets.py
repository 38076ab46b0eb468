"""Images, with labels or without: scikit-learn's digits, CIFAR, or folders; all or a long-tailed part of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from lightly.transforms.utils import IMAGENET_NORMALIZE
from PIL import Image
from torch.utils.data import Dataset, DistributedSampler

from dystress_plugin import distributed
from dystress_plugin.experiment import places
from dystress_plugin.experiment.data import folders
from dystress_plugin.experiment.data import selection as tails
from dystress_plugin.experiment.data.folders import say
from dystress_plugin.experiment.data.scan import read as read_scan
from dystress_plugin.experiment.io import pictures
from dystress_plugin.experiment.spec import DataSpec, RunSpec

PILImage: TypeAlias = Any  # PIL.Image.Image

HELD_OUT = 0.25  # of data that comes without a test part

RANKED = 4096  # images without labels that the effective rank is of

CIFAR = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616]}

NORMALIZE = {"digits": {"mean": [0.3] * 3, "std": [0.37] * 3}, "cifar10": CIFAR, "cifar100": CIFAR}  # else ImageNet's

# The settings that name a run's images: what was done on them, and who takes them from another place.
KEYS = {
    "data": ("trained", "`dystress evaluate`, `dystress inspect` and `dystress embed` also take"),
    "val": ("evaluated", "`dystress evaluate` also takes"),
}

IMAGE_SIZES = {"digits": 8, "cifar10": 32, "cifar100": 32}  # else 224


@dataclass(frozen=True)
class Images:
    """Labelled images, loaded when asked for.

    Attributes:
        source: (images, ...) pixels, or (images,) paths of files.
        labels: (images,) int64, classes from 0; all 0 where there are none.
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
        test: images that accuracies are measured on; without labels some of those to pretrain on.
        normalize: `mean` and `std` of a colour channel, each three numbers.
        augmentation: values that differ from those of natural images.
        classes: a name for every class, in the order of the labels, which is their alphabetical one; () without labels.
        val: other data, with labels, that the network is evaluated on.
    """

    train: Images
    test: Images
    normalize: dict[str, list[float]]
    augmentation: dict[str, float]
    classes: tuple[str, ...]
    val: Data | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def evaluated(self) -> Data:
        """What the network is evaluated on, shown as what it was trained on."""
        return self if self.val is None else replace(self.val, normalize=self.normalize)


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
    labels: bool | None = None,
    key: str = "data",
) -> Data:
    """A data set by name, or from folders of images; its training images those that `long_tail.select` chooses.

    The files in `without` are left out last, so that they change neither which images are held out nor what an index
    file means; they are paths below the folder that all lie in.

    Raises:
        ValueError: for a folder that is not there, has no images, cannot be read, or not without doubt
            (`folders.read`), for CIFAR that is neither there nor to be downloaded, a `long_tail` outside of (0, 1] or
            of images without labels, or an index file that does not fit.
    """
    bad: set[str] = set()
    if name in BUILTIN:
        data = BUILTIN[name](root, download, key)
    else:
        data, bad = _folder(name, labels, without, key)
    if labels is False:
        data = replace(data, classes=())
    if long_tail is not None and not data.classes:
        raise ValueError(f"long_tail={long_tail} is of classes, but the images in {key}={name} have no labels.")
    chosen = tails.select(data.train.labels, indices=indices, long_tail=long_tail, seed=seed, profile=long_tail_profile)
    if chosen is not None:
        data = replace(data, train=data.train.subset(chosen))
    if data.train.files is not None:
        data = replace(data, train=_usable(data.train, bad, data), test=_usable(data.test, bad, data))
    return data if data.classes else _unlabelled(data.train, data)


def load_for(
    spec: DataSpec, seed: int, *, without: Mapping[str, Collection[str]] | None = None, whole: bool = False
) -> Data:
    """The data of a run, without the files that its scans left out; `whole`: before a long tail was cut."""
    without = without or {}
    place: dict[str, Any] = {"root": spec.data_root, "download": spec.download, "seed": seed}
    data = load(
        spec.name,
        long_tail=None if whole else spec.long_tail,
        long_tail_profile=spec.long_tail_profile,
        indices=None if whole else spec.indices,
        without=without.get("data", ()),
        labels=spec.labels,
        **place,
    )
    if spec.val is None:
        return data
    val = load(spec.val, long_tail=None, without=without.get("val", ()), labels=True, key="val", **place)
    return replace(data, val=val)


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
    labels: bool | None = None,
    whole: bool = False,
    without: Mapping[str, Collection[str]] | None = None,
) -> Shown:
    """The data of a run, as it was trained on it, or other data, whose tail nobody cut; `val` is left alone.

    Args:
        run: its folder.
        trained: it, as `read_config` gives it.
        data: None for its own, which also has other spellings, or another place if it was moved.
        data_root: None for its own.
        download: None for its own.
        labels: as for `folders.read`; None for its own: as in training.
        whole: its own before a long tail was cut.
        without: files of other data to leave out, as for `load_for`.

    Raises:
        ValueError: as `load`; for images that are not there any more; for a part of data that is not the same any more.
    """
    scan = read_scan(run)
    asked = replace(trained.data, name=_found(run, "data", trained.data.name, data))
    own = data is None or places.same(data, asked.name)
    shown = asked.on(data, data_root, asked.download if download is None else download, labels)
    if not own and (asked.cut or (scan is not None and scan.bad)):
        say(f"data={shown.name} is not what {run} was trained on: no long tail, indices or skipped files are left out.")
    if own and asked.indices is not None:
        tails.check_unchanged(run, asked.indices)
    if own and scan is not None and not scan.fits(shown.name):
        changed = f"data={shown.name} has other images, or other splits, than {run} was trained on"
        if asked.cut:  # positions in it mean other images now
            raise ValueError(f"{changed}, and only a part of those was used. Put them back as they were.")
        say(f"{changed}.")
    left = without if not own else {} if scan is None else {"data": scan.left_out}
    images = load_for(shown, trained.seed, without=left, whole=whole)
    if not own:  # the network knows colours as it was shown them
        images = replace(images, normalize=normalize_of(asked.name))
    return Shown(replace(trained, data=shown), images, own)


def load_evaluated(
    run: Path,
    trained: RunSpec,
    *,
    data: str | None = None,
    val: str | None = None,
    data_root: str | None = None,
    download: bool | None = None,
    labels: bool | None = None,
) -> Data:
    """What accuracies of a run are of: `val`, given or its own, and then nothing else is read; or `load_for_run`.

    Its own `val` is of its own data alone.
    """
    own = trained.data.val
    if val is None and (own is None or not _is_own(run, trained.data.name, data)):
        return load_for_run(run, trained, data=data, data_root=data_root, download=download, labels=labels).data
    if own is not None:
        own = _found(run, "val", own, val)
    name = val or str(own)
    scan = read_scan(run, "val") if own is not None and places.same(name, own) else None
    if scan is not None and not scan.fits(name, "val"):
        say(f"val={name} has other images, or other splits, than {run} was evaluated on.")
    shown = load(
        name,
        root=data_root or trained.data.data_root,
        download=trained.data.download if download is None else download,
        long_tail=None,
        seed=trained.seed,
        without=() if scan is None else scan.left_out,
        labels=True,
        key="val",
    )
    return replace(shown, normalize=normalize_of(trained.data.name))


def _is_own(run: Path, name: str, data: str | None) -> bool:
    """Whether data that is given is a run's own, also where that has moved."""
    return data is None or places.same(data, _found(run, "data", name, data))


def _found(run: Path, key: str, name: str, given: str | None) -> str:
    """Where images of a run are that a setting names: where they were, else as given, if that has the very files."""
    if not places.is_gone(name):
        return name
    did, takers = KEYS[key]
    if given is None:
        raise ValueError(
            f"{run} was {did} on {key}={name}, which is not there. Put it, or a link to it, there; {takers} "
            f"{key}=FOLDER."
        )
    scan = read_scan(run, key)
    if scan is None or not folders.are_files(given) or not scan.fits(given, key):
        return name
    say(f"{key}={given} has the very files that {run} was {did} on in {name}, and is taken for it.")
    return given


def split(labels: np.ndarray, of: str = "data") -> tuple[np.ndarray, np.ndarray]:
    """Positions to train on and held-out ones: a quarter of every class, always the same; `of`: for errors."""
    from sklearn.model_selection import train_test_split

    try:
        train, test = train_test_split(np.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=0)
    except ValueError as error:
        raise ValueError(f"{of}: a quarter of every class is held out for accuracies, but: {error}") from None
    return np.sort(train), np.sort(test)


def _digits(_root: str, _download: bool, key: str) -> Data:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    gray = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = Images(gray, labels.astype(np.int64))
    train, test = split(images.labels)
    say(f"{key}=digits: a quarter of every class, {len(test)} images, is held out for accuracies.")
    return Data(
        train=images.subset(train),
        test=images.subset(test),
        normalize=NORMALIZE["digits"],
        # A mirrored or strongly cropped digit is another digit, and there is no colour.
        augmentation={"min_scale": 0.5, "grayscale": 0.0, "flip": 0.0, "rotate": 15.0},
        classes=tuple("0123456789"),
    )


def _cifar(class_name: str) -> Callable[[str, bool, str], Data]:
    def build(root: str, download: bool, key: str) -> Data:
        import torchvision

        dataset = getattr(torchvision.datasets, class_name)
        try:
            halves = [dataset(root, train=train, download=download) for train in (True, False)]
        except RuntimeError as error:
            raise ValueError(
                f"{key}={class_name.lower()} is not in data_root={root}: {error} Set data_root, or download=true."
            ) from None
        train, test = (Images(part.data, np.asarray(part.targets, dtype=np.int64)) for part in halves)
        return Data(
            train=train,
            test=test,
            normalize=NORMALIZE["cifar10"],
            augmentation={},
            classes=tuple(halves[0].classes),
        )

    return build


BUILTIN = {"cifar10": _cifar("CIFAR10"), "cifar100": _cifar("CIFAR100"), "digits": _digits}


def normalize_of(name: str) -> dict[str, list[float]]:
    """`mean` and `std` of the colour channels by which a data set is normalised."""
    found: dict[str, list[float]] = NORMALIZE.get(name, IMAGENET_NORMALIZE)
    return found


def image_size_of(name: str) -> int:
    """Pixels of a view of a data set, unless set otherwise."""
    return IMAGE_SIZES.get(name, 224)


def _folder(name: str, labels: bool | None, without: Collection[str], key: str) -> tuple[Data, set[str]]:
    """What a folder has, and the files in it that are to be left out."""
    places.check_data(name, key)
    layout = folders.read(name, labels, key=key)
    bad = {str(layout.folder / each) for each in without}
    found = [_image_folder(part, layout, bad) for part in layout.parts]
    folders.say(layout)
    if not layout.labelled:
        files = np.unique(np.concatenate([images.source for images, _ in found]))
        if not len(files):
            raise ValueError(f"{key}={name} has no images that Pillow can read.")
        images = Images(files, np.zeros(len(files), dtype=np.int64))
        return Data(images, images, IMAGENET_NORMALIZE, {}, ()), bad
    (train, classes), *others = found
    for test, its in others:
        if classes != its:
            raise ValueError(
                f"{layout.train[0]} and {layout.held_out} have different class folders: "
                f"{', '.join(sorted(set(classes) ^ set(its)))} only in one of them."
            )
        return Data(train, test, IMAGENET_NORMALIZE, {}, classes), bad
    kept, held_out = split(train.labels, f"{key}={name}")
    return Data(train.subset(kept), train.subset(held_out), IMAGENET_NORMALIZE, {}, classes), bad


def _image_folder(path: Path, layout: folders.Layout, without: Collection[str]) -> tuple[Images, tuple[str, ...]]:
    """What torchvision's ImageFolder finds, without hidden folders, and the names of the classes; or all images."""
    listed, faults = layout.listed[path]
    if place := next((place for place in faults if place not in without), None):
        raise ValueError(f"{place} cannot be listed: {faults[place]}. Fix or remove it.")
    if not layout.labelled:
        names = np.asarray([*filter(pictures.is_picture, chain.from_iterable(listed.values()))], dtype=np.str_)
        return Images(names, np.zeros(len(names), dtype=np.int64)), ()
    found = layout.classes(path)
    files = np.asarray([file for files in found.values() for file in files])
    labels = np.repeat(np.arange(len(found), dtype=np.int64), [len(files) for files in found.values()])
    return Images(files, labels), tuple(found)


def _unlabelled(images: Images, data: Data) -> Data:
    """Images without their labels; what is measured is of some of them."""
    images = Images(images.source, np.zeros_like(images.labels))
    some = np.sort(np.random.default_rng(0).permutation(len(images.labels))[:RANKED])
    return replace(data, train=images, test=images.subset(some), classes=())


def _usable(images: Images, without: Collection[str], data: Data) -> Images:
    """Images but those left out; a ValueError for a class of which nothing, or nothing readable, is left."""
    kept = images.subset(np.flatnonzero(~np.isin(images.source, list(without)))) if without else images
    for label in np.unique(images.labels):
        positions = np.flatnonzero(kept.labels == label)
        if not len(positions):
            folder = Path(images.source[np.argmax(images.labels == label)]).parent
            if not data.classes:
                raise ValueError(f"None of the images in {folder} can be used. Fix them.")
            raise ValueError(
                f"Class '{data.classes[label]}' has no image left: none of those in {folder} can be used. "
                "Fix them, or remove the folder."
            )
        kept.load(int(positions[0]))
    return kept
