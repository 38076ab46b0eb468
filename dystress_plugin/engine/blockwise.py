"""The blockwise engine: tiles of similarities, computed, reduced and thrown away. Memory grows with the rows.

Two identities carry it. S = Z Z^T is symmetric, so where anchors and candidates are the same, each tile is computed
once and serves its row block and its column block: forward and backward together then cost two full matrix products
instead of four. And |s| <= 1 bounds the logits, so no maximum has to be found unless exp could leave its range.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dystress_plugin.engine.rows import NegativeStats
from dystress_plugin.temperature.base import LogitMap, Work

# exp(60) * 2^30 terms and exp(-60) are both inside of float32.
UNSHIFTED = 60.0
# Entries of a tile: on a CPU a few of them fit the caches, on a GPU one fills the chip.
TILE_ENTRIES = {"cpu": 1024 * 1024}
TILE_ENTRIES_ELSEWHERE = 4096 * 4096
# What the forward pass may keep of its tiles for the backward pass, which has to compute the others again.
KEEP_BYTES = 80 * 2**20


def negative_stats(
    anchors: Tensor,
    candidates: Tensor | None,
    excluded: Tensor,
    logit_map: LogitMap,
    *,
    want_cosine: bool,
    tile: int | None = None,
    keep_bytes: int = KEEP_BYTES,
) -> NegativeStats:
    """L_i = log sum_j exp(a(s_ij)) over the negatives j of anchor i, with s_ij = anchors_i . candidates_j.

    Gradients use the closed-form slope of the map; a second derivative is an error.

    Args:
        anchors: (rows, dim), of length 1.
        candidates: (columns, dim), of length 1; None where they are the anchors themselves, each of which then
            excludes those that exclude it.
        excluded: (rows, any) int64 on the CPU, the columns that are not negatives of each row.
        logit_map: a.
        want_cosine: whether to return the negatives' mean cosine as well.
        tile: rows of a tile, and columns unless there are fewer rows; None chooses for the device.
        keep_bytes: memory that tiles may take up between forward and backward pass.
    """
    trains = logit_map.parameter_term(anchors[:, 0]) is not None
    plan = _Plan.make(anchors, candidates, excluded, logit_map, want_cosine or trains, tile, keep_bytes)
    negative, cosine = _Blockwise.apply(anchors, candidates, plan)  # type: ignore[no-untyped-call]
    term = logit_map.parameter_term(cosine)
    return NegativeStats(negative if term is None else negative + term, cosine if want_cosine else None)


@dataclass(frozen=True)
class _Plan:
    """What both passes share beside the embeddings.

    Attributes:
        rows, columns: size of the whole matrix.
        symmetric: whether it is the anchors' with themselves, so that only tiles on and above the diagonal are made.
        row_tile, column_tile: size of a tile.
    """

    rows: int
    columns: int
    symmetric: bool
    row_tile: int
    column_tile: int
    excluded: Tensor
    logit_map: LogitMap
    want_cosine: bool
    keep_bytes: int

    @staticmethod
    def make(
        anchors: Tensor,
        candidates: Tensor | None,
        excluded: Tensor,
        logit_map: LogitMap,
        want_cosine: bool,
        tile: int | None,
        keep_bytes: int,
    ) -> _Plan:
        rows, columns = len(anchors), len(anchors if candidates is None else candidates)
        side = tile or math.isqrt(TILE_ENTRIES.get(anchors.device.type, TILE_ENTRIES_ELSEWHERE))
        row_tile = min(rows, side)
        # Few anchors against a long queue get wide tiles; those of a symmetric matrix have to be square.
        column_tile = side if candidates is None or tile else side * side // row_tile
        return _Plan(rows, columns, candidates is None, side, column_tile, excluded, logit_map, want_cosine, keep_bytes)

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Where the tiles lie."""
        for r in range(0, self.rows, self.row_tile):
            for c in range(r if self.symmetric else 0, self.columns, self.column_tile):
                yield slice(r, min(r + self.row_tile, self.rows)), slice(c, min(c + self.column_tile, self.columns))

    def row_maxima(self, anchors: Tensor, others: Tensor) -> Tensor | None:
        """The largest logit of every row, or None where exp needs no shift."""
        if self.logit_map.bound <= UNSHIFTED:
            return None
        maxima = anchors.new_full((self.rows,), -math.inf)
        for r in range(0, self.rows, self.row_tile):
            for c in range(0, self.columns, self.column_tile):
                rows, columns = slice(r, r + self.row_tile), slice(c, c + self.column_tile)
                logit = self.logit_map.rows(rows).logit(anchors[rows] @ others[columns].T)
                maxima[rows] = torch.maximum(maxima[rows], self.fill(logit, rows, columns, -math.inf).amax(1))
        return maxima

    def exponentials(
        self, cosine: Tensor, rows: slice, columns: slice, shift: Tensor | None, work: Work
    ) -> tuple[Tensor, Tensor]:
        """exp(a(s) - shift) of a tile, 0 in its excluded entries; and a'(s), which may be smaller, if it broadcasts."""
        logit, slope = self.logit_map.rows(rows).logit_and_slope(cosine, work)
        if shift is not None:
            logit.sub_(shift[rows, None])
        return self.fill(logit.exp_(), rows, columns, 0.0), slope

    def fill(self, tile: Tensor, rows: slice, columns: slice, value: float) -> Tensor:
        """The tile with `value` in its excluded entries."""
        if tile.shape[1] == self.columns:
            return tile.scatter_(1, self.excluded[rows].to(tile.device), value)
        there = self.excluded[rows] - columns.start
        row, which = ((there >= 0) & (there < tile.shape[1])).nonzero(as_tuple=True)
        if len(row):
            tile[row.to(tile.device), there[row, which].to(tile.device)] = value
        return tile


