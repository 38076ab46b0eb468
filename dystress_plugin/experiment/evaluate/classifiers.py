"""The classes that frozen features give to images: nearest neighbours and a linear probe."""

from __future__ import annotations

import torch
from lightly.utils.benchmarking import knn_predict
from torch import Tensor
from torch.nn import functional as F

QUERIES = 1024  # at a time, against the whole memory


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
