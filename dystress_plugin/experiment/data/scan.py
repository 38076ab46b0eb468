"""Which files of an image folder can be used: every one is decoded once before training, and the result kept."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dystress_plugin.experiment.data import folders
from dystress_plugin.experiment.data.folders import named_as_image
from dystress_plugin.experiment.io import files, pictures

RECORD = "images.json"

SHOWN = 5  # bad files on the terminal; the record has all


@dataclass(frozen=True)
class Scan:
    """What a scan found, as `images.json` holds it.

    Attributes:
        folder: the image folder.
        good: number of files that can be used.
        bad: path below the folder → why it cannot be used.
        names: digest of the paths of the good files.
        state: digest of path, size and time of every file, or of what hides them; the same, and nothing has to be
            decoded again.
        splits: paths of the folders below that are trained on and held out; none where there are class folders; None
            in a file of version 0.1.0, which knew `train` with `val` or `test` alone.
    """

    folder: str
    good: int
    bad: dict[str, str] = field(default_factory=dict)
    names: str = ""
    state: str = ""
    splits: list[str] | None = None

    @property
    def left_out(self) -> frozenset[str]:
        """Paths of the bad files below the folder."""
        return frozenset(self.bad)

    def fits(self, folder: str) -> bool:
        """Whether a folder, here or moved, still has the files that can be used, read in the same way."""
        layout = folders.read(Path(folder))
        good = [name for name in _files(layout)[0] if named_as_image(name) and name not in self.bad]
        return self.names == _digest(good) and self.splits_fit(layout)

    def splits_fit(self, layout: folders.Layout) -> bool:
        """Whether the same folders as now were trained on and held out."""
        before = self.splits
        if before is None:
            held_out = [name for name in ("val", "test") if (layout.folder / name).is_dir()]
            before = ["train", held_out[0]] if held_out and (layout.folder / "train").is_dir() else []
        return before == layout.splits

    def write(self, out: Path) -> None:
        """Keeps it in the folder of a run."""
        files.write_text(out / RECORD, json.dumps(asdict(self), indent=2) + "\n")


def read(out: Path) -> Scan | None:
    """The scan that is kept in a run's folder, None if there is none.

    Raises:
        ValueError: for a file that holds something else.
    """
    if not (out / RECORD).exists():
        return None
    content = files.read_json(out / RECORD)
    try:
        return Scan(**content)
    except TypeError as error:
        raise ValueError(f"{out / RECORD} holds no list of images: {error}. Delete it, and it is made anew.") from None


def scan_folder(folder: str, out: Path, *, on_bad_image: str, num_workers: int, progress: bool) -> Scan:
    """Decodes every file that training would, unless the run's folder says that it has been done.

    Args:
        folder: class folders, or splits with class folders.
        out: folder of the run, which need not exist.
        on_bad_image: "stop" or "skip".
        num_workers: processes that decode; 0 decodes in this one.
        progress: show a bar.

    Raises:
        ValueError: with "stop" for files that cannot be used, all of them listed in `images.json` then; for files that
            are not those the run began with, or read in another way; as `folders.read`.
    """
    layout = folders.read(Path(folder))
    states, unlisted = _files(layout)
    state = _digest(f"{name} {value}" for name, value in (states | unlisted).items())
    before = read(out)
    begun = before if (out / "config.yaml").exists() else None
    if begun is not None and not begun.splits_fit(layout):
        then = ", ".join(begun.splits or []) or "otherwise, by version 0.1.0 or before folders were added"
        raise ValueError(
            f"data={folder} is read as {', '.join(layout.splits) or 'class folders'}, but was read as {then} when this "
            "run began. Choose another out."
        )
    if before is not None and before.state == state:
        scan = replace(before, folder=folder, splits=layout.splits)  # wherever it is now
    else:
        bad = unlisted | _bad(folder, list(states), num_workers, progress)
        good = [name for name in states if name not in bad and named_as_image(name)]
        scan = Scan(folder, len(good), bad, _digest(good), state, layout.splits)
        if begun is not None and begun.names != scan.names:
            raise ValueError(
                f"data={folder} has other images than this run began with: {scan.good} that can be used now, "
                f"{begun.good} then. Put them back as they were, or choose another out."
            )
    if scan.bad:
        _report(scan, out, on_bad_image)
    return scan


def fault(file: str) -> str | None:
    """Why a file cannot be used, None if it can or does not pretend to be an image."""
    named = named_as_image(file)
    try:
        with pictures.opened(file) as picture:
            if not named:
                return f"a {picture.format} image whose name does not end like one"
            picture.verify()
        pictures.decode(file)  # anew: verify leaves nothing to load
    except Exception as error:  # as in pictures.read
        # What is not there may stand for a folder of images, whatever its name; and only an image is a bomb.
        told = named or isinstance(error, pictures.BOMBS) or not os.path.exists(file)
        return pictures.reason(error) if told else None
    return None


class _Faults(Dataset[tuple[str, str]]):
    """(name, fault or nothing) of every file, so that a loader's workers share the decoding."""

    def __init__(self, folder: str, names: Sequence[str]) -> None:
        self.folder = folder
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[str, str]:
        return self.names[i], fault(os.path.join(self.folder, self.names[i])) or ""


def _bad(folder: str, names: Sequence[str], num_workers: int, progress: bool) -> dict[str, str]:
    loader: DataLoader[tuple[str, str]] = DataLoader(
        _Faults(folder, names), batch_size=64, num_workers=num_workers, collate_fn=list
    )
    bar = tqdm(loader, "checking the images", unit="batch", disable=not progress, leave=False)
    return {name: reason for batch in bar for name, reason in batch if reason}


def _files(layout: folders.Layout) -> tuple[dict[str, str], dict[str, str]]:
    """Path below the folder → state of every file in its class folders, in a fixed order; → why for what cannot be
    listed. Hidden files only if named like images, as torchvision takes those.
    """
    states: dict[str, str] = {}
    unlisted: dict[str, str] = {}
    for part in layout.parts:
        found, faults = folders.class_files(part)
        unlisted |= {os.path.relpath(place, layout.folder): why for place, why in faults.items()}
        for file in chain.from_iterable(found.values()):
            if named_as_image(file) or not os.path.basename(file).startswith("."):
                states[os.path.relpath(file, layout.folder)] = folders.state(file)
    return states, unlisted


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(os.fsencode(line) + b"\n")
    return digest.hexdigest()


def _report(scan: Scan, out: Path, on_bad_image: str) -> None:
    some = "".join(f"\n  {name}: {reason}" for name, reason in list(scan.bad.items())[:SHOWN])
    more = f"\n  and {len(scan.bad) - SHOWN} more" if len(scan.bad) > SHOWN else ""
    which = f"{len(scan.bad)} of {scan.good + len(scan.bad)} files in {scan.folder} cannot be used"
    if on_bad_image == "stop":
        out.mkdir(parents=True, exist_ok=True)
        replace(scan, state="").write(out)  # not to be believed again: what was wrong may be fixed with the same state
        raise ValueError(
            f"{which}, all of them listed in {out / RECORD}:{some}{more}\n"
            "Fix or remove them, or leave them out with on_bad_image=skip."
        )
    print(f"dystress: {which} and are left out, all of them listed in {out / RECORD}:{some}{more}", file=sys.stderr)
