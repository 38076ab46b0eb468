"""From settings as typed to settings as run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytorch_lightning import Trainer, seed_everything
from torch import nn

from dystress_plugin import recipes
from dystress_plugin.chunks import check_chunks
from dystress_plugin.contrastive import ContrastiveLoss
from dystress_plugin.experiment.backbone import backbone_name, build_backbone
from dystress_plugin.experiment.data.datasets import Data, image_size_of
from dystress_plugin.experiment.data.selection import read_numbers
from dystress_plugin.experiment.data.transforms import augmentation
from dystress_plugin.experiment.devices import check_step
from dystress_plugin.experiment.pretrain.module import MOMENTUM, OPTIMIZERS, PretrainModule, QueueModule, ViewsModule
from dystress_plugin.experiment.settings import PretrainSettings
from dystress_plugin.experiment.spec import RunSpec

if TYPE_CHECKING:
    from dystress_plugin.experiment.data.views import BatchViews

QUEUE_SIZE = 4096

SAMPLES = 40  # of the diagnostics in a run


def check_first(settings: PretrainSettings) -> None:
    """A ValueError for what is wrong whatever the data and the devices are, but for `check_network`."""
    recipe = recipes.recipe(settings.method)
    _queue(settings, recipe)
    _check_dim(settings)
    if settings.indices is not None:
        read_numbers(settings.indices)
    if settings.augment == "batch":
        _batch_views()  # which would be missed when the data had been read


def new_backbone(settings: PretrainSettings) -> nn.Module:
    """The backbone of a run that settings ask for, with random weights: what is trained is `build_module`'s.

    Raises:
        ValueError: for one that cannot train on images of this size, or in such chunks.
    """
    backbone, _ = build_backbone(backbone_name(settings.backbone, settings.data), image_size(settings))
    check_chunks(settings.chunk_size, backbone)
    return backbone


def check_network(settings: PretrainSettings, make: Callable[[], Trainer]) -> Trainer:
    """The trainer that is made between the errors of `new_backbone` and those of `check_step`; no network stays."""
    backbone = new_backbone(settings)
    trainer = make()
    check_step(backbone, trainer, image_size(settings))
    return trainer


def image_size(settings: PretrainSettings) -> int:
    """As set, or that of the data."""
    return settings.image_size or image_size_of(settings.data)


def check_batch(settings: PretrainSettings, data: Data, devices: int) -> None:
    """A ValueError for batches that the data cannot fill."""
    images = len(data.train.labels)
    if images < 2:
        raise ValueError(f"data={settings.data} has {images} image to train on: two or more can be told apart.")
    share = images // devices
    if settings.batch_size > share:
        each = f", {share} for each of {devices} devices" if devices > 1 else ""
        raise ValueError(f"batch_size={settings.batch_size} must lie between 2 and the {images} training images{each}.")


def resolve(settings: PretrainSettings, data: Data, devices: int) -> RunSpec:
    """The run that settings ask for: with a value for every key that they leave open.

    Raises:
        ValueError: for a parameter that the method does not have, a table that is not of the data's size, or a queue
            for a method without one.
    """
    recipe = recipes.recipe(settings.method)
    lr, weight_decay = OPTIMIZERS[settings.optimizer]
    size = image_size(settings)
    steps = settings.epochs * (len(data.train.labels) // devices // settings.batch_size)
    defaults = {
        "image_size": size,
        "backbone": backbone_name(None, settings.data),
        "lr": lr(settings.batch_size * devices),
        "weight_decay": weight_decay,
        "warmup_epochs": min(10.0, settings.epochs / 10),
        "diagnostics_every_n_steps": max(1, steps // SAMPLES),
    }
    # At the network's own rate, which is LARS's, a single number overshoots by far.
    defaults["temperature_lr"] = (defaults["lr"] if settings.lr is None else settings.lr) / 10
    defaults |= _queue(settings, recipe)
    chosen = {name: value for name, value in defaults.items() if getattr(settings, name) is None}
    chosen |= augmentation(settings, data, size)
    parameters = _parameters(settings, recipe, len(data.train.labels))
    return RunSpec.of(replace(settings, **chosen, method_kwargs=parameters))


def _queue(settings: PretrainSettings, recipe: recipes.Recipe) -> dict[str, Any]:
    """The defaults of a queue where the method has one; else a ValueError for the settings of one."""
    if recipe.queue:
        return {"queue_size": QUEUE_SIZE, "momentum_encoder": MOMENTUM}
    for key in ("queue_size", "momentum_encoder"):
        if (value := getattr(settings, key)) is not None:
            raise ValueError(f"{key}={value} is for methods with a queue, such as 'simclr_moco', not '{recipe.name}'.")
    return {}


def _parameters(settings: PretrainSettings, recipe: recipes.Recipe, images: int) -> dict[str, Any]:
    """Every parameter of the method, the size of a table among them."""
    recipe.check_names(settings.method_kwargs)
    own = {n: None if default is inspect.Parameter.empty else default for n, default in recipe.parameters.items()}
    own = recipe.sized(own | settings.method_kwargs, images, settings.projection_dim)
    if (given := recipe.table_length(own)) not in (None, images):
        raise ValueError(f"num_samples={given} must be that of the training images, {images}; leave it out.")
    return own


def _check_dim(settings: PretrainSettings) -> None:
    if (dim := settings.method_kwargs.get(recipes.DIM)) not in (None, settings.projection_dim):
        wanted = f"projection_dim={settings.projection_dim}"
        raise ValueError(f"dim={dim} must be that of the embeddings, {wanted}; leave it out.")


def build_module(spec: RunSpec, data: Data) -> PretrainModule:
    """The module of a run as it starts; seeds everything."""
    seed_everything(spec.seed, workers=True, verbose=False)
    # First of all that is drawn, so that it starts the same with every method.
    backbone, features = build_backbone(spec.model.backbone, spec.model.image_size)
    check_chunks(spec.model.chunk_size, backbone)
    loss = ContrastiveLoss(
        spec.method,
        queue_size=None if spec.queue is None else (spec.queue.size, spec.model.projection_dim),
        gather_distributed=spec.hardware.gather_distributed,
        **spec.method_kwargs,
    )
    module = ViewsModule if spec.queue is None else QueueModule
    views = None
    if spec.augmentation.augment == "batch":
        views = _batch_views()(spec.augmentation, spec.model.image_size, data.normalize)
    return module(backbone, features, loss, spec, data.evaluated.num_classes, views)


def _batch_views() -> type[BatchViews]:
    from dystress_plugin.experiment.data.views import BatchViews  # kornia with it, which takes its time

    return BatchViews
