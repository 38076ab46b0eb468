"""Errors that are no fault of a setting, and what another library says of its own."""

from __future__ import annotations

import traceback


class RunStopped(RuntimeError):
    """A training that cannot go on, through no setting of its own; what it has written is whole."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line that ends with a full stop; of a bare one, the line of code."""
    line = str(error).strip().partition("\n")[0].strip()
    if not line:
        code = [frame.line or "" for frame in traceback.extract_tb(error.__traceback__)]
        last = [text for text in code if not text.startswith("raise ")][-1:]  # what led to a bare `raise`
        line = ": ".join([type(error).__name__, *last])
    return line if line.endswith((".", "!", "?")) else f"{line}."
