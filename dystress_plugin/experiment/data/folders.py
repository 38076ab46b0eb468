"""Folders of images: which of their folders are splits, which are classes, and which are neither."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dystress_plugin.experiment import places
from dystress_plugin.experiment.io import pictures

SPLITS = {
    "train": ("train", "training", "trn", "trainval"),
    "val": ("val", "valid", "validation", "dev", "devel", "development", "eval", "evaluation"),
    "test": ("test", "testing", "tst", "holdout"),
}

HELD_OUT = ("val", "test")  # the first that is there

WORDS = {word: split for split, words in SPLITS.items() for word in words}

FILLERS = {"set", "split", "data", "dataset", "images", "image", "imgs", "img"}  # test_set, train-images

# Beside those that begin with a dot: what archives, network drives and file systems leave.
HIDDEN = {"__macosx", "__pycache__", "@eadir", "#recycle", "lost+found", "$recycle.bin", "system volume information"}

# Files that together tell a folder of results; the figures in it must never become images of a class.
TRACES: tuple[tuple[str, frozenset[str]], ...] = (
    *(
        ("`dystress pretrain`", frozenset({"config.yaml", other}))
        for other in ("images.json", "untrained.json", "metrics.csv", "summary.json")
    ),
    ("`dystress compare`", frozenset({"compare.yaml"})),
    ("`dystress report`", frozenset({"results.csv", "report.html"})),
    ("`dystress inspect`", frozenset({"inspect.json"})),
    ("`dystress long-tail`", frozenset({"long_tail.json"})),
    ("Lightning", frozenset({"hparams.yaml"})),
    ("wandb", frozenset({"wandb-metadata.json"})),
)


# What to do about images without classes, by the setting that names them.
SORT = {
    "data": "labels=false takes all images in it without labels.",
    "val": "val needs labels: sort its images into class folders, or give another val.",
}


@dataclass(frozen=True)
class Layout:
    """How the images are read that a value of `data` names.

    Attributes:
        name: that value.
        folder: what everything lies in.
        train: what is trained on: a folder of class folders, or folders and files of images without labels.
        held_out: folder of class folders to measure accuracies on; None: a part of `train`, or nothing.
        unused: names of the other folders beside the two.
        labelled: whether class folders are labels.
        key: the setting that it is a value of.
    """

    name: str
    folder: Path
    train: tuple[Path, ...]
    held_out: Path | None = None
    unused: tuple[str, ...] = ()
    labelled: bool = True
    key: str = "data"

    @property
    def parts(self) -> tuple[Path, ...]:
        """`train`, and `held_out` if there is one."""
        return self.train if self.held_out is None else (*self.train, self.held_out)

    @property
    def splits(self) -> list[str]:
        """The parts as paths below the folder; none where it has class folders itself, or none."""
        return [] if self.held_out is None else [part.relative_to(self.folder).as_posix() for part in self.parts]

    @property
    def read_as(self) -> str:
        """What it was taken for."""
        return ", ".join(self.splits) or ("class folders" if self.labelled else "images without labels")

    @cached_property
    def listed(self) -> dict[Path, tuple[dict[str, list[str]], dict[str, str]]]:
        """`class_files` of each part."""
        return {part: class_files(part, self.key) for part in self.parts}

    def classes(self, part: Path) -> dict[str, list[str]]:
        """The images in every class folder of a part.

        Raises:
            ValueError: for fewer than two class folders, or one without images.
        """
        files = self.listed[part][0]
        found = {name: list(filter(pictures.is_picture, files[name])) for name in files if name}
        if not found or not all(found.values()):
            empty = ", ".join(name for name, its in found.items() if not its)
            reason = f"no images in {empty}; remove what is no class" if empty else "it has no class folders"
            raise ValueError(f"{part} is no readable folder of class folders with images: {reason}. {SORT[self.key]}")
        if len(found) < 2:
            only = next(iter(found))
            raise ValueError(
                f"{part} has the single class '{only}'; accuracies need at least two. If the classes are in there, "
                f"give {self.key}={part / only}"
            )
        return found

    def check_classes(self) -> None:
        """Raises a ValueError for class folders that are no labels; what cannot be listed is for a scan to tell."""
        for part, (_, faults) in self.listed.items() if self.labelled else ():
            if not faults:
                self.classes(part)

    def __str__(self) -> str:
        """In a line, for the terminal: how it was read, and what was left out."""
        found = [(name, file) for files, _ in self.listed.values() for name in files for file in files[name]]
        images = [(name, file) for name, file in found if pictures.is_picture(file)]
        loose = [os.path.basename(file) for name, file in images if not name]
        if self.held_out is not None:
            learns = "trained" if self.key == "data" else "kNN and linear probe fitted"
            told = f"{learns} on {self.splits[0]}, accuracies on {self.splits[1]}"
            loose += [name for name in os.listdir(self.folder) if pictures.is_picture(str(self.folder / name))]
        elif self.labelled:
            classes = len({name for name, _ in found} - {""})
            told = f"{classes} class folders; for accuracies a quarter of every class is held out"
        else:
            left_out = "kNN and linear probe, which need classes, are left out (val=FOLDER has some for them)"
            told = f"{len(images):,} images without labels, none held out; {left_out}"
        if self.unused:
            told += f"; not used: {', '.join(self.unused)}"
        if self.labelled and loose:
            told += f"; not used, as they lie beside class folders: {_listed(loose)}"
        rest = sorted({file for _, file in found} - {file for _, file in images})
        others = Counter(os.path.splitext(file)[1].lower() for file in rest if os.path.basename(file)[0] != ".")
        if others:
            told += "; no images: " + ", ".join(f"{n} {end or 'without an ending'}" for end, n in others.most_common(5))
        return f"{self.key}={self.name}: {told}."


def read(data: str | Path, labels: bool | None = None, *, key: str = "data") -> Layout:
    """How images are laid out: class folders, splits (in any spelling of `SPLITS`) with class folders, or no classes.

    Args:
        data: a folder, or a list of folders or a pattern, whose images have no labels.
        labels: whether class folders are labels; None: where there are two or more.
        key: the setting that `data` is the value of.

    Raises:
        ValueError: for a folder that cannot be read, or in two ways, that has splits without class folders or nothing
            to train on, or that a command wrote results to.
    """
    try:
        found = [Path(path) for source in places.sources(str(data), key) for path in places.matches(source)]
        if not places.there(data):
            raise ValueError(f"{key}={data} names what is not there.")
        if len(found) == 1 and found[0].is_dir():
            return _read(found[0], str(data), labels, key)
        if labels:
            raise ValueError(f"{key}={data} has no labels: they need one folder of class folders.")
        return _read_several(found, str(data))
    except OSError as error:
        raise ValueError(f"{key}={data} cannot be read: {error}") from None


def are_files(name: str) -> bool:
    """Whether a value of `data` names images in files that are there, and not a data set with a name of its own."""
    return name not in places.NAMED and places.there(name)


@functools.cache
def say(line: object) -> None:
    """Prints a line for the user, once, however often the data is loaded."""
    print(f"dystress: {line}", file=sys.stderr)


def visible(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted as torchvision sorts classes, without hidden ones."""
    return sorted(name for name in os.listdir(folder) if os.path.isdir(folder / name) and not _hidden(name))


