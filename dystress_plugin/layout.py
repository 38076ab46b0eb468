"""The layout axis: which embeddings are anchors, and what each of them is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dystress_plugin import distributed


class Block(NamedTuple):
    """Anchors that share their candidates: a rectangle of the matrix of similarities.

    Attributes:
        anchors: (rows, dim) of length 1.
        positive_cosine: (rows, positives), with gradient.
        candidates: (columns, dim) of length 1; None where they are the anchors themselves.
        excluded: (rows, any) int64 on the CPU, the columns that are not negatives of each row.
    """

    anchors: Tensor
    positive_cosine: Tensor
    candidates: Tensor | None
    excluded: Tensor

    @property
    def num_negatives(self) -> int:
        """How many negatives each anchor has."""
        return len(self.anchors if self.candidates is None else self.candidates) - self.excluded.shape[1]


def views(units: Sequence[Tensor], *, gather: bool) -> list[Block]:
    """Every view of every image is an anchor; positives are the image's other views, negatives all of other images.

    SimCLR's layout. Anchors come view by view.
    """
    number, batch = len(units), len(units[0])
    stacked = torch.stack(list(units), dim=1)  # (batch, views, dim)
    cosine = stacked @ stacked.mT  # (batch, views, views)
    others = [[w for w in range(number) if w != v] for v in range(number)]
    positive_cosine = torch.cat([cosine[:, v, others[v]] for v in range(number)])

    everything, start = distributed.all_rows_with_gradient(stacked) if gather else (stacked, 0)
    own = start + torch.arange(batch).repeat(number)
    excluded = own[:, None] + len(everything) * torch.arange(number)[None, :]
    alone = everything is stacked
    candidates = None if alone else everything.transpose(0, 1).flatten(0, 1)
    return [Block(torch.cat(list(units)), positive_cosine, candidates, excluded)]


def queue(units: Sequence[Tensor], keys: Tensor) -> list[Block]:
    """View 0 holds the anchors, view 1 their positives, and the keys are the negatives: MoCo's layout."""
    anchors, positives = units
    positive_cosine = (anchors * positives).sum(dim=1, keepdim=True)
    nothing = torch.empty(len(anchors), 0, dtype=torch.int64)
    return [Block(anchors, positive_cosine, keys.to(anchors.dtype), nothing)]


def one_way(units: Sequence[Tensor], *, gather: bool) -> list[Block]:
    """Anchors from side 0, candidates from side 1, row i of each belonging together: SimCSE's layout."""
    anchors, others = units
    everything, start = distributed.all_rows_with_gradient(others) if gather else (others, 0)
    own = start + torch.arange(len(anchors))
    return [Block(anchors, (anchors * others).sum(dim=1, keepdim=True), everything, own[:, None])]


def both_ways(units: Sequence[Tensor], *, gather: bool) -> list[Block]:
    """`one_way` from side 0 to side 1 and from side 1 to side 0: CLIP's layout."""
    return one_way(units, gather=gather) + one_way(units[::-1], gather=gather)


LAYOUTS = {"views": views, "one_way": one_way, "both_ways": both_ways}
