"""From settings as typed to settings as run."""

from __future__ import annotations

import inspect
from dataclasses import replace

from pytorch_lightning import seed_everything

from dystress_plugin import recipes
from dystress_plugin.contrastive import ContrastiveLoss
from dystress_plugin.experiment.backbone import backbone_name, build_backbone
from dystress_plugin.experiment.data.datasets import Data
from dystress_plugin.experiment.data.transforms import augmentation
from dystress_plugin.experiment.pretrain.module import MODULES, MOMENTUM, OPTIMIZERS, PretrainModule
from dystress_plugin.experiment.settings import PretrainSettings

QUEUE_SIZE = 4096


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
    recipe.check_names(settings.method_kwargs)
    size = len(data.train.labels)
    own = {n: None if default is inspect.Parameter.empty else default for n, default in recipe.parameters.items()}
    own = recipe.sized(own | settings.method_kwargs, size)
    if (given := recipe.table_length(own)) not in (None, size):
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
    if recipe.queue:
        defaults |= {"queue_size": QUEUE_SIZE, "momentum_encoder": MOMENTUM}
    chosen = {name: value for name, value in defaults.items() if getattr(settings, name) is None}
    chosen |= augmentation(settings, data, image_size)
    return replace(settings, **chosen, method_kwargs=own)


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
    return MODULES[recipe.queue](backbone, features, loss, settings, data.num_classes)


def _queue_size(settings: PretrainSettings, recipe: recipes.Recipe) -> tuple[int, int] | None:
    if recipe.queue:
        assert settings.queue_size is not None  # as resolved; narrows the type
        return settings.queue_size, settings.projection_dim
    for key in ("queue_size", "momentum_encoder"):
        if (value := getattr(settings, key)) is not None:
            raise ValueError(f"{key}={value} is for methods with a queue, such as 'simclr_moco', not '{recipe.name}'.")
    return None
