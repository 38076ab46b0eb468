"""One process at a time that writes to a folder: a lock that the kernel holds, and lets go however the process ends."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NAME = ".lock"  # in the folder; gone with the lock, unless the process was killed, and then of no meaning

POLL = 0.5  # seconds between two tries of who waits

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # a file system that has none

_held: set[int] = set()


@contextmanager
def alone(out: Path, *, file: Path | None = None, wait: bool = False) -> Iterator[int | None]:
    """While inside, no other process is inside for the same folder.

    Not filelock, which every torch brings: it empties the file, in which the holder is named, before it has the lock.

    Args:
        out: the folder, which is made where it is missing; and is gone again if nothing was written to it.
        file: what is locked, if not a file in the folder; its own folder is made then.
        wait: until the other process has ended, instead of the error; says so once.

    Yields:
        The descriptor of the locked file, for a child process to inherit and hold the lock as well; None where a file
        system has no locks, which is said.

    Raises:
        ValueError: where another process is inside, with its number, machine and time; for a folder that cannot be
            written to.
    """
    path = file or out / NAME
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        descriptor = _enter(out, path, wait)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise ValueError(f"out={out} cannot be written: {error}. Choose another out.") from None
        print(f"dystress: {path} cannot be locked: {error}. Start nothing else with out={out}.", file=sys.stderr)
        descriptor = None
    try:
        yield descriptor
    finally:
        with suppress(OSError):  # the folders are not empty, or another has just come inside
            if descriptor is not None:
                _leave(descriptor, path)
            for folder in made:
                folder.rmdir()


def _enter(out: Path, path: Path, wait: bool) -> int:
    said = False
    while (descriptor := _open(path)) is None:
        holder = f"out={out} is in use by {_holder(path)}"
        if not wait:
            raise ValueError(f"{holder}. Wait until it has ended, or choose another out.")
        if not said:
            print(f"dystress: {holder}; waiting until it has ended, and what it left running.", file=sys.stderr)
            said = True
        time.sleep(POLL)
    me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with suppress(OSError):  # a full disk; it is for the message alone
        os.truncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, json.dumps(me).encode())
    _held.add(descriptor)
    return descriptor


def _leave(descriptor: int, path: Path) -> None:
    if descriptor not in _held:  # in a process that was forked inside
        return
    _held.remove(descriptor)
    try:
        if os.name == "posix":  # before another has it
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
    if os.name != "posix":  # where an open file cannot be removed
        path.unlink(missing_ok=True)


def _open(path: Path) -> int | None:
    """The descriptor of the file, locked; None where another process has it."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # who was inside has just removed the folder
            continue
        try:
            _try_lock(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return None
            path.unlink(missing_ok=True)
            raise
        if _is(descriptor, path):
            return descriptor
        os.close(descriptor)  # who was inside has just removed the file


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        found = json.loads(path.read_text())
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just begun, or ended
        return "another process"


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> None:
        # Far beyond what is in the file, as Windows lets nobody read what is locked.
        os.lseek(descriptor, 2**30, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _try_lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _let_go() -> None:
        for descriptor in _held:
            os.close(descriptor)
        _held.clear()

    # Or processes that load images would hold the lock for seconds after the one that forked them was killed.
    os.register_at_fork(after_in_child=_let_go)
