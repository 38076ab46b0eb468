"""`dystress pretrain`: one method on one data set, from nothing to a summary; the same command resumes."""

from __future__ import annotations

import json
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer

from dystress_plugin import recipes
from dystress_plugin.experiment import hardware, places
from dystress_plugin.experiment.data import datasets as data_module
from dystress_plugin.experiment.data import scan
from dystress_plugin.experiment.data.datasets import Data
from dystress_plugin.experiment.evaluate.protocols import protocol
from dystress_plugin.experiment.evaluate.scores import (
    features_of,
    pool_for,
    read_untrained,
    score_features,
    score_run,
)
from dystress_plugin.experiment.io import files, lock
from dystress_plugin.experiment.io.interruption import Progress, resumable
from dystress_plugin.experiment.keys import checked
from dystress_plugin.experiment.pretrain import figures
from dystress_plugin.experiment.pretrain.folder import open_run
from dystress_plugin.experiment.pretrain.guard import NanGuard
from dystress_plugin.experiment.pretrain.module import PretrainModule
from dystress_plugin.experiment.pretrain.resolve import build_module, check_batch, resolve, warn_short_schedule
from dystress_plugin.experiment.pretrain.trainer import HOST_NOISE, make_loaders, make_trainer
from dystress_plugin.experiment.settings import PretrainSettings, output_folder
from dystress_plugin.experiment.style import method_color


def pretrain(settings: PretrainSettings) -> dict[str, Any]:
    """Trains, evaluates and writes everything to `settings.out`; returns what `summary.json` holds.

    Raises:
        ValueError: before any training, for settings, devices, data, an output folder or files in it that do not fit,
            or a folder that another process writes to.
        RunStopped: for a disk that is full, an image that can no longer be read, or a loss that is not finite.
        SystemExit: after SIGTERM, with status 143.
    """
    settings = checked(settings)
    for name in settings.protocols:
        protocol(name)
    recipe = recipes.recipe(settings.method)
    out = output_folder(settings)
    with resumable(out) as progress:
        files.check_place(out)
        places.check_apart(out, settings.data)
        trainer = make_trainer(settings, out)
        # The first process holds the folder for all: the others of a training are no strangers to it.
        with lock.alone(out) if trainer.global_rank == 0 else nullcontext():
            summary = _run(settings, recipe, trainer, out, progress)
        if trainer.global_rank == 0:  # a run that had finished may not have been scored by all of them
            score_run(out, settings.protocols, with_map=settings.map)
        return summary


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
    }
    if trainer.global_rank == 0:
        untrained = _untrained(out, module, data, settings, options)
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
    without = scan.left_out if scan is not None else ()
    pool = pool_for(settings, settings.protocols, lambda: data_module.load_for(settings, without=without, whole=True))
    features = features_of(module.backbone, data, device=device, pool=pool, **options)
    trained = score_features(
        features, settings.protocols, knn_k=settings.knn_k, knn_t=settings.knn_t, with_map=settings.map
    )
    files.save(out / "backbone.pt", {k: v.cpu() for k, v in module.backbone.state_dict().items()})
    trained.write(out)
    (out / "figures").mkdir(exist_ok=True)
    figures.curves(out / "metrics.csv", out / "figures" / "curves.png", recipe.title, method_color(recipe.name))
    loaders[0].sampler.set_epoch(settings.epochs - 1)  # type: ignore[attr-defined]  # also where nothing was left to train
    views, _, index = next(iter(loaders[0]))
    figures.profile(module, views, index, settings.epochs - 1, out / "figures" / "temperature.png", recipe.title)
    summary = {
        "method": settings.method,
        "data": settings.data,
        "seed": settings.seed,
        "epochs": settings.epochs,
        **trained.top1,
        **{f"untrained_{name}": value for name, value in untrained.items()},
        "seconds": round(time.monotonic() - started, 1),
    }
    files.write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def scan_images(settings: PretrainSettings, out: Path) -> scan.Scan | None:
    """What `scan.scan_folder` finds in the data of a run; None where it is no folder of images."""
    if not data_module.is_folder(settings.data):
        return None
    return scan.scan_folder(
        settings.data,
        out,
        on_bad_image=settings.on_bad_image,
        num_workers=settings.num_workers,
        progress=settings.progress,
    )


def _untrained(
    out: Path, module: PretrainModule, data: Data, settings: PretrainSettings, options: dict[str, Any]
) -> dict[str, float]:
    """The accuracies before training, which a resumed run has no need to measure again."""
    if (found := read_untrained(out, settings)) is not None:
        return found
    features = features_of(module.backbone, data, device="cpu", **options)
    module.backbone.train()
    measured = score_features(features, knn_k=settings.knn_k, knn_t=settings.knn_t)
    measured.write_untrained(out, settings)
    return measured.top1
