"""The scores of a run, by every protocol, kept in its folder."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning import seed_everything
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dystress_plugin.experiment.backbone import build_backbone
from dystress_plugin.experiment.data.datasets import Views, load_for_run
from dystress_plugin.experiment.data.transforms import plain_transform
from dystress_plugin.experiment.evaluate.features import extract, trained_backbone
from dystress_plugin.experiment.evaluate.protocols import Features, groups, protocol
from dystress_plugin.experiment.io.config import read_config
from dystress_plugin.experiment.io.lock import alone
from dystress_plugin.experiment.io.tables import write_table
from dystress_plugin.experiment.spec import RunSpec

MAP_IMAGES = 1000  # of the embedding map


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


def untrained_backbone(settings: RunSpec) -> nn.Module:
    """The backbone as a run with these settings starts with: for one seed the same with every method."""
    seed_everything(settings.seed, workers=True, verbose=False)
    return build_backbone(settings.model.backbone, settings.model.image_size)[0]


def features_of(backbone: nn.Module, settings: RunSpec, run: Path) -> Features:
    """The features of a run's data, of every image once."""
    data = load_for_run(run, settings).data
    cut = settings.data.cut
    cuda = settings.hardware.accelerator in ("auto", "gpu") and torch.cuda.is_available()
    transform = plain_transform(settings.model.image_size, data.normalize)
    parts = [data.train, data.test, *([load_for_run(run, settings, whole=True).data.train] if cut else [])]
    taken = [
        extract(
            backbone,
            DataLoader(Views(part, transform), settings.data.batch_size, num_workers=settings.data.num_workers),
            "cuda" if cuda else "cpu",
        )
        for part in parts
    ]
    return Features(*taken[0], *taken[1], *taken[2 if cut else 0], data.classes)


def read(table: Path) -> list[Score]:
    """The scores of a CSV that `score_run` wrote."""
    with table.open(newline="") as file:
        return [
            Score(row["protocol"], row["group"], float(row["value"]), int(row["n"]), int(row["train_images"]))
            for row in csv.DictReader(file)
        ]


def _score(
    table: Path,
    names: Sequence[str],
    map_: Path | None,
    *,
    newer_than: Path,
    backbone: Callable[[], nn.Module],
    settings: RunSpec,
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
