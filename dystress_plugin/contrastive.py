"""The loss: layout -> temperature -> engine -> objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from dystress_plugin import distributed, tracing
from dystress_plugin import layout as layouts
from dystress_plugin.engine import ENGINES, RowStats
from dystress_plugin.errors import unknown_name
from dystress_plugin.layout import LAYOUTS, Block
from dystress_plugin.objectives import OBJECTIVES
from dystress_plugin.queue import KeyQueue
from dystress_plugin.recipes import recipe
from dystress_plugin.temperature import Individual, ModelAware, Temperature
from dystress_plugin.temperature.base import Batch


class Pairs(NamedTuple):
    """Cosines and temperatures of every pair of a batch, flat: what figures and logs are made of."""

    positive_cosine: Tensor
    positive_tau: Tensor
    negative_cosine: Tensor
    negative_tau: Tensor


@final
class ContrastiveLoss(nn.Module):
    """mean_i -log( exp(a(s_ip)) / (exp(a(s_ip)) + sum_n exp(a(s_in))) ), with a(s) = s / tau given by the temperature.

    i runs over all views of all images (NT-Xent), s is the cosine similarity, p the other view of i's image, n all
    views of all other images. With several positives their exponentials are added. `objective` replaces the outer
    form, `temperature` the map a. With a queue, i runs over view 0, p is view 1 and n the keys in the queue.

    Args:
        temperature: a method's name, from `dystress_plugin.recipes.METHODS`, or an instance of a class in
            `dystress_plugin.temperature`.
        objective: "ntxent", "macl", "sogclr", "dcl" or "dclw". None takes the recipe's; for an instance "ntxent", but
            "macl" for ModelAware and "sogclr" for Individual.
        queue_size: (keys, dim) for a queue of negatives, which a recipe named `..._moco` needs; None or 0 for none.
        layout: "views"; or for two sides whose rows belong together, such as images and captions, "one_way"
            (anchors from the first, candidates from the second, as in SimCSE) or "both_ways" (CLIP).
        engine: "dense" holds the matrix of similarities, "blockwise" tiles of it, so that memory grows with the batch
            and not with its square. "auto" takes "dense" up to 2^16 entries (128 images in two views), where it is
            the faster one on a CPU, and as far as 2^26 where torch.func or forward-mode differentiation need all of it.
        gather_distributed: compare with the batches of all ranks, with gradient. The loss of a rank is scaled such
            that the mean over ranks is the loss of the whole batch. MACL's alignment and DCLW's weights are then
            those of the whole batch.
        **settings: parameters of the temperature where it is given by name, such as `tau_max=0.3`, and of the
            objective, `sigma=0.5` for "dclw"; "isogclr" needs `num_samples`.

    Raises:
        ValueError: for an unknown name (with the nearest valid one) or a parameter out of its range.
        TypeError: for a temperature that is neither a name nor a `Temperature`, or its settings beside an instance.

    Examples:
        >>> loss = ContrastiveLoss("dystress", tau_min=0.1, tau_max=0.2)
        >>> value = loss(model(view_0), model(view_1))
    """

    def __init__(
        self,
        temperature: str | Temperature = "dystress",
        *,
        objective: str | None = None,
        queue_size: tuple[int, int] | int | None = None,
        layout: str = "views",
        engine: str = "auto",
        gather_distributed: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        chosen = recipe(temperature) if isinstance(temperature, str) else None
        if objective is None:
            default = {ModelAware: "macl", Individual: "sogclr"}.get(type(temperature), "ntxent")  # type: ignore[arg-type]
            objective = chosen.objective if chosen else default
        for kind, name, known in (
            ("objective", objective, OBJECTIVES),
            ("layout", layout, LAYOUTS),
            ("engine", engine, ENGINES),
        ):
            if name not in known:
                raise ValueError(unknown_name(kind, name, known))

        own = {name: settings.pop(name) for name in OBJECTIVES[objective].parameters if name in settings}
        if chosen:
            temperature = chosen.build_temperature(**settings)
            if chosen.layout == "queue" and not queue_size:
                raise ValueError(
                    f"Method '{chosen.name}' keeps a queue: give queue_size=(keys, dim), such as (65536, 128)."
                )
        elif settings:
            raise TypeError(
                f"{', '.join(settings)}: settings go into the temperature itself when it is given as an instance, "
                f"{type(temperature).__name__}(...)."
            )
        if not isinstance(temperature, Temperature):
            raise TypeError(
                f"temperature={temperature!r} must be a method's name, such as 'dystress', or an instance of a class "
                f"in dystress_plugin.temperature, such as Constant(0.1), not {type(temperature).__name__}."
            )

        self.temperature = temperature
        self.objective = objective
        self.objective_settings = OBJECTIVES[objective].checked(own)
        self.layout = layout
        self.engine = engine
        self.gather_distributed = bool(gather_distributed)
        self.queue = _queue(queue_size)
        if self.queue is not None and layout != "views":
            raise ValueError(f"layout='{layout}' takes no queue: leave queue_size out.")

    def forward(self, *views: Tensor, index: Tensor | None = None, epoch: float | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            *views: two or more (batch, dim) tensors of any float dtype, row i of each showing image i. They need
                not be normalised; a zero row has similarity 0 to everything and no gradient. Half precision is
                computed in float32. With a queue: anchors, then keys. With another layout than "views": two sides, then
                any hard negatives, row i of each for anchor i, which all anchors of side 0 are compared with.
            index: (batch,) int64, sample numbers, where the temperature keeps a table.
            epoch: the current epoch, 0 first, where the temperature is scheduled; a fraction lies within it.

        Returns:
            0-dim tensor, float32, or float64 if a view is.

        Raises:
            TypeError: for views, index or epoch of another type.
            ValueError: for shapes that do not fit, too few images, a missing index or epoch; for state that a transform
                of torch.func would have to change; or, on the CPU, for embeddings that are not finite (on CUDA, in
                compiled code and under torch.func they propagate: looking would wait for the device or is impossible).
        """
        units, index, epoch = self._checked(views, index, epoch)
        if self.queue is not None and self.training:
            self.queue.share()
        with torch.autocast(views[0].device.type, enabled=False):
            stats, batch = self._row_stats(units, index, epoch)
            stats = replace(stats, log_s=self.temperature.observe(stats, batch))
            objective = OBJECTIVES[self.objective]
            rows = objective.row_loss(stats, **self.objective_settings)
            value = rows.mean() * (batch.views if objective.sum_over_views else 1)
        if self.queue is not None and self.training:
            self.queue.push(units[1])
        return value * self._share(len(rows), rows.device)

    @torch.no_grad()
    def pairs(self, *views: Tensor, index: Tensor | None = None, epoch: float | None = None) -> Pairs:
        """Every pair of a batch with its temperature; of this rank alone, and without a change of state.

        It holds the whole matrix of similarities: give it a few hundred images.

        Args:
            *views: as for the loss.
            index: as for the loss.
            epoch: as for the loss.
        """
        units, index, epoch = self._checked(views, index, epoch)
        with torch.autocast(views[0].device.type, enabled=False):
            blocks = self._blocks(units, gather=False)
            batch = self._batch(blocks, len(units[0]), index, epoch, gather=False)
            maps = self.temperature.prepare(batch)
            positive_tau = maps.positive.temperature(batch.positive_cosine)
            cosines, taus = [], []
            for rows, block in _rows(blocks):
                candidates = block.anchors if block.candidates is None else block.candidates
                cosine = block.anchors @ candidates.T
                negative = torch.ones_like(cosine, dtype=torch.bool)
                negative.scatter_(1, block.excluded.to(cosine.device), False)
                cosines.append(cosine[negative])
                taus.append(maps.negative.rows(rows).temperature(cosine)[negative])
            return Pairs(batch.positive_cosine.flatten(), positive_tau.flatten(), torch.cat(cosines), torch.cat(taus))

    def _blocks(self, units: Tensor, *, gather: bool) -> list[Block]:
        if self.queue is not None:
            return layouts.queue(units, self.queue.read())
        return LAYOUTS[self.layout](units, gather=gather)

    def _batch(
        self, blocks: Sequence[Block], images: int, index: Tensor | None, epoch: float | None, *, gather: bool
    ) -> Batch:
        positive_cosine = torch.cat([block.positive_cosine for block in blocks])
        views = len(positive_cosine) // images
        return Batch(
            positive_cosine=positive_cosine.detach(),
            index=index.repeat(views) if index is not None else None,
            epoch=epoch,
            views=views,
            mean=distributed.mean_over_ranks if gather else torch.mean,
        )

    def _row_stats(self, units: Tensor, index: Tensor | None, epoch: float | None) -> tuple[RowStats, Batch]:
        if self.training and tracing.captured(self.buffers()):
            raise ValueError(
                "torch.func would have to change the state of this loss, its queue or its tables: call loss.eval(), or "
                "hand the state over by torch.func.functional_call."
            )
        blocks = self._blocks(units, gather=self.gather_distributed)
        batch = self._batch(blocks, len(units[0]), index, epoch, gather=self.gather_distributed)
        maps = self.temperature.prepare(batch)
        want_cosine = self._counts_negatives
        negatives = [
            ENGINES[self.engine](
                block.anchors,
                block.candidates,
                block.excluded,
                maps.negative.rows(rows),
                want_cosine=want_cosine,
            )
            for rows, block in _rows(blocks)
        ]
        positive_cosine = torch.cat([block.positive_cosine for block in blocks])
        cosines = [part.negative_cosine for part in negatives if part.negative_cosine is not None]
        stats = RowStats(
            positive=_over_positives(torch.logsumexp, maps.positive.logit(positive_cosine)),
            negative=torch.cat([part.negative for part in negatives]),
            positive_cosine=_over_positives(torch.mean, positive_cosine),
            negative_cosine=torch.cat(cosines) if cosines else None,
            num_negatives=blocks[0].num_negatives,
            mean=batch.mean,
        )
        return stats, batch

    def _share(self, rows: int, device: torch.device) -> float:
        """Rows of this rank over the mean of all ranks', so that ranks of different batches weigh by their rows."""
        if not self.gather_distributed or distributed.world_size() == 1:
            return 1.0
        mean = distributed.mean_over_ranks(torch.tensor([float(rows)], dtype=torch.float64, device=device))
        return rows / float(mean)

    def _checked(
        self, views: Sequence[Tensor], index: Tensor | None, epoch: float | None
    ) -> tuple[Tensor, Tensor | None, float | None]:
        """(views, batch, dim) of length 1 in the dtype of the computation, the index there, the epoch as a float."""
        self._check_views(views)
        name = type(self.temperature).__name__
        if index is None and self.temperature.needs_index:
            raise ValueError(f"{name} needs the sample numbers: call loss(z0, z1, index=index), int64 (batch,).")
        if index is not None:
            if not isinstance(index, Tensor) or index.dtype != torch.int64:
                got = index.dtype if isinstance(index, Tensor) else type(index).__name__
                raise TypeError(f"index must be an int64 tensor of sample numbers, not {got}.")
            if index.shape != views[0].shape[:1]:
                raise ValueError(f"index has shape {tuple(index.shape)}, the batch needs ({len(views[0])},).")
            index = index.to(views[0].device)
        if epoch is None and self.temperature.needs_epoch:
            raise ValueError(f"{name} needs the epoch: call loss(z0, z1, epoch=current_epoch).")
        if epoch is not None:
            if isinstance(epoch, bool) or not isinstance(epoch, (int, float)):
                raise TypeError(f"epoch={epoch!r} must be a number, not {type(epoch).__name__}.")
            if not 0 <= epoch < math.inf:
                raise ValueError(f"epoch={epoch} must be finite and at least 0.")
            epoch = float(epoch)
        dtype = torch.float64 if any(view.dtype == torch.float64 for view in views) else torch.float32
        # Nothing here is an operation that autocast would take to a half precision.
        together = torch.cat([view.to(dtype) for view in views])
        # A sum is quick and finds every NaN and infinity; where it overflows by itself, nothing is wrong.
        if (
            together.device.type == "cpu"
            and tracing.eager(together)
            and not math.isfinite(together.detach().sum())
            and not torch.isfinite(together).all()
        ):
            raise ValueError(_not_finite(views))
        # A half precision's subnormal rows have few digits left, and gradients beyond its range.
        least = torch.finfo(torch.float16).tiny if views[0].dtype == torch.float16 else 0.0
        return normalize(together, least).view(len(views), *views[0].shape), index, epoch

    def _check_views(self, views: Sequence[Tensor]) -> None:
        if len(views) < 2:
            raise ValueError(f"The loss compares views: pass at least two embeddings, loss(z0, z1), not {len(views)}.")
        if len(views) > 2 and self.queue is not None:
            raise ValueError(f"With a queue the loss takes two views, not {len(views)}.")
        if len(views) > 2 and self.layout == "both_ways" and self._counts_negatives:
            raise ValueError(
                "layout='both_ways' with hard negatives gives the two ways different numbers of negatives, which "
                f"objective='{self.objective}' with {type(self.temperature).__name__} divides by; use 'one_way'."
            )
        for number, view in enumerate(views):
            _check_view(number, view, views[0])
        if self.queue is not None:
            if views[0].shape[1] != self.queue.keys.shape[1]:
                raise ValueError(
                    f"Embeddings have {views[0].shape[1]} dims, the queue {self.queue.keys.shape[1]}; set queue_size."
                )
        elif len(views[0]) == 1 and not (self.gather_distributed and distributed.world_size() > 1):
            if self.layout == "one_way" and len(views) > 2:
                return
            raise ValueError("A batch of one image has no negatives; use at least two images, or a queue.")

    @property
    def _counts_negatives(self) -> bool:
        return OBJECTIVES[self.objective].needs_negative_cosine or self.temperature.needs_negative_cosine

    def extra_repr(self) -> str:
        own = "".join(f", {name}={value}" for name, value in self.objective_settings.items())
        return (
            f"objective={self.objective}{own}, layout={self.layout}, engine={self.engine}, "
            f"gather_distributed={self.gather_distributed}"
        )


