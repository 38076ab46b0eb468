"""The figures of a run."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dystress_plugin.experiment.io import files
from dystress_plugin.experiment.pretrain.module import PretrainModule
from dystress_plugin.experiment.style import NEGATIVE, OUTLINE, PNG, POSITIVE, SOLID
from dystress_plugin.metrics import some_pairs

# Title and axis of what is measured after every epoch, with labels and without.
QUALITY = {
    "knn_top1": ("Weighted kNN on the test images", "top-1 accuracy (%)"),
    "effective_rank": ("Effective rank of the features (RankMe)", "effective rank"),
}

TAUS = [f"tau_{pairs}_{how}" for pairs in ("positive", "negative") for how in ("mean", "min", "max")]

DRAWN = ("epoch", "loss", "alignment", "uniformity", *TAUS)


def curves(metrics: Path, path: Path, title: str, color: str) -> None:
    """Loss, kNN or effective rank, temperatures, alignment and uniformity over epochs; `color`: of the method."""
    rows = files.read_table(metrics, _numbers, files.ROWS_IN_CHECKPOINT)
    column = {name: [row[name] for row in rows] for name in rows[0]}
    epoch = column["epoch"]
    with mpl.rc_context(PNG):
        figure = Figure(figsize=(9, 6), layout="constrained")
        (loss, quality), (tau, shape) = figure.subplots(2, 2, sharex=True)
        figure.suptitle(f"{title}: pretraining")
        loss.plot(epoch, column["loss"], color=color)
        loss.set(title="Loss", ylabel="loss (nats)")
        measure = "knn_top1" if "knn_top1" in column else "effective_rank"
        measured = [(at, value) for at, value in zip(epoch, column[measure], strict=True) if not math.isnan(value)]
        quality.plot([at for at, _ in measured], [value for _, value in measured], color=color)
        quality.set(title=QUALITY[measure][0], ylabel=QUALITY[measure][1])
        for pairs, its, start in (("positive", POSITIVE, 0), ("negative", NEGATIVE, 2)):
            tau.plot(epoch, column[f"tau_{pairs}_mean"], color=its, label=f"{pairs} pairs: mean, least and most")
            for end in ("min", "max"):  # no band: where two lie on each other they would be of a third colour
                tau.plot(epoch, column[f"tau_{pairs}_{end}"], color=its, linestyle=(start, (1, 3)), linewidth=1)
        tau.set(title="Temperature", xlabel="epoch (the first is 0)", ylabel="temperature", ylim=(0, None))
        tau.legend(frameon=False, fontsize=8)
        shape.plot(epoch, column["alignment"], color=POSITIVE, label="alignment (mean cosine of positives)")
        shape.plot(epoch, column["uniformity"], color=NEGATIVE, label="uniformity (log mean potential)")
        shape.set(title="Embedding", xlabel="epoch (the first is 0)", ylabel="value")
        shape.legend(frameon=False, fontsize=8)
        for axes in (tau, shape):
            axes.xaxis.get_major_locator().set_params(integer=True)
        if len(epoch) == 1:  # a line through one point is not seen
            shape.set_xticks(epoch)
            for line in (line for axes in figure.axes for line in axes.lines):
                line.set_marker("o")
        figure.savefig(path)


def _numbers(cells: dict[str, str]) -> dict[str, float]:
    # Nothing in a column where the epoch has not been measured.
    return {name: float(cells[name] or "nan") for name in (*DRAWN, *(name for name in QUALITY if name in cells))}


@torch.no_grad()
def profile(module: PretrainModule, views: list[Tensor], index: Tensor, epoch: int, path: Path, title: str) -> None:
    """The temperature at every cosine, over the histograms of the cosines of one batch of views."""
    # In train mode, as the loss sees the embeddings; that moves the statistics of the norms, which are put back.
    state = copy.deepcopy(module.state_dict())
    z = module.train().embed([view.to(module.device) for view in views])
    module.load_state_dict(state)
    pairs = some_pairs(module.loss, *z, index=index, epoch=epoch, max_images=256)
    with mpl.rc_context(PNG):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        density = figure.subplots()
        temperature = density.twinx()
        for cosine, tau, color, shape, label in (
            (pairs.negative_cosine, pairs.negative_tau, NEGATIVE, SOLID, "negative pairs"),
            (pairs.positive_cosine, pairs.positive_tau, POSITIVE, OUTLINE, "positive pairs"),
        ):
            density.hist(cosine.cpu(), bins=80, range=(-1, 1), density=True, color=color, label=label, **shape)
            chosen = torch.randperm(len(cosine), generator=torch.Generator().manual_seed(0))[:3000]
            temperature.scatter(cosine.cpu()[chosen], tau.cpu()[chosen], s=6, color=color, linewidths=0)
        highest = max(float(pairs.negative_tau.max()), float(pairs.positive_tau.max()))
        density.set(xlim=(-1, 1), xlabel="cosine similarity", ylabel="density of pairs (areas)")
        temperature.set(ylabel="temperature (dots)", ylim=(0, 1.25 * highest))
        temperature.spines["right"].set_visible(True)
        temperature.grid(visible=False)
        density.set_title(f"{title}: temperature over the similarities of one batch")
        density.legend(loc="upper left", frameon=False)
        figure.savefig(path)
