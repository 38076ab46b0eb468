"""What happens every epoch beside the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from dystress_plugin.experiment.data.datasets import seed_cpu
from dystress_plugin.experiment.io import files

COLUMNS = (
    "epoch",
    "loss",
    "knn_top1",
    *(f"tau_{pairs}_{how}" for pairs in ("positive", "negative") for how in ("mean", "min", "max")),
    "alignment",
    "uniformity",
)


class SeedEveryEpoch(Callback):
    """Starts the model's own random numbers, such as dropout's, from (seed, epoch, rank): resuming repeats them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seed_cpu(self.seed, trainer.current_epoch, trainer.global_rank)
        torch.cuda.manual_seed_all(int(torch.randint(2**31, ())))


class EpochTable(Callback):
    """Writes `metrics.csv`, a row an epoch.

    The rows are part of the checkpoint, so that after an interruption the table has each epoch exactly once.
    Lightning's own CSVLogger deletes the earlier rows when a run resumes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.rows.append({"epoch": trainer.current_epoch} | {name: values[name] for name in COLUMNS[1:]})
        if trainer.global_rank == 0:
            lines = [",".join(COLUMNS), *(",".join(f"{row[name]:.8g}" for name in COLUMNS) for row in self.rows)]
            files.write_text(self.path, "\n".join(lines) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]
