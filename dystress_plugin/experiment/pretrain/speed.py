"""How fast a run trains, and on what: `speed.csv`, a row an epoch."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from dystress_plugin.experiment.data.folders import say
from dystress_plugin.experiment.devices import device_name
from dystress_plugin.experiment.io import files

TABLE = "speed.csv"


class ImagesPerSecond(Callback):
    """Measures how many images an epoch trains on in a second, on all devices, without what is measured after it.

    Into a file: a process that Lightning has spawned hands no callback back, and a run that was resumed has had its
    epochs in several processes.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._rows: list[dict[str, Any]] = []
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An epoch that an interruption has cut off from its checkpoint comes again.
        self._rows = [row for row in _read(self.run) if row["epoch"] < trainer.current_epoch]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_last_batch:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        images = len(batch[-1]) * trainer.num_training_batches * trainer.world_size
        speed = images / (time.monotonic() - self._started)
        each, several = device_name(pl_module.device), trainer.world_size
        device = f"{several} x {each}" if several > 1 else each
        self._rows.append({"epoch": trainer.current_epoch, "images_per_second": speed, "device": device})
        if trainer.global_rank == 0:
            files.write_table(self.run / TABLE, list(self._rows[-1]), self._rows)


def summary(run: Path) -> dict[str, Any]:
    """What a run's `summary.json` says of it; None without a `speed.csv` that can be read.

    The median over the epochs, so that the first one's start counts little, on the last of its devices; and all its
    devices, as a run may go on elsewhere.
    """
    rows = _read(run)
    speeds = [row["images_per_second"] for row in rows if row["device"] == rows[-1]["device"]]
    return {
        "images_per_second": round(median(speeds), 1) if speeds else None,
        "device": ", then ".join(dict.fromkeys(row["device"] for row in rows)) or None,
        "torch": torch.__version__,
    }


def _read(run: Path) -> list[dict[str, Any]]:
    if not (run / TABLE).exists():
        return []
    try:
        return files.read_table(run / TABLE, _row, "The speeds in it are left out of summary.json.")
    except ValueError as error:  # nothing that a training should end by
        say(error)
        return []


def _row(cells: dict[str, str]) -> dict[str, Any]:
    return {
        "epoch": int(cells["epoch"]),
        "images_per_second": float(cells["images_per_second"]),
        "device": cells["device"],
    }
