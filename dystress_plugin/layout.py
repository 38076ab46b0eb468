"""The layout axis: which embeddings are anchors, and what each of them is compared with.

Every layout takes (views, batch, dim) vectors of length 1, row i of each view showing image i.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dystress_plugin import distributed, tracing

# Of the largest mask that is kept for the next batch.
KEPT_ENTRIES = 2**16


class Excluded(NamedTuple):
    """The candidates that are no negatives of an anchor: of anchor i those at start + i % batch + k images, k < copies.

    Numbers instead of a tensor, so that nothing has to be copied to a device, or read from one, to know where they are.

    Attributes:
        batch: anchors of a view.
        images: candidates of a view.
        start: where the candidates of the anchors' images begin within a view.
        copies: in how many views of the candidates an anchor has one.
        first: number of the first anchor, of those that are cut out of all.
    """

    batch: int
    images: int
    start: int
    copies: int
    first: int = 0

    def rows(self, rows: slice) -> Excluded:
        """Those of some of the anchors."""
        return self._replace(first=self.first + rows.start)

    def mask(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """(rows, columns) bool, true where a candidate is excluded; not to be written to."""
        # What a compiler or a transform creates must not outlive it.
        kept = device.type == "cpu" and rows * columns <= KEPT_ENTRIES and tracing.eager()
        return (_kept_mask if kept else _mask)(self, rows, columns, device)

    def columns(self, rows: int, device: torch.device) -> Tensor:
        """(rows, copies) int64, those of every one of so many anchors."""
        own = self.start + (self.first + torch.arange(rows, device=device)) % self.batch
        return own[:, None] + self.images * torch.arange(self.copies, device=device)

    def fill_(self, tile: Tensor, value: float, *, row: int = 0, column: int = 0) -> Tensor:
        """Puts `value` into the excluded entries of a tile that begins at that anchor and candidate; returns the tile.

        They lie on diagonals, one for every view of the anchors and of the candidates.
        """
        row += self.first
        height, width = tile.shape
        whole_views = not (column or row % self.batch or height % self.batch or (self.images and width % self.images))
        if self.copies and whole_views:  # all diagonals at once
            views = tile.view(-1, self.batch, width // self.images, self.images)
            views[:, :, : self.copies, self.start : self.start + self.batch].diagonal(dim1=1, dim2=3).fill_(value)
            return tile
        for copy in range(self.copies):
            for view in range(row // self.batch, -(-(row + height) // self.batch)):
                right = self.start + copy * self.images - view * self.batch  # of an anchor's number is its candidate's
                low = max(row, view * self.batch, column - right)
                high = min(row + height, (view + 1) * self.batch, column + width - right)
                if low < high:
                    left = low + right - column
                    tile[low - row : high - row, left : left + high - low].diagonal().fill_(value)
        return tile


def _mask(excluded: Excluded, rows: int, columns: int, device: torch.device) -> Tensor:
    # Not zeros_like: under vmap that would be one for every example.
    out = torch.zeros((rows, columns), dtype=torch.bool, device=device)
    return out.scatter_(1, excluded.columns(rows, device), True)


@lru_cache(maxsize=8)
def _kept_mask(excluded: Excluded, rows: int, columns: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # autograd may save it
        return _mask(excluded, rows, columns, device)


class Alike(NamedTuple):
    """The candidates that are of an anchor's class, which are no negatives; itself among them, all others positives.

    Attributes:
        anchors: (rows,) int64, the classes of anchors.
        candidates: (columns,), those of candidates.
        itself: (rows,) int64, which candidate an anchor is.
    """

    anchors: Tensor
    candidates: Tensor
    itself: Tensor

    def rows(self, rows: slice) -> Alike:
        """Those of some of the anchors."""
        return Alike(self.anchors[rows], self.candidates, self.itself[rows])

    def mask(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """(rows, columns) bool, true where a candidate is of an anchor's class."""
        return self.anchors[:, None] == self.candidates

    def positives(self) -> Tensor:
        """(rows, columns) bool, true where a candidate is another of an anchor's class."""
        others = torch.arange(len(self.candidates), device=self.itself.device) != self.itself[:, None]
        return (self.anchors[:, None] == self.candidates) & others

    def fill_(self, tile: Tensor, value: float, *, row: int = 0, column: int = 0) -> Tensor:
        """Puts `value` where the mask is true into a tile that begins at that anchor and candidate; returns it."""
        height, width = tile.shape
        same = self.anchors[row : row + height, None] == self.candidates[column : column + width]
        return tile.masked_fill_(same, value)


NOTHING = Excluded(batch=1, images=0, start=0, copies=0)


class Block(NamedTuple):
    """Anchors that share their candidates: a rectangle of the matrix of similarities.

    Attributes:
        anchors: (rows, dim) of length 1.
        positive_cosine: (rows, positives), with gradient; with classes their mean, (rows, 1).
        candidates: (columns, dim) of length 1; None where they are the anchors themselves.
        excluded: the columns that are not negatives of each row.
        hard: (rows, hard), cosines of each row with its own hard negatives, with gradient; None without. Their columns
            are further copies of the one that is excluded.
    """

    anchors: Tensor
    positive_cosine: Tensor
    candidates: Tensor | None
    excluded: Excluded | Alike
    hard: Tensor | None = None

    @property
    def num_negatives(self) -> int | Tensor:
        """How many negatives each anchor has."""
        everything = len(self.anchors if self.candidates is None else self.candidates)
        if isinstance(self.excluded, Alike):
            return everything - _count(self.excluded.anchors, self.excluded.candidates)[0]
        return everything - self.excluded.copies

    @property
    def own(self) -> Excluded:
        """The columns that are of each row's own: those that are excluded, and its hard negatives."""
        assert isinstance(self.excluded, Excluded)  # classes have no hard negatives; narrows the type
        return self.excluded if self.hard is None else self.excluded._replace(copies=1 + self.hard.shape[1])


