"""Adaptive temperatures for sentence-transformers (5.4 or newer), which the extra `sentences` brings.

A loss in the place of MultipleNegativesRankingLoss, the same with cached gradients, the trainer's callback, and what
SimCSE is made of: its temperatures and its head for training alone; `encoders` and `sts` have the rest.
"""

from dystress_plugin.errors import needing

with needing("sentences"):
    from dystress_plugin.frameworks.sentence_transformers.callback import ContrastiveCallback
    from dystress_plugin.frameworks.sentence_transformers.head import TrainingHead
    from dystress_plugin.frameworks.sentence_transformers.losses import (
        SETTINGS,
        CachedContrastiveSentenceLoss,
        ContrastiveSentenceLoss,
    )

__all__ = [
    "SETTINGS",
    "CachedContrastiveSentenceLoss",
    "ContrastiveCallback",
    "ContrastiveSentenceLoss",
    "TrainingHead",
]
