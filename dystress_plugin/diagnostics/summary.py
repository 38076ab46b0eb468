"""What a temperature does to the first images of a batch: every pair's similarity and temperature, and summaries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dystress_plugin.arguments import Index
from dystress_plugin.contrastive import ContrastiveLoss, Pairs
from dystress_plugin.metrics import uniformity

MAX_IMAGES = 128  # 65 thousand pairs of two views
BINS = 40


class Summary(NamedTuple):
    """One quantity of one kind of pairs: four of them describe a batch.

    Attributes:
        loss: where the loss is in its module, such as "criterion".
        pairs: "positive" or "negative".
        quantity: "similarity" or "temperature".
        values: (count,) on the CPU, without those that are not finite.
        low: lower end of the first bin: -1 for similarities, 0 for temperatures.
        high: upper end of the last bin: 1 for similarities, for temperatures the highest of the batch.
    """

    loss: str
    pairs: str
    quantity: str
    values: Tensor
    low: float
    high: float

    @property
    def statistics(self) -> dict[str, float]:
        """Mean, min and max."""
        values = self.values.double()  # or the mean of equal values may round to below their min
        return {how: float(getattr(values, how)()) for how in ("mean", "min", "max")}

    @property
    def counts(self) -> list[int]:
        """How many values are in each of `BINS` bins of equal width."""
        # A cosine may round to just above 1.
        inside = self.values.clamp(self.low, self.high)
        return [int(count) for count in torch.histc(inside, BINS, self.low, self.high).tolist()]

    @property
    def edges(self) -> list[float]:
        """The `BINS + 1` ends of the bins."""
        width = (self.high - self.low) / BINS
        return [self.low + width * number for number in range(BINS)] + [self.high]

    @property
    def tag(self) -> str:
        """Name of its histogram in TensorBoard and wandb; `_mean`, `_min` and `_max` are added for the scalars."""
        return "/".join(part for part in ("diagnostics", self.loss, f"{self.pairs}_{self.quantity}") if part)


def summaries(
    loss: ContrastiveLoss,
    *views: Tensor,
    index: Index | None = None,
    epoch: float | None = None,
    max_images: int = MAX_IMAGES,
    name: str = "",
) -> list[Summary]:
    """Describes the first `max_images` of a batch; to be called before the loss, whose state it reads and leaves alone.

    The other arguments are those of the loss; `name` becomes `Summary.loss`.

    Returns:
        Similarities and temperatures of the positives, then of the negatives; nothing where there is nothing finite.
    """
    seen = some_pairs(loss, *views, index=index, epoch=epoch, max_images=max_images)
    # With mixed precision a step may overflow, and GradScaler leaves it out: that is no reason to stop here.
    finite = [values[torch.isfinite(values)].cpu() for values in seen]
    highest = max((float(tau.max()) for tau in (finite[1], finite[3]) if len(tau)), default=0.0)
    kinds = [(pairs, quantity) for pairs in ("positive", "negative") for quantity in ("similarity", "temperature")]
    return [
        Summary(name, *kind, values, *((-1.0, 1.0) if kind[1] == "similarity" else (0.0, highest)))
        for kind, values in zip(kinds, finite, strict=True)
        if len(values)
    ]


@torch.no_grad()
def temperature_summary(
    loss: ContrastiveLoss,
    *views: Tensor,
    index: Index | None = None,
    epoch: float | None = None,
    max_images: int = MAX_IMAGES,
) -> dict[str, Tensor]:
    """What the temperature does to the first `max_images` of a batch; changes no state and needs no gradient.

    The other arguments are those of the loss. Of the negatives it looks at a square of `max_images` times the views.

    Returns:
        0-dim tensors `tau_positive_mean`, `_min`, `_max`, the same for `tau_negative`, `alignment`, `uniformity`.
    """
    pairs = some_pairs(loss, *views, index=index, epoch=epoch, max_images=max_images)
    summary: dict[str, Tensor] = {}
    for name, tau in (("positive", pairs.positive_tau), ("negative", pairs.negative_tau)):
        summary |= {f"tau_{name}_mean": tau.mean(), f"tau_{name}_min": tau.min(), f"tau_{name}_max": tau.max()}
    summary["alignment"] = pairs.positive_cosine.mean()
    summary["uniformity"] = uniformity(views[0].detach()[:max_images])
    return summary


@torch.no_grad()
def some_pairs(
    loss: ContrastiveLoss,
    *views: Tensor,
    index: Index | None = None,
    epoch: float | None = None,
    max_images: int = MAX_IMAGES,
    max_keys: int = 1024,
) -> Pairs:
    """`ContrastiveLoss.pairs` of the first `max_images` of a batch, and with a queue of at most `max_keys` of its keys.

    With a queue it must be called before the loss, which puts this batch's keys among the negatives of the next.
    """
    first = [view.detach()[:max_images] for view in views]
    if isinstance(index, (tuple, list)):
        index = (index[0][:max_images], index[1][:max_images])
    elif index is not None:
        index = index[:max_images]
    return loss.pairs(*first, index=index, epoch=epoch, max_keys=max_keys)
