"""`dystress pretrain`: one method on one data set, from nothing to a summary; the same command resumes."""

from __future__ import annotations

import inspect
import json
import platform
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import SLURMEnvironment
from torch.utils.data import DataLoader

from dystress_plugin import __version__, diagnostics, recipes
from dystress_plugin.contrastive import ContrastiveLoss
from dystress_plugin.errors import unknown_name
from dystress_plugin.experiment import data as data_module
from dystress_plugin.experiment import figures, files, folders, hardware, images, lock, long_tail
from dystress_plugin.experiment.backbone import backbone_name, build_backbone
from dystress_plugin.experiment.data import Data, EpochOrder, OwnGenerator, Views, seed_cpu
from dystress_plugin.experiment.devices import build_trainer
from dystress_plugin.experiment.evaluation import evaluate
from dystress_plugin.experiment.guard import NanGuard
from dystress_plugin.experiment.interruption import Progress, resumable
from dystress_plugin.experiment.module import MODULES, MOMENTUM, OPTIMIZERS, PretrainModule
from dystress_plugin.experiment.settings import (
    PretrainSettings,
    checked,
    comparable,
    output_folder,
    read_config,
    recorded,
    recorded_settings,
)
from dystress_plugin.experiment.transforms import augmentation, plain_transform, view_transform
from dystress_plugin.temperature import CosineSchedule

VERSIONS = ("torch", "torchvision", "lightly", "pytorch-lightning", "timm", "scikit-learn", "numpy")
# What Lightning warns of that is meant to be so here: resuming in the same folder, also when it was moved, and loading
# in the process itself.
HOST_NOISE = (
    "Checkpoint directory .* exists and is not empty",
    "The dirpath has changed",
    "The '.*_dataloader' does not have many workers",
    r".isinstance\(treespec, LeafSpec\). is deprecated",
)
QUEUE_SIZE = 4096
COLUMNS = (
    "epoch",
    "loss",
    "knn_top1",
    *(f"tau_{pairs}_{how}" for pairs in ("positive", "negative") for how in ("mean", "min", "max")),
    "alignment",
    "uniformity",
)


def pretrain(settings: PretrainSettings) -> dict[str, Any]:
    """Trains, evaluates and writes everything to `settings.out`; returns what `summary.json` holds.

    Raises:
        ValueError: before any training, for settings, devices, data, an output folder or files in it that do not fit,
            or a folder that another process writes to.
        RunStopped: for a disk that is full, an image that can no longer be read, or a loss that is not finite.
        SystemExit: after SIGTERM, with status 143.
    """
    settings = checked(settings)
    recipe = recipes.recipe(settings.method)
    out = output_folder(settings)
    with resumable(out) as progress:
        files.check_place(out)
        folders.check_apart(out, settings.data)
        trainer = make_trainer(settings, out)
        # The first process holds the folder for all: the others of a training are no strangers to it.
        with lock.alone(out) if trainer.global_rank == 0 else nullcontext():
            return _run(settings, recipe, trainer, out, progress)


