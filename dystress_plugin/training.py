"""What every LightningModule of ours does alike, whichever Lightning and host it trains in. It imports neither."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dystress_plugin.arguments import Index
from dystress_plugin.contrastive import ContrastiveLoss
from dystress_plugin.metrics import temperature_summary
from dystress_plugin.recipes import Recipe, class_name, follow
from dystress_plugin.temperature import Temperature

# The step


def clock(module: Any, temperature: Temperature, batch_idx: int) -> float:
    """The epoch that a module's loss is given for a batch."""
    return temperature.clock(module.current_epoch, batch_idx, int(module.trainer.num_training_batches))


def is_logging_step(module: Any) -> bool:
    """Whether Lightning, which counts steps from one, writes in this step what is logged."""
    every = module.trainer.log_every_n_steps
    return bool(every) and (module.global_step + 1) % every == 0


def contrast(
    module: Any,
    loss: ContrastiveLoss,
    views: Sequence[Tensor],
    batch_idx: int,
    *,
    index: Tensor | None,
    epoch: float,
    on_epoch: bool = False,
) -> Tensor:
    """The loss of a batch; in logging steps a module also logs what the temperature does to it.

    That is `dystress_plugin.metrics.temperature_summary` of this rank's first images.

    Args:
        module: the LightningModule in its training step.
        loss: the loss.
        views: what it compares.
        batch_idx: number of the batch within the epoch.
        index: (batch,) sample numbers.
        epoch: see `clock`.
        on_epoch: log the mean over the epoch and all ranks, of minima the minimum and of maxima the maximum; else the
            step's own values, which need no communication.
    """
    # An epoch may be over before a logging step has come, and is written nevertheless.
    due = is_logging_step(module) or (on_epoch and batch_idx == 0)
    # Before the loss, which takes the batch's own keys into a queue of negatives.
    if due and len(views[0]) > 1:
        summary = temperature_summary(loss, *views, index=index, epoch=epoch)
        how: dict[str, Any] = {"on_step": not on_epoch, "on_epoch": on_epoch, "sync_dist": on_epoch}
        for name, number in summary.items():
            reduction = name.rsplit("_", 1)[-1]
            reduction = reduction if reduction in ("min", "max") else "mean"
            shown = name == "tau_positive_mean"
            module.log(name, number, prog_bar=shown, reduce_fx=reduction, batch_size=len(views[0]), **how)
    # An epoch's last batch may be of one image. Where its first is, all of them are, and the loss says so.
    value: Tensor = (
        loss_or_zero(loss, *views, index=index, epoch=epoch) if batch_idx else loss(*views, index=index, epoch=epoch)
    )
    return value


