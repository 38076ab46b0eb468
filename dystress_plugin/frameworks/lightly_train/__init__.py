"""LightlyTrain: our methods in `lightly_train.pretrain(method="dystress", ...)`, by importing this package.

`python -m dystress_plugin.frameworks.lightly_train` is its command line with them. LightlyTrain is under the AGPL-3.0;
nothing else in dystress_plugin imports this package.
"""

from dystress_plugin.frameworks.lightly_train.registration import register

__all__ = ["register"]

register()
