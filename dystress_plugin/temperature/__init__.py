"""How a cosine similarity becomes a logit: one class a file, over one abstract base."""

from dystress_plugin.temperature.base import Temperature
from dystress_plugin.temperature.constant import Constant
from dystress_plugin.temperature.cosine_schedule import CosineSchedule
from dystress_plugin.temperature.dystress import DySTreSS
from dystress_plugin.temperature.individual import Individual
from dystress_plugin.temperature.learnable import Learnable
from dystress_plugin.temperature.model_aware import ModelAware
from dystress_plugin.temperature.step_schedule import StepSchedule
from dystress_plugin.temperature.temperature_free import TemperatureFree
from dystress_plugin.temperature.warm_up import WarmUp

__all__ = [
    "Constant",
    "CosineSchedule",
    "DySTreSS",
    "Individual",
    "Learnable",
    "ModelAware",
    "StepSchedule",
    "Temperature",
    "TemperatureFree",
    "WarmUp",
]
