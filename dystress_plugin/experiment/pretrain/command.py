"""`dystress pretrain`: one method on one data set, from nothing to a summary; the same command resumes."""

from __future__ import annotations

import json
import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer

from dystress_plugin import recipes, training
from dystress_plugin.experiment import places
from dystress_plugin.experiment.data import datasets as data_module
from dystress_plugin.experiment.data.datasets import Data
from dystress_plugin.experiment.data.scan import Scan, left_out, scan_images, write_all
from dystress_plugin.experiment.devices import processes
from dystress_plugin.experiment.evaluate.scores import (
    features_of,
    pool_for,
    read_untrained,
    score_features,
    score_run,
    scoring_device,
)
from dystress_plugin.experiment.io import files, lock
from dystress_plugin.experiment.io.interruption import Progress, resumable
from dystress_plugin.experiment.keys import checked
from dystress_plugin.experiment.pretrain import figures, speed
from dystress_plugin.experiment.pretrain.folder import RunFolder
from dystress_plugin.experiment.pretrain.guard import NanGuard
from dystress_plugin.experiment.pretrain.module import PretrainModule
from dystress_plugin.experiment.pretrain.resolve import (
    build_module,
    check_batch,
    check_first,
    check_network,
    resolve,
)
from dystress_plugin.experiment.pretrain.trainer import (
    HOST_NOISE,
    Loader,
    Loaders,
    make_loaders,
    make_trainer,
)
from dystress_plugin.experiment.settings import PretrainSettings, output_folder
from dystress_plugin.experiment.spec import DataSpec, RunSpec, part
from dystress_plugin.experiment.style import method_color


def pretrain(settings: PretrainSettings) -> dict[str, Any]:
    """Trains, evaluates and writes everything to `settings.out`; returns what `summary.json` holds.

        from dystress_plugin.experiment.pretrain.command import pretrain
        from dystress_plugin.experiment.settings import PretrainSettings

        summary = pretrain(PretrainSettings(method="macl", method_kwargs={"tau": 0.2}, data="imgs", epochs=100))

    Args:
        settings: the keys of `dystress pretrain`, which `dystress pretrain --help` lists, with the same defaults.

    Raises:
        ValueError: before any training, for settings, devices, data, an output folder or files in it that do not fit,
            or a folder that another process writes to.
        RunStopped: for a disk that is full, an image that can no longer be read, or a loss that is not finite.
        SystemExit: after SIGTERM, with status 143.
    """
    settings = checked(settings)
    out = output_folder(settings)
    with resumable(out) as progress:
        files.check_place(out)
        places.check_apart(out, data=settings.data, val=settings.val)
        check_first(settings)
        make = partial(make_trainer, settings, out)
        trainer = make() if RunFolder(out).summary.exists() else check_network(settings, make)
        # The first process holds the folder for all: the others of a training are no strangers to it.
        with lock.alone(out) if trainer.global_rank == 0 else nullcontext():
            summary = _run(settings, trainer, progress)
        if trainer.global_rank == 0:  # a run that had finished may not have been scored by all of them
            score_run(out, settings.protocols, with_map=settings.map)
        return summary


def _run(settings: PretrainSettings, trainer: Trainer, progress: Progress) -> dict[str, Any]:
    first = trainer.global_rank == 0
    spec, data, found = prepare(settings, trainer.world_size)
    folder = RunFolder.open(spec)
    if folder.finished is not None:  # by all of them: who went on to train would wait for the first process
        return folder.finished if first else {}
    module = build_module(spec, data)
    training.warn_of_concerns(module.loss.temperature, spec.epochs, warnings.warn)
    if first:
        folder.begin(module)
        write_all(found, folder.path)
    progress.begun = True
    started = time.monotonic()
    untrained = _untrained(folder.path, module, data) if first else {}
    loaders = make_loaders(spec, data, trainer)
    fit(module, loaders, trainer, folder)
    if not first:
        return {}
    return summarise(module, data, loaders[0], folder, untrained, started)


