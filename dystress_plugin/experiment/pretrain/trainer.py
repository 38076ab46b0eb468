"""Lightning's Trainer, what it does every epoch beside the training, and the loaders of a run."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import SLURMEnvironment
from torch.utils.data import DataLoader

from dystress_plugin.experiment.data import memory
from dystress_plugin.experiment.data.datasets import Data, EpochOrder, OwnGenerator, Views, seed_cpu
from dystress_plugin.experiment.data.transforms import plain_transform, view_transform
from dystress_plugin.experiment.devices import build_trainer
from dystress_plugin.experiment.io import files
from dystress_plugin.experiment.pretrain.guard import NanGuard
from dystress_plugin.experiment.pretrain.speed import ImagesPerSecond
from dystress_plugin.experiment.settings import PretrainSettings
from dystress_plugin.experiment.spec import HardwareSpec, RunSpec, part
from dystress_plugin.experiment.terminal import MEASURES

# What Lightning warns of that is meant to be so here: resuming in the same folder, also when it was moved or with fewer
# checkpoints, and loading in the process itself.
HOST_NOISE = (
    "Be aware that when using `ckpt_path`, callbacks .*ModelCheckpoint",
    "Checkpoint directory .* exists and is not empty",
    "The dirpath has changed",
    "The '.*_dataloader' does not have many workers",
    r".isinstance\(treespec, LeafSpec\). is deprecated",
)

COLUMNS = (
    "epoch",
    "loss",
    "knn_top1",  # with labels
    "effective_rank",  # without
    *(f"tau_{pairs}_{how}" for pairs in ("positive", "negative") for how in ("mean", "min", "max")),
    "alignment",
    "uniformity",
)

Loader: TypeAlias = "DataLoader[Any] | memory.MemoryLoader"
Loaders: TypeAlias = "tuple[Loader, list[Loader]]"


def make_loaders(spec: RunSpec, data: Data, trainer: Trainer) -> Loaders:
    """The loader of views, or of whole images to make them of, and those of plain ones for kNN or effective rank."""
    batch_size, image_size = spec.data.batch_size, spec.model.image_size
    common: dict[str, Any] = {
        "num_workers": spec.data.num_workers,
        "persistent_workers": spec.data.num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        # Or every new iterator would take a number from the generator that dropout draws from.
        "generator": OwnGenerator(),
    }
    views = Views(data.train, view_transform(spec.augmentation, image_size, data.normalize), spec.seed)
    # Not shuffle=True: the order of a resumed run must not depend on what was drawn before. Lightning sets the epoch.
    order = EpochOrder(views, trainer.world_size, trainer.global_rank, shuffle=True, seed=spec.seed)
    shown = data.evaluated
    measured = (shown.train, shown.test) if shown.classes else (shown.test,)
    plain = plain_transform(image_size, data.normalize)
    if spec.augmentation.augment == "loader":
        train = DataLoader(views, batch_size, sampler=order, drop_last=True, **common)
        return train, [DataLoader(Views(images, plain), batch_size, **common) for images in measured]
    # Asked for when the training begins, which may be in another process.
    device = partial(getattr, trainer.strategy, "root_device")
    size: dict[str, Any] = {"image_size": image_size, "normalize": data.normalize}
    return memory.batches(data.train, batch_size, device, sampler=order, **common), [
        memory.plain_batches(images, batch_size, device, **size)
        or DataLoader(Views(images, plain), batch_size, **common)
        for images in measured
    ]


def make_trainer(settings: PretrainSettings, out: Path) -> Trainer:
    """Lightning's Trainer with all callbacks and loggers of a run; writes nothing.

    It comes before all is resolved, as the learning rate depends on its devices. What depends on that, the module adds:
    what loggers record, and the diagnostics.
    """
    table = EpochTable(out / "metrics.csv")
    callbacks: list[Callback] = [
        SeedEveryEpoch(settings.seed),
        table,
        *([NanGuard(out)] if settings.nan_guard else []),
        ModelCheckpoint(
            out / "checkpoints",
            "last",
            save_top_k=1,
            enable_version_counter=False,
            every_n_epochs=settings.check_every_n_epochs,
            save_on_train_epoch_end=True,  # when the epoch has its row in the table
        ),
        ImagesPerSecond(out),
    ]
    bar = settings.progress and sys.stdout.isatty()
    if settings.progress:
        callbacks.append(TQDMProgressBar() if bar else EpochLines(table))
    return build_trainer(
        part(HardwareSpec, settings),
        max_epochs=settings.epochs,
        sync_batchnorm=settings.accelerator != "cpu" and torch.cuda.is_available(),
        callbacks=callbacks,
        plugins=_plugins(),
        logger=_loggers(settings, out),
        enable_progress_bar=bar,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=settings.check_every_n_epochs,
        log_every_n_steps=settings.log_every_n_steps,
        default_root_dir=out,
    )


def _plugins() -> list[Any]:
    plugins: list[Any] = [files.WholeCheckpoints()]
    if SLURMEnvironment.detect():
        # Its checkpoints are from the middle of an epoch; `sbatch --requeue` and the same command do it exactly.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return plugins


def _loggers(settings: PretrainSettings, out: Path) -> list[Logger]:
    from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

    loggers: list[Logger] = []
    if settings.tensorboard:
        loggers.append(TensorBoardLogger(out, name="", version="tensorboard"))
    if settings.wandb != "off":
        name = f"{settings.method}-{settings.data}-{settings.seed}"
        offline = settings.wandb == "offline"
        loggers.append(WandbLogger(name, out, offline=offline, project=settings.wandb_project))
    return loggers


class SeedEveryEpoch(Callback):
    """Starts the model's own random numbers, such as dropout's, from (seed, epoch, rank): resuming repeats them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seed_cpu(self.seed, trainer.current_epoch, trainer.global_rank)
        torch.cuda.manual_seed_all(int(torch.randint(2**31, ())))


class EpochTable(Callback):
    """Writes `metrics.csv`, a row an epoch; nothing in a column where the epoch has not been measured.

    The rows are part of the checkpoint, so that after an interruption the table has each epoch exactly once.
    Lightning's own CSVLogger deletes the earlier rows when a run resumes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float | None]] = []
        self._measured: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.rows:  # by now those of the checkpoint; the file may have been damaged since
            self._write(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measured = trainer.current_epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values: dict[str, float | None] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self._measured != trainer.current_epoch:  # Lightning keeps those of an earlier epoch
            measure = "knn_top1" if pl_module.num_classes else "effective_rank"
            values[measure] = None
        self.rows.append({"epoch": trainer.current_epoch} | {name: values[name] for name in COLUMNS if name in values})
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if trainer.global_rank == 0:
            files.write_table(self.path, list(self.rows[-1]), self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]


class EpochLines(Callback):
    """Prints a line an epoch, where a progress bar would fill a log with its thousands of states."""

    def __init__(self, table: EpochTable) -> None:
        self.table = table

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_rank == 0:
            row = self.table.rows[-1]
            shown = ", ".join(f"{name} {row[name]:.4g}" for name in ("loss", *MEASURES) if row.get(name) is not None)
            print(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}: {shown}", flush=True)
