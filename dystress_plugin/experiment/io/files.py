"""Files of a run: written whole or not at all, read without running anything that is in them."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from torch import nn

T = TypeVar("T")

MIB = 2**20

SPARE = 4 * MIB  # tables, figures and what a checkpoint holds besides tensors


def write(path: Path, content: bytes) -> None:
    """Replaces a file; whenever the process or the machine stops, the old content or the new one is there, whole.

    Raises:
        OSError: such as for a full disk; the old file is as it was.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            # Or after a power cut the new name might stand for a file whose content never reached the disk.
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write` in UTF-8; what has no place in it, of a folder's name in another encoding, as an escape."""
    write(path, text.encode(errors="backslashreplace"))


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """A CSV, whole or not at all; numbers with eight digits, nothing for None."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.8g}" if isinstance(value, float) else value for key, value in row.items()})
    write_text(path, text.getvalue())


def read_table(path: Path, row: Callable[[dict[str, str]], T], remedy: str) -> list[T]:
    """The rows of a CSV that `write_table` wrote, at least one.

    Args:
        path: the file.
        row: from the cells of a row, by the names of their columns.
        remedy: what the user can do, for the error.

    Raises:
        ValueError: for a file without rows, or of which `row` makes nothing, by a KeyError, ValueError or TypeError.
    """
    try:
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file, restkey="", restval=""))
        if not lines:
            raise ValueError("it has no rows")
        return [row(line) for line in lines]
    except KeyError as error:
        raise ValueError(f"{path} is damaged: it has no column {error}. {remedy}") from None
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged: {error}. {remedy}") from None


def save(path: Path, content: Any) -> None:
    """`torch.save` by way of `write`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getvalue())


def load(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """A dictionary that `torch.save` wrote, on the CPU.

    Only tensors and plain values: a pickle that would call anything is refused, and so not run.

    Args:
        path: the file.
        what: what it should be, for the error.
        remedy: what the user can do, for the error.

    Raises:
        ValueError: for a file that is empty, cut off, damaged or something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        size = path.stat().st_size
        raise ValueError(f"{path} ({size} bytes) is not {what}, or is damaged: {reason} {remedy}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not {what}: it holds a {type(content).__name__}. {remedy}")
    return content


def load_state(module: nn.Module, path: Path, remedy: str) -> None:
    """Loads the state dict in a file into a module, with the errors of `load` and `check_state`."""
    state = load(path, "a state dict", remedy)
    check_state(module, state, path, remedy)
    module.load_state_dict(state)


def check_state(module: nn.Module, state: Mapping[str, Any], path: Path, remedy: str) -> None:
    """Raises a ValueError for a state dict from a file whose names or shapes are not the module's."""
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}
    if own == found:
        return
    name = min(name for name in own.keys() | found.keys() if own.get(name) != found.get(name))
    raise ValueError(
        f"{path} belongs to another model: '{name}' is {found.get(name, 'missing')} there and "
        f"{own.get(name, 'missing')} here. {remedy}"
    )


def read_json(path: Path, needed: Iterable[str] = ()) -> dict[str, Any]:
    """An object from a JSON file; a ValueError that names the file where there is none in it, or a key is missing."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged, no JSON: {error}. Delete it and run the same command again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object. Delete it and run the same command again.")
    if missing := [key for key in needed if key not in content]:
        raise ValueError(f"{path} is damaged: it has no '{missing[0]}'. Delete it and run the same command again.")
    return content


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints by way of `write` and `load`.

    Lightning's own go to the system's temporary folder and are moved from there: across file systems that is a copy,
    which an interruption cuts off halfway, after the previous checkpoint is gone.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return load(Path(path), "a checkpoint", NO_CHECKPOINT)


NO_CHECKPOINT = (
    "Put a copy of the right file there; or choose another out, or delete the file, and the run starts from its "
    "first epoch."
)


ANEW = "Delete it, and it is made anew."

ROWS_IN_CHECKPOINT = (
    "Delete it, and summary.json beside it if that is there, and run the same `dystress pretrain` again: the "
    "checkpoint has its rows."
)


def check_new(file: Path) -> None:
    """Makes the folder of a file that is to be written; a ValueError where it is there already, or cannot be."""
    if file.exists():
        raise ValueError(f"out={file} exists already, and nothing is ever overwritten. Choose another out.")
    check_place(file.parent)
    file.parent.mkdir(parents=True, exist_ok=True)


def check_place(out: Path) -> None:
    """Raises a ValueError where a folder cannot be made or written to; makes none."""
    there = _existing(out)
    if not there.is_dir():
        raise ValueError(f"out={out} cannot be a folder: {there} is a file. Choose another out.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"out={out} cannot be written: no permission in {there}. Choose another out.")


def check_room(out: Path, module: nn.Module, have: int = 0) -> None:
    """Raises a ValueError where the disk has no room for two checkpoints of a module and its weights.

    Two, since the previous one stays until the next is whole.

    Args:
        out: folder of the run.
        module: what is trained, with one momentum for each number.
        have: checkpoints that are there already.
    """
    each = checkpoint_bytes(module)
    needed = (2 - have) * each + SPARE
    free = shutil.disk_usage(_existing(out)).free
    if free < needed:
        raise ValueError(
            f"out={out} is on a disk with {free / MIB:.0f} MiB free, but two checkpoints of {each / MIB:.0f} MiB and "
            f"the results need {needed / MIB:.0f} MiB more. Free some, or choose another out."
        )


def checkpoint_bytes(module: nn.Module) -> int:
    """Size of the tensors in a checkpoint: the module's, and the momentum of what is trained."""
    tensors = [*module.state_dict().values(), *(p for p in module.parameters() if p.requires_grad)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
