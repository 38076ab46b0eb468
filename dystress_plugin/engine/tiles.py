"""Tiles of similarities: what the blockwise engine does without autograd, and the craft of its memory."""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dystress_plugin import tracing
from dystress_plugin.hardware import widest
from dystress_plugin.layout import Alike, Excluded
from dystress_plugin.temperature.maps import LogitMap, Times, Work

# exp(60) * 2^30 terms and exp(-60) are both inside of float32.
UNSHIFTED = 60.0
# Entries of a tile: large enough that threads seldom wait for each other; on a GPU one fills the chip.
TILE_ENTRIES = {"cpu": 1152 * 1152}
TILE_ENTRIES_ELSEWHERE = 4096 * 4096
# Of a symmetric matrix on a CPU, rows of a tile for each thread and one more: small tiles compute less that lies below
# the diagonal for nothing, and of many threads each waits for the others more often.
SIDE = 256
# Entries of float32 in a cache line.
LINE = 16
# Up to this size the forward pass keeps its tiles for the backward pass, which otherwise computes them again: 4096
# images with a copy of each, in float32. Of more images it could keep a small part only, which costs memory and saves
# little time.
KEEP_BYTES = 160 * 2**20


def entries_of_a_tile(device: torch.device) -> int:
    """How many entries a tile has at most."""
    return TILE_ENTRIES.get(device.type, TILE_ENTRIES_ELSEWHERE)


