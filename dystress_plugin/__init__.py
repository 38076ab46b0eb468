"""Adaptive temperatures for contrastive losses, as a plugin to the libraries people already use."""

from dystress_plugin import metrics, recipes, temperature
from dystress_plugin.contrastive import ContrastiveLoss

__version__ = "0.1.0"

__all__ = ["ContrastiveLoss", "__version__", "metrics", "recipes", "temperature"]
