"""`dystress evaluate`: kNN and linear probe of a trained backbone."""

from __future__ import annotations

from pathlib import Path

from dystress_plugin.experiment.data.datasets import load_for_run
from dystress_plugin.experiment.devices import torch_device
from dystress_plugin.experiment.evaluate.features import evaluate, trained_backbone
from dystress_plugin.experiment.keys import checked
from dystress_plugin.experiment.settings import EvaluateSettings


def evaluate_run(settings: EvaluateSettings) -> dict[str, float]:
    """`knn_top1` and `linear_top1` of the backbone that `dystress pretrain` left in a folder.

    Raises:
        ValueError: for a folder without a finished run, data whose images do not fit, or an accelerator that is not
            there.
    """
    settings = checked(settings)
    device = torch_device(settings.accelerator)
    trained, backbone = trained_backbone(Path(settings.checkpoint))
    shown = load_for_run(
        Path(settings.checkpoint),
        trained,
        data=settings.data,
        data_root=settings.data_root,
        download=settings.download,
    )
    return evaluate(
        backbone,
        shown.data,
        image_size=trained.model.image_size,  # whatever the data: the stem depends on it
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        knn_k=settings.knn_k,
        knn_t=settings.knn_t,
        device=device,
    )
