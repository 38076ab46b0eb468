"""What the plugin adds to solo-learn when one of its scripts starts. Nothing of solo-learn's own is replaced."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dystress_plugin.frameworks.solo import fixes
from dystress_plugin.frameworks.solo.locate import ADVICE
from dystress_plugin.frameworks.solo.settings import label
from dystress_plugin.recipes import Recipe, follow

CONFIGS = "pkg://dystress_plugin.frameworks.solo.configs"


def register() -> bool:
    """Adds our methods, the small backbones and the resolver of our configs; may be called again.

    A method of ours whose name solo-learn has already (simclr) is left out: theirs stays theirs.

    Returns:
        Whether the solo-learn that is running is one that we can serve.
    """
    host = sys.modules["solo.methods"]
    if not hasattr(getattr(host, "SimCLR", None), "add_and_assert_specific_cfg"):
        warnings.warn(f"dystress_plugin does not know this version of solo-learn. {ADVICE}", stacklevel=2)
        return False

    import solo.args.linear

    from dystress_plugin.frameworks.solo.methods import CLASSES

    ours: set[str] = set()

    def add(recipe: Recipe) -> None:
        cls = CLASSES[recipe.name]
        if host.METHODS.setdefault(recipe.name, cls) is cls:
            ours.add(recipe.name)

    follow(add)
    fixes.add_small_backbones(host.BaseMethod._BACKBONES)
    fixes.follow_checkpoint(solo.args.linear, ours)
    add_resolver()
    return True


def add_resolver() -> None:
    """What `${dystress_settings:}` in the name of a run becomes."""
    OmegaConf.register_new_resolver("dystress_settings", _settings, replace=True)


def _settings(*, _root_: DictConfig) -> str:
    given: dict[str, Any] = {**(_root_.get("method_kwargs") or {})}
    return label(str(_root_.method), given, seed=_root_.get("seed"))
