"""The protocols that score a frozen backbone, by name: its features are taken once, and every protocol reads them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dystress_plugin.errors import unknown_name
from dystress_plugin.experiment import files
from dystress_plugin.experiment.backbone import build_backbone
from dystress_plugin.experiment.data import Views, load_for_run
from dystress_plugin.experiment.evaluation import extract, knn_classes, linear_classes, trained_backbone
from dystress_plugin.experiment.lock import alone
from dystress_plugin.experiment.settings import PROTOCOLS, PretrainSettings, read_config
from dystress_plugin.experiment.transforms import plain_transform

DRAWS = 5  # of the few labelled images, with the seeds 0 to 4, the same for every run
MAP_IMAGES = 1000  # of the embedding map
IMBALANCED = 2.0  # largest class / smallest class, from which classes are grouped by frequency
COUNT_GROUPS = (("over 100 images", 101, None), ("20 to 100 images", 20, 100), ("under 20 images", 0, 19))
KNOWN = "weighted_knn, knn_K, linear, few_shot_N (images of each class) and few_shot_Npct, with K and N at least 1"


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
    """

    name: str
    title: str
    text: str
    classes: Callable[[Features], Tensor]
    per_class_mean: bool = False


@dataclass(frozen=True)
class Score:
    """One accuracy.

    Attributes:
        protocol: its name.
        group: "all", "class 3", or a group of classes such as "tail".
        value: percent.
        n: test images it is of.
        train_images: training images of these classes.
    """

    protocol: str
    group: str
    value: float
    n: int
    train_images: int


def protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        ValueError: for any other name, with those that exist.
    """
    if name == "weighted_knn":
        text = "The class with the largest sum of exp(cosine / 0.1) among the 200 nearest training images."
        return Protocol(name, "weighted kNN, k=200, t=0.1", text, _weighted_knn)
    if name == "linear":
        text = "Logistic regression (scikit-learn, C=1) on the standardised features of all training images."
        return Protocol(name, "linear probe", text, _linear)
    if match := re.fullmatch(r"knn_([1-9]\d{0,8})", name):
        k = int(match[1])
        nearest = "nearest training image" if k == 1 else f"{k} nearest training images, ties to the lower number"
        text = f"The most frequent class of the {nearest}, by cosine; the mean over classes of their accuracies."
        return Protocol(name, f"kNN@{k}, mean of classes", text, partial(_majority_knn, k=k), per_class_mean=True)
    if match := re.fullmatch(r"few_shot_([1-9]\d{0,8}|[1-9]\d?pct|100pct)", name):
        percent = name.endswith("pct")
        amount = int(match[1].removesuffix("pct"))
        each = f"{amount} %" if percent else f"{amount} images"
        text = (
            f"Logistic regression on few labels: {each} of every class, as many of each, drawn {DRAWS} times with the "
            f"seeds 0 to {DRAWS - 1}, the same images for every run; the mean over the draws."
        )
        classes = partial(_few_shot, amount=amount, percent=percent)
        return Protocol(name, f"few-shot linear, {each} per class", text, classes)
    raise ValueError(unknown_name("protocol", name, PROTOCOLS, choices=KNOWN))


def score(features: Features, names: Sequence[str]) -> list[Score]:
    """Accuracies by every protocol: of all test images, of every class and, where they differ in size, of groups."""
    counts = torch.bincount(features.train_labels, minlength=features.num_classes).numpy()
    in_test = torch.bincount(features.labels, minlength=features.num_classes).numpy()
    present = np.flatnonzero(in_test)
    scores = []
    for chosen in map(protocol, names):
        right = (chosen.classes(features) == features.labels).double().mean(0)
        of_class = {int(c): 100 * float(right[features.labels == c].mean()) for c in present}
        mean = float(np.mean(list(of_class.values())))
        whole = mean if chosen.per_class_mean else 100 * float(right.mean())
        scores.append(Score(chosen.name, "all", whole, len(features.labels), int(counts.sum())))
        for group, classes in groups(counts).items():
            values = [of_class[c] for c in classes if c in of_class]
            if values:
                n, train_images = int(in_test[classes].sum()), int(counts[classes].sum())
                scores.append(Score(chosen.name, group, float(np.mean(values)), n, train_images))
        scores += [Score(chosen.name, f"class {c}", of_class[c], int(in_test[c]), int(counts[c])) for c in of_class]
    return scores


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


def score_run(run: Path, names: Sequence[str], *, with_map: bool = False) -> list[Score]:
    """Scores the backbone of a finished run, once: `protocols.csv` and, if asked for, `map.csv` in its folder.

    Args:
        run: a folder of `dystress pretrain`.
        names: protocols; those that are in `protocols.csv` already are not computed again.
        with_map: also a t-SNE map of the features of up to 1000 test images.

    Raises:
        ValueError: for an unknown protocol, or a folder without a finished run.
    """
    table, map_ = run / "protocols.csv", run / "map.csv"
    return _score(
        table,
        names,
        map_ if with_map else None,
        newer_than=run / "backbone.pt",
        backbone=lambda: trained_backbone(run)[1],
        settings=read_config(run / "config.yaml"),
    )


def score_untrained(run: Path, names: Sequence[str], *, with_map: bool = False) -> list[Score]:
    """The same of the backbone that a run started from: `untrained_protocols.csv` and `untrained_map.csv`."""
    settings = read_config(run / "config.yaml")
    table, map_ = run / "untrained_protocols.csv", run / "untrained_map.csv"
    return _score(
        table,
        names,
        map_ if with_map else None,
        newer_than=run / "config.yaml",
        backbone=lambda: untrained_backbone(settings),
        settings=settings,
    )


def untrained_backbone(settings: PretrainSettings) -> nn.Module:
    """The backbone as a run with these settings starts with: for one seed the same with every method."""
    seed_everything(settings.seed, workers=True, verbose=False)
    assert settings.backbone is not None  # as config.yaml records them; narrows the types
    assert settings.image_size is not None
    return build_backbone(settings.backbone, settings.image_size)[0]


def features_of(backbone: nn.Module, settings: PretrainSettings, run: Path) -> Features:
    """The features of a run's data, of every image once."""
    data = load_for_run(run, settings).data
    cut = settings.long_tail is not None or settings.indices is not None
    cuda = settings.accelerator in ("auto", "gpu") and torch.cuda.is_available()
    transform = plain_transform(settings.image_size or data.image_size, data.normalize)
    parts = [data.train, data.test, *([load_for_run(run, settings, whole=True).data.train] if cut else [])]
    taken = [
        extract(
            backbone,
            DataLoader(Views(part, transform), settings.batch_size, num_workers=settings.num_workers),
            "cuda" if cuda else "cpu",
        )
        for part in parts
    ]
    return Features(*taken[0], *taken[1], *taken[2 if cut else 0], data.classes)