def views(units: Tensor, *, gather: bool) -> list[Block]:
    """Every view of every image is an anchor; positives are the image's other views, negatives all of other images.

    SimCLR's layout. Anchors come view by view.
    """
    number, batch, _ = units.shape
    anchors = units.flatten(0, 1)
    # Each pair of views once; it is a positive of both.
    each = units.unbind()
    cosine = {frozenset((a, b)): (each[a] * each[b]).sum(dim=1) for a in range(number) for b in range(a)}
    others = [[frozenset((a, (a + shift) % number)) for a in range(number)] for shift in range(1, number)]
    positive_cosine = torch.stack([torch.cat([cosine[pair] for pair in pairs]) for pairs in others], dim=1)
    if not gather or distributed.world_size() == 1:
        return [Block(anchors, positive_cosine, None, Excluded(batch, batch, 0, number))]
    everything, start = distributed.all_rows_with_gradient(units.transpose(0, 1), of_batch=True)  # (images, views, dim)
    candidates = everything.transpose(0, 1).flatten(0, 1)
    return [Block(anchors, positive_cosine, candidates, Excluded(batch, len(everything), start, number))]


def classes(units: Tensor, labels: Tensor, *, gather: bool) -> list[Block]:
    """Every view of every image is an anchor; positives are all others of its class, negatives all of other classes.

    SupCon's layout. Anchors come view by view.

    Args:
        units: as for `views`.
        labels: (batch,) int64.
        gather: whether candidates are those of all ranks.
    """
    number, batch, _ = units.shape
    anchors, start, of_candidates = units.flatten(0, 1), 0, labels
    gathers = gather and distributed.world_size() > 1
    candidates = anchors
    if gathers:
        everything, start = distributed.all_rows_with_gradient(units.transpose(0, 1), of_batch=True)
        candidates = everything.transpose(0, 1).flatten(0, 1)
        (of_candidates,) = distributed.all_rows(labels, of_batch=True)
    if labels.device.type == "cpu" and tracing.eager(labels) and (of_candidates == of_candidates[0]).all():
        raise ValueError(f"labels are {of_candidates[0].item()} for the whole batch: there is no other class in it.")
    itself = Excluded(batch, len(of_candidates), start, 1).columns(batch, units.device)[:, 0]
    itself = (itself + len(of_candidates) * torch.arange(number, device=units.device)[:, None]).flatten()
    alike = Alike(labels.repeat(number), of_candidates.repeat(number), itself)
    return [Block(anchors, _mean_cosine(anchors, candidates, alike), candidates if gathers else None, alike)]


def _mean_cosine(anchors: Tensor, candidates: Tensor, alike: Alike) -> Tensor:
    """(rows, 1), of every anchor with its positives: with their sum, which is that of its class without itself."""
    count, place = _count(alike.anchors, alike.candidates)
    of_candidates = _count(alike.candidates, alike.candidates)[1]
    sums = torch.zeros_like(candidates).index_add(0, of_candidates, candidates)
    cosine = (anchors * sums[place]).sum(dim=1) - anchors.square().sum(dim=1)
    return (cosine / (count - 1))[:, None]


def _count(labels: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """How often each label is among others, and a number below theirs that tells its class from other classes."""
    ordered = among.sort().values
    place = torch.searchsorted(ordered, labels)
    return torch.searchsorted(ordered, labels, right=True) - place, place


def queue(units: Tensor, keys: Tensor) -> list[Block]:
    """View 0 holds the anchors, view 1 their positives, and the keys are the negatives: MoCo's layout."""
    anchors, positives = units
    positive_cosine = (anchors * positives).sum(dim=1, keepdim=True)
    return [Block(anchors, positive_cosine, keys.to(anchors.dtype), NOTHING)]


def one_way(units: Tensor, *, gather: bool) -> list[Block]:
    """Anchors from side 0, candidates from side 1, row i of each belonging together: SimCSE's layout.

    Further sides are hard negatives, which every anchor is compared with: the candidates' rows after those of side 1.
    """
    return [_way(units, _of_all_ranks(units[1:]) if gather else None)]


def both_ways(units: Tensor, *, gather: bool) -> list[Block]:
    """`one_way` from side 0 to side 1 and from side 1 to side 0: CLIP's layout. The way back has no hard negatives."""
    if not gather:
        return [_way(units), _way(units[:2].flip(0))]
    everything, start = _of_all_ranks(units)  # both sides at once
    return [_way(units, (everything[1:], start)), _way(units[:2].flip(0), (everything[:1], start))]


def _of_all_ranks(units: Tensor) -> tuple[Tensor, int]:
    """The sides with the rows of all ranks, (sides, images, dim), and where this rank's own begin."""
    everything, start = distributed.all_rows_with_gradient(units.transpose(0, 1), of_batch=True)
    return everything.transpose(0, 1), start


def _way(units: Tensor, gathered: tuple[Tensor, int] | None = None) -> Block:
    """Anchors of side 0 against the sides after it, or what is gathered of these."""
    anchors, positives, others = units[0], units[1], units[1:]
    candidates, start = gathered or (others, 0)
    excluded = Excluded(len(anchors), candidates.shape[1], start, copies=1)
    hard = (anchors[:, None] * others[1:].transpose(0, 1)).sum(dim=2) if len(units) > 2 else None
    positive_cosine = (anchors * positives).sum(dim=1, keepdim=True)
    return Block(anchors, positive_cosine, candidates.flatten(0, 1), excluded, hard)


LAYOUTS = {"views": views, "one_way": one_way, "both_ways": both_ways}
