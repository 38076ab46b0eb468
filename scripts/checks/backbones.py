"""Trains a step of every backbone: all of torchvision's names, and the smallest of each of timm's families.

    python scripts/checks/backbones.py [--sizes 32 64 224] [--timm families] [--out results/backbones.csv]

A backbone at a size is `trained`, `refused` by a ValueError of one line, `skipped` for its number of parameters, or
`broken`, which must be none. Trained is a step of the module of `dystress pretrain` on four images in two views, with
finite loss, gradients, weights and features, weights that load into a new network, and copies as a queue and spawned
processes make them. The column `unused` counts parameters without a gradient, which strategy=ddp does not take.

The table is written as it grows, small networks first. All of it happens in another process, so that not even a crash
stops it.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import math
import multiprocessing
import pickle
import sys
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import timm
import torch
from torchvision import models

from dystress_plugin import recipes
from dystress_plugin.experiment.backbone import build_backbone
from dystress_plugin.experiment.data.datasets import Data, load
from dystress_plugin.experiment.pretrain.resolve import build_module, resolve
from dystress_plugin.experiment.settings import PretrainSettings

IMAGES = 4
COLUMNS = ("library", "family", "backbone", "parameters", "image_size", "outcome", "features", "unused", "reason")


class Candidate(NamedTuple):
    """A name, and its parameters in millions, with the classifier; NaN where there is no knowing."""

    library: str
    family: str
    backbone: str
    parameters: float


def candidates(which: str) -> list[Candidate]:
    """All that is to be tried, small ones first."""
    classifiers = models.list_models(module=models)
    found = [Candidate("torchvision", "", name, told_parameters(name)) for name in models.list_models()]
    for family in timm.list_modules() if which != "none" else ():
        # A name that both libraries have is torchvision's; those that begin with test_ are smaller than what is in use.
        names = [name for name in timm.list_models(module=family, exclude_filters="test_*") if name not in classifiers]
        members = [Candidate("timm", family, name, counted_parameters(name)) for name in names]
        members.sort(key=size_of)
        found += members if which == "all" else members[:1]
    return sorted(found, key=size_of)


def size_of(candidate: Candidate) -> float:
    return math.inf if math.isnan(candidate.parameters) else candidate.parameters


def told_parameters(name: str) -> float:
    """As torchvision tells them."""
    weights = next(iter(models.get_model_weights(name)), None)
    return math.nan if weights is None else round(weights.meta["num_params"] / 1e6, 3)


def counted_parameters(name: str) -> float:
    """Of one of timm's networks, counted without making them."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = timm.create_model(name)
    except Exception:
        return math.nan
    return round(sum(p.numel() for p in network.parameters()) / 1e6, 3)


def attempt(name: str, image_size: int, threads: int) -> dict[str, Any]:
    """Outcome and reason, and the width of the features."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    digits = load("digits", root="", download=False, long_tail=None, seed=0)
    try:
        return {"outcome": "trained"} | step(name, image_size, digits)
    except ValueError as error:
        lines = str(error).splitlines()
        clear = len(lines) == 1 and lines[0].startswith(f"backbone={name} ")
        return {"outcome": "refused" if clear else "broken", "reason": " ".join(lines)}
    except Exception as error:
        return {"outcome": "broken", "reason": f"{type(error).__name__}: {error}".replace("\n", " ")}


def step(name: str, image_size: int, data: Data) -> dict[str, Any]:
    """Trains a step and looks at what comes out; whatever is wrong is a RuntimeError, or as it comes."""
    recipe = recipes.recipe("dystress")
    settings = PretrainSettings(method=recipe.name, backbone=name, image_size=image_size, batch_size=IMAGES)
    module = build_module(resolve(settings, data, 1), data)
    trainer = SimpleNamespace(estimated_stepping_batches=10)
    module.trainer = trainer  # type: ignore[assignment]
    optimizer = module.configure_optimizers()["optimizer"]
    copy.deepcopy(module.backbone)
    module.trainer = None
    pickle.Pickler(io.BytesIO()).dump(module.backbone)

    views = [torch.randn(IMAGES, 3, image_size, image_size) for _ in range(2)]
    loss = module.loss(*module.embed(views))
    loss.backward()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    unused = [name for name, p in trained.items() if p.grad is None]
    finite("loss", loss)
    for which, parameter in trained.items():
        if parameter.grad is not None:
            finite(f"gradient of {which}", parameter.grad)
    optimizer.step()
    for which, value in module.state_dict().items():
        finite(which, value)
    with torch.no_grad():
        features = module.eval().backbone(views[0]).flatten(1)
    finite("features", features)
    again, width = build_backbone(name, image_size)
    again.load_state_dict(module.backbone.state_dict())
    if features.shape != (IMAGES, width):
        raise RuntimeError(f"features of shape {tuple(features.shape)}, not {(IMAGES, width)}")
    return {"features": width, "unused": len(unused)}


def finite(what: str, value: torch.Tensor) -> None:
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise RuntimeError(f"{what} is not finite")


def rows(found: list[Candidate], options: argparse.Namespace) -> Any:
    """A row for every candidate and size."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, context)
    for candidate in found:
        for image_size in options.sizes:
            row = candidate._asdict() | {"image_size": image_size}
            if size_of(candidate) > options.most:
                yield row | {
                    "outcome": "skipped",
                    "reason": f"more than {options.most:g} million parameters, or unknown",
                }
                continue
            try:
                yield row | pool.submit(attempt, candidate.backbone, image_size, options.threads).result()
            except BrokenProcessPool:
                pool = ProcessPoolExecutor(1, context)
                yield row | {"outcome": "broken", "reason": "the process died"}
    pool.shutdown()


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 224], help="pixels (default: %(default)s)")
    parser.add_argument("--timm", choices=("families", "all", "none"), default="families", help="which of timm's")
    parser.add_argument("--most", type=float, default=150, help="million parameters (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/backbones.csv"))
    options = parser.parse_args(given)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows(candidates(options.timm), options):
            writer.writerow(row)
            file.flush()
            counts[row["outcome"]] += 1
            if row["outcome"] == "broken":
                print(f"{row['backbone']} at {row['image_size']}: {row['reason']}", flush=True)
    print(", ".join(f"{counts[outcome]} {outcome}" for outcome in ("trained", "refused", "skipped", "broken")))
    return int(counts["broken"] > 0)


if __name__ == "__main__":
    sys.exit(main())
