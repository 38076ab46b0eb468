"""Checks of what users give: each returns the value, or an error that names it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any


def plain(value: Any) -> Any:
    """A scalar of NumPy or torch, such as `np.float32(0.1)`, as Python's own number; anything else as it is."""
    if isinstance(value, (int, float)):  # NumPy's float64 too
        return value
    return value.item() if getattr(value, "shape", None) == () else value


def check_positive(name: str, value: float) -> float:
    """`value` as a float, or a ValueError that names it unless it is finite and above 0."""
    value = check_number(name, value)
    if value <= 0:
        raise ValueError(f"{name}={value} must be above 0.")
    return value


def check_number(name: str, value: float) -> float:
    """`value` as a float, or an error that names it unless it is a finite number."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}.")
    if not -math.inf < value < math.inf:  # which a compiler can read
        raise ValueError(f"{name}={value} must be finite.")
    return float(value)


def check_count(name: str, value: int, *, given: str | None = None) -> int:
    """`value`, or a ValueError that names it, or what it was `given` as part of, unless it is an int of at least 1."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        shown = f"{name}={value!r}" if given is None else f"{given}: {name}"
        raise ValueError(f"{shown} must be an int of at least 1.")
    return value


def check_at_least(name: str, value: float, least: float) -> float:
    """`value` as a float, or an error that names it unless it is finite and at least `least`."""
    number = check_number(name, value)
    if number < least:
        raise ValueError(f"{name}={value} must be at least {least}.")
    return number


def check_between(name: str, value: float, low: float, high: float, range_: str | None = None) -> float:
    """`value` as a float, or an error that names it, and the range by its name, unless it lies in [low, high]."""
    value = check_number(name, value)
    if not low <= value <= high:
        raise ValueError(f"{name}={value} must lie in {f'{range_} = ' if range_ else ''}[{low}, {high}].")
    return value


def check_fraction(name: str, value: float) -> float:
    """`value` as a float, or an error that names it unless it lies in [0, 1]."""
    return check_between(name, value, 0, 1)


def check_range(tau_min: float, tau_max: float, low: str = "tau_min", high: str = "tau_max") -> tuple[float, float]:
    """Both ends as floats, or an error that names them unless 0 < tau_min <= tau_max."""
    tau_min, tau_max = check_positive(low, tau_min), check_positive(high, tau_max)
    if tau_min > tau_max:
        raise ValueError(f"{low}={tau_min} is above {high}={tau_max}; swap them.")
    return tau_min, tau_max


def unknown_name(kind: str, name: object, known: Iterable[str], *, choices: str | None = None) -> str:
    """A message for a name that is not among `known`: the nearest one first, then all of them, or `choices`."""
    known = list(known)
    spelled = {entry.lower(): entry for entry in known}  # "DySTreSS" is near to "dystress"
    nearest = difflib.get_close_matches(str(name).lower(), spelled, n=1, cutoff=0.4)
    hint = f" Did you mean '{spelled[nearest[0]]}'?" if nearest else ""
    return f"Unknown {kind} '{name}'.{hint} Choose from: {choices or ', '.join(known)}."
