"""How a cosine similarity becomes a logit: one class a file, over one abstract base."""

from dystress_plugin.temperature.base import Temperature
from dystress_plugin.temperature.constant import Constant
from dystress_plugin.temperature.cosine_schedule import CosineSchedule
from dystress_plugin.temperature.dystress import DySTreSS
from dystress_plugin.temperature.individual import Individual
from dystress_plugin.temperature.model_aware import ModelAware
from dystress_plugin.temperature.temperature_free import TemperatureFree

__all__ = [
    "Constant",
    "CosineSchedule",
    "DySTreSS",
    "Individual",
    "ModelAware",
    "Temperature",
    "TemperatureFree",
]
