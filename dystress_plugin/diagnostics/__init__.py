"""What the temperature does during training: samples of some of the steps, and in them of some of the pairs.

Every `every_n_steps` steps, for the positive and for the negative pairs of the first images of the batch: number, mean,
min, max and histogram of their cosine similarities and of their temperatures. `callback` is for a Trainer, of
`lightning.pytorch` or of `pytorch_lightning`, whatever the module; `Recorder` is for a loop of one's own. Both find
every `ContrastiveLoss` in a module by themselves, write a CSV, and change neither the module nor any random number.
"""

from dystress_plugin.diagnostics.lightning import callback, callbacks
from dystress_plugin.diagnostics.recorder import COLUMNS, EVERY_N_STEPS, Recorder
from dystress_plugin.diagnostics.summary import (
    BINS,
    MAX_IMAGES,
    Summary,
    some_pairs,
    summaries,
    temperature_summary,
)

__all__ = [
    "BINS",
    "COLUMNS",
    "EVERY_N_STEPS",
    "MAX_IMAGES",
    "Recorder",
    "Summary",
    "callback",
    "callbacks",
    "some_pairs",
    "summaries",
    "temperature_summary",
]
