"""The scores of a run, by every protocol, kept in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dystress_plugin.experiment.backbone import build_backbone
from dystress_plugin.experiment.data.datasets import Data, Images, Views, load_evaluated, load_for_run
from dystress_plugin.experiment.data.memory import plain_batches
from dystress_plugin.experiment.data.transforms import plain_transform
from dystress_plugin.experiment.devices import torch_device
from dystress_plugin.experiment.evaluate.protocols import Features, Protocol, groups, protocol, weighted_knn
from dystress_plugin.experiment.io import files
from dystress_plugin.experiment.io.config import comparable, read_config
from dystress_plugin.experiment.io.files import write_table
from dystress_plugin.experiment.io.lock import alone
from dystress_plugin.experiment.spec import EvaluationSpec, RunSpec
from dystress_plugin.metrics import effective_rank

WEIGHTS = "backbone.pt"
TABLE, MAP = "protocols.csv", "map.csv"

UNTRAINED = "untrained_"  # before the names of the files that are of the backbone before training
UNTRAINED_TOP1 = "untrained.json"
UNTRAINED_TABLE = f"{UNTRAINED}{TABLE}"
UNTRAINED_FILES = (UNTRAINED_TOP1, UNTRAINED_TABLE, f"{UNTRAINED}{MAP}")

TOP1 = ({"knn_top1", "linear_top1"}, {"effective_rank"})  # with labels, and without

# The settings that the scores of the untrained backbone depend on.
OF_THE_START = (
    *("data", "labels", "val", "long_tail", "long_tail_profile", "indices", "on_bad_image"),
    *("seed", "backbone", "image_size", "knn_k", "knn_t"),
)

MAP_IMAGES = 1000
MAP_COLUMNS = ("x", "y", "class", "name")


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


def score(features: Features, protocols: Iterable[Protocol]) -> list[Score]:
    """Accuracies by every protocol: of all test images, of every class and, where they differ in size, of groups."""
    counts = torch.bincount(features.train_labels, minlength=features.num_classes).numpy()
    in_test = torch.bincount(features.labels, minlength=features.num_classes).numpy()
    present = np.flatnonzero(in_test)
    scores = []
    for chosen in protocols:
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


@dataclass(frozen=True)
class Scores:
    """What one extraction of features gives.

    Attributes:
        top1: `knn_top1`, by the weighted kNN with the run's own settings, and `linear_top1`, as in a summary; without
            labels `effective_rank`.
        by_protocol: the scores by the protocols that were asked for.
        map: the lines of a map; None where none was asked for.
    """

    top1: dict[str, float]
    by_protocol: list[Score]
    map: list[dict[str, Any]] | None

    def write(self, run: Path, prefix: str = "") -> None:
        """Keeps the scores and the map in the folder of a run; of the untrained backbone with that prefix."""
        if self.by_protocol:
            _write_scores(run / f"{prefix}{TABLE}", self.by_protocol)
        if self.map is not None:
            write_table(run / f"{prefix}{MAP}", MAP_COLUMNS, self.map)

    def write_untrained(self, run: Path, settings: RunSpec) -> None:
        """Keeps them in a folder as those of the backbone that a run with these settings starts from."""
        for name in UNTRAINED_FILES:
            (run / name).unlink(missing_ok=True)
        self.write(run, UNTRAINED)
        files.write_text(run / UNTRAINED_TOP1, json.dumps(self.top1 | {"of": _start(settings)}) + "\n")


def read_untrained(run: Path, settings: RunSpec) -> dict[str, float] | None:
    """What the folder says of the backbone that a run with these settings starts from.

    It is there where the run was interrupted, or `dystress compare` has put it there; None where it is not, has no
    scores, or is of another start.
    """
    if not (run / UNTRAINED_TOP1).exists():
        return None
    found = files.read_json(run / UNTRAINED_TOP1)
    return found if found.pop("of", _start(settings)) == _start(settings) and set(found) in TOP1 else None


def _start(settings: RunSpec) -> dict[str, Any]:
    """What the scores before training depend on."""
    return {key: value for key, value in comparable(settings).items() if key in OF_THE_START}


def score_features(features: Features, spec: EvaluationSpec) -> Scores:
    """Scores by the protocols and those of a summary, each computed once."""
    if not features.classes:
        top1 = {"effective_rank": float(effective_rank(features.test))}
        return Scores(top1, [], _map(features) if spec.map else None)
    own = weighted_knn(spec.knn_k, spec.knn_t)
    wanted = {each.name: each for each in (own, protocol("linear"), *map(protocol, spec.protocols))}
    found = score(features, wanted.values())
    knn, linear = (next(s for s in found if (s.protocol, s.group) == (name, "all")) for name in (own.name, "linear"))
    # A share of whole images, as after every epoch: equal to the last digit.
    top1 = {"knn_top1": 100 * round(knn.value * knn.n / 100) / knn.n, "linear_top1": linear.value}
    chosen = [each for name in spec.protocols for each in found if each.protocol == name]
    return Scores(top1, chosen, _map(features) if spec.map else None)


@torch.no_grad()
def extract(backbone: nn.Module, loader: Iterable[Any], device: str) -> tuple[Tensor, Tensor]:
    """Features (images, features) and labels (images,), on the CPU, computed in float32 whatever it was trained in.

    The backbone is left in float32 and in eval mode.
    """
    backbone.to(device, torch.float32).eval()
    parts = [(backbone(images.to(device)).flatten(1).cpu(), labels.cpu()) for images, labels, _ in loader]
    return torch.cat([features for features, _ in parts]), torch.cat([labels for _, labels in parts])


def trained_backbone(run: Path) -> tuple[RunSpec, nn.Module]:
    """The run, as `config.yaml` has it, and the backbone that `dystress pretrain` left in a folder.

    Raises:
        ValueError: for a folder without a finished run, or with damaged files.
    """
    config, weights = run / "config.yaml", run / WEIGHTS
    if not config.exists() or not weights.exists():
        missing = config if not config.exists() else weights
        raise ValueError(f"checkpoint={run} holds no finished run of `dystress pretrain`: {missing} is missing.")
    trained = read_config(config)
    backbone, _ = build_backbone(trained.model.backbone, trained.model.image_size)
    files.load_state(backbone, weights, f"Delete it and run `dystress pretrain` again with out={run}.")
    return trained, backbone


def features_of(
    backbone: nn.Module, data: Data, *, spec: RunSpec, device: str | None = None, pool: Images | None = None
) -> Features:
    """The features of every image, once.

    Args:
        backbone: left in float32 and in eval mode.
        data: the images.
        spec: the run: how large its images are, and how they are loaded.
        device: what it runs on; None: see `scoring_device`.
        pool: where few labelled images are drawn from, if not from the training images.
    """
    size: dict[str, Any] = {"image_size": spec.model.image_size, "normalize": data.normalize}
    device = device or scoring_device(spec)

    def of(images: Images) -> tuple[Tensor, Tensor]:
        loader: Any = None
        if spec.augmentation.augment == "batch":
            loader = plain_batches(images, spec.data.batch_size, lambda: torch.device(device), **size)
        if loader is None:
            views = Views(images, plain_transform(**size))
            loader = DataLoader(views, spec.data.batch_size, num_workers=spec.data.num_workers)
        return extract(backbone, loader, device)

    shown = data.evaluated
    test = of(shown.test)
    train = of(shown.train) if shown.classes else test
    return Features(*train, *test, *(train if pool is None else of(pool)), shown.classes)


def scoring_device(spec: RunSpec) -> str:
    """A GPU, unless the run was to do without. It may be scored where there is none."""
    return torch_device("cpu" if spec.hardware.accelerator == "cpu" else "auto")


def pool_for(spec: RunSpec, names: Iterable[str], load: Callable[[], Data]) -> Images | None:
    """The training images that a part of was cut from, by `load`, where one of the protocols draws from them."""
    cut = spec.data.cut and spec.data.val is None
    return load().train if cut and any(protocol(name).few_labels for name in names) else None


def score_run(run: Path, names: Sequence[str], *, with_map: bool = False, untrained: bool = False) -> list[Score]:
    """Scores the backbone of a finished run by what it has not been scored by: `protocols.csv`, `map.csv`.

    Args:
        run: a folder of `dystress pretrain`.
        names: protocols; those that are in `protocols.csv` already are not computed again.
        with_map: also a t-SNE map of the features of up to 1000 test images.
        untrained: the backbone that it started from instead: `untrained_protocols.csv`, `untrained_map.csv`.

    Raises:
        ValueError: for an unknown protocol, or a folder without a finished run.
    """
    for name in names:
        protocol(name)
    prefix = UNTRAINED if untrained else ""
    if _missing(run, prefix, names, with_map):
        with alone(run, wait=True):
            if missing := _missing(run, prefix, names, with_map):  # another report may have scored it meanwhile
                _add(run, prefix, missing)
    found = read(run / f"{prefix}{TABLE}") if names and is_labelled(run) else []
    return [each for name in names for each in found if each.protocol == name]


def untrained_backbone(settings: RunSpec) -> nn.Module:
    """The backbone as a run with these settings starts with: for one seed the same with every method."""
    seed_everything(settings.seed, workers=True, verbose=False)
    return build_backbone(settings.model.backbone, settings.model.image_size)[0]


def score_start(spec: RunSpec, data: Data, names: Sequence[str], *, pool: Images | None) -> Scores:
    """Scores of what a run starts from, with a map if it has one; `pool` as of `pool_for`."""
    features = features_of(untrained_backbone(spec), data, spec=spec, pool=pool)
    return score_features(features, replace(spec.evaluation, protocols=list(names)))


def features_of_run(backbone: nn.Module, run: Path, spec: RunSpec, names: Iterable[str]) -> Features:
    """The features of a run's data, and of the pool where one of the protocols draws from it."""
    pool = pool_for(spec, names, lambda: load_for_run(run, spec, whole=True).data)
    return features_of(backbone, load_evaluated(run, spec), spec=spec, pool=pool)