def class_files(part: Path, key: str = "data") -> tuple[dict[str, list[str]], dict[str, str]]:
    """The files of every class folder, in the order of torchvision's ImageFolder; and what cannot be listed, with why.

    Those that lie in none, hidden ones left out, are in the class "". A file instead of a folder is one of them.

    Raises:
        ValueError: for a folder that cannot be listed itself, or with one below that a command wrote results to or that
            is divided into splits.
    """
    top = str(part)
    if os.path.isfile(top):
        return {"": [top]}, {}
    places, faults = _walk(top, key)
    if top in faults:
        raise ValueError(f"{top} is no readable folder of class folders with images: {faults[top]}")
    found: dict[str, list[str]] = {}
    for folder, names in places:
        name = "" if folder == top else os.path.relpath(folder, top).split(os.sep)[0]
        of_class = [str(Path(folder, file)) for file in names if name or not file.startswith(".")]
        if name or of_class:
            found.setdefault(name, []).extend(of_class)
    # What lies beside class folders and is not there may stand for a class, which would be missed.
    lost = {file: state(file) for file in found.get("", []) if not os.path.exists(file)}
    if lost:
        found[""] = [file for file in found[""] if file not in lost]
    return dict(sorted(found.items())), {str(Path(place)): why for place, why in (faults | lost).items()}


def state(file: str) -> str:
    """Size and time of a file, or why there are none."""
    try:
        found = os.stat(file)
    except OSError as error:
        return pictures.reason(error)
    return f"{found.st_size} {found.st_mtime_ns}"


