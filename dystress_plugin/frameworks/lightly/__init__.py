"""Adaptive temperatures for lightly: drop-in criteria, LightningModules, entries for lightly's benchmark.

The criteria need torch alone; `modules` and the benchmark's launcher need lightly (the extra
`lightly`).
"""

from dystress_plugin.frameworks.lightly.criteria import (
    DySTreSSLoss,
    ISogCLRLoss,
    MACLLoss,
    TemperatureFreeLoss,
    TemperatureScheduleLoss,
)

__all__ = ["DySTreSSLoss", "ISogCLRLoss", "MACLLoss", "TemperatureFreeLoss", "TemperatureScheduleLoss"]
