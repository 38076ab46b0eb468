"""The `dystress` command: pretraining and evaluation, built on lightly, Lightning and torchvision/timm."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def load_backbone(run: str | Path) -> nn.Module:
    """backbone(images) -> (batch, features): the network that `dystress pretrain` left in a folder, in eval mode.

    Its images are as large as `image_size` in the run's `config.yaml`. `dystress export` hands it to those who have not
    this package.

    Raises:
        ValueError: for a folder without a finished run, or with damaged files.
    """
    from dystress_plugin.experiment.evaluate.scores import trained_backbone

    return trained_backbone(Path(run))[1].eval()
