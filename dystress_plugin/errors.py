"""Wording of errors that several places raise."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """A message for a name that is not among `known`: the nearest one first, then all of them."""
    known = list(known)
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    return f"Unknown {kind} '{name}'.{hint} Choose from: {', '.join(known)}."
