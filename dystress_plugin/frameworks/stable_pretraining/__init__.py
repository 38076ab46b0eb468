"""Adaptive temperatures for stable-pretraining (0.1.8), which the extra `stable-pretraining` brings.

`contrastive` is a forward function for its Module, in the place of `forward.simclr`; `METHODS["dystress"]` is a class
beside its `methods.SimCLR`, one for every recipe of the table without a queue.
"""

from dystress_plugin.frameworks.stable_pretraining import version

version.check()  # before what imports it

from dystress_plugin.frameworks.stable_pretraining.forward import TemperatureCallback, contrastive  # noqa: E402
from dystress_plugin.frameworks.stable_pretraining.methods import METHODS  # noqa: E402

__all__ = ["METHODS", "TemperatureCallback", "contrastive"]