class _Scratch:
    """Four tiles to overwrite. On a CPU they outlive the call: the system takes longer to hand out memory than a pass
    over it, and gives back what is freed. A GPU's allocator keeps it anyway.
    """

    _of_thread = threading.local()

    def __init__(self, plan: _Plan, like: Tensor) -> None:
        entries = min(plan.row_tile, plan.rows) * min(plan.column_tile, plan.columns)
        last: Tensor | None = getattr(self._of_thread, "last", None)
        if last is None or last.shape[1] < entries or last.dtype != like.dtype or last.device != like.device:
            last = like.new_empty(4, entries)
            if like.device.type == "cpu":
                self._of_thread.last = last
        self.flat = last

    def tile(self, number: int, shape: tuple[int, int]) -> Tensor:
        return self.flat[number, : shape[0] * shape[1]].view(shape)

    def product(self, left: Tensor, right: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """left right^T in the first tile, and the next two as work for a map."""
        shape = (len(left), len(right))
        return torch.mm(left, right.T, out=self.tile(0, shape)), (self.tile(1, shape), self.tile(2, shape))


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: Tensor, candidates: Tensor | None, plan: _Plan) -> tuple[Tensor, Tensor]:
        others = anchors if candidates is None else candidates
        shift = plan.row_maxima(anchors, others)
        # One exponential serves a tile and its mirror image only where neither depends on the row.
        shared = plan.symmetric and shift is None and plan.logit_map.rowless
        # Sums over many tiles in double: they decide the accuracy, and are only vectors.
        total = torch.zeros(plan.rows, dtype=torch.float64, device=anchors.device)
        moment = torch.zeros_like(total)

        # A mirrored tile with maps of its own for rows and columns would have to be kept twice.
        budget = plan.keep_bytes if (shared or not plan.symmetric) and any(ctx.needs_input_grad) else 0
        kept: list[tuple[Tensor, Tensor | None]] = []
        scratch = _Scratch(plan, anchors)
        for rows, columns in plan.tiles():
            cosine, work = scratch.product(anchors[rows], others[columns])
            mirrored = plan.symmetric and rows != columns
            budget -= cosine.nbytes * (1 + plan.want_cosine)
            if budget >= 0:
                work = (torch.empty_like(cosine), work[1])
            e, slope = plan.exponentials(cosine, rows, columns, shift, work)
            total[rows] += e.sum(1)
            if plan.want_cosine:
                moment[rows] += (e * cosine).sum(1)
            if mirrored:
                e_mirror = e.T if shared else plan.exponentials(cosine.T, columns, rows, shift, None)[0]
                total[columns] += e_mirror.sum(1)
                if plan.want_cosine:
                    moment[columns] += (e_mirror * cosine.T).sum(1)
            if budget >= 0:
                kept.append((e * slope, e) if plan.want_cosine else (e.mul_(slope), None))
        ctx.plan, ctx.shared, ctx.kept = plan, shared, kept
        ctx.save_for_backward(anchors, candidates, total, shift)
        negative = total.log() if shift is None else total.log() + shift
        return negative.to(anchors.dtype), (moment / total).to(anchors.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_negative: Tensor, grad_cosine: Tensor) -> tuple[Tensor, Tensor | None, None]:
        plan: _Plan = ctx.plan
        anchors, candidates, total, shift = ctx.saved_tensors
        others = anchors if candidates is None else candidates
        # dS_ij = e_ij (a'_ij by_slope_i + plain_i): the softmax weight, e over its row's total, times what arrives.
        by_slope = (grad_negative / total).to(anchors.dtype)
        plain = (grad_cosine / total).to(anchors.dtype)
        grad_anchors = torch.zeros_like(anchors)
        grad_others = torch.zeros_like(others) if ctx.needs_input_grad[1] else None

        scratch = _Scratch(plan, anchors)

        def one_sided(cosine: Tensor, rows: slice, columns: slice, work: Work) -> Tensor:
            e, slope = plan.exponentials(cosine, rows, columns, shift, work)
            factor = slope * by_slope[rows, None]
            return e.mul_(factor + plain[rows, None] if plan.want_cosine else factor)

        def both_sided(e_slope: Tensor, e: Tensor | None, rows: slice, columns: slice) -> Tensor:
            block = scratch.tile(3, e_slope.shape)  # type: ignore[arg-type]
            torch.add(by_slope[rows, None], by_slope[None, columns], out=block).mul_(e_slope)
            return block if e is None else block.addcmul_(e, plain[rows, None] + plain[None, columns])

        for number, (rows, columns) in enumerate(plan.tiles()):
            mirrored = plan.symmetric and rows != columns
            if number < len(ctx.kept):
                e_slope, e = ctx.kept[number]
                if not ctx.shared:
                    block = e_slope * by_slope[rows, None]
                    block = block if e is None else block.addcmul_(e, plain[rows, None])
                else:
                    block = both_sided(e_slope, e, rows, columns)
            else:
                cosine, work = scratch.product(anchors[rows], others[columns])
                if ctx.shared:
                    e, slope = plan.exponentials(cosine, rows, columns, shift, work)
                    e_slope = e * slope if plan.want_cosine else e.mul_(slope)
                    block = both_sided(e_slope, e if plan.want_cosine else None, rows, columns)
                else:
                    block = one_sided(cosine, rows, columns, work)
                    if plan.symmetric:
                        mirror = one_sided(cosine.T, columns, rows, None) if mirrored else block
                        block = block + mirror.T
            grad_anchors[rows].addmm_(block, others[columns])
            if mirrored:
                grad_anchors[columns].addmm_(block.T, anchors[rows])
            if grad_others is not None:
                grad_others[columns].addmm_(block.T, anchors[rows])
        return grad_anchors, grad_others, None
