"""The layout axis: which embeddings are anchors, and what each of them is compared with.

Every layout takes (views, batch, dim) vectors of length 1, row i of each view showing image i.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dystress_plugin import distributed, tracing


class Hard(NamedTuple):
    """Of the hard negatives that were given for an anchor, (rows, hard): cosines, with gradient, and columns."""

    cosine: Tensor
    columns: Tensor


class Block(NamedTuple):
    """Anchors that share their candidates: a rectangle of the matrix of similarities.

    Attributes:
        anchors: (rows, dim) of length 1.
        positive_cosine: (rows, positives), with gradient.
        candidates: (columns, dim) of length 1; None where they are the anchors themselves.
        excluded: (rows, any) int64 on the CPU, the columns that are not negatives of each row.
        hard: where each row's own hard negatives are among its negatives; None without.
    """

    anchors: Tensor
    positive_cosine: Tensor
    candidates: Tensor | None
    excluded: Tensor
    hard: Hard | None = None

    @property
    def num_negatives(self) -> int:
        """How many negatives each anchor has."""
        return len(self.anchors if self.candidates is None else self.candidates) - self.excluded.shape[1]


def views(units: Tensor, *, gather: bool) -> list[Block]:
    """Every view of every image is an anchor; positives are the image's other views, negatives all of other images.

    SimCLR's layout. Anchors come view by view.
    """
    number, batch, _ = units.shape
    anchors = units.flatten(0, 1)
    # Each pair of views once; it is a positive of both.
    cosine = {frozenset((a, b)): (units[a] * units[b]).sum(dim=1) for a in range(number) for b in range(a)}
    others = [[frozenset((a, (a + shift) % number)) for a in range(number)] for shift in range(1, number)]
    positive_cosine = torch.stack([torch.cat([cosine[pair] for pair in pairs]) for pairs in others], dim=1)
    if not gather or distributed.world_size() == 1:
        return [Block(anchors, positive_cosine, None, _same_image(units, batch, 0))]
    everything, start = distributed.all_rows_with_gradient(units.transpose(0, 1))  # (images, views, dim)
    candidates = everything.transpose(0, 1).flatten(0, 1)
    return [Block(anchors, positive_cosine, candidates, _same_image(units, len(everything), start))]


def queue(units: Tensor, keys: Tensor) -> list[Block]:
    """View 0 holds the anchors, view 1 their positives, and the keys are the negatives: MoCo's layout."""
    anchors, positives = units
    positive_cosine = (anchors * positives).sum(dim=1, keepdim=True)
    nothing = torch.empty(len(anchors), 0, dtype=torch.int64)
    return [Block(anchors, positive_cosine, keys.to(anchors.dtype), nothing)]


def one_way(units: Tensor, *, gather: bool) -> list[Block]:
    """Anchors from side 0, candidates from side 1, row i of each belonging together: SimCSE's layout.

    Further sides are hard negatives, which every anchor is compared with: the candidates' rows after those of side 1.
    """
    anchors, positives = units[0], units[1]
    others = units[1:].transpose(0, 1)  # (batch, sides, dim)
    everything, start = distributed.all_rows_with_gradient(others) if gather else (others, 0)
    own = start + torch.arange(len(anchors))
    candidates = everything.transpose(0, 1).flatten(0, 1)
    hard = None
    if len(units) > 2:
        columns = own[:, None] + len(everything) * torch.arange(1, len(units) - 1)
        hard = Hard((anchors[:, None] * others[:, 1:]).sum(dim=2), columns)
    return [Block(anchors, (anchors * positives).sum(dim=1, keepdim=True), candidates, own[:, None], hard)]


def both_ways(units: Tensor, *, gather: bool) -> list[Block]:
    """`one_way` from side 0 to side 1 and from side 1 to side 0: CLIP's layout. The way back has no hard negatives."""
    return one_way(units, gather=gather) + one_way(units[:2].flip(0), gather=gather)


def _same_image(units: Tensor, images: int, start: int) -> Tensor:
    """For every anchor, view by view, the candidates that show its image; of all `images` its own begin at `start`."""
    number, batch, _ = units.shape
    # What a compiler or a transform creates must not outlive it.
    table = _same_image_table if tracing.eager(units) else _same_image_table.__wrapped__
    return table(number, batch, images, start)


@lru_cache(maxsize=8)
def _same_image_table(number: int, batch: int, images: int, start: int) -> Tensor:
    own = start + torch.arange(batch).repeat(number)
    return own[:, None] + images * torch.arange(number)[None, :]


LAYOUTS = {"views": views, "one_way": one_way, "both_ways": both_ways}
