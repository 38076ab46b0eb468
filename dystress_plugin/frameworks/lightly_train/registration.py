"""What the plugin adds to LightlyTrain. Nothing of LightlyTrain's own is replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dystress_plugin.errors import checked_version, to_install

OLDEST = "0.13.0"  # the first with lightly_train.pretrain
NEWEST = "0.18.0"
SUPPORT = f"dystress_plugin supports LightlyTrain {OLDEST} to {NEWEST}"
ADVICE = f"Install a version that fits: {to_install('lightly-train')}"


@dataclass
class MethodTable:
    """LightlyTrain's function from method names to classes, with further ones.

    Attributes:
        theirs: the function as LightlyTrain has it. Its names win: its own simclr stays its own.
        ours: what is added.
    """

    theirs: Callable[[], dict[str, Any]]
    ours: dict[str, Any]

    def __call__(self) -> dict[str, Any]:
        """All methods by name."""
        return {**self.ours, **self.theirs()}


def register() -> None:
    """Adds our methods to LightlyTrain's; may be called again.

    Raises:
        ImportError: if LightlyTrain is missing, too old, or so new that our methods do not fit into it; two lines.

    Warns:
        UserWarning: if it is newer than what was tried.
    """
    version = checked_version("lightly-train", OLDEST, NEWEST, SUPPORT, ADVICE)
    try:
        from lightly_train._methods import method_helpers

        from dystress_plugin.frameworks.lightly_train.methods import CLASSES

        table = method_helpers._method_name_to_cls
    except (ImportError, AttributeError, TypeError) as error:
        raise ImportError(f"{SUPPORT}, and {version} does not work: {error}\n{ADVICE}") from error
    if not isinstance(table, MethodTable):
        method_helpers._method_name_to_cls = MethodTable(table, CLASSES)
