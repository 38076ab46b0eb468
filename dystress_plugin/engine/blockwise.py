"""The blockwise engine: tiles of similarities, computed, reduced and thrown away. Memory grows with the rows.

Two identities carry it. S = Z Z^T is symmetric, so where anchors and candidates are the same, each tile is computed
once and serves its row block and its column block: forward and backward together then cost two full matrix products
instead of four. And |s| <= 1 bounds the logits, so no maximum has to be found unless exp could leave its range.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dystress_plugin.engine.rows import NegativeStats
from dystress_plugin.temperature.base import LogitMap, Times, Work

# exp(60) * 2^30 terms and exp(-60) are both inside of float32.
UNSHIFTED = 60.0
# Entries of a tile: large enough that threads seldom wait for each other; on a GPU one fills the chip.
TILE_ENTRIES = {"cpu": 1152 * 1152}
TILE_ENTRIES_ELSEWHERE = 4096 * 4096
# Entries of float32 in a cache line.
LINE = 16
# Up to this size the forward pass keeps its tiles for the backward pass, which otherwise computes them again: 4096
# images with a copy of each, in float32. Of more images it could keep a small part only, which costs memory and saves
# little time.
KEEP_BYTES = 160 * 2**20


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
        keep_bytes: what all tiles together may take up to be kept between forward and backward pass.
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
        excluded: as given.
        spans: for every row block and column of `excluded`, its smallest and its largest entry.
    """

    rows: int
    columns: int
    symmetric: bool
    row_tile: int
    column_tile: int
    excluded: Tensor
    spans: list[list[tuple[int, int]]]
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
        if tile is None and candidates is None:
            # Blocks of the same size, as those on the diagonal compute too much; and rows of whole cache lines, as a
            # product into others takes up to twice as long.
            blocks = -(-rows // side)
            side = -(-rows // (blocks * LINE)) * LINE
        row_tile = min(rows, side)
        # Few anchors against a long queue get wide tiles; those of a symmetric matrix have to be square.
        column_tile = side if candidates is None or tile else side * side // row_tile
        spans = []
        if columns > column_tile:
            for block in excluded.split(side):
                ends = torch.aminmax(block, dim=0) if block.numel() else ()
                spans.append(list(zip(*(end.tolist() for end in ends), strict=True)))
        return _Plan(
            rows,
            columns,
            candidates is None,
            side,
            column_tile,
            excluded,
            spans,
            logit_map,
            want_cosine,
            keep_bytes,
        )

    def tiles(self, anchors: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Where the tiles lie, and gain * anchors of their rows."""
        gain = self.logit_map.gain
        for r in range(0, self.rows, self.row_tile):
            rows = slice(r, min(r + self.row_tile, self.rows))
            scaled = anchors[rows] if gain == 1 else anchors[rows] * gain
            for c in range(r if self.symmetric else 0, self.columns, self.column_tile):
                yield rows, slice(c, min(c + self.column_tile, self.columns)), scaled

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
        self, scaled: Tensor, rows: slice, columns: slice, shift: Tensor | None, work: Work
    ) -> tuple[Tensor, Times]:
        """exp(a(s) - shift) of a tile of gain * s, 0 in its excluded entries; and how to multiply with a' / gain."""
        logit, times_slope = self.logit_map.rows(rows).logit_and_slope(scaled, work)
        out = work and work[0]
        if shift is not None:
            logit = torch.sub(logit, shift[rows, None], out=out)
        return self.fill(torch.exp(logit, out=out), rows, columns, 0.0), times_slope

    def fill(self, tile: Tensor, rows: slice, columns: slice, value: float) -> Tensor:
        """The tile with `value` in its excluded entries."""
        if not self.spans:
            return tile.scatter_(1, self.excluded[rows].to(tile.device), value)
        first, end = columns.start, columns.start + tile.shape[1]
        if any(low < end and high >= first for low, high in self.spans[rows.start // self.row_tile]):
            there = self.excluded[rows] - first
            row, which = ((there >= 0) & (there < tile.shape[1])).nonzero(as_tuple=True)
            tile[row.to(tile.device), there[row, which].to(tile.device)] = value
        return tile


# What a thread keeps from one call to the next.
_of_thread = threading.local()


class _Scratch:
    """Tiles to overwrite. On a CPU they outlive the call: the system takes longer to hand out memory than a pass over
    it, and gives back what is freed. A GPU's allocator keeps it anyway.

    Args:
        plan: for the size of a tile.
        like: for dtype and device.
        number: of tiles, 2 or 3; with 2 the exponentials take the place of the products.
    """

    def __init__(self, plan: _Plan, like: Tensor, number: int) -> None:
        entries = min(plan.row_tile, plan.rows) * min(plan.column_tile, plan.columns)
        last: Tensor | None = getattr(_of_thread, "scratch", None)
        if last is None or last.numel() < number * entries or last.dtype != like.dtype or last.device != like.device:
            last = like.new_empty(number * entries)
            if like.device.type == "cpu":
                _of_thread.scratch = last
        self.tiles = last[: number * entries].view(number, entries)

    def tile(self, number: int, shape: tuple[int, int]) -> Tensor:
        return self.tiles[number, : shape[0] * shape[1]].view(shape)

    def product(self, left: Tensor, right: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """left right^T in the first tile, and two as work for a map."""
        shape = (len(left), len(right))
        work = self.tile(-2, shape), self.tile(-1, shape)
        return torch.mm(left, right.T, out=self.tile(0, shape)), work


def _room(plan: _Plan, like: Tensor) -> Tensor | None:
    """Where the tiles are kept, if there is room for all of them."""
    entries = plan.rows * plan.columns
    if plan.symmetric:  # blocks on and above the diagonal
        ends = [*range(0, plan.rows, plan.row_tile), plan.rows]
        entries = (entries + sum((end - start) ** 2 for start, end in pairwise(ends))) // 2
    entries *= 1 + plan.want_cosine
    nbytes = entries * like.itemsize
    if nbytes > plan.keep_bytes:
        return None
    if like.device.type != "cpu" or nbytes < 2**23 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(entries)
    # To write into new memory takes the system several times as long as a pass over it, so the last call's serves
    # again, once no tensor holds it any more.
    memory, holder = getattr(_of_thread, "kept", (b"", lambda: None))
    if len(memory) < nbytes or holder() is not None:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # in pages of 2 MiB it comes four times as fast; a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    held = memoryview(memory)
    _of_thread.kept = memory, weakref.ref(held)
    return torch.frombuffer(held, dtype=like.dtype, count=entries)


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
        keeps = (shared or not plan.symmetric) and any(ctx.needs_input_grad)
        room = _room(plan, anchors) if keeps else None
        kept: list[Tensor] = []
        tiles = 2 if shared and not plan.want_cosine else 3
        scratch = _Scratch(plan, anchors, tiles)
        for rows, columns, left in plan.tiles(anchors):
            scaled, work = scratch.product(left, others[columns])
            mirrored = plan.symmetric and rows != columns
            if room is not None:
                mine, room = room[: scaled.numel()].view_as(scaled), room[scaled.numel() :]
                work = (mine, work[1])
            e, times_slope = plan.exponentials(scaled, rows, columns, shift, work)
            total[rows] += e.sum(1)
            if plan.want_cosine:
                moment[rows] += (e * scaled).sum(1)
            if mirrored:
                e_mirror = e.T if shared else plan.exponentials(scaled.T, columns, rows, shift, None)[0]
                total[columns] += e_mirror.sum(1)
                if plan.want_cosine:
                    moment[columns] += (e_mirror * scaled.T).sum(1)
            if room is None:
                continue
            if plan.want_cosine:
                other, room = room[: scaled.numel()].view_as(scaled), room[scaled.numel() :]
                kept += [times_slope(other.copy_(e)), e]
            else:
                kept.append(times_slope(e))
        ctx.plan, ctx.shared, ctx.tiles = plan, shared, tiles
        ctx.save_for_backward(anchors, candidates, total, shift, *kept)
        negative = total.log() if shift is None else total.log() + shift
        return negative.to(anchors.dtype), (moment / (total * plan.logit_map.gain)).to(anchors.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_negative: Tensor, grad_cosine: Tensor) -> tuple[Tensor, Tensor | None, None]:
        plan: _Plan = ctx.plan
        anchors, candidates, total, shift, *kept = ctx.saved_tensors
        others = anchors if candidates is None else candidates
        # dS_ij = e_ij (a'_ij / gain by_slope_i + plain_i): the softmax weight, e over its total, times what arrives.
        by_slope = (grad_negative * plan.logit_map.gain / total).to(anchors.dtype)
        plain = (grad_cosine / total).to(anchors.dtype)
        grad_anchors = torch.zeros_like(anchors)
        grad_others = torch.zeros_like(others) if ctx.needs_input_grad[1] else None
        scratch = _Scratch(plan, anchors, ctx.tiles)

        def with_slope(scaled: Tensor, rows: slice, columns: slice, work: Work) -> list[Tensor]:
            """What the forward pass keeps of a tile."""
            e, times_slope = plan.exponentials(scaled, rows, columns, shift, work)
            return [times_slope(e.clone()), e] if plan.want_cosine else [times_slope(e)]

        def one_sided(tile: list[Tensor], rows: slice) -> Tensor:
            block = tile[0] * by_slope[rows, None]
            return torch.addcmul(block, tile[1], plain[rows, None]) if plan.want_cosine else block

        def both_sided(tile: list[Tensor], rows: slice, columns: slice) -> Tensor:
            block = scratch.tile(-1, tile[0].shape)  # type: ignore[arg-type]  # the map is done with it
            torch.add(by_slope[rows, None], by_slope[None, columns], out=block).mul_(tile[0])
            return block.addcmul_(tile[1], plain[rows, None] + plain[None, columns]) if plan.want_cosine else block

        for rows, columns, left in plan.tiles(anchors):
            mirrored = plan.symmetric and rows != columns
            if kept:
                tile, kept = kept[: 1 + plan.want_cosine], kept[1 + plan.want_cosine :]
            else:
                scaled, work = scratch.product(left, others[columns])
                tile = with_slope(scaled, rows, columns, work)
            if ctx.shared:
                block = both_sided(tile, rows, columns)
            else:
                block = one_sided(tile, rows)
                if plan.symmetric:
                    mirror = one_sided(with_slope(scaled.T, columns, rows, None), columns) if mirrored else block
                    block = block + mirror.T
            grad_anchors[rows].addmm_(block, others[columns])
            if mirrored:
                grad_anchors[columns].addmm_(block.T, anchors[rows])
            if grad_others is not None:
                grad_others[columns].addmm_(block.T, anchors[rows])
        return grad_anchors, grad_others, None