def balanced(labels: np.ndarray, each: int, seed: int) -> np.ndarray:
    """Positions of `each` images of every class, or as many as the smallest class has, drawn with the seed."""
    each = min(each, int(np.bincount(labels)[np.unique(labels)].min()))
    order = np.random.default_rng(seed).permutation(len(labels))
    return np.sort(np.concatenate([order[labels[order] == c][:each] for c in np.unique(labels)]))


def read(table: Path) -> list[Score]:
    """The scores of a CSV that `score_run` wrote."""
    with table.open(newline="") as file:
        return [
            Score(row["protocol"], row["group"], float(row["value"]), int(row["n"]), int(row["train_images"]))
            for row in csv.DictReader(file)
        ]


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """A CSV, whole or not at all; numbers with eight digits, nothing for None."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.8g}" if isinstance(value, float) else value for key, value in row.items()})
    files.write_text(path, text.getvalue())


def _score(
    table: Path,
    names: Sequence[str],
    map_: Path | None,
    *,
    newer_than: Path,
    backbone: Callable[[], nn.Module],
    settings: PretrainSettings,
) -> list[Score]:
    for name in names:
        protocol(name)

    def state() -> tuple[list[Score], list[str], bool]:
        found = read(table) if _current(table, newer_than) else []
        there = {each.protocol for each in found}
        return found, [name for name in names if name not in there], map_ is not None and not _current(map_, newer_than)

    found, missing, no_map = state()
    if missing or no_map:
        with alone(table.parent, wait=True):
            found, missing, no_map = state()  # another report may have scored it meanwhile
            features = features_of(backbone(), settings, table.parent)
            found += score(features, missing)
            write_table(table, [f.name for f in fields(Score)], map(vars, found))
            if map_ and no_map:
                _write_map(map_, features)
    return [each for name in names for each in found if each.protocol == name]


def _current(path: Path, newer_than: Path) -> bool:
    return path.exists() and path.stat().st_mtime >= newer_than.stat().st_mtime


def _write_map(path: Path, features: Features) -> None:
    from sklearn.manifold import TSNE

    n = len(features.labels)
    chosen = np.sort(np.random.default_rng(0).permutation(n)[:MAP_IMAGES])
    units = F.normalize(features.test[torch.from_numpy(chosen)], dim=1).numpy()
    places = TSNE(perplexity=min(30.0, (len(units) - 1) / 3), init="pca", random_state=0).fit_transform(units)
    labels = features.labels[torch.from_numpy(chosen)].tolist()
    rows = [
        {"x": x, "y": y, "class": c, "name": features.classes[c]}
        for (x, y), c in zip(places.tolist(), labels, strict=True)
    ]
    write_table(path, ["x", "y", "class", "name"], rows)


def _weighted_knn(f: Features) -> Tensor:
    return knn_classes(f.train, f.train_labels, f.test, num_classes=f.num_classes, k=200, t=0.1)[None]


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
