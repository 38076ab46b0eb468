"""Which files of an image folder can be used: every one is decoded once before training, and the result kept."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dystress_plugin.experiment.data import folders
from dystress_plugin.experiment.io import files, pictures
from dystress_plugin.experiment.settings import PretrainSettings

RECORDS = {"data": "images.json", "val": "val_images.json"}  # of the images that a setting names

SHOWN = 5  # bad files on the terminal; the record has all


@dataclass(frozen=True)
class Scan:
    """What a scan found, as `images.json` holds it.

    Attributes:
        folder: the value of `data` that names the images.
        good: number of files that can be used.
        bad: path below the folder → why it cannot be used.
        names: digest of the paths of the good files.
        state: digest of path, size and time of every file, or of what hides them; the same, and nothing has to be
            decoded again.
        splits: paths of the folders below that are trained on and held out; none where there are class folders; None
            in a file of version 0.1.0, which knew `train` with `val` or `test` alone.
        labelled: whether class folders are labels.
    """

    folder: str
    good: int
    bad: dict[str, str] = field(default_factory=dict)
    names: str = ""
    state: str = ""
    splits: list[str] | None = None
    labelled: bool = True

    @property
    def left_out(self) -> frozenset[str]:
        """Paths of the bad files below the folder that all lie in."""
        return frozenset(self.bad)

    def fits(self, folder: str, key: str = "data") -> bool:
        """Whether a folder, here or moved, still has the files that can be used, read in the same way."""
        layout = folders.read(folder, self.labelled, key=key)
        return self.names == _digest(_good(layout, _files(layout)[0], self.bad)) and self.reads(layout)

    def reads(self, layout: folders.Layout) -> bool:
        """Whether the same folders as now were trained on and held out, with labels or without."""
        before = self.splits
        if before is None:
            held_out = [name for name in ("val", "test") if (layout.folder / name).is_dir()]
            before = ["train", held_out[0]] if held_out and (layout.folder / "train").is_dir() else []
        return (before, self.labelled) == (layout.splits, layout.labelled)

    def write(self, record: Path) -> None:
        """Keeps it in a file, in the folder of a run one of `RECORDS`."""
        files.write_text(record, json.dumps(asdict(self), indent=2) + "\n")


def read(out: Path, key: str = "data") -> Scan | None:
    """The scan that is kept in a run's folder, None if there is none; a ValueError for a file with something else."""
    record = out / RECORDS[key]
    if not record.exists():
        return None
    content = files.read_json(record)
    try:
        found = Scan(**content)
        if not (isinstance(found.bad, dict) and isinstance(found.splits, list | None)):
            raise TypeError("bad must be an object, and splits a list or null")
        return found
    except TypeError as error:
        raise ValueError(f"{record} holds no list of images: {error}. Delete it, and it is made anew.") from None


def read_all(out: Path) -> dict[str, Scan]:
    """`read` for every setting that names images."""
    return {key: found for key in RECORDS if (found := read(out, key)) is not None}


def write_all(scans: Mapping[str, Scan], out: Path) -> None:
    """Keeps scans in the folder of a run."""
    for key, scan in scans.items():
        scan.write(out / RECORDS[key])


def left_out(scans: Mapping[str, Scan]) -> dict[str, frozenset[str]]:
    """The files that scans leave out, by the setting that names the images."""
    return {key: scan.left_out for key, scan in scans.items()}


def scan_images(settings: PretrainSettings, out: Path) -> dict[str, Scan]:
    """What `scan_layout` finds in the images that settings name, by the setting; nothing where they are no files."""
    how = {name: getattr(settings, name) for name in ("on_bad_image", "num_workers", "progress")}
    labels = {"data": settings.labels, "val": True}
    named = {key: name for key in RECORDS if (name := getattr(settings, key)) is not None and folders.are_files(name)}
    layouts = {key: folders.read(name, labels[key], key=key) for key, name in named.items()}
    for layout in layouts.values():  # of all of them before the first one is decoded
        layout.check_classes()
    return {key: scan_layout(layout, out, **how) for key, layout in layouts.items()}


def scan_layout(layout: folders.Layout, out: Path, *, on_bad_image: str, num_workers: int, progress: bool) -> Scan:
    """Decodes every file that training would, unless the run's folder says that it has been done.

    Args:
        layout: how the images are read.
        out: folder of the run, which need not exist.
        on_bad_image: "stop" or "skip".
        num_workers: processes that decode; 0 decodes in this one.
        progress: show a bar.

    Raises:
        ValueError: with "stop" for files that cannot be used, all of them listed in `images.json` then; for files that
            are not those the run began with, or read in another way.
    """
    folder, key = layout.name, layout.key
    folders.say(layout)
    states, unlisted = _files(layout)
    state = _digest(f"{name} {value}" for name, value in (states | unlisted).items())
    before = read(out, key)
    begun = before if (out / "config.yaml").exists() else None
    if begun is not None and not begun.reads(layout):
        before_that = "otherwise, by version 0.1.0 or before folders were added"
        then = ", ".join(begun.splits or []) or (before_that if begun.labelled else "images without labels")
        raise ValueError(
            f"{key}={folder} is read as {layout.read_as}, but was read as {then} when this run began. Choose another "
            "out."
        )
    if before is not None and before.state == state:
        scan = replace(before, folder=folder, splits=layout.splits, labelled=layout.labelled)  # wherever it is now
    else:
        bad = unlisted | _bad(layout, list(states), num_workers, progress)
        good = _good(layout, states, bad)
        scan = Scan(folder, len(good), bad, _digest(good), state, layout.splits, layout.labelled)
        if begun is not None and begun.names != scan.names:
            raise ValueError(
                f"{key}={folder} has other images than this run began with: {scan.good} that can be used now, "
                f"{begun.good} then. Put them back as they were, or choose another out."
            )
    if scan.bad:
        _report(scan, out / RECORDS[key], on_bad_image)
    return scan