def _read(folder: Path, name: str, labels: bool | None, key: str) -> Layout:
    _check_no_results(folder, key)
    names = visible(folder)
    roles = _roles(names)
    if not roles:
        layout = Layout(name, folder, (folder,), key=key)
        labelled = _has_classes(folder, *layout.listed[folder]) if labels is None else labels
        return layout if labelled else Layout(name, folder, (folder,), labelled=False, key=key)
    _check_roles(folder, names, roles, key)
    if labels is False:
        part = roles["train"][0]
        rest = tuple(other for other in names if other != part)
        return Layout(name, folder, (folder / part,), unused=rest, labelled=False, key=key)
    held_out = roles[next(split for split in HELD_OUT if split in roles)][0]
    chosen = (roles["train"][0], held_out)
    train, test = (_class_folders_of(folder, part, key) for part in chosen)
    if places.same(train, test):
        raise ValueError(
            f"{key}={folder} has the same images in {chosen[0]} and {chosen[1]}: one is a link to the other."
        )
    unused = tuple(other for other in names if other not in chosen)
    return Layout(name, folder, (train,), test, unused, key=key)


def _read_several(found: Sequence[Path], name: str) -> Layout:
    """Folders and files without labels; what lies in another folder of them is there once."""
    real = {Path(os.path.realpath(path)): path.absolute() for path in found}
    chosen = tuple(path for place, path in real.items() if real.keys().isdisjoint(place.parents))
    for folder in (path for path in chosen if path.is_dir()):
        _check_no_results(folder, "data")
        if _complete(roles := _roles(visible(folder))):
            raise ValueError(
                f"data={name} names {folder}, which has the splits {_listed(sorted(roles))}; all would be trained on. "
                f"Name the one to train on, such as {folder / roles['train'][0]}"
            )
    around = os.path.commonpath([path if path.is_dir() else path.parent for path in chosen])
    return Layout(name, Path(around), chosen, labelled=False)


def _check_no_results(folder: Path, key: str) -> None:
    if (writer := _writer(os.listdir(folder))) and writer != "`dystress long-tail`":
        raise ValueError(f"{key}={folder} holds results of {writer}, no images. Choose another {key}.")


def _has_classes(folder: Path, found: dict[str, list[str]], faults: dict[str, str]) -> bool:
    """Whether the folders in a folder are classes: where two or more have images, or may have some.

    Raises:
        ValueError: where most images are in none of them, or a single one has folders of images itself.
    """
    counts = {name: sum(map(pictures.is_picture, files)) for name, files in found.items()}
    loose = counts.pop("", 0)
    full = [name for name, images in counts.items() if images]
    if len(full) > 1 and loose >= (inside := sum(counts.values())):
        raise ValueError(
            f"data={folder} is ambiguous: {loose} images lie beside the folders {_listed(full)}, which have {inside}. "
            "labels=true takes those folders as classes and nothing else, labels=false all as images without labels."
        )
    if len(full) != 1 or loose:
        return len(full) > 1 or (not loose and bool(counts or faults))
    only = folder / full[0]
    inner = {Path(file).relative_to(only).parts[0] for file in found[full[0]] if pictures.is_picture(file)}
    if sum((only / name).is_dir() for name in inner) > 1:
        raise ValueError(
            f"{folder} has the single class '{full[0]}'; accuracies need at least two, labels=false needs none. If "
            f"the classes are in there, give data={only}"
        )
    return len(counts) > 1 or any(Path(place).parent == folder for place in faults)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in HIDDEN


def _walk(top: str, key: str) -> tuple[list[tuple[str, list[str]]], dict[str, str]]:
    """Every folder that is not hidden, with the names of its files, sorted; and path → why for those that cannot be
    listed.

    Links are followed, but for those to a folder that they lie in: below them every image would be found once more,
    and where there are two of them without end.
    """
    places: list[tuple[str, list[str]]] = []
    faults: dict[str, str] = {}
    around = {top: _with_parents(top)}
    for folder, inner, names in os.walk(top, onerror=lambda error: faults.update(_told(error)), followlinks=True):
        inner[:] = sorted(name for name in inner if not _hidden(name))
        if folder != top:
            _check_class(folder, inner, names, key)
        places.append((folder, sorted(names)))
        for name in inner.copy():
            place = os.path.join(folder, name)
            if os.path.realpath(place) in around[folder]:
                faults[place] = "a link to a folder that it lies in"
                inner.remove(name)
            else:
                around[place] = around[folder] | _with_parents(place)
    return sorted(places), faults


