"""Every method of the table as a LightningModule in the style of lightly's ImageNet benchmark.

The classes are made from the table and bear the methods' titles: `from dystress_plugin.frameworks.lightly.modules
import DySTreSS, MACLMoCo`. A method added to the table is here, and in `BENCHMARK_METHODS`, by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dystress_plugin.frameworks.lightly.layouts import BASES, TRANSFORMS
from dystress_plugin.frameworks.lightly.module import ContrastiveModule
from dystress_plugin.recipes import Recipe, follow
from dystress_plugin.training import method_class

transform = TRANSFORMS[False]


def entry(method: Recipe) -> dict[str, Any]:
    """What lightly's benchmark has for a method."""
    model = method_class(method, BASES[method.queue], __name__, {"method": method.name})
    return {"model": model, "transform": TRANSFORMS[method.queue]}


BENCHMARK_METHODS: dict[str, dict[str, Any]] = {}
follow(lambda method: BENCHMARK_METHODS.update({method.name: entry(method)}))

if TYPE_CHECKING:

    def __getattr__(name: str) -> type[ContrastiveModule]: ...
