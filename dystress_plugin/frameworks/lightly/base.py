"""What every method shares as a LightningModule in the style of lightly's ImageNet benchmark."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightly.utils.benchmarking import KNNClassifier, OnlineLinearClassifier
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import Subset
from torchvision.models import resnet50

from dystress_plugin import diagnostics, training
from dystress_plugin.checks import check_positive
from dystress_plugin.chunks import check_chunks, embed_in_chunks
from dystress_plugin.contrastive import ContrastiveLoss
from dystress_plugin.recipes import recipe

Batch = tuple[list[Tensor], Tensor, list[str]]


def log_as_outermost(self: KNNClassifier, *args: Any, **kwargs: Any) -> None:
    """The kNN classifier's `log_dict`: nothing where it is a part of a module, which logs the metrics it returns.

    lightly's own logs there as well, which Lightning allows to the outermost module only.
    """
    if self.trainer.lightning_module is self:
        super(KNNClassifier, self).log_dict(*args, **kwargs)


class OnlineKNN(KNNClassifier):
    """lightly's kNN classifier as a part of another module."""

    log_dict = log_as_outermost


class ContrastiveModule(LightningModule, ABC):
    """A method of the table; a subclass of each layout trains it as lightly's benchmark trains its own of that layout.

    Training logs `train_loss`, the online classifier's metrics and, in the steps that the Trainer logs, what the
    temperature does to the batch (`dystress_plugin.metrics.temperature_summary`). Validation takes two dataloaders, the
    training images and the validation images, and logs `val_knn_top1` and `val_online_cls_top1`; with the second
    alone it skips kNN.

    A method with a table of samples (iSogCLR) reads the sample numbers from the filenames in the batch and sizes the
    table in `setup`, so it needs a `lightly.data.LightlyDataset`.

    Args:
        batch_size_per_device: images a step and device; the learning rate grows with it.
        num_classes: classes of the online classifiers.
        knn_k: neighbours of the kNN classifier; fewer where there are fewer training images.
        knn_t: temperature of its weights.
        backbone: from images to (batch, feature_dim, ...). None is torchvision's ResNet-50 without its last layer.
            It is not among the hyperparameters of a checkpoint: `load_from_checkpoint` has to be given it again.
        feature_dim: length of the backbone's features.
        queue_size: (keys, dim), None where the layout has no queue.
        diagnostics_every_n_steps: how often to write `diagnostics.csv`, see `dystress_plugin.diagnostics`; None never.
        chunk_size: images that the backbone embeds at a time, see `dystress_plugin.embed_in_chunks`; None is all.
        temperature_lr: learning rate of what a temperature learns; None is a tenth of the network's.
        **settings: parameters of the method, such as `tau_max=0.3`.

    Attributes:
        method: name in `dystress_plugin.recipes.METHODS`.
        criterion: the `ContrastiveLoss`.
    """

    method: str

    def __init__(
        self,
        batch_size_per_device: int,
        num_classes: int,
        knn_k: int = 200,
        knn_t: float = 0.1,
        backbone: nn.Module | None = None,
        feature_dim: int = 2048,
        *,
        queue_size: tuple[int, int] | None = None,
        diagnostics_every_n_steps: int | None = None,
        chunk_size: int | None = None,
        temperature_lr: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.diagnostics_every_n_steps = diagnostics_every_n_steps
        self.batch_size_per_device = batch_size_per_device

        if backbone is None:
            backbone = resnet50()
            backbone.fc = nn.Identity()
        self.backbone = backbone
        self.chunk_size = check_chunks(chunk_size, backbone)
        self.temperature_lr = None if temperature_lr is None else check_positive("temperature_lr", temperature_lr)
        method = recipe(self.method)
        method.check_names(settings)
        # A table has one entry until setup() or a checkpoint knows better.
        settings = method.sized(settings)
        self.criterion = ContrastiveLoss(self.method, queue_size=queue_size, gather_distributed=True, **settings)

        # Top-5 of fewer than five classes is an error in lightly.
        topk = (1, 5) if num_classes >= 5 else (1,)
        self.online_classifier = OnlineLinearClassifier(feature_dim, num_classes, topk=topk)
        self.knn_classifier = OnlineKNN(
            model=None,
            num_classes=num_classes,
            knn_k=knn_k,
            knn_t=knn_t,
            train_dataloader_idx=0,
            val_dataloader_idx=1,
            topk=topk,
        )
        self._knn_images = 0
        self._sample_numbers: dict[str, int] = {}

    @abstractmethod
    def embed(self, views: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """From the views of a batch to features, (batch or a multiple of it, feature_dim), and what is compared."""

    def configure_callbacks(self) -> list[Any]:
        return diagnostics.callbacks(self.diagnostics_every_n_steps)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = embed_in_chunks(self.backbone, x, self.chunk_size)
        return features

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        training.check_has_steps(self.trainer, "batch_size_per_device")
        temperature = self.criterion.temperature
        if temperature.needs_index:
            self._sample_numbers = sample_numbers(self.trainer.train_dataloader.dataset)
            training.size_table(temperature, len(self._sample_numbers))

    def on_fit_start(self) -> None:
        training.warn_of_concerns(self.criterion.temperature, self.trainer.max_epochs, rank_zero_warn)

    def teardown(self, stage: str) -> None:
        self._sample_numbers = {}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        # Lightning, and lightly's benchmark without it, load by this.
        known = len(self._sample_numbers) or None
        training.make_room(self.criterion.temperature, state_dict, "criterion.temperature.", known)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        views, targets = batch[0], batch[1]
        features, z = self.embed(views)
        epoch = training.clock(self, self.criterion.temperature, batch_idx)
        loss = training.contrast(self, self.criterion, z, batch_idx, index=self._index(batch), epoch=epoch)
        self.log("train_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(targets))

        cls_loss, cls_log = self.online_classifier.training_step(
            (features.detach(), targets.repeat(len(features) // len(targets))), batch_idx
        )
        self.log_dict(cls_log, sync_dist=True, batch_size=len(targets))
        total: Tensor = loss + cls_loss
        return total

    def validation_step(
        self, batch: tuple[Tensor, Tensor, list[str]], batch_idx: int, dataloader_idx: int | None = None
    ) -> Tensor | None:
        images, targets = batch[0], batch[1]
        features = self(images).flatten(start_dim=1)
        if dataloader_idx == 0:
            seen = 0 if batch_idx == 0 else self._knn_images
            self._knn_images = seen + len(targets) * self.trainer.world_size
            self.knn_classifier.validation_step((features, targets), batch_idx, dataloader_idx)
            return None

        log: dict[str, Tensor] = {}
        if dataloader_idx == 1:
            # The sanity check before training, and small data sets, have fewer images than neighbours.
            self.knn_classifier.knn_k = min(self.hparams["knn_k"], self._knn_images)
            log |= self.knn_classifier.validation_step((features, targets), batch_idx, dataloader_idx)
        cls_loss, cls_log = self.online_classifier.validation_step((features, targets), batch_idx)
        log |= cls_log
        self.log_dict(log, prog_bar=True, sync_dist=True, batch_size=len(targets), add_dataloader_idx=False)
        loss: Tensor = cls_loss
        return loss

    def on_validation_epoch_end(self) -> None:
        self.knn_classifier.reset_storage()

    def _index(self, batch: Batch) -> Tensor | None:
        if not self.criterion.temperature.needs_index:
            return None
        try:
            return torch.tensor([self._sample_numbers[filename] for filename in batch[2]])
        except KeyError as error:
            raise ValueError(f"The batch has the image {error}, which the training data set does not list.") from None


def sample_numbers(dataset: Any) -> dict[str, int]:
    """From filename to sample number, for a LightlyDataset or a torch Subset of one.

    Raises:
        ValueError: for a data set that does not list filenames, or lists one twice.
    """
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if not hasattr(dataset, "get_filenames"):
        raise ValueError(
            f"Temperatures of single images need to know which image is which, and {type(dataset).__name__} does not "
            "list filenames: wrap it, lightly.data.LightlyDataset.from_torch_dataset(dataset)."
        )
    filenames = dataset.get_filenames()
    numbers = {filename: number for number, filename in enumerate(filenames)}
    if len(numbers) < len(filenames):
        raise ValueError(
            f"{len(filenames)} images have only {len(numbers)} different filenames; each needs its own temperature."
        )
    return numbers