def _run(
    settings: PretrainSettings, recipe: recipes.Recipe, trainer: Trainer, out: Path, progress: Progress
) -> dict[str, Any]:
    scan = scan_images(settings, out)
    data = data_module.load_for(settings, without=scan.left_out if scan is not None else ())
    check_batch(settings, data, trainer.world_size)
    settings = resolve(settings, recipe, data, trainer.world_size)
    image_size = settings.image_size or data.image_size
    module = build_module(settings, recipe, data, image_size)
    hardware.check_step(module.backbone, trainer, image_size)
    warn_short_schedule(module.loss, settings.epochs)

    last = out / "checkpoints" / "last.ckpt"
    if trainer.global_rank == 0:
        if (finished := open_run(out, settings, module, last)) is not None:
            return finished
        if scan is not None:
            scan.write(out)
    progress.begun = True
    started = time.monotonic()
    untrained = None
    options: dict[str, Any] = {
        "image_size": image_size,
        "batch_size": settings.batch_size,
        "num_workers": settings.num_workers,
        "knn_k": settings.knn_k,
        "knn_t": settings.knn_t,
    }
    if trainer.global_rank == 0:
        untrained = _untrained(out / "untrained.json", module, data, options)
    loaders = make_loaders(settings, data, image_size, trainer)
    # Lightning does so after it has loaded a checkpoint, of which float64 would be rounded.
    module = trainer.precision_plugin.convert_module(module)
    with warnings.catch_warnings():
        for message in HOST_NOISE:
            warnings.filterwarnings("ignore", message)
        try:
            with hardware.processes(trainer):
                trainer.fit(module, *loaders, ckpt_path=str(last) if last.exists() else None)
        except ValueError:
            if settings.nan_guard:
                NanGuard(out).explain(trainer, module)
            raise
    if trainer.global_rank != 0 or untrained is None:
        return {}
    if settings.wandb != "off":
        import wandb

        wandb.finish()  # or the next run of this process would go on with it

    device = str(module.device)
    module.float()
    trained = evaluate(module.backbone, data, device=device, **options)
    files.save(out / "backbone.pt", {k: v.cpu() for k, v in module.backbone.state_dict().items()})
    (out / "figures").mkdir(exist_ok=True)
    figures.curves(out / "metrics.csv", out / "figures" / "curves.png", recipe.title)
    loaders[0].sampler.set_epoch(settings.epochs - 1)  # type: ignore[attr-defined]  # also where nothing was left to train
    views, _, index = next(iter(loaders[0]))
    figures.profile(module, views, index, settings.epochs - 1, out / "figures" / "temperature.png", recipe.title)
    summary = {
        "method": settings.method,
        "data": settings.data,
        "seed": settings.seed,
        "epochs": settings.epochs,
        **trained,
        **{f"untrained_{name}": value for name, value in untrained.items()},
        "seconds": round(time.monotonic() - started, 1),
    }
    files.write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def check_batch(settings: PretrainSettings, data: Data, devices: int) -> None:
    """A ValueError for batches that the data cannot fill."""
    share = len(data.train.labels) // devices
    if settings.batch_size > share:
        each = f", {share} for each of {devices} devices" if devices > 1 else ""
        raise ValueError(
            f"batch_size={settings.batch_size} must lie between 2 and the {len(data.train.labels)} training images"
            f"{each}."
        )


def resolve(settings: PretrainSettings, recipe: recipes.Recipe, data: Data, devices: int) -> PretrainSettings:
    """The settings with a value for every key that they leave open: what `config.yaml` records.

    Raises:
        ValueError: for a parameter that the method does not have, or a table that is not of the data's size.
    """
    parameters = recipe.parameters
    for name in settings.method_kwargs:
        if name not in parameters:
            raise ValueError(unknown_name(f"parameter of method '{recipe.name}'", name, parameters))
    own = {name: None if value is inspect.Parameter.empty else value for name, value in parameters.items()}
    if "num_samples" in own:
        own["num_samples"] = size = len(data.train.labels)
        if (given := settings.method_kwargs.get("num_samples", size)) != size:
            raise ValueError(f"num_samples={given} must be that of the training images, {size}; leave it out.")
    lr, weight_decay = OPTIMIZERS[settings.optimizer]
    image_size = settings.image_size or data.image_size
    defaults = {
        "image_size": image_size,
        "backbone": backbone_name(None, settings.data),
        "lr": lr(settings.batch_size * devices),
        "weight_decay": weight_decay,
        "warmup_epochs": min(10.0, settings.epochs / 10),
    }
    if recipe.layout == "queue":
        defaults |= {"queue_size": QUEUE_SIZE, "momentum_encoder": MOMENTUM}
    chosen = {name: value for name, value in defaults.items() if getattr(settings, name) is None}
    chosen |= augmentation(settings, data, image_size)
    return replace(settings, **chosen, method_kwargs=own | settings.method_kwargs)


