"""What a value of `data` names, when two names mean the same folder, and when one folder lies in another."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import yaml

NAMED = ("cifar10", "cifar100", "digits")  # data that is no folder


def sources(data: str, key: str = "data") -> list[str]:
    """What a value of `data`, or of another such key, names: itself, or what is in a list such as [imgs/a, imgs/b].

    Each may be a pattern.
    """
    if data[:1] == "[" and data[-1:] == "]" and not os.path.exists(data):
        with suppress(yaml.YAMLError):
            listed = yaml.load(data, yaml.BaseLoader)  # of which 2021 stays a text
            if isinstance(listed, list) and listed and all(isinstance(each, str) for each in listed):
                return listed
        raise ValueError(f"{key}={data} must be a list of folders, such as {key}=[imgs/a,imgs/b].")
    return [data]


def each(data: str, change: Callable[[str], str]) -> str:
    """The same value with every folder in it changed."""
    found = [change(source) for source in sources(data)]
    return json.dumps(found, ensure_ascii=False) if len(found) > 1 or found[0][:1] == "[" else found[0]


def matches(source: str) -> list[str]:
    """The paths that a folder, a file or a pattern such as imgs/*.png stands for, sorted; none where nothing is."""
    source = os.path.expanduser(source)
    return [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))


def there(data: str | Path) -> bool:
    """Whether everything is there that a value of `data`, or another path, names."""
    return all(map(matches, sources(str(data))))


def is_gone(data: str | None) -> bool:
    """Whether a value of `data` names folders that are not there."""
    return data is not None and data not in NAMED and not there(data)


def same(one: str | Path, other: str | Path) -> bool:
    """Whether two values of `data`, or two paths, mean the same, whatever the spelling and the links on the way."""
    return place(one) == place(other)


def place(name: str | Path) -> str:
    """The one spelling of a path; a named data set as it is."""
    return str(name) if name in NAMED else each(str(name), lambda path: os.path.realpath(os.path.expanduser(path)))


def name_of(data: str) -> str:
    """The name of a data set, or of its folder, also for `.` and `..`; of several the first one's."""
    if data in NAMED:
        return data
    first = os.path.abspath(os.path.expanduser(sources(data)[0]))
    return next((part for part in reversed(Path(first).parts[1:]) if not glob.has_magic(part)), "images")


def check_data(data: str, key: str = "data") -> None:
    """Raises a ValueError for a value of `data`, or of another such key, that names what is not there."""
    missing = [] if data in NAMED else [source for source in sources(data, key) if not matches(source)]
    if missing:
        raise ValueError(f"{key}={missing[0]} is neither a folder nor one of {', '.join(NAMED)}.")


def check_run(checkpoint: str) -> None:
    """Raises a ValueError for a folder without a run of `dystress pretrain`."""
    if not (config := Path(checkpoint, "config.yaml")).exists():
        raise ValueError(f"checkpoint={checkpoint} holds no run of `dystress pretrain`: {config} is missing.")


def check_folders(folders: Iterable[str | Path]) -> None:
    """Raises a ValueError for a folder that is not there."""
    for folder in folders:
        if not Path(folder).expanduser().exists():
            raise ValueError(f"There is no folder {folder}.")


def check_outside(out: Path, **named: str | None) -> None:
    """Raises a ValueError where results would become images: `out` is a folder that a key names, or lies in one."""
    for key, folder in _folders(named):
        if _inside(out, folder):
            there = Path(os.path.realpath(folder)).parent / "runs" / Path(os.path.realpath(out)).name
            raise ValueError(
                f"out={out} lies in {key}={folder}, where its figures would be taken for images. Give an out "
                f"elsewhere, such as out={there}"
            )


def check_apart(out: Path, **named: str | None) -> None:
    """`check_outside`, and a ValueError as well where a folder of images lies in `out`."""
    check_outside(out, **named)
    for key, folder in _folders(named):
        if _inside(folder, out):
            raise ValueError(f"{key}={folder} lies in out={out}, a folder for results alone. Choose another out.")


def _folders(named: Mapping[str, str | None]) -> list[tuple[str, str]]:
    values = ((key, data) for key, data in named.items() if data is not None and data not in NAMED)
    each_source = ((key, source) for key, data in values for source in sources(data, key))
    return [(key, path) for key, source in each_source for path in (matches(source) or [source])]


def _inside(inner: str | Path, outer: str | Path) -> bool:
    """Whether a folder, there or not, is another one that is there, or lies in it."""
    place = Path(os.path.realpath(inner))
    # Not by name alone: a file system may tell neither case nor mounts apart.
    above = (each for each in (place, *place.parents) if os.path.exists(each))
    return os.path.isdir(outer) and any(os.path.samefile(each, outer) for each in above)
