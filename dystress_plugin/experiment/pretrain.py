"""`dystress pretrain`: one method on one data set, from nothing to a summary; the same command resumes."""

from __future__ import annotations

import inspect
import json
import os
import platform
import time
import warnings
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import Logger
from torch.utils.data import DataLoader

from dystress_plugin import __version__, diagnostics, recipes
from dystress_plugin.contrastive import ContrastiveLoss
from dystress_plugin.errors import unknown_name
from dystress_plugin.experiment import data as data_module
from dystress_plugin.experiment import figures
from dystress_plugin.experiment.backbone import backbone_name, build_backbone
from dystress_plugin.experiment.data import Data, EpochOrder, Views, seed_cpu
from dystress_plugin.experiment.evaluation import evaluate
from dystress_plugin.experiment.module import MODULES, MOMENTUM, OPTIMIZERS, PretrainModule
from dystress_plugin.experiment.settings import PretrainSettings
from dystress_plugin.experiment.transforms import augmentation, plain_transform, view_transform
from dystress_plugin.temperature import CosineSchedule

VERSIONS = ("torch", "torchvision", "lightly", "pytorch-lightning", "timm", "scikit-learn", "numpy")
# What Lightning warns of that is meant to be so here: resuming in the same folder, and loading in the process itself.
HOST_NOISE = (
    "Checkpoint directory .* exists and is not empty",
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
        ValueError: before any training, for settings, data or an output folder that do not fit.
    """
    recipe = recipes.recipe(settings.method)
    out = output_folder(settings)
    data = data_module.load(
        settings.data,
        root=settings.data_root,
        download=settings.download,
        long_tail=settings.long_tail,
        long_tail_profile=settings.long_tail_profile,
        indices=settings.indices,
        seed=settings.seed,
    )
    if settings.epochs < 1:
        raise ValueError(f"epochs={settings.epochs} must be at least 1.")
    trainer = _trainer(settings, out)
    images = len(data.train.labels) // trainer.world_size
    if not 2 <= settings.batch_size <= images:
        each = f", {images} for each of {trainer.world_size} devices" if trainer.world_size > 1 else ""
        raise ValueError(
            f"batch_size={settings.batch_size} must lie between 2 and the {len(data.train.labels)} training images"
            f"{each}."
        )
    settings = resolve(settings, recipe, data, trainer.world_size)
    image_size = settings.image_size or data.image_size
    module = _module(settings, recipe, data, image_size)
    _warn_short_schedule(module.loss, settings.epochs)

    if trainer.global_rank == 0 and (finished := _open(out, settings)) is not None:
        return finished
    started = time.monotonic()
    last = out / "checkpoints" / "last.ckpt"
    untrained = None
    options: dict[str, Any] = {
        "image_size": image_size,
        "batch_size": settings.batch_size,
        "num_workers": settings.num_workers,
        "knn_k": settings.knn_k,
        "knn_t": settings.knn_t,
    }
    if trainer.global_rank == 0:
        untrained = evaluate(module.backbone, data, device="cpu", **options)
        module.backbone.train()
    loaders = _loaders(settings, data, image_size, trainer)
    with warnings.catch_warnings():
        for message in HOST_NOISE:
            warnings.filterwarnings("ignore", message)
        trainer.fit(module, *loaders, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    if trainer.global_rank != 0 or untrained is None:
        return {}
    if settings.wandb != "off":
        import wandb

        wandb.finish()  # or the next run of this process would go on with it

    device = str(module.device)
    trained = evaluate(module.backbone, data, device=device, **options)
    torch.save({k: v.cpu() for k, v in module.backbone.state_dict().items()}, out / "backbone.pt")
    figures.curves(out / "metrics.csv", out / "figures" / "curves.png", recipe.title)
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
    _write(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def output_folder(settings: PretrainSettings) -> Path:
    """Where a run leaves its results."""
    return Path(settings.out or f"runs/{settings.method}-{Path(settings.data).name}-{settings.seed}")


def resolve(settings: PretrainSettings, recipe: recipes.Recipe, data: Data, devices: int) -> PretrainSettings:
    """The settings with a value for every key that they leave open: what `config.yaml` records.

    Raises:
        ValueError: for a parameter that the method does not have, or an unknown optimizer.
    """
    parameters = recipe.parameters
    for name in settings.method_kwargs:
        if name not in parameters:
            raise ValueError(unknown_name(f"parameter of method '{recipe.name}'", name, parameters))
    own = {name: None if value is inspect.Parameter.empty else value for name, value in parameters.items()}
    if "num_samples" in own:
        own["num_samples"] = len(data.train.labels)
    if settings.optimizer not in OPTIMIZERS:
        raise ValueError(unknown_name("optimizer", settings.optimizer, OPTIMIZERS))
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


def _module(settings: PretrainSettings, recipe: recipes.Recipe, data: Data, image_size: int) -> PretrainModule:
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


def _loaders(
    settings: PretrainSettings, data: Data, image_size: int, trainer: Trainer
) -> tuple[DataLoader[Any], list[DataLoader[Any]]]:
    common: dict[str, Any] = {
        "num_workers": settings.num_workers,
        "persistent_workers": settings.num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        # Or every new iterator would take a number from the generator that dropout draws from.
        "generator": torch.Generator(),
    }
    views = Views(data.train, view_transform(settings, data, image_size), settings.seed)
    # Not shuffle=True: the order of a resumed run must not depend on what was drawn before. Lightning sets the epoch.
    order = EpochOrder(views, trainer.world_size, trainer.global_rank, shuffle=True, seed=settings.seed)
    train = DataLoader(views, settings.batch_size, sampler=order, drop_last=True, **common)
    plain = plain_transform(image_size, data.normalize)
    return train, [DataLoader(Views(part, plain), settings.batch_size, **common) for part in (data.train, data.test)]


def _trainer(settings: PretrainSettings, out: Path) -> Trainer:
    devices: str | int = int(settings.devices) if settings.devices.isdigit() else settings.devices
    callbacks: list[Callback] = [
        SeedEveryEpoch(settings.seed),
        EpochTable(out / "metrics.csv"),
        *_diagnostics(settings, out),
        ModelCheckpoint(out / "checkpoints", "last", save_top_k=1, enable_version_counter=False),
    ]
    if settings.progress:
        callbacks.append(TQDMProgressBar())
    return Trainer(
        max_epochs=settings.epochs,
        accelerator=settings.accelerator,
        devices=devices,
        num_nodes=settings.num_nodes,
        strategy=settings.strategy,
        precision=settings.precision,  # type: ignore[arg-type]
        sync_batchnorm=settings.accelerator != "cpu" and torch.cuda.is_available(),
        callbacks=callbacks,
        logger=_loggers(settings, out),
        enable_progress_bar=settings.progress,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        default_root_dir=out,
    )


def _diagnostics(settings: PretrainSettings, out: Path) -> list[Callback]:
    every = settings.diagnostics_every_n_steps
    if every < 0:
        raise ValueError(f"diagnostics_every_n_steps={every} must be at least 1, or 0 for none.")
    return [diagnostics.callback(out / "diagnostics.csv", every_n_steps=every)] if every else []


def _loggers(settings: PretrainSettings, out: Path) -> list[Logger]:
    from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

    loggers: list[Logger] = []
    if settings.tensorboard:
        loggers.append(TensorBoardLogger(out, name="", version="tensorboard"))
    if settings.wandb not in ("off", "offline", "online"):
        raise ValueError(f"wandb={settings.wandb} must be off, offline or online.")
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
            _write(self.path, "\n".join(lines) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]


def _open(out: Path, settings: PretrainSettings) -> dict[str, Any] | None:
    """Makes `out` ready for these settings; the summary if they have been run to the end already."""
    config = out / "config.yaml"
    wanted = OmegaConf.create(asdict(settings))
    if config.exists():
        found = OmegaConf.load(config).settings
        different = [
            f"{key}={wanted.get(key)} (there: {found.get(key)})"
            for key in wanted
            if key != "out" and wanted.get(key) != found.get(key)
        ]
        if different:
            raise ValueError(f"out={out} holds a run with other settings: {', '.join(different)}. Choose another out.")
        if (out / "summary.json").exists():
            summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
            return summary
        return None
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"out={out} is not empty and holds no run of this command. Choose another out.")
    versions = {name: metadata.version(name) for name in VERSIONS}
    versions |= {"python": platform.python_version(), "dystress_plugin": __version__}
    record = OmegaConf.create({"settings": wanted, "versions": versions})
    (out / "figures").mkdir(parents=True, exist_ok=True)
    _write(config, OmegaConf.to_yaml(record))
    return None


def _write(path: Path, text: str) -> None:
    """Whole or not at all, also when the process is killed meanwhile."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def _warn_short_schedule(loss: ContrastiveLoss, epochs: int) -> None:
    schedule = loss.temperature
    if isinstance(schedule, CosineSchedule) and epochs <= schedule.period / 2:
        warnings.warn(
            f"The temperature falls from {schedule.tau_max} to {schedule.tau_min} over half a period of "
            f"{schedule.period / 2:g} epochs, but training ends after {epochs}, at {schedule.tau(epochs - 1):.3g}. "
            f"Set method_kwargs.period={epochs} for one full cycle.",
            stacklevel=2,
        )
