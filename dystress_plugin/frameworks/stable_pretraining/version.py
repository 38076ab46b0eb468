"""Which stable-pretraining there is, and whether anybody has tried it."""

from __future__ import annotations

from dystress_plugin.errors import checked_version, to_install

TRIED = "0.1.8"
SUPPORT = f"dystress_plugin was tried with stable-pretraining {TRIED}"


def check() -> None:
    """Raises an ImportError where it is missing or older, warns where it is newer."""
    advice = f"Install a version that fits: {to_install('stable-pretraining')}"
    checked_version("stable-pretraining", TRIED, TRIED, SUPPORT, advice)