def prepare(settings: PretrainSettings, devices: int) -> tuple[RunSpec, Data, dict[str, Scan]]:
    """The run that settings ask for, its data, and what was found in folders of images."""
    found = scan_images(settings, output_folder(settings))
    data = data_module.load_for(part(DataSpec, settings), settings.seed, without=left_out(found))
    check_batch(settings, data, devices)
    return resolve(settings, data, devices), data, found


def fit(module: PretrainModule, loaders: Loaders, trainer: Trainer, folder: RunFolder) -> None:
    """Trains to the end, from the last checkpoint if there is one."""
    last = folder.last if folder.last.exists() else None
    if last is not None:
        # Lightning does so as well, but after workers have begun to load what the loader would show first.
        done = files.load(last, "a checkpoint", files.NO_CHECKPOINT)["epoch"] + 1
        loaders[0].sampler.set_epoch(done)  # type: ignore[union-attr]
    # Lightning does so after it has loaded a checkpoint, of which float64 would be rounded.
    module = trainer.precision_plugin.convert_module(module)
    with warnings.catch_warnings():
        for message in HOST_NOISE:
            warnings.filterwarnings("ignore", message)
        try:
            with processes(trainer):
                trainer.fit(module, *loaders, ckpt_path=last)
        except ValueError:
            if module.spec.logging.nan_guard:
                NanGuard(folder.path).explain(trainer, module)
            raise


def summarise(
    module: PretrainModule,
    data: Data,
    loader: Loader,
    folder: RunFolder,
    untrained: dict[str, Any],
    started: float,
) -> dict[str, Any]:
    """Scores what was trained, and writes backbone, figures and, last, `summary.json`, whose content it returns."""
    spec, out = module.spec, folder.path
    if spec.logging.wandb != "off":
        import wandb

        wandb.finish()  # or the next run of this process would go on with it

    # Lightning has left it on the CPU.
    device = scoring_device(spec)
    module.float().to(device)
    pool = pool_for(spec, spec.evaluation.protocols, lambda: data_module.load_for_run(out, spec, whole=True).data)
    features = features_of(module.backbone, data, spec=spec, device=device, pool=pool)
    trained = score_features(features, spec.evaluation)
    files.save(out / "backbone.pt", {k: v.cpu() for k, v in module.backbone.state_dict().items()})
    trained.write(out)
    _draw(module, loader, out)
    summary = {
        "method": spec.method,
        "data": spec.data.name,
        "seed": spec.seed,
        "epochs": spec.epochs,
        **_last_epoch(out / "metrics.csv", data),
        **trained.top1,
        **{f"untrained_{name}": value for name, value in untrained.items()},
        "seconds": round(time.monotonic() - started, 1),
        **speed.summary(out),
    }
    files.write_text(folder.summary, json.dumps(summary, indent=2) + "\n")
    return summary


def _last_epoch(metrics: Path, data: Data) -> dict[str, float]:
    """What stands for a run without accuracies, as it was in its last epoch."""
    if data.evaluated.classes:
        return {}
    shown = ("loss", "alignment", "uniformity", "tau_positive_mean", "tau_negative_mean")
    rows = files.read_table(metrics, lambda row: {n: float(row[n]) for n in shown}, files.ROWS_IN_CHECKPOINT)
    return rows[-1]


def _draw(module: PretrainModule, loader: Loader, out: Path) -> None:
    recipe, last = recipes.recipe(module.spec.method), module.spec.epochs - 1
    (out / "figures").mkdir(exist_ok=True)
    figures.curves(out / "metrics.csv", out / "figures" / "curves.png", recipe.title, method_color(recipe.name))
    loader.sampler.set_epoch(last)  # type: ignore[union-attr]  # also where nothing was left to train
    images, _, index = next(iter(loader))
    views = module.views(images, last, 0)
    figures.profile(module, views, index.to(module.device), last, out / "figures" / "temperature.png", recipe.title)


def _untrained(out: Path, module: PretrainModule, data: Data) -> dict[str, float]:
    """The accuracies before training, which a resumed run has no need to measure again."""
    spec = module.spec
    if (found := read_untrained(out, spec)) is not None:
        return found
    features = features_of(module.backbone, data, spec=spec, device="cpu")
    module.backbone.train()
    measured = score_features(features, replace(spec.evaluation, protocols=[], map=False))
    measured.write_untrained(out, spec)
    return measured.top1
