"""Which stable-pretraining there is, and whether anybody has tried it."""

from __future__ import annotations

import importlib.metadata
import warnings

from packaging.version import Version

from dystress_plugin.errors import to_install

TRIED = "0.1.8"
SUPPORT = f"dystress_plugin was tried with stable-pretraining {TRIED}"


def check() -> None:
    """Raises an ImportError where it is missing or older, warns where it is newer."""
    advice = f"Install a version that fits: {to_install('stable-pretraining')}"
    try:
        found = Version(importlib.metadata.version("stable-pretraining"))
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{SUPPORT}, and none is installed.\n{advice}") from None
    if found < Version(TRIED):
        raise ImportError(f"{SUPPORT}, and {found} is installed.\n{advice}")
    if found.release[:2] > Version(TRIED).release[:2]:
        warnings.warn(f"{SUPPORT}; {found} is installed, and nobody has tried it yet.", stacklevel=3)
