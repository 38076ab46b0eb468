"""Adaptive temperatures for contrastive losses, as a plugin to the libraries people already use."""

from dystress_plugin import metrics, objectives, recipes, temperature
from dystress_plugin.contrastive import ContrastiveLoss
from dystress_plugin.rows import RowStats

__version__ = "0.1.0"

__all__ = ["ContrastiveLoss", "RowStats", "__version__", "metrics", "objectives", "recipes", "temperature"]