def read(table: Path) -> list[Score]:
    """The scores of a CSV that `score_run` wrote."""
    return files.read_table(table, _score, files.ANEW)


def _score(cells: dict[str, str]) -> Score:
    n, train_images = int(cells["n"]), int(cells["train_images"])
    return Score(cells["protocol"], cells["group"], float(cells["value"]), n, train_images)


def is_scored(run: Path, names: Iterable[str], with_map: bool) -> bool:
    """Whether a run has been scored by all these protocols, and has a map if one is wanted."""
    return not _missing(run, "", names, with_map)


def has_weights(run: Path) -> bool:
    """Whether a finished run is there as a whole, and not its tables alone."""
    return (run / WEIGHTS).exists()


def is_labelled(run: Path) -> bool:
    """Whether a finished run has accuracies."""
    summary = run / "summary.json"
    return not summary.exists() or "effective_rank" not in files.read_json(summary)


def _missing(run: Path, prefix: str, names: Iterable[str], with_map: bool) -> list[str]:
    """The protocols and, by its file's name, the map that a folder lacks or that are older than the backbone."""
    if not is_labelled(run):
        names = ()
    table, map_ = run / f"{prefix}{TABLE}", run / f"{prefix}{MAP}"
    there = {each.protocol for each in read(table)} if _current(table, prefix) else set()
    missing = [name for name in names if name not in there]
    return [*missing, MAP] if with_map and not _current(map_, prefix) else missing


