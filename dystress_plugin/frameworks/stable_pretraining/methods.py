"""Classes beside `stable_pretraining.methods.SimCLR`, one for every recipe of the table without a queue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from stable_pretraining.methods.simclr import SimCLR, SimCLROutput
from torch import Tensor, nn

from dystress_plugin import training
from dystress_plugin.contrastive import ContrastiveLoss
from dystress_plugin.frameworks.stable_pretraining.forward import contrastive
from dystress_plugin.recipes import Recipe, follow


class ViewsMethod(SimCLR):
    """stable-pretraining's SimCLR with our loss: called with views as theirs is, and a Trainer trains it as it is.

    Args:
        encoder_name: as for SimCLR, and so are:
        projector_dims:
        low_resolution:
        pretrained:
        **settings: parameters of the method, such as `tau_max=0.3`, or `num_samples=len(dataset)`.
    """

    recipe: ClassVar[Recipe]

    def __init__(
        self,
        encoder_name: str | nn.Module = "vit_small_patch16_224",
        projector_dims: Sequence[int] = (2048, 2048, 256),
        low_resolution: bool = False,
        pretrained: bool = False,
        **settings: Any,
    ) -> None:
        self.recipe.check_names(settings)
        super().__init__(encoder_name, projector_dims, low_resolution=low_resolution, pretrained=pretrained)
        del self.simclr_loss
        settings = self.recipe.sized(settings, dim=projector_dims[-1])
        self.contrastive_loss = ContrastiveLoss(self.recipe.name, gather_distributed=True, **settings)

    def forward(
        self,
        view1: Tensor | dict[str, Any],
        view2: Tensor | None = None,
        stage: str = "fit",
        *,
        index: Tensor | None = None,
        epoch: float | None = None,
    ) -> Any:
        """SimCLROutput of one or two views, or, of a batch, what `contrastive` returns.

        Args:
            view1: (batch, channels, height, width), or the batch that the Trainer gives.
            view2: as view1; None for the embedding alone.
            stage: of a batch.
            index: (batch,) sample numbers, where the temperature keeps a table.
            epoch: the current epoch, where it is scheduled.
        """
        if isinstance(view1, dict):
            return contrastive(self, view1, stage)
        if view2 is None:
            return super().forward(view1)
        features = [self.backbone(view) for view in (view1, view2)]
        z = [self.projector(part) for part in features]
        loss = self.contrastive_loss(*z, index=index, epoch=epoch)
        return SimCLROutput(loss=loss, embedding=torch.cat(features), projection=torch.cat(z))


METHODS: dict[str, type[ViewsMethod]] = {}


def _add(recipe: Recipe) -> None:
    if not recipe.queue:
        METHODS[recipe.name] = training.method_class(recipe, ViewsMethod, __name__, {"recipe": recipe})


follow(_add)