def normalize(z: Tensor, least: float = 0.0) -> Tensor:
    """z / |z| for every row; a zero row stays zero and gets no gradient, and so does one without an entry of `least`.

    Tiny and huge rows come out right as well, as long as 1/|z| is within the dtype's range.
    """
    if tracing.transformed(z):
        peak = _peak(z.detach(), least)
        z = z / peak
        return z / z.square().sum(dim=1, keepdim=True).masked_fill(peak.isinf(), 1.0).sqrt()
    units: Tensor = _Normalize.apply(z, least)[0]  # type: ignore[no-untyped-call]
    return units


def _peak(z: Tensor, least: float) -> Tensor:
    """The largest entry of every row, infinite where the row counts as zero."""
    peak: Tensor = torch.linalg.vector_norm(z, math.inf, dim=1, keepdim=True)
    # Below, the gradient 1/|z| itself would leave the dtype's range.
    return peak.masked_fill_((peak <= 1e8 * torch.finfo(z.dtype).tiny) | (peak < least), math.inf)


class _Normalize(torch.autograd.Function):
    """u = z / |z| and |z|. Autograd by itself would save three copies of z, this saves u.

    |z| is a result as well, for the second derivative: what a gradient is made of has to be one.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, least: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        # Over the largest entry first: the squares of tiny and huge rows would leave the range.
        peak = _peak(z, least)
        units = z / peak
        length = torch.linalg.vector_norm(units, dim=1, keepdim=True)
        units.div_(length.masked_fill(length == 0, 1.0))
        length = (length * peak).nan_to_num_(math.inf, math.inf)
        ctx.save_for_backward(units, length)
        return units, length

    @staticmethod
    def backward(ctx: Any, grad_units: Tensor | None, grad_length: Tensor | None) -> tuple[Tensor | None, None]:
        units, length = ctx.saved_tensors
        grad = None
        if grad_units is not None:
            grad = (grad_units - units * (units * grad_units).sum(1, keepdim=True)) / length
        if grad_length is not None:
            along = units * grad_length
            grad = along if grad is None else grad + along
        return grad, None


def _over_positives(reduce: Callable[..., Tensor], x: Tensor) -> Tensor:
    """`reduce` over the positives of every anchor, at no cost where there is one."""
    return x.squeeze(1) if x.shape[1] == 1 else reduce(x, dim=1)


def _rows(blocks: Sequence[Block]) -> list[tuple[slice, Block]]:
    """Every block with where its anchors lie among the rows of the batch."""
    ends = [0]
    for block in blocks:
        ends.append(ends[-1] + len(block.anchors))
    return [(slice(start, end), block) for start, end, block in zip(ends, ends[1:], blocks, strict=False)]


def _queue(queue_size: tuple[int, int] | int | None) -> KeyQueue | None:
    if queue_size is None or queue_size == 0:
        return None
    try:
        size, dim = queue_size  # type: ignore[misc]
    except (TypeError, ValueError):
        raise ValueError(
            f"queue_size={queue_size!r} must be (keys, dim), such as (65536, 128), or 0 for none."
        ) from None
    return KeyQueue(size, dim)


def _check_view(number: int, view: Tensor, first: Tensor) -> None:
    if not isinstance(view, Tensor):
        raise TypeError(f"View {number} must be a tensor, not {type(view).__name__}.")
    if not view.is_floating_point():
        raise TypeError(f"View {number} is {view.dtype}; embeddings must be of a float dtype: call .float().")
    if view.dim() != 2:
        raise ValueError(f"View {number} has shape {tuple(view.shape)}, needs (batch, dim): flatten it.")
    if view.shape != first.shape:
        raise ValueError(f"View {number} has shape {tuple(view.shape)}, view 0 {tuple(first.shape)}; they must agree.")
    if view.device != first.device:
        raise ValueError(f"View {number} is on {view.device}, view 0 on {first.device}; move them together.")
    if view.numel() == 0:
        raise ValueError(f"View {number} is empty, shape {tuple(view.shape)}.")


def _not_finite(views: Sequence[Tensor]) -> str:
    bad = [int((~torch.isfinite(view)).any(dim=1).sum()) for view in views]
    number = next(v for v, rows in enumerate(bad) if rows)
    return f"View {number} has {bad[number]} of {len(views[0])} rows with NaN or infinity: the model diverged."