def _add(run: Path, prefix: str, missing: Sequence[str]) -> None:
    """Scores by what `_missing` found."""
    if prefix == UNTRAINED:
        spec = read_config(run / "config.yaml")
        backbone = untrained_backbone(spec)
    else:
        spec, backbone = trained_backbone(run)
    table, wanted = run / f"{prefix}{TABLE}", [name for name in missing if name != MAP]
    features = features_of_run(backbone, run, spec, wanted)
    if wanted:
        before = read(table) if _current(table, prefix) else []
        _write_scores(table, [*before, *score(features, map(protocol, wanted))])
    if MAP in missing:
        write_table(run / f"{prefix}{MAP}", MAP_COLUMNS, _map(features))


def _current(path: Path, prefix: str) -> bool:
    """Whether a file is there and no older than the weights that it is of."""
    if not path.exists() or prefix == UNTRAINED or not has_weights(path.parent):
        return path.exists()
    return path.stat().st_mtime >= (path.parent / WEIGHTS).stat().st_mtime


def _write_scores(table: Path, scores: Iterable[Score]) -> None:
    write_table(table, [f.name for f in fields(Score)], map(vars, scores))


def _map(features: Features) -> list[dict[str, Any]]:
    from sklearn.manifold import TSNE

    n = len(features.labels)
    chosen = np.sort(np.random.default_rng(0).permutation(n)[:MAP_IMAGES])
    units = F.normalize(features.test[torch.from_numpy(chosen)], dim=1).numpy()
    places = TSNE(perplexity=min(30.0, (len(units) - 1) / 3), init="pca", random_state=0).fit_transform(units)
    labels = features.labels[torch.from_numpy(chosen)].tolist()
    return [
        {"x": x, "y": y, "class": c, "name": features.classes[c] if features.classes else "no label"}
        for (x, y), c in zip(places.tolist(), labels, strict=True)
    ]
