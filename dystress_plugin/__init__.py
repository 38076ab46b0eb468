"""Adaptive temperatures for contrastive losses, as a plugin to the libraries people already use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dystress_plugin import metrics, objectives, recipes, temperature
    from dystress_plugin.chunks import embed_in_chunks
    from dystress_plugin.contrastive import ContrastiveLoss
    from dystress_plugin.rows import RowStats

__version__ = "0.1.0"

__all__ = [
    "ContrastiveLoss",
    "RowStats",
    "__version__",
    "embed_in_chunks",
    "metrics",
    "objectives",
    "recipes",
    "temperature",
]

_HOMES = {"ContrastiveLoss": "contrastive", "RowStats": "rows", "embed_in_chunks": "chunks"}


def __getattr__(name: str) -> Any:
    # Not before it is asked for: a command refuses settings in less time than torch takes to be imported.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOMES.get(name, name)}")
    return getattr(module, name) if name in _HOMES else module


def __dir__() -> list[str]:
    return __all__
