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
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from dystress_plugin.errors import unknown_name
from dystress_plugin.experiment import files, pictures

ON_BAD_IMAGE = ("stop", "skip")
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
    """

    folder: str
    good: int
    bad: dict[str, str] = field(default_factory=dict)
    names: str = ""
    state: str = ""

    @property
    def left_out(self) -> frozenset[str]:
        """Paths of the bad files, with the folder's."""
        return frozenset(str(Path(self.folder, name)) for name in self.bad)

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


def left_out(out: Path, folder: str) -> frozenset[str]:
    """Files that a run left out of a folder: none if it was trained on something else."""
    scan = read(out)
    return scan.left_out if scan is not None and scan.folder == folder else frozenset()


def scan_folder(folder: str, out: Path, *, on_bad_image: str, num_workers: int, progress: bool) -> Scan:
    """Decodes every file that training would, unless the run's folder says that it has been done.

    Args:
        folder: class folders, or `train` and `val` or `test` with class folders.
        out: folder of the run, which need not exist.
        on_bad_image: "stop" or "skip".
        num_workers: processes that decode; 0 decodes in this one.
        progress: show a bar.

    Raises:
        ValueError: with "stop" for files that cannot be used, all of them listed in `images.json` then; for files that
            are not those the run began with; for a folder that cannot be listed.
    """
    if on_bad_image not in ON_BAD_IMAGE:
        raise ValueError(unknown_name("value of on_bad_image", on_bad_image, ON_BAD_IMAGE))
    states, unlisted = _files(folder)
    state = _digest(f"{name} {value}" for name, value in (states | unlisted).items())
    before = read(out)
    if before is not None and (before.folder, before.state) == (folder, state):
        scan = before
    else:
        bad = unlisted | _bad(folder, list(states), num_workers, progress)
        good = [name for name in states if name not in bad and named_as_image(name)]
        scan = Scan(folder, len(good), bad, _digest(good), state)
        if before is not None and (out / "config.yaml").exists() and before.names != scan.names:
            raise ValueError(
                f"data={folder} has other images than this run began with: {scan.good} that can be used now, "
                f"{before.good} then. Put them back as they were, or choose another out."
            )
    if scan.bad:
        _report(scan, out, on_bad_image)
    return scan


def parts(folder: Path) -> list[Path]:
    """`train`, and `val` or `test`, where the folder has both; else the folder itself."""
    held_out = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    return [folder / "train", held_out] if held_out is not None and (folder / "train").is_dir() else [folder]


def named_as_image(file: str) -> bool:
    """Whether a name ends like that of an image, in either case."""
    return file.lower().endswith(IMG_EXTENSIONS)


def class_files(part: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The files of every class folder, in the order of torchvision's ImageFolder; and what cannot be listed, with why.

    Raises:
        ValueError: for a folder that cannot be listed itself.
    """
    places, faults = _walk(part)
    if part in faults:
        raise ValueError(f"{part} is no readable folder of class folders with images: {faults[part]}")
    found: dict[str, list[str]] = {}
    for folder, names in places:
        if folder != part:
            of_class = found.setdefault(os.path.relpath(folder, part).split(os.sep)[0], [])
            of_class += [os.path.join(folder, name) for name in names]
            continue
        for file in [os.path.join(part, name) for name in names if not name.startswith(".")]:
            if not os.path.exists(file):  # it may stand for a class, which would be missed
                faults[file] = _state(file)
    return dict(sorted(found.items())), faults


def _walk(top: str) -> tuple[list[tuple[str, list[str]]], dict[str, str]]:
    """Every folder with the names of its files, sorted, and path → why for those that cannot be listed.

    Links are followed, but for those to a folder that they lie in: below them every image would be found once more,
    and where there are two of them without end.
    """
    places: list[tuple[str, list[str]]] = []
    faults: dict[str, str] = {}
    around = {top: _with_parents(top)}
    for folder, inner, names in os.walk(top, onerror=lambda error: faults.update(_told(error)), followlinks=True):
        places.append((folder, sorted(names)))
        for name in inner.copy():
            place = os.path.join(folder, name)
            if os.path.realpath(place) in around[folder]:
                faults[place] = "a link to a folder that it lies in"
                inner.remove(name)
            else:
                around[place] = around[folder] | _with_parents(place)
    return sorted(places), faults


def _told(error: OSError) -> dict[str, str]:
    return {error.filename: pictures.reason(error)}


def _with_parents(folder: str) -> frozenset[str]:
    """Where a folder really is, and the folders that it really lies in."""
    real = Path(os.path.realpath(folder))
    return frozenset(map(str, (real, *real.parents)))


def _state(file: str) -> str:
    """Size and time of a file, or why there are none."""
    try:
        state = os.stat(file)
    except OSError as error:
        return pictures.reason(error)
    return f"{state.st_size} {state.st_mtime_ns}"


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


def _files(folder: str) -> tuple[dict[str, str], dict[str, str]]:
    """Path below the folder → state of every file in its class folders, in a fixed order; → why for what cannot be
    listed. Hidden files only if named like images, as torchvision takes those.
    """
    states: dict[str, str] = {}
    unlisted: dict[str, str] = {}
    for part in parts(Path(folder)):
        found, faults = class_files(str(part))
        unlisted |= {os.path.relpath(place, folder): why for place, why in faults.items()}
        for file in chain.from_iterable(found.values()):
            if named_as_image(file) or not os.path.basename(file).startswith("."):
                states[os.path.relpath(file, folder)] = _state(file)
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
