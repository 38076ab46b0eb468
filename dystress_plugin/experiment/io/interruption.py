"""What ends a run from outside: SIGTERM, Ctrl-C, and files that cannot be written or read any more."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from dystress_plugin.errors import RunStopped
from dystress_plugin.experiment.io.pictures import BadPicture

SIGTERM_STATUS = 128 + signal.SIGTERM  # as shells and schedulers know it


@dataclass
class Progress:
    """How far a run has come, for the message of what ends it.

    Attributes:
        out: folder of the run.
        begun: whether the folder is known to be this run's.
    """

    out: Path
    begun: bool = False

    @property
    def hint(self) -> str:
        """What the same command would do."""
        if not self.begun:
            return "The run had not begun; the same command starts again."
        if not (self.out / "checkpoints" / "last.ckpt").exists():
            return f"No epoch was finished; the same command starts with the first one in out={self.out}."
        return f"The same command again goes on from the last finished epoch in out={self.out}."


@contextmanager
def resumable(out: Path) -> Iterator[Progress]:
    """While inside, what stops the process from outside says how to go on.

    SIGTERM ends it at once with status 143: Lightning alone would wait for the end of the batch and end with 0, as if
    all was done. Checkpoints are written whole or not at all, so there is nothing to wait for.

    Raises:
        RunStopped: once the run has begun, instead of an OSError, such as for a disk that is full, or a BadPicture.
        ValueError: before, instead of an OSError.
        KeyboardInterrupt: on Ctrl-C, also where Lightning has made a SystemExit with status 1 of it.
    """
    progress = Progress(out)
    with sigterm_exits() as received:
        try:
            yield progress
        except BaseException as error:
            # Whatever it is: what the handler raises may surface as another error, such as that of a class that was
            # being made, or be lost in a destructor and raised again by Lightning after the batch.
            if received:
                print(f"dystress: stopped by SIGTERM. {progress.hint}", file=sys.stderr)
                raise SystemExit(SIGTERM_STATUS) from None
            if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt(f"stopped by Ctrl-C. {progress.hint}") from None
            if progress.begun and isinstance(error, (OSError, BadPicture)):
                raise RunStopped(
                    f"{error}. What was written before is whole. When that is fixed: {progress.hint}"
                ) from error
            if isinstance(error, OSError):
                raise ValueError(str(error)) from error
            raise


@contextmanager
def sigterm_exits() -> Iterator[list[int]]:
    """Raises SystemExit on SIGTERM; the list is empty until then."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield received
        return
    process = os.getpid()

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        if os.getpid() != process:  # a worker that loads images inherits the handler: it just ends
            os._exit(SIGTERM_STATUS)
        received.append(number)
        raise SystemExit(SIGTERM_STATUS)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