def loss_or_zero(
    loss: ContrastiveLoss,
    *views: Tensor,
    index: Index | None = None,
    epoch: float | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """The loss of a batch; 0, with gradients of 0, for one image without negatives, as others' losses have it."""
    if loss.lacks_negatives(*views):
        return loss.zero(*views)
    value: Tensor = loss(*views, index=index, epoch=epoch, labels=labels)
    return value


def check_has_steps(trainer: Any, batch_size: str) -> None:
    """An error where no batch of the training data is full: Lightning would end without a step or a word.

    Args:
        trainer: in a module's setup for "fit"; its data are loaded, as they would be soon after.
        batch_size: what the host calls the size of a batch.

    Raises:
        ValueError: if the batch is larger than a rank's share of the data.
    """
    trainer.fit_loop.setup_data()
    if trainer.num_training_batches or not trainer.limit_train_batches:
        return
    loader = trainer.train_dataloader
    size, images = getattr(loader, "batch_size", None), len(getattr(loader, "dataset", ()))
    most, processes = images // trainer.world_size, trainer.world_size
    raise ValueError(
        f"{batch_size}={size} makes no full batch of {images} training images"
        + (f" in {processes} processes" if processes > 1 else "")
        + ", and the rest of an epoch is left out: training would have no step. "
        + (f"Set it to at most {most}." if most else "It needs more images, or fewer processes.")
    )


def warn_of_concerns(temperature: Temperature, epochs: float | None, warn: Callable[[str], Any]) -> None:
    """Warns of what the temperature says to a training of so many epochs.

    Args:
        temperature: the temperature.
        epochs: what the Trainer is told; None and -1 are its words for no limit.
        warn: the host's function that warns once for all ranks.
    """
    for concern in temperature.concerns(epochs) if epochs is not None and epochs >= 0 else []:
        warn(concern)


def own_group(loss: ContrastiveLoss, lr: float, temperature_lr: float | None) -> list[dict[str, Any]]:
    """The optimizer's group of what temperatures train, undecayed, at a rate of its own; none without parameters.

    Args:
        loss: the loss.
        lr: learning rate of the network, at which a single number overshoots.
        temperature_lr: that of the group; None is a tenth of the network's.
    """
    trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    rate = lr / 10 if temperature_lr is None else temperature_lr
    return [{"name": "temperature", "params": trained, "lr": rate, "weight_decay": 0.0}] if trained else []


# A table of samples


def size_table(temperature: Temperature, num_samples: int) -> None:
    """Gives a table of samples, where there is one, the length of the training data.

    Raises:
        ValueError: if it has learned from data of another length.
    """
    if temperature.num_samples in (None, num_samples):
        return
    if temperature.has_learned:
        raise ValueError(_other_data(temperature.num_samples, num_samples))
    temperature.resize(num_samples)


def make_room(temperature: Temperature, state: Mapping[str, Any], prefix: str, known: int | None) -> None:
    """Gives a table of samples the length that it has in a checkpoint, as long as the training data is unknown.

    Args:
        temperature: the temperature; nothing happens to one without a table.
        state: the state dict that is about to be loaded.
        prefix: what the temperature's entries begin with there, such as "criterion.temperature.".
        known: the number of training images, or None.

    Raises:
        ValueError: if that is known to be another one.
    """
    saved = _saved_length(temperature, state, prefix)
    if saved in (None, temperature.num_samples):
        return
    if known is not None:
        raise ValueError(_other_data(saved, known))
    temperature.resize(saved)  # type: ignore[arg-type]  # no longer None


def _saved_length(temperature: Temperature, state: Mapping[str, Any], prefix: str) -> int | None:
    """What is as long as the table here, and has another length there, is a part of it."""
    own = temperature.num_samples
    buffers = dict(temperature.named_buffers())
    tables = [state.get(prefix + name) for name, x in buffers.items() if x.dim() and len(x) == own]
    lengths = [len(table) for table in tables if table is not None]
    return next((length for length in lengths if length != own), own)


def _other_data(saved: int | None, present: int) -> str:
    return (
        f"The checkpoint keeps temperatures of {saved} images, but this run trains on {present}: resume with the data, "
        "and the part of it, that it was trained on."
    )


# A momentum encoder


def momentum_copies(*parts: nn.Module) -> list[nn.Module]:
    """Copies that begin the same and take no gradient, so that DistributedDataParallel finds nothing unused."""
    return [copy.deepcopy(part).requires_grad_(False) for part in parts]


def update_momentum(pairs: Sequence[tuple[nn.Module, nn.Module]], momentum: float) -> None:
    """copy <- momentum * copy + (1 - momentum) * part, for pairs of (part, copy)."""
    from lightly.models.utils import update_momentum

    for part, average in pairs:
        update_momentum(part, average, momentum)


@torch.no_grad()
def shuffled_keys(encode: Callable[[Tensor], Tensor], images: Tensor, *, distributed: bool) -> Tensor:
    """Keys of images that are encoded in another order, over all devices, as in MoCo.

    Keys whose batch norm saw the same images as their queries' would be told by it from those in the queue.
    """
    from lightly.models.utils import batch_shuffle, batch_unshuffle

    shuffled, order = batch_shuffle(images, distributed=distributed)
    keys: Tensor = batch_unshuffle(encode(shuffled), order, distributed=distributed)
    return keys


# Classes made from the table


def method_classes(bases: Mapping[bool, type], module: str, body: Callable[[Recipe], dict[str, Any]]) -> dict[str, Any]:
    """A class for every method by name, and from then on for each that is registered; see `method_class`.

    Args:
        bases: what they are derived from, by whether a method has a queue.
        module: name of the module that makes them.
        body: from a method to the attributes of its class.
    """
    classes: dict[str, Any] = {}

    def add(recipe: Recipe) -> None:
        classes[recipe.name] = method_class(recipe, bases[recipe.queue], module, body(recipe))

    follow(add)
    return classes


def method_class(recipe: Recipe, base: type, module: str, body: Mapping[str, Any]) -> Any:
    """A subclass for a method, in the module of that name, where pickle and load_from_checkpoint look for it.

    Args:
        recipe: the method, whose title it bears.
        base: what it is derived from.
        module: name of the module that makes it.
        body: its attributes.
    """
    doc = f"{recipe.title} ({recipe.paper}, {recipe.url}); method={recipe.name}. See `{base.__name__}`."
    name = class_name(recipe)
    cls = type(name, (base,), {"__doc__": doc, "__module__": module, "__qualname__": name, **body})
    setattr(sys.modules[module], name, cls)
    return cls
