"""How a cosine similarity becomes a logit: a file a method, over one abstract base.

Beside the temperatures, what one of your own is made of; `dystress_plugin.recipes.register` says how.
"""

from dystress_plugin.temperature.base import Batch, Temperature
from dystress_plugin.temperature.dystress import DySTreSS
from dystress_plugin.temperature.hardness import Hardness
from dystress_plugin.temperature.individual import Individual
from dystress_plugin.temperature.maps import LogitMap, LogitMaps, MixedMap, Scaled, WeightedMap
from dystress_plugin.temperature.model_aware import ModelAware
from dystress_plugin.temperature.profiles import ProfiledMap
from dystress_plugin.temperature.robust_global import RobustGlobal
from dystress_plugin.temperature.scalar import Constant, Learnable
from dystress_plugin.temperature.schedules import CosineSchedule, StepSchedule
from dystress_plugin.temperature.temp_net import TempNet
from dystress_plugin.temperature.temperature_free import TemperatureFree
from dystress_plugin.temperature.warm_up import WarmUp

__all__ = [
    "Batch",
    "Constant",
    "CosineSchedule",
    "DySTreSS",
    "Hardness",
    "Individual",
    "Learnable",
    "LogitMap",
    "LogitMaps",
    "MixedMap",
    "ModelAware",
    "ProfiledMap",
    "RobustGlobal",
    "Scaled",
    "StepSchedule",
    "TempNet",
    "Temperature",
    "TemperatureFree",
    "WarmUp",
    "WeightedMap",
]