def _check_class(folder: str, inner: Sequence[str], names: Sequence[str], key: str) -> None:
    """Raises a ValueError for a folder of a class that holds something else."""
    if writer := _writer(names):
        raise ValueError(
            f"{folder} holds results of {writer}, which are no images, but lies in a folder of images. Move it out."
        )
    splits = {name: found[0] for name in inner if (found := _split(name)) and not found[1]}
    if _complete(splits.values()):
        raise ValueError(
            f"{folder} is read as a class, but has the splits {_listed(sorted(splits))}; all would be of it. Put "
            f"class folders into train and val, not these into class folders, or give {key}={folder}"
        )


def _told(error: OSError) -> dict[str, str]:
    return {error.filename: pictures.reason(error)}


def _with_parents(folder: str) -> frozenset[str]:
    """Where a folder really is, and the folders that it really lies in."""
    real = Path(os.path.realpath(folder))
    return frozenset(map(str, (real, *real.parents)))


def _writer(names: Sequence[str]) -> str | None:
    """Which command left the files with these names, if one did."""
    return next((writer for writer, traces in TRACES if traces.issubset(names)), None)


def _split(name: str) -> tuple[str, str] | None:
    """Of a folder's name the split and what else is in it: "seg_train" → ("train", "seg"); None: no split's name."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()  # TrainImages
    words = re.findall(r"[^\W\d_]+|\d+", apart)
    bare = [word.removesuffix("set") if word.removesuffix("set") in WORDS else word for word in words]  # trainset
    found = [word for word in bare if word in WORDS]
    if len(found) != 1:
        return None
    return WORDS[found[0]], " ".join(word for word in bare if word not in WORDS and word not in FILLERS)


def _roles(names: Sequence[str]) -> dict[str, list[str]]:
    """From a split to the folders that its name is read from; {} for a folder of classes.

    `train` and `valid` are splits' names on their own. `seg_train` is one beside `seg_test` only, or where all other
    folders have names of splits too: `bullet_train` beside `taxi` is a class.
    """
    read = {name: found for name in names if (found := _split(name))}
    by_rest: dict[str, list[str]] = {}
    for name, (_, rest) in read.items():
        by_rest.setdefault(rest, []).append(name)
    complete = [group for group in by_rest.values() if _complete([read[name][0] for name in group])]
    partners = [name for group in complete for name in group]
    everything = list(read) if len(read) == len(names) and _complete([split for split, _ in read.values()]) else []
    roles: dict[str, list[str]] = {}
    for name in by_rest.get("") or everything or partners:
        roles.setdefault(read[name][0], []).append(name)
    return roles


def _complete(splits: Collection[str]) -> bool:
    return "train" in splits and not set(HELD_OUT).isdisjoint(splits)


def _check_roles(folder: Path, names: Sequence[str], roles: dict[str, list[str]], key: str) -> None:
    """Raises a ValueError where splits are not the only way to read the names, or are not all there."""
    read = [name for found in roles.values() for name in found]
    for split, found in roles.items():
        if len(found) > 1:
            raise ValueError(
                f"{key}={folder} is ambiguous: {_listed(found)} mean '{split}'. Keep one, or {_rename(found)}."
            )
    if "train" in roles and len(roles) > 1:
        return
    others = [name for name in names if name not in read]
    if others:
        raise ValueError(
            f"{key}={folder} is ambiguous: {_listed(read)} would be a split, or a class like {_listed(others)}. For a "
            f"class, {_rename(read)}; for a split, put train and val with class folders into a folder of their own, or "
            f"give {key}={folder / read[0]}"
        )
    missing = "something held out, such as val" if "train" in roles else "train"
    raise ValueError(
        f"{key}={folder} has {_listed(read)}, read as a split, but not {missing}. Add it, or give "
        f"{key}={folder / read[0]} to hold out a part of that; for a class, {_rename(read)}."
    )


def _class_folders_of(folder: Path, name: str, key: str) -> Path:
    """The folder of class folders of a split: its own, or one of its name in it, as archives from Kaggle have it."""
    place = folder / name
    while len(inner := visible(place)) == 1 and _split(inner[0]) == _split(name):
        place = place / inner[0]
    if not inner:
        without = ", or do without by labels=false" if key == "data" else ""
        raise ValueError(
            f"{key}={folder} has splits, but {place} has no class folders, and accuracies need classes. Sort its "
            f"images into class folders{without}; if '{name}' is a class, {_rename([name])}."
        )
    return place


def _listed(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more


def _rename(names: Sequence[str]) -> str:
    return f"rename {_listed(names)}, such as to '{names[0]}s'"
