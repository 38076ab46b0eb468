"""`dystress evaluate` and `dystress embed`: what a trained backbone is worth, and what it makes of images."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from dystress_plugin.experiment import places
from dystress_plugin.experiment.data import folders, scan
from dystress_plugin.experiment.data.datasets import Data, Images, Views, load_evaluated, load_for_run
from dystress_plugin.experiment.data.transforms import plain_transform
from dystress_plugin.experiment.devices import torch_device
from dystress_plugin.experiment.evaluate.scores import extract, features_of, score_features, trained_backbone
from dystress_plugin.experiment.io import files
from dystress_plugin.experiment.keys import checked
from dystress_plugin.experiment.settings import EmbedSettings, EvaluateSettings
from dystress_plugin.experiment.spec import EvaluationSpec


def evaluate_run(settings: EvaluateSettings) -> dict[str, float]:
    """`knn_top1` and `linear_top1` of the backbone that `dystress pretrain` left; without labels `effective_rank`.

    Raises:
        ValueError: for a folder without a finished run, data whose images do not fit, or an accelerator that is not
            there.
    """
    settings = checked(settings)
    device = torch_device(settings.accelerator)
    run = Path(settings.checkpoint)
    trained, backbone = trained_backbone(run)
    data = load_evaluated(run, trained, val=settings.val, **_asked(settings))
    its = replace(trained.data, batch_size=settings.batch_size, num_workers=settings.num_workers)
    features = features_of(backbone, data, spec=replace(trained, data=its), device=device)
    return score_features(features, EvaluationSpec(settings.knn_k, settings.knn_t, protocols=[], map=False)).top1


def embed(settings: EmbedSettings) -> dict[str, Any]:
    """Writes `out`, a .npz that needs no pickle; returns what it holds, in words.

    embeddings   (images, features) float32, in eval mode, of images as `dystress evaluate` shows them
    files        (images,) their paths, beginning as `data` does; part/position for a data set that is no folder
    labels       (images,) int64, and `classes`, a name for each; where the images have some

    Raises:
        ValueError: for a folder without a finished run, images that do not fit or cannot be used, or an `out` that is
            there.
    """
    settings = checked(settings)
    out, run = Path(settings.out), Path(settings.checkpoint)
    files.check_new(out)
    device = torch_device(settings.accelerator)
    trained, backbone = trained_backbone(run)
    own = settings.data is None or places.same(settings.data, trained.data.name)
    without = None if own else _bad(settings)
    found = load_for_run(run, trained, whole=True, without=without, **_asked(settings))
    images, names = _everything(found.data)
    views = Views(images, plain_transform(trained.model.image_size, found.data.normalize))
    loader = DataLoader(views, settings.batch_size, num_workers=settings.num_workers)
    shown = tqdm(loader, "embedding", unit="batch", disable=None if settings.progress else True)
    content: dict[str, Any] = {"embeddings": extract(backbone, shown, device)[0].numpy(), "files": names}
    if found.data.classes:
        content |= {"labels": images.labels, "classes": np.asarray(found.data.classes)}
    buffer = io.BytesIO()
    np.savez(buffer, **content)
    files.write(out, buffer.getvalue())
    return {"out": str(out)} | {name: list(array.shape) for name, array in content.items()}


def _asked(settings: EvaluateSettings | EmbedSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("data", "labels", "data_root", "download")}


def _everything(data: Data) -> tuple[Images, np.ndarray]:
    """All images, those that are held out among them, and a name for each."""
    parts = {"train": data.train} | ({"test": data.test} if data.classes else {})  # else these are some of those
    images = Images(*(np.concatenate([getattr(p, name) for p in parts.values()]) for name in ("source", "labels")))
    if images.files is None:
        return images, np.asarray([f"{name}/{i:05d}" for name, part in parts.items() for i in range(len(part.labels))])
    images = images.subset(np.argsort(images.source, kind="stable"))
    return images, images.source


def _bad(settings: EmbedSettings) -> dict[str, frozenset[str]]:
    """The files that cannot be used, of images that the run was not trained on."""
    if settings.data is None or not folders.are_files(settings.data):
        return {}
    how = {name: getattr(settings, name) for name in ("on_bad_image", "num_workers", "progress")}
    return {"data": scan.bad_files(settings.data, settings.labels, **how)}
