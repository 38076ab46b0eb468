"""`dystress evaluate`: kNN and linear probe of a trained backbone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dystress_plugin.experiment.data.datasets import load_for_run
from dystress_plugin.experiment.devices import torch_device
from dystress_plugin.experiment.evaluate.scores import features_of, score_features, trained_backbone
from dystress_plugin.experiment.keys import checked
from dystress_plugin.experiment.settings import EvaluateSettings
from dystress_plugin.experiment.spec import EvaluationSpec


def evaluate_run(settings: EvaluateSettings) -> dict[str, float]:
    """`knn_top1` and `linear_top1` of the backbone that `dystress pretrain` left in a folder.

    Raises:
        ValueError: for a folder without a finished run, data whose images do not fit, or an accelerator that is not
            there.
    """
    settings = checked(settings)
    device = torch_device(settings.accelerator)
    run = Path(settings.checkpoint)
    trained, backbone = trained_backbone(run)
    shown = load_for_run(run, trained, data=settings.data, data_root=settings.data_root, download=settings.download)
    its = replace(shown.spec.data, batch_size=settings.batch_size, num_workers=settings.num_workers)
    features = features_of(backbone, shown.data, spec=replace(trained, data=its), device=device)
    return score_features(features, EvaluationSpec(settings.knn_k, settings.knn_t, protocols=[], map=False)).top1