def bad_files(data: str, labels: bool | None, *, on_bad_image: str, num_workers: int, progress: bool) -> frozenset[str]:
    """What `scan_layout` would leave out of images that no run is of, with its errors; nothing is kept."""
    layout = folders.read(data, labels)
    folders.say(layout)
    states, unlisted = _files(layout)
    bad = unlisted | _bad(layout, list(states), num_workers, progress)
    if bad:
        _report(Scan(data, len(_good(layout, states, bad)), bad), None, on_bad_image)
    return frozenset(bad)


def fault(file: str) -> str | None:
    """Why a file cannot be used, None if it can or is no image."""
    try:
        with pictures.opened(file) as picture:
            picture.verify()
        pictures.decode(file)  # anew: verify leaves nothing to load
    except Exception as error:  # as in pictures.read
        # What is not there may stand for a folder of images, whatever its name; and only an image is a bomb.
        told = isinstance(error, pictures.BOMBS) or not os.path.exists(file) or pictures.is_picture(file)
        return pictures.reason(error) if told else None
    return None


def _good(layout: folders.Layout, names: Iterable[str], bad: Mapping[str, str]) -> list[str]:
    return [name for name in names if name not in bad and pictures.is_picture(os.path.join(layout.folder, name))]


class _Faults(Dataset[tuple[str, str, bool]]):
    """(name, fault or nothing, whether it has frames) of every file, so that a loader's workers share the decoding."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[str, str, bool]:
        file = os.path.join(self.folder, self.names[i])
        reason = fault(file) or ""
        return self.names[i], reason, not reason and pictures.is_picture(file) and pictures.has_frames(file)


def _bad(layout: folders.Layout, names: Sequence[str], num_workers: int, progress: bool) -> dict[str, str]:
    loader: DataLoader[tuple[str, str, bool]] = DataLoader(
        _Faults(layout.folder, names), batch_size=64, num_workers=num_workers, collate_fn=list
    )
    bar = tqdm(loader, "checking the images", unit="batch", disable=None if progress else True, leave=False)
    found = [each for batch in bar for each in batch]
    if frames := [name for name, _, several in found if several]:
        folders.say(
            f"{len(frames)} files in {layout.name} have several frames, such as {frames[0]}: the first is used."
        )
    return {name: reason for name, reason, _ in found if reason}


def _files(layout: folders.Layout) -> tuple[dict[str, str], dict[str, str]]:
    """Path below the folder → state of every file that is read, in a fixed order; → why for what cannot be listed."""
    states: dict[str, str] = {}
    unlisted: dict[str, str] = {}
    for part in layout.parts:
        found, faults = layout.listed[part]
        unlisted |= {os.path.relpath(place, layout.folder): why for place, why in faults.items()}
        for file in chain.from_iterable(found[name] for name in found if name or not layout.labelled):
            if pictures.is_picture(file) or not os.path.basename(file).startswith("."):
                states[os.path.relpath(file, layout.folder)] = folders.state(file)
    return states, unlisted


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(os.fsencode(line) + b"\n")
    return digest.hexdigest()


def _report(scan: Scan, record: Path | None, on_bad_image: str) -> None:
    """Says which files cannot be used; with "stop" as a ValueError, after they were all listed in the record."""
    some = "".join(f"\n  {name}: {reason}" for name, reason in list(scan.bad.items())[:SHOWN])
    more = f"\n  and {len(scan.bad) - SHOWN} more" if len(scan.bad) > SHOWN else ""
    which = f"{len(scan.bad)} of {scan.good + len(scan.bad)} files in {scan.folder} cannot be used"
    listed = f"{'' if record is None else f', all of them listed in {record}'}:{some}{more}"
    if on_bad_image == "stop":
        if record is not None:
            record.parent.mkdir(parents=True, exist_ok=True)
            # Not to be believed again: what was wrong may be fixed with the same state.
            replace(scan, state="").write(record)
        raise ValueError(f"{which}{listed}\nFix or remove them, or leave them out with on_bad_image=skip.")
    print(f"dystress: {which} and are left out{listed}", file=sys.stderr)
