"""Every method of the table as a LightningModule that trains as lightly's ImageNet benchmark trains its own.

Networks, optimizer and augmentations are lightly's. The classes are made from the table and bear the methods' titles:
`from dystress_plugin.frameworks.lightly.modules import DySTreSS, MACLMoCo`. A method added to the table is here, and in
`BENCHMARK_METHODS`, by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dystress_plugin import training
from dystress_plugin.chunks import embed_in_chunks
from dystress_plugin.errors import needing
from dystress_plugin.recipes import Recipe, follow

with needing("lightly"):
    from lightly.models.modules import MoCoProjectionHead, SimCLRProjectionHead
    from lightly.models.utils import get_weight_decay_parameters
    from lightly.transforms import MoCoV2Transform, SimCLRTransform
    from lightly.utils.lars import LARS
    from lightly.utils.scheduler import CosineWarmupScheduler

    from dystress_plugin.frameworks.lightly.base import ContrastiveModule

DIM = 128  # of an embedding, in all of the benchmark
# By whether a recipe has a queue.
TRANSFORMS = {False: SimCLRTransform(), True: MoCoV2Transform()}
transform = TRANSFORMS[False]


class SimCLRModule(ContrastiveModule):
    """SimCLR as lightly's benchmark trains it; the learning rate follows the square root of the batch size.

    The arguments are those of `ContrastiveModule` without the queue's.
    """

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
        super().__init__(batch_size_per_device, num_classes, knn_k, knn_t, backbone, feature_dim, **settings)
        self.save_hyperparameters(ignore=["backbone"])
        self.projection_head = SimCLRProjectionHead(feature_dim, feature_dim, DIM)

    def embed(self, views: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        features = self(torch.cat(list(views))).flatten(start_dim=1)
        return features, self.projection_head(features).chunk(len(views))

    def configure_optimizers(self) -> Any:
        # Square root scaling, as lightly's SimCLR: better than linear below batches of 2048 and 200 epochs
        # (SimCLR, appendix B.1).
        lr = 0.075 * math.sqrt(self.batch_size_per_device * self.trainer.world_size)
        optimizer = LARS(_parameter_groups(self, lr), lr=lr, momentum=0.9, weight_decay=1e-6)
        steps, epochs = int(self.trainer.estimated_stepping_batches), self.trainer.max_epochs
        # Ten epochs, as in lightly, whose scheduler refuses a shorter training. That gets a tenth of its steps.
        warmup = steps * 10 // epochs if epochs >= 10 else steps // 10
        scheduler = CosineWarmupScheduler(optimizer=optimizer, warmup_epochs=warmup, max_epochs=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class MoCoModule(ContrastiveModule):
    """MoCo v2 as lightly's benchmark trains it: keys from a momentum encoder, in batches shuffled over all devices.

    Unlike lightly's, the key encoder's head starts as a copy of the query encoder's, as in the paper.

    The arguments are those of `ContrastiveModule` and:

    Args:
        queue_size: number of keys in the queue.
        momentum: share of the key encoder that a step keeps.
    """

    def __init__(
        self,
        batch_size_per_device: int,
        num_classes: int,
        knn_k: int = 200,
        knn_t: float = 0.1,
        backbone: nn.Module | None = None,
        feature_dim: int = 2048,
        queue_size: int = 65536,
        momentum: float = 0.999,
        **settings: Any,
    ) -> None:
        super().__init__(
            batch_size_per_device,
            num_classes,
            knn_k,
            knn_t,
            backbone,
            feature_dim,
            queue_size=(queue_size, DIM),
            **settings,
        )
        self.save_hyperparameters(ignore=["backbone"])
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum} must lie in [0, 1]: it is what the key encoder keeps of itself.")
        self.momentum = momentum
        self.projection_head = MoCoProjectionHead(feature_dim, feature_dim, DIM)
        copies = training.momentum_copies(self.backbone, self.projection_head)
        self.key_backbone, self.key_projection_head = copies

    def embed(self, views: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        key_images, query_images = views
        features = self(query_images).flatten(start_dim=1)
        queries = self.projection_head(features)
        # Between the two encoders, as the authors and lightly have it.
        pairs = ((self.backbone, self.key_backbone), (self.projection_head, self.key_projection_head))
        training.update_momentum(pairs, self.momentum)
        keys = training.shuffled_keys(self._encode_keys, key_images, distributed=self.trainer.world_size > 1)
        return features, (queries, keys)

    def _encode_keys(self, images: Tensor) -> Tensor:
        features = embed_in_chunks(self.key_backbone, images, self.chunk_size).flatten(start_dim=1)
        keys: Tensor = self.key_projection_head(features)
        return keys

    def configure_optimizers(self) -> Any:
        lr = 0.03 * self.batch_size_per_device * self.trainer.world_size / 256
        optimizer = torch.optim.SGD(_parameter_groups(self, lr), lr=lr, momentum=0.9, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = CosineWarmupScheduler(optimizer=optimizer, warmup_epochs=0, max_epochs=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


# By whether a recipe has a queue.
BASES: dict[bool, type[ContrastiveModule]] = {False: SimCLRModule, True: MoCoModule}


def _parameter_groups(module: SimCLRModule | MoCoModule, lr: float) -> list[dict[str, Any]]:
    decayed, not_decayed = get_weight_decay_parameters([module.backbone, module.projection_head])
    name, classifier = module.method, module.online_classifier.parameters()
    return [
        {"name": name, "params": decayed},
        {"name": f"{name}_no_weight_decay", "params": not_decayed, "weight_decay": 0.0},
        {"name": "online_classifier", "params": classifier, "weight_decay": 0.0},
        *training.own_group(module.criterion, lr, module.temperature_lr),
    ]


def entry(method: Recipe) -> dict[str, Any]:
    """What lightly's benchmark has for a method."""
    model = training.method_class(method, BASES[method.queue], __name__, {"method": method.name})
    return {"model": model, "transform": TRANSFORMS[method.queue]}


BENCHMARK_METHODS: dict[str, dict[str, Any]] = {}
follow(lambda method: BENCHMARK_METHODS.update({method.name: entry(method)}))

if TYPE_CHECKING:

    def __getattr__(name: str) -> type[ContrastiveModule]: ...
