"""When two names mean the same folder, and when one folder lies in another."""

from __future__ import annotations

import os
from pathlib import Path

NAMED = ("cifar10", "cifar100", "digits")  # data that is no folder


def same(one: str | Path, other: str | Path) -> bool:
    """Whether two values of `data`, or two paths, mean the same, whatever the spelling and the links on the way."""
    return place(one) == place(other)


def place(name: str | Path) -> str:
    """The one spelling of a path; a named data set as it is."""
    return str(name) if name in NAMED else os.path.realpath(os.path.expanduser(name))


def name_of(data: str) -> str:
    """The name of a data set, or of its folder, also for `.` and `..`."""
    return data if data in NAMED else Path(os.path.abspath(data)).name


def check_outside(out: Path, data: str) -> None:
    """Raises a ValueError where results would become images: `out` is the folder of images, or lies in it."""
    if data not in NAMED and _inside(out, data):
        there = Path(os.path.realpath(data)).parent / "runs" / Path(os.path.realpath(out)).name
        raise ValueError(
            f"out={out} lies in data={data}, where its figures would be taken for images. Give an out elsewhere, such "
            f"as out={there}"
        )


def check_apart(out: Path, data: str) -> None:
    """`check_outside`, and a ValueError as well where the folder of images lies in `out`."""
    check_outside(out, data)
    if data not in NAMED and _inside(data, out):
        raise ValueError(f"data={data} lies in out={out}, a folder for results alone. Choose another out.")


def _inside(inner: str | Path, outer: str | Path) -> bool:
    """Whether a folder, there or not, is another one that is there, or lies in it."""
    place = Path(os.path.realpath(inner))
    # Not by name alone: a file system may tell neither case nor mounts apart.
    above = (each for each in (place, *place.parents) if os.path.exists(each))
    return os.path.isdir(outer) and any(os.path.samefile(each, outer) for each in above)
