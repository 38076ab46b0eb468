"""Features of a frozen backbone, and the backbone that a run left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dystress_plugin.experiment.backbone import build_backbone
from dystress_plugin.experiment.data.datasets import Data, Views
from dystress_plugin.experiment.data.transforms import plain_transform
from dystress_plugin.experiment.evaluate.classifiers import knn_accuracy, linear_accuracy
from dystress_plugin.experiment.io import files
from dystress_plugin.experiment.io.config import read_config
from dystress_plugin.experiment.spec import RunSpec


@torch.no_grad()
def extract(backbone: nn.Module, loader: DataLoader[Any], device: str) -> tuple[Tensor, Tensor]:
    """Features (images, features) and labels (images,), on the CPU, computed in float32 whatever it was trained in.

    The backbone is left in float32 and in eval mode.
    """
    backbone.to(device, torch.float32).eval()
    parts = [(backbone(images.to(device)).flatten(1).cpu(), labels) for images, labels, _ in loader]
    return torch.cat([features for features, _ in parts]), torch.cat([labels for _, labels in parts])


def evaluate(
    backbone: nn.Module,
    data: Data,
    *,
    image_size: int,
    batch_size: int,
    num_workers: int,
    knn_k: int,
    knn_t: float,
    device: str,
) -> dict[str, float]:
    """`knn_top1` and `linear_top1` of a frozen backbone, in percent: fitted on the training images, for the test's."""
    transform = plain_transform(image_size, data.normalize)
    (train, train_labels), (test, labels) = (
        extract(backbone, DataLoader(Views(part, transform), batch_size, num_workers=num_workers), device)
        for part in (data.train, data.test)
    )
    knn = knn_accuracy(train, train_labels, test, labels, num_classes=data.num_classes, k=knn_k, t=knn_t)
    return {"knn_top1": knn, "linear_top1": linear_accuracy(train, train_labels, test, labels)}


def trained_backbone(run: Path) -> tuple[RunSpec, nn.Module]:
    """The run, as `config.yaml` has it, and the backbone that `dystress pretrain` left in a folder.

    Raises:
        ValueError: for a folder without a finished run, or with damaged files.
    """
    config, weights = run / "config.yaml", run / "backbone.pt"
    if not config.exists() or not weights.exists():
        missing = config if not config.exists() else weights
        raise ValueError(f"checkpoint={run} holds no finished run of `dystress pretrain`: {missing} is missing.")
    trained = read_config(config)
    backbone, _ = build_backbone(trained.model.backbone, trained.model.image_size)
    files.load_state(backbone, weights, f"Delete it and run `dystress pretrain` again with out={run}.")
    return trained, backbone