@dataclass(frozen=True)
class Plan:
    """What both passes share beside the embeddings.

    Attributes:
        rows, columns: size of the whole matrix.
        symmetric: whether it is the anchors' with themselves, so that only tiles on and above the diagonal are made.
        row_tile, column_tile: size of a tile.
        excluded, ratio: as given.
        keep_bytes: as given; 0 where no gradient will be asked for.
    """

    rows: int
    columns: int
    symmetric: bool
    row_tile: int
    column_tile: int
    excluded: Excluded | Alike
    logit_map: LogitMap
    want_cosine: bool
    ratio: float | None
    keep_bytes: int

    @staticmethod
    def make(
        anchors: Tensor,
        candidates: Tensor | None,
        excluded: Excluded | Alike,
        logit_map: LogitMap,
        want_cosine: bool,
        ratio: float | None,
        tile: int | None = None,
        keep_bytes: int = KEEP_BYTES,
    ) -> Plan:
        rows, columns = len(anchors), len(anchors if candidates is None else candidates)
        side = tile or math.isqrt(entries_of_a_tile(anchors.device))
        if tile is None and candidates is None:
            if anchors.device.type == "cpu" and not tracing.compiled(anchors):  # which cannot ask for threads
                side = min(side, SIDE * (1 + torch.get_num_threads()))
            # Blocks of the same size, as those on the diagonal compute too much; and rows of whole cache lines, as a
            # product into others takes up to twice as long.
            blocks = -(-rows // side)
            side = -(-rows // (blocks * LINE)) * LINE
        row_tile = min(rows, side)
        # Few anchors against a long queue get wide tiles; those of a symmetric matrix have to be square.
        column_tile = side if candidates is None or tile else side * side // row_tile
        sizes = rows, columns, candidates is None, side, column_tile
        return Plan(*sizes, excluded, logit_map, want_cosine, ratio, keep_bytes)

    @property
    def whole(self) -> bool:
        """Whether one tile is all."""
        return self.row_tile >= self.rows and self.column_tile >= self.columns

    @property
    def shifted(self) -> bool:
        """Whether exp needs the largest logit of every row subtracted."""
        return self.logit_map.bound > UNSHIFTED

    @property
    def shared(self) -> bool:
        """Whether one exponential serves a tile and its mirror image: only where neither depends on the row."""
        return self.symmetric and not self.shifted and self.logit_map.rowless

    def kept_entries(self, like: Tensor) -> int:
        """Entries that are kept for the backward pass, in the dtype of `like`: those of all tiles, or 0."""
        entries = self.rows * self.columns
        if self.symmetric:
            if not self.shared:  # a mirrored tile with maps of its own for rows and columns would be kept twice
                return 0
            blocks, rest = self.rows // self.row_tile, self.rows % self.row_tile
            entries = (entries + blocks * self.row_tile**2 + rest**2) // 2  # on and above the diagonal
        entries *= 1 + self.want_cosine
        return entries if entries * like.itemsize <= self.keep_bytes else 0

    def tiles(self, anchors: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Where the tiles lie, and gain * anchors of their rows."""
        gain = self.logit_map.gain
        for r in range(0, self.rows, self.row_tile):
            rows = slice(r, min(r + self.row_tile, self.rows))
            left = _part(anchors, rows)
            scaled = left if gain == 1 else left * gain
            for c in range(r if self.symmetric else 0, self.columns, self.column_tile):
                yield rows, slice(c, min(c + self.column_tile, self.columns)), scaled

    def row_maxima(self, anchors: Tensor, others: Tensor) -> Tensor | None:
        """The largest logit of every row, or None where exp needs no shift."""
        if not self.shifted:
            return None
        maxima = anchors.new_full((self.rows,), -math.inf)
        for r in range(0, self.rows, self.row_tile):
            for c in range(0, self.columns, self.column_tile):
                rows, columns = slice(r, r + self.row_tile), slice(c, c + self.column_tile)
                logit = self.logit_map.rows(rows).logit(anchors[rows] @ others[columns].T)
                self.excluded.fill_(logit, -math.inf, row=r, column=c)
                maxima[rows] = torch.maximum(maxima[rows], logit.amax(1))
        return maxima

    def exponentials(
        self,
        scaled: Tensor,
        rows: slice,
        columns: slice,
        shift: Tensor | None,
        work: Work,
        see: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, Times]:
        """exp(a(s) - shift) of a tile of gain * s, 0 in its excluded entries; and how to multiply with a' / gain.

        `see` is shown a(s) - shift before it is overwritten.
        """
        logit, multiply_by_slope = self.logit_map.rows(rows).logit_and_slope(scaled, work)
        out = work and work[0]
        if shift is not None:
            logit = torch.sub(logit, _part(shift, rows)[:, None], out=out)
        if see is not None:
            see(logit)
        e = torch.exp(logit, out=out)
        return self.excluded.fill_(e, 0.0, row=rows.start, column=columns.start), multiply_by_slope


def _part(x: Tensor, rows: slice) -> Tensor:
    """Some of the rows, at no cost where they are all."""
    return x if rows.stop - rows.start == len(x) else x[rows]


# What a thread keeps from one call to the next.
_of_thread = threading.local()


class _Scratch:
    """Tiles to overwrite. On a CPU they outlive the call: the system takes longer to hand out memory than a pass over
    it, and gives back what is freed. A GPU's allocator keeps it anyway.
    """

    def __init__(self, plan: Plan, like: Tensor) -> None:
        # With two the exponentials take the place of the products.
        number = 2 if plan.shared and not plan.want_cosine else 3
        shape = min(plan.row_tile, plan.rows), min(plan.column_tile, plan.columns)
        entries = shape[0] * shape[1]
        last: Tensor | None = getattr(_of_thread, "scratch", None)
        if last is None or last.numel() < number * entries or last.dtype != like.dtype or last.device != like.device:
            with torch.inference_mode(False):  # where it might be a training's that comes next
                last = torch.empty(number * entries, dtype=like.dtype, device=like.device)
            if like.device.type == "cpu":
                _of_thread.scratch = last
        self.tiles = last[: number * entries].view(number, *shape).unbind()

    def tile(self, number: int, shape: tuple[int, int]) -> Tensor:
        tile = self.tiles[number]
        return tile if tile.shape == shape else tile.view(-1)[: shape[0] * shape[1]].view(shape)

    def product(self, left: Tensor, right: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """left right^T in the first tile, and two as work for a map."""
        shape = (len(left), len(right))
        work = self.tile(-2, shape), self.tile(-1, shape)
        return torch.mm(left, right.T, out=self.tile(0, shape)), work


def _room(plan: Plan, like: Tensor) -> Tensor | None:
    """Where the tiles are kept, if they are."""
    entries = plan.kept_entries(like)
    nbytes = entries * like.itemsize
    if not entries:
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


class _Roll:
    """Cuts one tile after another off a flat tensor."""

    def __init__(self, rest: Tensor) -> None:
        self.rest = rest

    def tile(self, shape: torch.Size | tuple[int, int]) -> Tensor:
        entries = shape[0] * shape[1]
        if entries == len(self.rest):
            return self.rest.view(shape)
        cut, self.rest = self.rest[:entries].view(shape), self.rest[entries:]
        return cut


class _Sums:
    """Sums over many tiles, (rows,): they decide the accuracy, and are only vectors.

    In float64; on a device that has none as pairs of float32, the second what the first has lost by rounding (Knuth's
    TwoSum), which hold about as many digits.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._rows, self._device = rows, device
        self._sum: Tensor | None = None
        self._lost: Tensor | None = None

    def add(self, rows: slice, x: Tensor) -> None:
        """Adds to some of the rows."""
        if self._sum is None:
            dtype = widest(self._device)
            if len(x) == self._rows:  # at no cost where they are all
                self._sum = x.to(dtype, copy=True)
                return
            self._sum = torch.zeros(self._rows, dtype=dtype, device=self._device)
        sum_ = _part(self._sum, rows)
        if self._sum.dtype == torch.float64:
            sum_.add_(x)
            return
        self._lost = torch.zeros_like(self._sum) if self._lost is None else self._lost
        after = sum_ + x
        added = after - sum_
        self._lost[rows] += (sum_ - (after - added)) + (x - added)
        sum_.copy_(after)

    def value(self) -> Tensor:
        """All rows, wide."""
        assert self._sum is not None  # narrows the type
        return self._sum if self._lost is None else self._sum + self._lost


class Passed(NamedTuple):
    """What the forward pass leaves to the backward pass.

    Attributes:
        total: (rows,), sum of exp(logit - shift), wide.
        shift: (rows,), the largest logit, or None where exp needs no shift.
        kept: flat, of every tile what the backward pass needs, or None.
    """

    total: Tensor
    shift: Tensor | None
    kept: Tensor | None


def forward(
    plan: Plan, anchors: Tensor, candidates: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Passed]:
    """L of all rows, and the mean cosine of their negatives and the second L if the plan wants them."""
    others = anchors if candidates is None else candidates
    shift = plan.row_maxima(anchors, others)
    sums, moments, softened = (_Sums(plan.rows, anchors.device) for _ in range(3))

    def soften(logit: Tensor, rows: slice, columns: slice, *, ratio: float, twice: bool) -> None:
        """Adds a tile's exp(logit / ratio) to those of its rows, and of its columns where it is theirs as well."""
        tile = plan.excluded.fill_((logit / ratio).exp_(), 0.0, row=rows.start, column=columns.start)
        softened.add(rows, tile.sum(1))
        if twice:
            softened.add(columns, tile.sum(0))

    shared, kept, scratch = plan.shared, _room(plan, anchors), _Scratch(plan, anchors)
    roll = None if kept is None else _Roll(kept)
    for rows, columns, left in plan.tiles(anchors):
        scaled, work = scratch.product(left, _part(others, columns))
        mirrored = plan.symmetric and rows != columns
        if roll is not None:
            work = (roll.tile(scaled.shape), work[1])
        see = see_mirror = None
        if plan.ratio is not None:
            see = partial(soften, rows=rows, columns=columns, ratio=plan.ratio, twice=shared and mirrored)
            see_mirror = partial(soften, rows=columns, columns=rows, ratio=plan.ratio, twice=False)
        e, multiply_by_slope = plan.exponentials(scaled, rows, columns, shift, work, see)
        sums.add(rows, e.sum(1))
        if plan.want_cosine:
            moments.add(rows, (e * scaled).sum(1))
        if mirrored:
            e_mirror = e.T if shared else plan.exponentials(scaled.T, columns, rows, shift, None, see_mirror)[0]
            sums.add(columns, e_mirror.sum(1))
            if plan.want_cosine:
                moments.add(columns, (e_mirror * scaled.T).sum(1))
        if roll is not None:
            multiply_by_slope(roll.tile(e.shape).copy_(e) if plan.want_cosine else e)
    total = sums.value()
    negative = total.log() if shift is None else total.log() + shift
    cosine = moments.value() / (total * plan.logit_map.gain) if plan.want_cosine else None
    soft = None
    if plan.ratio is not None:
        soft = softened.value().log()
        soft = soft if shift is None else soft + shift / plan.ratio
    found = [None if x is None else x.to(anchors.dtype) for x in (negative, cosine, soft)]
    return *found, Passed(total, shift, kept)  # type: ignore[return-value]  # negative is a tensor


def backward(
    plan: Plan,
    anchors: Tensor,
    candidates: Tensor | None,
    passed: Passed,
    grad_negative: Tensor | None,
    grad_cosine: Tensor | None,
    *,
    by_candidates: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients by the anchors and by the candidates, the latter None unless asked for."""
    others = anchors if candidates is None else candidates
    # dS_ij = e_ij (a'_ij / gain weight_slope_i + weight_i): the softmax weight, e over its total, times what arrives.
    gain = plan.logit_map.gain
    slope_weight = torch.zeros_like(passed.total) if grad_negative is None else grad_negative * gain / passed.total
    weight_slope = slope_weight.to(anchors.dtype)
    weight = None if grad_cosine is None else (grad_cosine / passed.total).to(anchors.dtype)
    # The only tile is all there is to add up.
    beta, room = (0, torch.empty_like) if plan.whole else (1, torch.zeros_like)
    grad_anchors = room(anchors)
    grad_others = room(others) if by_candidates else None
    shared, scratch = plan.shared, _Scratch(plan, anchors)
    roll = None if passed.kept is None else _Roll(passed.kept)

    def recompute_tile(scaled: Tensor, rows: slice, columns: slice, work: Work) -> list[Tensor]:
        """A tile of exponentials times slopes, and of the exponentials alone where they are needed too."""
        e, multiply_by_slope = plan.exponentials(scaled, rows, columns, passed.shift, work)
        return [multiply_by_slope(e.clone()), e] if plan.want_cosine else [multiply_by_slope(e)]

    def tile_gradient(tile: list[Tensor], rows: slice) -> Tensor:
        """dS of a tile, as far as it comes from the statistics of its rows."""
        block = tile[0] * _part(weight_slope, rows)[:, None]
        return block if weight is None else torch.addcmul(block, tile[1], _part(weight, rows)[:, None])

    def shared_tile_gradient(tile: list[Tensor], rows: slice, columns: slice) -> Tensor:
        """The same of a tile that is its mirror image's too: from the statistics of its rows and of its columns."""
        block = scratch.tile(-1, tile[0].shape)  # type: ignore[arg-type]  # the map is done with it

        def of_both(x: Tensor, out: Tensor | None = None) -> Tensor:
            return torch.add(_part(x, rows)[:, None], _part(x, columns), out=out)

        of_both(weight_slope, block).mul_(tile[0])
        return block if weight is None else block.addcmul_(tile[1], of_both(weight))

    for rows, columns, left in plan.tiles(anchors):
        mirrored = plan.symmetric and rows != columns
        if roll is not None:
            tile = [roll.tile((len(left), columns.stop - columns.start)) for _ in range(1 + plan.want_cosine)][::-1]
        else:
            scaled, work = scratch.product(left, _part(others, columns))
            tile = recompute_tile(scaled, rows, columns, work)
        if shared:
            block = shared_tile_gradient(tile, rows, columns)
        else:
            block = tile_gradient(tile, rows)
            if plan.symmetric:
                mirror = block
                if mirrored:
                    mirror = tile_gradient(recompute_tile(scaled.T, columns, rows, None), columns)
                block = block + mirror.T
        _part(grad_anchors, rows).addmm_(block, _part(others, columns), beta=beta)
        if mirrored:
            grad_anchors[columns].addmm_(block.T, anchors[rows])
        if grad_others is not None:
            _part(grad_others, columns).addmm_(block.T, _part(anchors, rows), beta=beta)
    return grad_anchors, grad_others
