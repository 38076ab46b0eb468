"""The protocols that score a frozen backbone, by name: its features are taken once, and every protocol reads them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from lightly.utils.benchmarking import knn_predict
from torch import Tensor
from torch.nn import functional as F

from dystress_plugin.experiment.settings import FEW_SHOT, KNN, check_protocols

QUERIES = 1024  # at a time, against the whole memory

DRAWS = 5  # of the few labelled images, with the seeds 0 to 4, the same for every run

IMBALANCED = 2.0  # largest class / smallest class, from which classes are grouped by frequency

COUNT_GROUPS = (("over 100 images", 101, None), ("20 to 100 images", 20, 100), ("under 20 images", 0, 19))


# What stands for accuracies where images have no labels, by its name in a summary: title, and how it is measured.
UNLABELLED = {
    "effective_rank": (
        "effective rank",
        "RankMe, the exponential of the entropy of the singular values, of the features of up to 4096 training images.",
    ),
    "loss": ("loss", "Mean over the last epoch, in nats; of different temperatures it is on different scales."),
    "alignment": ("alignment", "Mean cosine of two views of an image in the last epoch."),
    "uniformity": ("uniformity", "log mean exp(-2 |z_i - z_j|^2) in the last epoch; lower is more uniform."),
}


@dataclass(frozen=True)
class Features:
    """What a frozen backbone makes of a data set, in float32 on the CPU.

    Attributes:
        train: (images, features) of the images it was pretrained on, the memory and the probe's training images.
        train_labels: (images,).
        test: (images, features).
        labels: (images,) of the test images.
        pool: where the few labelled images are drawn from: `train` or, where a long tail was cut, what it was cut from.
        pool_labels: its labels.
        classes: a name for every class, in the order of the labels.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    labels: Tensor
    pool: Tensor
    pool_labels: Tensor
    classes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.classes)


@dataclass(frozen=True)
class Protocol:
    """A way to classify the test images with frozen features.

    Attributes:
        name: what a user types.
        title: what a report shows.
        text: how it works, a sentence.
        classes: from features to the classes it gives the test images, (draws, images).
        per_class_mean: whether its accuracy is the mean over the classes of their accuracies, or over the images.
        few_labels: whether it draws its labelled images from the pool.
    """

    name: str
    title: str
    text: str
    classes: Callable[[Features], Tensor]
    per_class_mean: bool = False
    few_labels: bool = False


def protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        ValueError: for any other name, with those that exist.
    """
    check_protocols([name])
    if name == "weighted_knn":
        return weighted_knn(k=200, t=0.1)
    if name == "linear":
        text = "Logistic regression (scikit-learn, C=1) on the standardised features of all training images."
        return Protocol(name, "linear probe", text, _linear)
    if match := re.fullmatch(KNN, name):
        k = int(match[1])
        nearest = "nearest training image" if k == 1 else f"{k} nearest training images, ties to the lower number"
        text = f"The most frequent class of the {nearest}, by cosine; the mean over classes of their accuracies."
        return Protocol(name, f"kNN@{k}, mean of classes", text, partial(_majority_knn, k=k), per_class_mean=True)
    percent = name.endswith("pct")
    amount = int(re.fullmatch(FEW_SHOT, name)[1].removesuffix("pct"))  # type: ignore[index]  # no other is left
    each = f"{amount} %" if percent else f"{amount} images"
    text = (
        f"Logistic regression on few labels: {each} of every class, as many of each, drawn {DRAWS} times with the "
        f"seeds 0 to {DRAWS - 1}, the same images for every run; the mean over the draws."
    )
    classes = partial(_few_shot, amount=amount, percent=percent)
    return Protocol(name, f"few-shot linear, {each} per class", text, classes, few_labels=True)


def weighted_knn(k: int, t: float) -> Protocol:
    """The weighted kNN with these settings; "weighted_knn" by name with those of InstDisc."""
    name = "weighted_knn" if (k, t) == (200, 0.1) else f"weighted_knn_{k}_{t:g}"
    text = f"The class with the largest sum of exp(cosine / {t:g}) among the {k} nearest training images."
    return Protocol(name, f"weighted kNN, k={k}, t={t:g}", text, partial(_weighted_knn, k=k, t=t))


def groups(counts: np.ndarray) -> dict[str, list[int]]:
    """Groups of classes by their training images: thirds, and by number; none for (nearly) balanced classes.

    The accuracy of a group is the mean of its classes' accuracies. SDCLR and Temperature Schedules divide the classes
    of CIFAR in thirds, those of ImageNet at 100 and 20 images.

    Args:
        counts: (classes,) training images of each class.
    """
    if counts.max() < IMBALANCED * max(1, counts.min()):
        return {}
    frequent_first = np.argsort(-counts, kind="stable")
    thirds = zip(("head", "medium", "tail"), np.array_split(frequent_first, 3), strict=True)
    found = {name: sorted(map(int, classes)) for name, classes in thirds}
    for name, low, high in COUNT_GROUPS:
        inside = (counts >= low) & (counts <= (counts.max() if high is None else high))
        found[name] = [int(c) for c in np.flatnonzero(inside)]
    return {name: classes for name, classes in found.items() if classes}


def balanced(labels: np.ndarray, each: int, seed: int) -> np.ndarray:
    """Positions of `each` images of every class, or as many as the smallest class has, drawn with the seed."""
    each = min(each, int(np.bincount(labels)[np.unique(labels)].min()))
    order = np.random.default_rng(seed).permutation(len(labels))
    return np.sort(np.concatenate([order[labels[order] == c][:each] for c in np.unique(labels)]))


def _weighted_knn(f: Features, k: int, t: float) -> Tensor:
    return knn_classes(f.train, f.train_labels, f.test, num_classes=f.num_classes, k=k, t=t)[None]


def _majority_knn(f: Features, k: int) -> Tensor:
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(min(k, len(f.train)), metric="cosine")
    return torch.from_numpy(classifier.fit(f.train.numpy(), f.train_labels.numpy()).predict(f.test.numpy()))[None]


def _linear(f: Features) -> Tensor:
    return linear_classes(f.train, f.train_labels, f.test)[None]


def _few_shot(f: Features, amount: int, percent: bool) -> Tensor:
    labels = f.pool_labels.numpy()
    each = max(1, round(amount / 100 * len(labels) / len(np.unique(labels)))) if percent else amount
    draws = [torch.from_numpy(balanced(labels, each, seed)) for seed in range(DRAWS)]
    return torch.stack([linear_classes(f.pool[few], f.pool_labels[few], f.test) for few in draws])


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
