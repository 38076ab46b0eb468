"""Every two-view method of the table as a LightningModule in the style of lightly's ImageNet benchmark.

The classes are made from the table and bear the methods' titles: `from dystress_plugin.frameworks.lightly.modules
import DySTreSS, MACL`. A method added to the table is here, and in `BENCHMARK_METHODS`, by itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightly.models.modules import SimCLRProjectionHead
from lightly.models.utils import get_weight_decay_parameters
from lightly.transforms import SimCLRTransform
from lightly.utils.benchmarking import KNNClassifier, OnlineLinearClassifier
from lightly.utils.lars import LARS
from lightly.utils.scheduler import CosineWarmupScheduler
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import Subset
from torchvision.models import resnet50

from dystress_plugin.contrastive import ContrastiveLoss
from dystress_plugin.metrics import temperature_summary
from dystress_plugin.recipes import METHODS, Recipe, recipe
from dystress_plugin.temperature import Individual

Batch = tuple[list[Tensor], Tensor, list[str]]

transform = SimCLRTransform()


class OnlineKNN(KNNClassifier):
    """lightly's kNN classifier as a part of another module, which logs the metrics that this one returns."""

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: lightly's version logs here as well, which Lightning allows to the outermost module only."""


class ContrastiveModule(LightningModule):
    """SimCLR as lightly's benchmark trains it, with the loss of the method that a subclass names.

    Training logs `train_loss`, the online classifier's metrics and, in the steps that the Trainer logs, what the
    temperature does to the batch (`dystress_plugin.metrics.temperature_summary`). Validation takes two dataloaders, the
    training images and the validation images, and logs `val_knn_top1` and `val_online_cls_top1`; with the second
    alone it skips kNN.

    A method with a table of samples (iSogCLR) reads the sample numbers from the filenames in the batch and sizes the
    table in `setup`, so it needs a `lightly.data.LightlyDataset`.

    Args:
        batch_size_per_device: images a step and device; the learning rate follows its square root.
        num_classes: classes of the online classifiers.
        knn_k: neighbours of the kNN classifier; fewer where there are fewer training images.
        knn_t: temperature of its weights.
        backbone: from images to (batch, feature_dim, ...). None is torchvision's ResNet-50 without its last layer.
            It is not among the hyperparameters of a checkpoint: `load_from_checkpoint` has to be given it again.
        feature_dim: length of the backbone's features.
        **settings: parameters of the method's temperature, such as `tau_max=0.3`.

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
        **settings: Any,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"])
        self.batch_size_per_device = batch_size_per_device

        if backbone is None:
            backbone = resnet50()
            backbone.fc = nn.Identity()
        self.backbone = backbone
        self.projection_head = SimCLRProjectionHead(feature_dim, feature_dim, 128)
        if "num_samples" in recipe(self.method).parameters:
            settings.setdefault("num_samples", 1)  # until setup() or a checkpoint knows better
        self.criterion = ContrastiveLoss(self.method, gather_distributed=True, **settings)

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

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.backbone(x)
        return features

    def setup(self, stage: str) -> None:
        temperature = self.criterion.temperature
        if stage != "fit" or not isinstance(temperature, Individual):
            return
        self.trainer.fit_loop.setup_data()  # Lightning would do so soon after
        self._sample_numbers = sample_numbers(self.trainer.train_dataloader.dataset)
        if temperature.num_samples == len(self._sample_numbers):
            return
        if temperature.visited.any():
            raise ValueError(_other_data(temperature.num_samples, len(self._sample_numbers)))
        temperature.resize(len(self._sample_numbers))

    def teardown(self, stage: str) -> None:
        self._sample_numbers = {}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        # Tables of another length than the fresh object's: Lightning, and lightly's benchmark without it, load by this.
        temperature, saved = self.criterion.temperature, state_dict.get("criterion.temperature.tau")
        if isinstance(temperature, Individual) and saved is not None and len(saved) != temperature.num_samples:
            if self._sample_numbers:
                raise ValueError(_other_data(len(saved), len(self._sample_numbers)))
            temperature.resize(len(saved))
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        views, targets = batch[0], batch[1]
        features = self(torch.cat(views)).flatten(start_dim=1)
        z = self.projection_head(features).chunk(len(views))
        index, epoch = self._index(batch), float(self.current_epoch)
        loss: Tensor = self.criterion(*z, index=index, epoch=epoch)
        self.log("train_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(targets))
        if self._is_logging_step() and len(targets) > 1:
            # Of rank 0's batch alone: no collective for a log.
            summary = temperature_summary(self.criterion, *z, index=index, epoch=epoch)
            self.log_dict(summary, batch_size=len(targets))

        cls_loss, cls_log = self.online_classifier.training_step(
            (features.detach(), targets.repeat(len(views))), batch_idx
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

    def configure_optimizers(self) -> Any:
        params, params_no_weight_decay = get_weight_decay_parameters([self.backbone, self.projection_head])
        optimizer = LARS(
            [
                {"name": self.method, "params": params},
                {"name": f"{self.method}_no_weight_decay", "params": params_no_weight_decay, "weight_decay": 0.0},
                {
                    "name": "online_classifier",
                    "params": self.online_classifier.parameters(),
                    "weight_decay": 0.0,
                },
            ],
            # Square root scaling, as lightly's SimCLR: better than linear below batches of 2048 and 200 epochs
            # (SimCLR, appendix B.1).
            lr=0.075 * math.sqrt(self.batch_size_per_device * self.trainer.world_size),
            momentum=0.9,
            weight_decay=1e-6,
        )
        steps, epochs = int(self.trainer.estimated_stepping_batches), self.trainer.max_epochs
        # Ten epochs, as in lightly, whose scheduler refuses a shorter training. That gets a tenth of its steps.
        warmup = steps * 10 // epochs if epochs >= 10 else steps // 10
        scheduler = CosineWarmupScheduler(optimizer=optimizer, warmup_epochs=warmup, max_epochs=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def _index(self, batch: Batch) -> Tensor | None:
        if not self.criterion.temperature.needs_index:
            return None
        try:
            return torch.tensor([self._sample_numbers[filename] for filename in batch[2]])
        except KeyError as error:
            raise ValueError(f"The batch has the image {error}, which the training data set does not list.") from None

    def _is_logging_step(self) -> bool:
        # The steps in which Lightning writes, which counts them from one.
        every = self.trainer.log_every_n_steps
        return bool(every) and (self.global_step + 1) % every == 0


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


def _other_data(saved: int, present: int) -> str:
    return (
        f"The checkpoint has temperatures of {saved} images, but the training data has {present}; "
        "resume on the data it was trained on."
    )


def _module_class(method: Recipe) -> type[ContrastiveModule]:
    text = f"{method.title} ({method.paper}, {method.url}) as lightly's benchmark trains; see `ContrastiveModule`."
    name = re.sub(r"\W", "", method.title)
    return type(name, (ContrastiveModule,), {"method": method.name, "__doc__": text, "__module__": __name__})


BENCHMARK_METHODS: dict[str, dict[str, Any]] = {
    method.name: {"model": _module_class(method), "transform": transform}
    for method in METHODS.values()
    if method.layout == "views"
}
# By name in this module, so that they can be imported, pickled and found by load_from_checkpoint.
globals().update({entry["model"].__name__: entry["model"] for entry in BENCHMARK_METHODS.values()})

if TYPE_CHECKING:

    def __getattr__(name: str) -> type[ContrastiveModule]: ...
