"""Accuracies of a frozen backbone: the weighted kNN and a linear probe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightly.utils.benchmarking import knn_predict
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dystress_plugin.experiment import files
from dystress_plugin.experiment.backbone import build_backbone
from dystress_plugin.experiment.data import Data, Views, load_for_run
from dystress_plugin.experiment.devices import torch_device
from dystress_plugin.experiment.settings import EvaluateSettings, PretrainSettings, checked, read_config
from dystress_plugin.experiment.transforms import plain_transform

QUERIES = 1024  # at a time, against the whole memory


@torch.no_grad()
def extract(backbone: nn.Module, loader: DataLoader[Any], device: str) -> tuple[Tensor, Tensor]:
    """Features (images, features) and labels (images,), on the CPU, computed in float32 whatever it was trained in.

    The backbone is left in float32 and in eval mode.
    """
    backbone.to(device, torch.float32).eval()
    parts = [(backbone(images.to(device)).flatten(1).cpu(), labels) for images, labels, _ in loader]
    return torch.cat([features for features, _ in parts]), torch.cat([labels for _, labels in parts])


def knn_classes(
    memory: Tensor, memory_labels: Tensor, queries: Tensor, *, num_classes: int, k: int, t: float
) -> Tensor:
    """The class of each query, (queries,): the largest sum of exp(cosine / t) among the k nearest memories.

    InstDisc, 2018, https://arxiv.org/abs/1805.01978 (k=200, t=0.1); computed by lightly's knn_predict.

    Args:
        memory: (images, features), any scale.
        memory_labels: (images,).
        queries: (queries, features), any scale.
        num_classes: number of classes.
        k: neighbours; all of the memory where it is smaller.
        t: temperature of the weights.
    """
    bank = F.normalize(memory, dim=1).T.contiguous()
    parts = F.normalize(queries, dim=1).split(QUERIES)
    k = min(k, len(memory))
    return torch.cat([knn_predict(part, bank, memory_labels, num_classes, knn_k=k, knn_t=t)[:, 0] for part in parts])


def knn_accuracy(
    memory: Tensor, memory_labels: Tensor, queries: Tensor, labels: Tensor, *, num_classes: int, k: int, t: float
) -> float:
    """Share of queries that `knn_classes` gets right, in percent; arguments as there, and the queries' labels."""
    found = knn_classes(memory, memory_labels, queries, num_classes=num_classes, k=k, t=t)
    return 100 * int((found == labels).sum()) / len(queries)


def linear_classes(train: Tensor, train_labels: Tensor, test: Tensor) -> Tensor:
    """The class that multinomial logistic regression on the frozen features gives each test image, (images,).

    scikit-learn's LogisticRegression with its own L2 strength, C=1, on features scaled to mean 0 and deviation 1 of
    the training images: no augmentation, no learning rate to tune, and the same number every time.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(train.numpy(), train_labels.numpy())
    return torch.from_numpy(probe.predict(test.numpy()))


def linear_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, labels: Tensor) -> float:
    """Percent of the test images that `linear_classes` gets right."""
    return 100 * float((linear_classes(train, train_labels, test) == labels).double().mean())


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


def trained_backbone(run: Path) -> tuple[PretrainSettings, nn.Module]:
    """The settings, as `config.yaml` has them, and the backbone that `dystress pretrain` left in a folder.

    Raises:
        ValueError: for a folder without a finished run, or with damaged files.
    """
    config, weights = run / "config.yaml", run / "backbone.pt"
    if not config.exists() or not weights.exists():
        missing = config if not config.exists() else weights
        raise ValueError(f"checkpoint={run} holds no finished run of `dystress pretrain`: {missing} is missing.")
    trained = read_config(config)
    assert trained.backbone is not None  # as resolved; narrows the types
    assert trained.image_size is not None
    backbone, _ = build_backbone(trained.backbone, trained.image_size)
    files.load_state(backbone, weights, f"Delete it and run `dystress pretrain` again with out={run}.")
    return trained, backbone


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
    assert trained.image_size is not None  # as above
    return evaluate(
        backbone,
        shown.data,
        image_size=trained.image_size,  # whatever the data: the stem depends on it
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        knn_k=settings.knn_k,
        knn_t=settings.knn_t,
        device=device,
    )
