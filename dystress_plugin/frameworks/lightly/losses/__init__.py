"""Drop-in criteria with lightly's argument names: an `NTXentLoss` goes out, one of these comes in.

They hold no formula: each is `dystress_plugin.ContrastiveLoss` under the name and with the arguments that lightly's
users know. What they add over it is lightly's rule that only what is trained on enters a memory bank.
"""

from dystress_plugin.frameworks.lightly.losses.dystress import DySTreSSLoss
from dystress_plugin.frameworks.lightly.losses.isogclr import ISogCLRLoss
from dystress_plugin.frameworks.lightly.losses.macl import MACLLoss
from dystress_plugin.frameworks.lightly.losses.schedule import TemperatureScheduleLoss
from dystress_plugin.frameworks.lightly.losses.temperature_free import TemperatureFreeLoss

__all__ = ["DySTreSSLoss", "ISogCLRLoss", "MACLLoss", "TemperatureFreeLoss", "TemperatureScheduleLoss"]
