"""Every method of the table as a LightningModule in the style of lightly's ImageNet benchmark.

The classes are made from the table and bear the methods' titles: `from dystress_plugin.frameworks.lightly.modules
import DySTreSS, MACLMoCo`. A method added to the table is here, and in `BENCHMARK_METHODS`, by itself.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from dystress_plugin.frameworks.lightly.layouts import LAYOUTS, TRANSFORMS
from dystress_plugin.frameworks.lightly.module import ContrastiveModule
from dystress_plugin.recipes import Recipe, follow

transform = TRANSFORMS["views"]


def _module_class(method: Recipe) -> type[ContrastiveModule]:
    base = LAYOUTS[method.layout]
    text = f"{method.title} ({method.paper}, {method.url}) as lightly's benchmark trains; see `{base.__name__}`."
    name = re.sub(r"\W", "", method.title)
    return type(name, (base,), {"method": method.name, "__doc__": text, "__module__": __name__})


BENCHMARK_METHODS: dict[str, dict[str, Any]] = {}


def _add(method: Recipe) -> None:
    model = _module_class(method)
    BENCHMARK_METHODS[method.name] = {"model": model, "transform": TRANSFORMS[method.layout]}
    # By name in this module, so that it can be imported, pickled and found by load_from_checkpoint.
    globals()[model.__name__] = model


follow(_add)

if TYPE_CHECKING:

    def __getattr__(name: str) -> type[ContrastiveModule]: ...
