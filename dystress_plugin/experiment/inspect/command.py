"""`dystress inspect`: the similarities of a network's embeddings, and what each temperature would do to them."""

from __future__ import annotations

import itertools
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_lightning import seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from dystress_plugin import metrics, recipes
from dystress_plugin.contrastive import ContrastiveLoss
from dystress_plugin.experiment import places
from dystress_plugin.experiment.arms import loss_in_batch, method_of
from dystress_plugin.experiment.backbone import build_backbone
from dystress_plugin.experiment.data.datasets import Data, EpochOrder, Shown, Views, load_for, load_for_run
from dystress_plugin.experiment.data.transforms import view_transform
from dystress_plugin.experiment.devices import torch_device
from dystress_plugin.experiment.inspect import effects, figures
from dystress_plugin.experiment.io import files, lock
from dystress_plugin.experiment.io.config import read_config
from dystress_plugin.experiment.keys import checked
from dystress_plugin.experiment.pretrain.module import ViewsModule
from dystress_plugin.experiment.pretrain.resolve import new_backbone, resolve
from dystress_plugin.experiment.settings import NOTHING_TO_INSPECT, InspectSettings, PretrainSettings
from dystress_plugin.experiment.spec import DataSpec, RunSpec, part
from dystress_plugin.experiment.style import styles
from dystress_plugin.temperature import Constant

MAX_IMAGES = 512  # a million negative pairs

FIXED = "simclr"  # the method of a constant

REFERENCE = "constant 0.1"  # its default

LAST = "checkpoints/last.ckpt"  # in a run's folder

WITHOUT = "untrained=true does without."


class Sample(NamedTuple):
    """A network and the embeddings of one batch.

    Attributes:
        name: of network and data, for figures.
        z: two views, (images, dim) each.
        numbers: (images,) int64, of the images among the training images.
        samples: how many training images there are.
        spec: of the run, or of the one that would start from the network.
        run: method and loss of the run that the network is from; None where it is from no run, or shows other data.
        epoch: 0 first.
    """

    name: str
    z: Sequence[Tensor]
    numbers: Tensor
    samples: int
    spec: RunSpec
    run: tuple[str, ContrastiveLoss] | None
    epoch: float


def inspect_temperatures(settings: InspectSettings) -> dict[str, Any]:
    """Writes figures and `inspect.json` to `out`; returns what the latter holds.

    Raises:
        ValueError: for a checkpoint, data, methods or an output folder that do not fit.
    """
    settings = checked(settings)
    out = _new_folder(settings)
    settings = replace(settings, out=str(out))
    with lock.alone(out):
        return _inspect(settings, out)