def build_module(settings: PretrainSettings, recipe: recipes.Recipe, data: Data, image_size: int) -> PretrainModule:
    """The module of a run as it starts, from settings as resolved; seeds everything."""
    seed_everything(settings.seed, workers=True, verbose=False)
    # First of all that is drawn, so that it starts the same with every method.
    backbone, features = build_backbone(backbone_name(settings.backbone, settings.data), image_size)
    loss = ContrastiveLoss(
        settings.method,
        queue_size=_queue_size(settings, recipe),
        gather_distributed=settings.gather_distributed,
        **settings.method_kwargs,
    )
    return MODULES[recipe.layout](backbone, features, loss, settings, data.num_classes)


def _queue_size(settings: PretrainSettings, recipe: recipes.Recipe) -> tuple[int, int] | None:
    if recipe.layout == "queue":
        assert settings.queue_size is not None  # as resolved; narrows the type
        return settings.queue_size, settings.projection_dim
    for key in ("queue_size", "momentum_encoder"):
        if (value := getattr(settings, key)) is not None:
            raise ValueError(f"{key}={value} is for methods with a queue, such as 'simclr_moco', not '{recipe.name}'.")
    return None


def make_loaders(
    settings: PretrainSettings, data: Data, image_size: int, trainer: Trainer
) -> tuple[DataLoader[Any], list[DataLoader[Any]]]:
    common: dict[str, Any] = {
        "num_workers": settings.num_workers,
        "persistent_workers": settings.num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        # Or every new iterator would take a number from the generator that dropout draws from.
        "generator": OwnGenerator(),
    }
    views = Views(data.train, view_transform(settings, data, image_size), settings.seed)
    # Not shuffle=True: the order of a resumed run must not depend on what was drawn before. Lightning sets the epoch.
    order = EpochOrder(views, trainer.world_size, trainer.global_rank, shuffle=True, seed=settings.seed)
    train = DataLoader(views, settings.batch_size, sampler=order, drop_last=True, **common)
    plain = plain_transform(image_size, data.normalize)
    return train, [DataLoader(Views(part, plain), settings.batch_size, **common) for part in (data.train, data.test)]


def make_trainer(settings: PretrainSettings, out: Path) -> Trainer:
    callbacks: list[Callback] = [
        SeedEveryEpoch(settings.seed),
        EpochTable(out / "metrics.csv"),
        *_diagnostics(settings, out),
        *([NanGuard(out)] if settings.nan_guard else []),
        ModelCheckpoint(out / "checkpoints", "last", save_top_k=1, enable_version_counter=False),
    ]
    if settings.progress:
        callbacks.append(TQDMProgressBar())
    return build_trainer(
        settings,
        max_epochs=settings.epochs,
        sync_batchnorm=settings.accelerator != "cpu" and torch.cuda.is_available(),
        callbacks=callbacks,
        plugins=_plugins(),
        logger=_loggers(settings, out),
        enable_progress_bar=settings.progress,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        default_root_dir=out,
    )


def _plugins() -> list[Any]:
    plugins: list[Any] = [files.WholeCheckpoints()]
    if SLURMEnvironment.detect():
        # Its checkpoints are from the middle of an epoch; `sbatch --requeue` and the same command do it exactly.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return plugins


def _diagnostics(settings: PretrainSettings, out: Path) -> list[Callback]:
    every = settings.diagnostics_every_n_steps
    return [diagnostics.callback(out / "diagnostics.csv", every_n_steps=every)] if every else []


def _loggers(settings: PretrainSettings, out: Path) -> list[Logger]:
    from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

    loggers: list[Logger] = []
    if settings.tensorboard:
        loggers.append(TensorBoardLogger(out, name="", version="tensorboard"))
    if settings.wandb != "off":
        name = f"{settings.method}-{settings.data}-{settings.seed}"
        offline = settings.wandb == "offline"
        loggers.append(WandbLogger(name, out, offline=offline, project=settings.wandb_project, config=asdict(settings)))
    return loggers


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
        values["tau_positive_mean"] = values["tau"]
        self.rows.append({"epoch": trainer.current_epoch} | {name: values[name] for name in COLUMNS[1:]})
        if trainer.global_rank == 0:
            lines = [",".join(COLUMNS), *(",".join(f"{row[name]:.8g}" for name in COLUMNS) for row in self.rows)]
            files.write_text(self.path, "\n".join(lines) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]


