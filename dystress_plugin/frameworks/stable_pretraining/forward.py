"""A forward function for `stable_pretraining.Module`, and what a temperature needs beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dystress_plugin import training
from dystress_plugin.chunks import embed_in_chunks

NUMBER = "sample_idx"  # stable-pretraining's data sets put it into every sample


def contrastive(self: Any, batch: dict[str, Any], stage: str) -> dict[str, Any]:
    """stable-pretraining's `forward.simclr` with any method: `Module(forward=contrastive, contrastive_loss=...)`.

    In training all views are compared; a loss with a queue compares the first with the keys that the second's teacher
    gives, so backbone and projector are `stable_pretraining.backbone.TeacherStudentWrapper`s there. Beside the loss it
    logs, in the steps that the Trainer logs, what the temperature does (`dystress_plugin.metrics.temperature_summary`).

    Args:
        self: the Module, with the attributes `backbone`, `projector`, `contrastive_loss` (a
            `dystress_plugin.ContrastiveLoss`) and, if wanted, `chunk_size`, see `dystress_plugin.embed_in_chunks`.
        batch: {"views": [view, ...]} or named views, as MultiViewTransform makes them; or a single one. Each view has
            an "image", and "sample_idx" where the temperature keeps a table.
        stage: of the training.

    Returns:
        "embedding" and, where there are labels, "label", for OnlineProbe and OnlineKNN; "loss" in training.

    Raises:
        ValueError: for a module without a loss, a table without sample numbers, or a queue without a teacher.

    Examples:
        >>> loss = dystress_plugin.ContrastiveLoss("dystress", gather_distributed=True)
        >>> module = spt.Module(forward=contrastive, backbone=b, projector=p, contrastive_loss=loss, optim=optim)
    """
    views = _views(batch)
    loss = getattr(self, "contrastive_loss", None)
    if loss is None:
        raise ValueError("contrastive needs Module(contrastive_loss=dystress_plugin.ContrastiveLoss(...)).")
    chunk_size = getattr(self, "chunk_size", None)
    teaches = loss.queue is not None
    backbone = _part(self.backbone, "student", teaches)
    # Of a queue's views the second is the teacher's alone.
    own = views[:1] if teaches else views
    features = [embed_in_chunks(backbone, view["image"], chunk_size).flatten(1) for view in own]
    out = {"embedding": torch.cat(features)}
    if "label" in own[0]:
        out["label"] = torch.cat([view["label"] for view in own])
    if not self.training or len(views) < 2:
        return out

    z = [_part(self.projector, "student", teaches)(part) for part in features]
    if teaches:
        with torch.no_grad():
            keys = embed_in_chunks(_part(self.backbone, "teacher", True), views[1]["image"], chunk_size).flatten(1)
            z.append(_part(self.projector, "teacher", True)(keys))
    index = _numbers(views[0]) if loss.temperature.needs_index else None
    step = batch["batch_idx"]
    epoch = training.clock(self, loss.temperature, step)
    out["loss"] = training.contrast(self, loss, z, step, index=index, epoch=epoch)
    self.log(f"{stage}/loss", out["loss"], on_step=True, on_epoch=True, sync_dist=True, batch_size=len(z[0]))
    return out


class TemperatureCallback(Callback):
    """Warns of a training that is too short for its temperature, and gives a table of samples the data's length.

    The loss may be made with `num_samples=1` then; it is resized before training.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        temperature = pl_module.contrastive_loss.temperature
        training.warn_of_concerns(temperature, trainer.max_epochs, rank_zero_warn)
        if temperature.needs_index:
            trainer.fit_loop.setup_data()
            training.size_table(temperature, len(trainer.train_dataloader.dataset))


def _views(batch: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    if "views" in batch:
        views: Sequence[Mapping[str, Any]] = batch["views"]
        return views
    if "image" in batch:
        return [batch]
    return [view for view in batch.values() if isinstance(view, Mapping)]  # beside them is the number of the batch


def _part(network: Any, side: str, teaches: bool) -> Any:
    """The student or teacher of a wrapper; without a queue the network itself."""
    if not teaches:
        return network
    if not hasattr(network, side):
        raise ValueError(
            f"A loss with a queue takes its keys from a teacher, which {type(network).__name__} does not have: wrap "
            "backbone and projector in stable_pretraining.backbone.TeacherStudentWrapper."
        )
    return getattr(network, side)


def _numbers(view: Mapping[str, Any]) -> Tensor:
    if NUMBER not in view:
        raise ValueError(
            f"This temperature keeps a value for every sample, and the batch has no '{NUMBER}': use a data set of "
            "stable_pretraining.data, which adds it."
        )
    numbers: Tensor = view[NUMBER]
    return numbers
