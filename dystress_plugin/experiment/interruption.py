"""What ends a run from outside: SIGTERM, and files that cannot be written any more."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from dystress_plugin.errors import RunStopped

SIGTERM_STATUS = 128 + signal.SIGTERM  # as shells and schedulers know it


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """While inside, what stops the process from outside says how to go on.

    SIGTERM ends it at once with status 143: Lightning alone would wait for the end of the batch and end with 0, as if
    all was done. Checkpoints are written whole or not at all, so there is nothing to wait for.

    Raises:
        RunStopped: instead of an OSError, such as for a disk that is full.
    """
    hint = f"The same command again goes on from the last finished epoch in out={out}."
    with _sigterm_exits() as received:
        try:
            yield
        except BaseException as error:
            # Whatever it is: what the handler raises may surface as another error, such as that of a class that was
            # being made, or be lost in a destructor and raised again by Lightning after the batch.
            if received:
                print(f"dystress: stopped by SIGTERM. {hint}", file=sys.stderr)
                raise SystemExit(SIGTERM_STATUS) from None
            if isinstance(error, OSError):
                raise RunStopped(
                    f"{error}. What was written before is whole. When that is mended: {hint[0].lower()}{hint[1:]}"
                ) from error
            raise


@contextmanager
def _sigterm_exits() -> Iterator[list[int]]:
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