def open_run(out: Path, settings: PretrainSettings, module: PretrainModule, last: Path) -> dict[str, Any] | None:
    """Makes `out` ready for these settings; the summary if they have been run to the end already."""
    config = out / "config.yaml"
    if config.exists():
        check_settings(out, settings)
        if (out / "summary.json").exists():
            return files.read_json(out / "summary.json")
        if last.exists():
            _check_checkpoint(last, module)
    # What an interruption leaves before config.yaml is there, and a scan that found bad images.
    elif out.exists() and {path.name for path in out.iterdir()} - {"config.yaml.part", images.RECORD, lock.NAME}:
        raise ValueError(f"out={out} is not empty and holds no run of this command. Choose another out.")
    files.check_room(out, module, have=int(last.exists()))
    if not config.exists():
        versions = {name: metadata.version(name) for name in VERSIONS}
        versions |= {"python": platform.python_version(), "dystress_plugin": __version__}
        record = OmegaConf.create({"settings": recorded(settings), "versions": versions})
        if settings.indices is not None:
            record[long_tail.DIGEST] = long_tail.digest(settings.indices)
        try:
            out.mkdir(parents=True, exist_ok=True)
            files.write_text(config, OmegaConf.to_yaml(record))
        except OSError as error:
            raise ValueError(f"out={out} cannot be written: {error}. Choose another out.") from None
    return None


def check_settings(out: Path, settings: PretrainSettings) -> None:
    """Raises a ValueError if `out` holds a run with other settings than these, which `resolve` has completed."""
    if (config := out / "config.yaml").exists():
        _check_same(comparable(settings), comparable(read_config(config, settings)), f"out={out} holds a run")
        if settings.indices is not None:
            long_tail.check_unchanged(out, settings.indices)


def _check_same(wanted: dict[str, Any], found: dict[str, Any], what: str) -> None:
    different = [f"{key}={value} (there: {found.get(key)})" for key, value in wanted.items() if value != found.get(key)]
    if different:
        raise ValueError(f"{what} with other settings: {', '.join(different)}. Choose another out.")


def _check_checkpoint(last: Path, module: PretrainModule) -> None:
    """Raises a ValueError for a checkpoint that is damaged, or of another run."""
    checkpoint = files.load(last, "a checkpoint", files.NO_CHECKPOINT)
    if missing := [key for key in ("state_dict", "epoch", "settings") if key not in checkpoint]:
        raise ValueError(f"{last} is no checkpoint of this command: it has no {missing[0]}. {files.NO_CHECKPOINT}")
    files.check_state(module, checkpoint["state_dict"], last, files.NO_CHECKPOINT)
    found = recorded_settings(checkpoint["settings"], last.parent.parent, module.settings)
    _check_same(comparable(module.settings), comparable(found), f"{last} belongs to a run")


def scan_images(settings: PretrainSettings, out: Path) -> images.Scan | None:
    """What `images.scan_folder` finds in the data of a run; None where it is no folder of images."""
    if not data_module.is_folder(settings.data):
        return None
    return images.scan_folder(
        settings.data,
        out,
        on_bad_image=settings.on_bad_image,
        num_workers=settings.num_workers,
        progress=settings.progress,
    )


def _untrained(path: Path, module: PretrainModule, data: Data, options: dict[str, Any]) -> dict[str, Any]:
    """The accuracies before training, which a resumed run has no need to measure again."""
    if path.exists():
        return files.read_json(path)
    accuracies = evaluate(module.backbone, data, device="cpu", **options)
    module.backbone.train()
    files.write_text(path, json.dumps(accuracies) + "\n")
    return accuracies


def warn_short_schedule(loss: ContrastiveLoss, epochs: int) -> None:
    schedule = loss.temperature
    if isinstance(schedule, CosineSchedule) and epochs <= schedule.period / 2:
        warnings.warn(
            f"The temperature falls from {schedule.tau_max} to {schedule.tau_min} over half a period of "
            f"{schedule.period / 2:g} epochs, but training ends after {epochs}, at {schedule.tau(epochs - 1):.3g}. "
            f"Set method_kwargs.period={epochs} for one full cycle.",
            stacklevel=2,
        )
