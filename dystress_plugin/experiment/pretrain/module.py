"""The training step of every method, as LightningModules: one for each layout of the table."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
from lightly.models.modules import SimCLRProjectionHead
from lightly.models.utils import get_weight_decay_parameters
from lightly.utils.lars import LARS
from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from dystress_plugin import diagnostics, training
from dystress_plugin.chunks import embed_in_chunks
from dystress_plugin.contrastive import ContrastiveLoss
from dystress_plugin.experiment.evaluate.protocols import knn_classes
from dystress_plugin.experiment.io.config import recorded
from dystress_plugin.experiment.spec import RunSpec
from dystress_plugin.metrics import effective_rank

if TYPE_CHECKING:
    from dystress_plugin.experiment.data.views import BatchViews

MOMENTUM = 0.99  # of the key encoder

# Defaults that the settings leave open: learning rate for a batch over all devices, weight decay.
OPTIMIZERS = {
    "lars": (lambda batch: 0.075 * math.sqrt(batch), 1e-6),
    "sgd": (lambda batch: 0.06 * batch / 256, 5e-4),
}


class Step(NamedTuple):
    """What the latest training step compared, without its graph.

    Attributes:
        z: (batch, projection_dim) for each view.
        images: (batch,) their numbers.
        epoch: the temperature's clock.
        loss: 0-dim; None if there is none, since computing it failed.
    """

    z: tuple[Tensor, ...]
    images: Tensor
    epoch: float
    loss: Tensor | None = None


class PretrainModule(LightningModule, ABC):
    """Backbone, projection head and loss; a weighted kNN or, without labels, the effective rank after every epoch.

    Both are of features in the precision of the training.

    Subclasses are final and say how the views of a batch become what the loss compares.

    Args:
        backbone: maps images to (batch, features).
        features: width of the backbone's output.
        loss: what to minimise.
        spec: the run, which the checkpoint and the loggers record.
        num_classes: number of classes, for the kNN; 0 without labels.
        batch_views: makes views of a batch of whole images; None where the loader has made them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        features: int,
        loss: ContrastiveLoss,
        spec: RunSpec,
        num_classes: int,
        batch_views: BatchViews | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection_head = SimCLRProjectionHead(features, spec.model.hidden_dim, spec.model.projection_dim)
        self.loss = loss
        self.spec = spec
        self.num_classes = num_classes
        self.batch_views = batch_views
        self.last_step: Step | None = None
        self._features: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._labels: tuple[list[Tensor], list[Tensor]] = ([], [])

    @abstractmethod
    def embed(self, views: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the loss compares, (batch, projection_dim) each."""

    def project(self, backbone: nn.Module, head: nn.Module, images: Tensor) -> Tensor:
        """(batch, projection_dim); the head, of which little is held, sees the batch as a whole."""
        z: Tensor = head(embed_in_chunks(backbone, images, self.spec.model.chunk_size).flatten(1))
        return z

    def on_train_start(self) -> None:
        # Of a run that goes on to more epochs the checkpoint has the length that it had.
        self.lr_schedulers().max_epochs = int(self.trainer.estimated_stepping_batches)  # type: ignore[union-attr]

    def on_fit_start(self) -> None:
        # Here and not where loggers are made: before all is resolved, and maybe in another process.
        for logger in self.trainer.loggers:
            logger.log_hyperparams(recorded(self.spec))

    def views(self, images: list[Tensor] | Tensor, epoch: int, batch_idx: int) -> list[Tensor]:
        """The views of a batch as the loader gives it: two or more of them already, or whole images."""
        if isinstance(images, list):
            return images
        assert self.batch_views is not None  # narrows the type
        made = self.batch_views(images, self.spec.seed, epoch, batch_idx, self.global_rank)
        return [view.to(next(self.backbone.parameters()).dtype) for view in made]

    def training_step(self, batch: tuple[list[Tensor] | Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, _, index = batch
        z = self.embed(self.views(images, self.current_epoch, batch_idx))
        epoch = training.clock(self, self.loss.temperature, batch_idx)
        self.last_step = Step(tuple(view.detach() for view in z), index, epoch)
        loss = training.contrast(self, self.loss, z, batch_idx, index=index, epoch=epoch, on_epoch=True)
        self.last_step = self.last_step._replace(loss=loss.detach())
        self.log("loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=len(index))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        images, labels, _ = batch
        features = embed_in_chunks(self.backbone, images, self.spec.model.chunk_size)
        self._features[dataloader_idx].append(features.flatten(1).float())
        self._labels[dataloader_idx].append(labels)

    def on_validation_epoch_end(self) -> None:
        memory, queries = (torch.cat(part) if part else torch.empty(0) for part in self._features)
        memory_labels, query_labels = (torch.cat(part) if part else torch.empty(0) for part in self._labels)
        for part in (*self._features, *self._labels):
            part.clear()
        if not self.num_classes:
            rank = effective_rank(self.all_gather(memory).view(-1, memory.shape[-1]))
            self.log("effective_rank", rank, prog_bar=True, sync_dist=True, batch_size=len(memory))
            return
        # Each device answers for its share of the queries, against the memory of all.
        memory, memory_labels = self.all_gather(memory), self.all_gather(memory_labels)
        found = knn_classes(
            memory.view(-1, memory.shape[-1]),
            memory_labels.flatten(),
            queries,
            num_classes=self.num_classes,
            k=self.spec.evaluation.knn_k,
            t=self.spec.evaluation.knn_t,
        )
        accuracy = 100 * int((found == query_labels).sum()) / len(queries)
        self.log("knn_top1", accuracy, prog_bar=True, sync_dist=True, batch_size=len(queries))

    def configure_callbacks(self) -> list[Any]:
        every = self.spec.logging.diagnostics_every_n_steps
        return [diagnostics.callback(Path(self.spec.out) / "diagnostics.csv", every_n_steps=every)] if every else []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["settings"] = recorded(self.spec)

    def configure_optimizers(self) -> Any:
        s = self.spec.optimizer
        decayed, others = get_weight_decay_parameters([self.backbone, self.projection_head])
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        if learnable := list(self.loss.parameters()):
            groups.append({"params": learnable, "weight_decay": 0.0, "lr": s.temperature_lr})
        options: dict[str, Any] = {"lr": s.lr, "momentum": s.momentum, "weight_decay": s.weight_decay}
        optimizer = LARS(groups, **options) if s.name == "lars" else torch.optim.SGD(groups, **options)
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = round(steps * s.warmup_epochs / self.spec.epochs)
        scheduler = CosineWarmupScheduler(optimizer, warmup_epochs=warmup, max_epochs=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@final
class ViewsModule(PretrainModule):
    """One encoder for all views, as in SimCLR."""

    def embed(self, views: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.project(self.backbone, self.projection_head, torch.cat(list(views))).chunk(len(views))


@final
class QueueModule(PretrainModule):
    """Anchors from the trained encoder, keys from its moving average, as in MoCo.

    The weight of the past in the average rises from `momentum_encoder` to 1 on half a cosine over the training, as in
    MoCo v3; the queue starts with random directions. Batch norm sees the batch as it is, without MoCo's shuffling over
    devices: on GPUs its statistics are those of all devices, and MoCo v3 does without as well.

    MoCo, 2020, https://arxiv.org/abs/1911.05722 (0.999, constant); MoCo v3, 2021, https://arxiv.org/abs/2104.02057
    (0.99, rising).
    """

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        copies = training.momentum_copies(self.backbone, self.projection_head)
        self.key_backbone, self.key_projection_head = copies

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QueueModule:
        # The average moves in steps that half precision would round to nothing: precision="bf16-true" leaves it alone.
        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            half = moved.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(moved.device, torch.float32) if half else moved

        average = (self.key_backbone, self.key_projection_head)
        for part in self.children():
            part._apply(at_least_float32 if part in average else fn)
        super()._apply(fn, recurse=False)
        return self

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        assert self.spec.queue is not None  # narrows the type
        steps = int(self.trainer.estimated_stepping_batches)
        momentum = cosine_schedule(self.global_step, steps, self.spec.queue.momentum, 1.0)
        pairs = ((self.backbone, self.key_backbone), (self.projection_head, self.key_projection_head))
        training.update_momentum(pairs, momentum)

    def embed(self, views: Sequence[Tensor]) -> Sequence[Tensor]:
        anchors = self.project(self.backbone, self.projection_head, views[0])
        with torch.no_grad():
            images = views[1].to(next(self.key_backbone.parameters()).dtype)
            keys = self.project(self.key_backbone, self.key_projection_head, images)
        return anchors, keys