def _inspect(settings: InspectSettings, out: Path) -> dict[str, Any]:
    if _holds_files(out):
        raise ValueError(f"out={out} is not empty. Choose another out.")
    seen = _sample(settings, out)
    losses = _losses(settings, seen)
    pairs = effects.similarities(*seen.z, index=seen.numbers, epoch=seen.epoch)
    found = {name: effects.effect(loss, pairs) for name, (_, loss) in losses.items()}
    reference = next((name for name, its in losses.items() if its is seen.run), REFERENCE)
    against = (found.get(reference) or effects.effect(ContrastiveLoss(Constant(0.1)), pairs)).measures
    negatives = pairs.negative.shape[1]
    trained = seen.run[1] if seen.run and not settings.untrained else None
    starting = [name for name, (_, loss) in losses.items() if loss is not trained and _learns(loss)]
    report = {
        "settings": asdict(settings),
        "network": seen.name,
        "images": pairs.images,
        "negatives_per_anchor": negatives,
        "epoch": seen.epoch,
        "similarities": effects.describe(*seen.z),
        "alignment": float(metrics.alignment(*seen.z)),
        "uniformity": float(metrics.uniformity(torch.cat(list(seen.z)))),
        "reference": reference,
        "temperatures": {
            name: its.measures | {"advice": effects.advice(name, its.measures, against, reference, negatives)}
            for name, its in found.items()
        },
    }
    methods = {name: method for name, (method, _) in losses.items() if method != FIXED and name != reference}
    final = {name: found[name].measures for name in methods if name not in starting}
    first = effects.first_to_try(final, against, reference, negatives)
    report["try_first"] = f"{first.sentence}{_caveat(starting)}"
    if first.name is not None:
        report["command"] = _comparison([methods[first.name], *([seen.run[0]] if seen.run else [])], seen.spec)
    style = styles({name: method for name, (method, _) in losses.items()}, {name: name for name in losses})
    figures.draw(found, style, pairs, out, f"{seen.name}, {pairs.images} images in two views")
    (out / "inspect.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _learns(loss: ContrastiveLoss) -> bool:
    """Whether training moves the temperature, by samples or as a whole."""
    return any(True for _ in loss.parameters()) or any(its.num_samples for its in loss.temperatures)


def _caveat(starting: Sequence[str]) -> str:
    if not starting:
        return ""
    return f" Shown as they start, before they have learned anything, and so no candidates: {', '.join(starting)}."


def _comparison(methods: Sequence[str], spec: RunSpec) -> str:
    """What to type to train these methods as the network that was inspected is trained."""
    values = spec.flat()
    shared = [f"{key}={values[key]}" for key in ("data", "epochs", "batch_size", "backbone", "image_size")]
    return shlex.join(["dystress", "compare", f"methods=[{','.join(dict.fromkeys(methods))}]", *shared])


def _new_folder(settings: InspectSettings) -> Path:
    """Where the results go: as asked, else the first place of its kind that holds none."""
    if settings.out is not None:
        return Path(settings.out)
    start = f"{settings.checkpoint}/inspect" if settings.checkpoint else None
    start = start or f"runs/inspect-{places.name_of(settings.data or 'digits')}"
    names = (f"{start}-{number}" if number > 1 else start for number in itertools.count(1))
    return next(folder for folder in map(Path, names) if not _holds_files(folder))


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(path.name != lock.NAME for path in folder.iterdir())


def table(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The measures as rows of text, the first with the headings."""
    heading = ("temperature", "tau of negatives", "effective", "hardest 1 %", "hardest 10 %", "inverted")
    return [
        heading,
        *(
            (
                name,
                f"{found['tau_negative_min']:.3g} to {found['tau_negative_max']:.3g}",
                f"{found['effective_negatives']:.0f} of {report['negatives_per_anchor']}",
                *(f"{found[key]:.1f} %" for key in effects.HARDEST),
                f"{found['inverted_percent']:.2g} %",
            )
            for name, found in report["temperatures"].items()
        ),
    ]


def _sample(settings: InspectSettings, out: Path) -> Sample:
    device = torch_device(settings.accelerator)
    run = Path(settings.checkpoint) if settings.checkpoint else None
    spec, data, own = _shown(settings, run, out)
    module = _network(spec, data)
    fresh = run is None or settings.untrained
    if run and not fresh:
        _load(module, run)
    pictures, index = _pictures(settings, spec, data)
    with torch.no_grad():  # in train mode, as the loss sees the embeddings
        embedded = module.train().to(device).embed([view.to(device) for view in pictures])
    z = [each.cpu() for each in embedded]
    module.cpu()
    title = "untrained" if fresh else f"{recipes.recipe(spec.method).title}, trained for {spec.epochs} epochs:"
    return Sample(
        # A folder's name need not be UTF-8, which is all that figures take.
        name=f"{title} {spec.model.backbone} on {os.fsencode(spec.data.name).decode(errors='backslashreplace')}",
        z=z,
        numbers=index,
        samples=len(data.train.labels),
        spec=spec,
        run=(spec.method, module.loss) if run and own else None,
        epoch=settings.epoch if settings.epoch is not None else float(0 if fresh else spec.epochs - 1),
    )


def _shown(settings: InspectSettings, run: Path | None, out: Path) -> Shown:
    if run is None:
        asked = _untrained_settings(settings)
        places.check_apart(out, data=asked.data)
        new_backbone(asked)
        data = load_for(part(DataSpec, asked), asked.seed)
        return Shown(resolve(asked, data, 1), data, own=False)
    if not settings.untrained and not (last := run / LAST).exists():
        raise ValueError(f"checkpoint={run} has no trained network: {last} is missing. {WITHOUT}")
    trained = read_config(run / "config.yaml")
    places.check_apart(out, data=settings.data or trained.data.name)
    given = {key: getattr(settings, key) for key in ("data", "labels", "data_root", "download")}
    return load_for_run(run, trained, **given)


def _untrained_settings(settings: InspectSettings) -> PretrainSettings:
    shared = ("data", "labels", "data_root", "download", "seed", "backbone", "image_size")
    given = {key: value for key in shared if (value := getattr(settings, key)) is not None}
    return PretrainSettings(method=FIXED, **given)


def _network(spec: RunSpec, data: Data) -> ViewsModule:
    """As this run starts; of a method with a queue the network that is trained."""
    seed_everything(spec.seed, workers=True, verbose=False)
    backbone, features = build_backbone(spec.model.backbone, spec.model.image_size)
    loss = loss_in_batch(spec.method, spec.method_kwargs)
    return ViewsModule(backbone, features, loss, spec, data.num_classes)


def _load(module: ViewsModule, run: Path) -> None:
    path = run / LAST
    state = files.load(path, "a checkpoint", WITHOUT).get("state_dict", {})
    wanted = ("backbone.", "projection_head.", "loss.temperature.")
    state = {name: value for name, value in state.items() if name.startswith(wanted)}
    files.check_state(module, state, path, WITHOUT)
    module.load_state_dict(state)


def _pictures(settings: InspectSettings, spec: RunSpec, data: Data) -> tuple[list[Tensor], Tensor]:
    number = min(settings.images or min(spec.data.batch_size, MAX_IMAGES), len(data.train.labels))
    if number < 2:
        raise ValueError(f"images={number} must be at least 2: one image has no negatives.")
    transform = view_transform(spec.augmentation, spec.model.image_size, data.normalize)
    views = Views(data.train, transform, settings.seed)
    order = EpochOrder(views, 1, 0, shuffle=True, seed=settings.seed)
    loader = DataLoader(views, number, sampler=order, num_workers=settings.num_workers)
    pictures, _, index = next(iter(loader))
    return pictures, index


def _losses(settings: InspectSettings, seen: Sample) -> dict[str, tuple[str, ContrastiveLoss]]:
    """By the name to show, each with its method."""
    losses = {f"constant {tau:g}": (FIXED, ContrastiveLoss(Constant(tau))) for tau in settings.constants}
    if seen.run is not None:
        losses[f"{recipes.recipe(seen.run[0]).title}, this run's"] = seen.run
    for name in settings.methods:
        own = settings.method_kwargs.get(name, {})
        if seen.run is not None and name == seen.run[0] and not own:
            continue
        recipe, word = recipes.recipe(method_of(name)), name.partition("-")[2]
        title = f"{recipe.title} ({word})" if word else recipe.title
        losses[title] = recipe.name, loss_in_batch(recipe.name, own, seen.samples, seen.z[0].shape[1])
    if not losses:
        raise ValueError(NOTHING_TO_INSPECT)
    return losses
