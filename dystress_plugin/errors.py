"""Wording of errors that several places raise."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable


def unknown_name(kind: str, name: object, known: Iterable[str], *, choices: str | None = None) -> str:
    """A message for a name that is not among `known`: the nearest one first, then all of them, or `choices`."""
    known = list(known)
    spelled = {entry.lower(): entry for entry in known}  # "DySTreSS" is near to "dystress"
    nearest = difflib.get_close_matches(str(name).lower(), spelled, n=1, cutoff=0.4)
    hint = f" Did you mean '{spelled[nearest[0]]}'?" if nearest else ""
    return f"Unknown {kind} '{name}'.{hint} Choose from: {choices or ', '.join(known)}."


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
