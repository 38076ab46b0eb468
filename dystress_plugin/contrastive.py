"""The loss: gather -> candidates -> temperature -> engine -> objective."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from dystress_plugin import distributed
from dystress_plugin.engine import ENGINES, RowStats
from dystress_plugin.errors import unknown_name
from dystress_plugin.objectives import OBJECTIVES
from dystress_plugin.queue import KeyQueue
from dystress_plugin.recipes import recipe
from dystress_plugin.temperature import Individual, ModelAware, Temperature
from dystress_plugin.temperature.base import Batch


class Candidates(NamedTuple):
    """Rows and columns of one batch.

    Attributes:
        anchors: (rows, dim), all views one after the other.
        positive_cosine: (rows, positives), with gradient.
        columns: (columns, dim), what every anchor is compared with.
        excluded: (rows, any) int64, the columns that are not negatives of each row.
    """

    anchors: Tensor
    positive_cosine: Tensor
    columns: Tensor
    excluded: Tensor


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
        objective: "ntxent", "macl" or "sogclr". None takes the recipe's; for an instance "ntxent", but "macl" for
            ModelAware and "sogclr" for Individual.
        queue_size: (keys, dim) for a queue of negatives; None or 0 for none.
        engine: "auto" or "dense".
        gather_distributed: compare with the batches of all ranks, with gradient. The loss of a rank is scaled such
            that the mean over ranks is the loss of the whole batch. MACL's alignment is then the global mean.
        **settings: parameters of the temperature where it is given by name, such as `tau_max=0.3`; "isogclr" needs
            `num_samples`.

    Raises:
        ValueError: for an unknown name (with the nearest valid one) or a parameter out of its range.
        TypeError: for a temperature that is neither a name nor a `Temperature`, or settings beside an instance.

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
        engine: str = "auto",
        gather_distributed: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        if isinstance(temperature, str):
            chosen = recipe(temperature)
            objective = objective or chosen.objective
            temperature = chosen.build_temperature(**settings)
        elif not isinstance(temperature, Temperature):
            raise TypeError(
                f"temperature={temperature!r} must be a method's name, such as 'dystress', or an instance of a class "
                f"in dystress_plugin.temperature, such as Constant(0.1), not {type(temperature).__name__}."
            )
        elif settings:
            raise TypeError(
                f"{', '.join(settings)}: settings go into the temperature itself when it is given as an instance, "
                f"{type(temperature).__name__}(...)."
            )
        if objective is None:
            objective = {ModelAware: "macl", Individual: "sogclr"}.get(type(temperature), "ntxent")
        if objective not in OBJECTIVES:
            raise ValueError(unknown_name("objective", objective, OBJECTIVES))
        if engine not in ENGINES:
            raise ValueError(unknown_name("engine", engine, ENGINES))

        self.temperature = temperature
        self.objective = objective
        self.engine = engine
        self.gather_distributed = bool(gather_distributed)
        self.queue = _queue(queue_size)

    def forward(self, *views: Tensor, index: Tensor | None = None, epoch: float | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            *views: two or more (batch, dim) tensors of any float dtype, row i of each showing image i. They need
                not be normalised; a zero row has similarity 0 to everything and no gradient. Half precision is
                computed in float32. With a queue: anchors, then keys.
            index: (batch,) int64, sample numbers, where the temperature keeps a table.
            epoch: the current epoch, 0 first, where the temperature is scheduled.

        Returns:
            0-dim tensor, float32, or float64 if a view is.

        Raises:
            TypeError: for views, index or epoch of another type.
            ValueError: for shapes that do not fit, too few images, a missing index or epoch, or, on the CPU,
                embeddings that are not finite (on CUDA they propagate: looking would wait for the device).
        """
        units, index, epoch = self._checked(views, index, epoch)
        with torch.autocast(views[0].device.type, enabled=False):
            stats, batch = self._row_stats(units, index, epoch)
            stats = replace(stats, log_s=self.temperature.observe(stats, batch))
            objective = OBJECTIVES[self.objective]
            rows = objective.row_loss(stats)
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
            candidates = self._candidates(units, gather=False)
            maps = self.temperature.prepare(self._batch(candidates, len(units[0]), index, epoch, gather=False))
            cosine = candidates.anchors @ candidates.columns.T
            negative = torch.ones_like(cosine, dtype=torch.bool).scatter_(1, candidates.excluded, False)
            return Pairs(
                candidates.positive_cosine.flatten(),
                maps.positive.temperature(candidates.positive_cosine).flatten(),
                cosine[negative],
                maps.negative.temperature(cosine)[negative],
            )

    def _batch(
        self, candidates: Candidates, images: int, index: Tensor | None, epoch: float | None, *, gather: bool
    ) -> Batch:
        views = len(candidates.anchors) // images
        return Batch(
            positive_cosine=candidates.positive_cosine.detach(),
            index=index.repeat(views) if index is not None else None,
            epoch=epoch,
            views=views,
            mean=distributed.mean_over_ranks if gather else torch.mean,
        )

    def _row_stats(self, units: Sequence[Tensor], index: Tensor | None, epoch: float | None) -> tuple[RowStats, Batch]:
        candidates = self._candidates(units, gather=self.gather_distributed)
        positive_cosine = candidates.positive_cosine
        batch = self._batch(candidates, len(units[0]), index, epoch, gather=self.gather_distributed)
        maps = self.temperature.prepare(batch)
        negative, negative_cosine = ENGINES[self.engine](
            candidates.anchors,
            candidates.columns,
            candidates.excluded,
            maps.negative,
            want_cosine=OBJECTIVES[self.objective].needs_negative_cosine or self.temperature.needs_negative_cosine,
        )
        stats = RowStats(
            positive=torch.logsumexp(maps.positive.logit(positive_cosine), dim=1),
            negative=negative,
            positive_cosine=positive_cosine.mean(dim=1),
            negative_cosine=negative_cosine,
            num_negatives=len(candidates.columns) - candidates.excluded.shape[1],
        )
        return stats, batch

    def _candidates(self, units: Sequence[Tensor], *, gather: bool) -> Candidates:
        if self.queue is not None:
            anchors, keys = units
            positive_cosine = (anchors * keys).sum(dim=1, keepdim=True)
            nothing = torch.empty(len(anchors), 0, dtype=torch.int64, device=anchors.device)
            return Candidates(anchors, positive_cosine, self.queue.read().to(anchors.dtype), nothing)

        views, batch = len(units), len(units[0])
        stacked = torch.stack(list(units), dim=1)  # (batch, views, dim)
        everything, start = stacked, 0
        if gather:
            everything, start = distributed.all_rows_with_gradient(stacked)
        cosine = stacked @ stacked.mT  # (batch, views, views)
        others = [[w for w in range(views) if w != v] for v in range(views)]
        positive_cosine = torch.cat([cosine[:, v, others[v]] for v in range(views)])

        own = start + torch.arange(batch, device=stacked.device).repeat(views)
        blocks = len(everything) * torch.arange(views, device=stacked.device)
        return Candidates(
            anchors=torch.cat(list(units)),
            positive_cosine=positive_cosine,
            columns=everything.transpose(0, 1).flatten(0, 1),
            excluded=own[:, None] + blocks[None, :],
        )

    def _share(self, rows: int, device: torch.device) -> float:
        """Rows of this rank over the mean of all ranks', so that ranks of different batches weigh by their rows."""
        if not self.gather_distributed or distributed.world_size() == 1:
            return 1.0
        mean = distributed.mean_over_ranks(torch.tensor([float(rows)], device=device))
        return rows / float(mean)

    def _checked(
        self, views: Sequence[Tensor], index: Tensor | None, epoch: float | None
    ) -> tuple[list[Tensor], Tensor | None, float | None]:
        """The views at length 1 in the dtype of the computation, the index on their device, the epoch as a float."""
        _check_views(views, self.queue, alone=not self.gather_distributed or distributed.world_size() == 1)
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
            if not math.isfinite(epoch) or epoch < 0:
                raise ValueError(f"epoch={epoch} must be finite and at least 0.")
            epoch = float(epoch)
        dtype = torch.float64 if any(view.dtype == torch.float64 for view in views) else torch.float32
        with torch.autocast(views[0].device.type, enabled=False):
            return [normalize(view.to(dtype)) for view in views], index, epoch

    def extra_repr(self) -> str:
        return f"objective={self.objective}, engine={self.engine}, gather_distributed={self.gather_distributed}"


def normalize(z: Tensor) -> Tensor:
    """z / |z| for every row; a zero row stays zero and gets no gradient.

    The division by the largest entry first keeps the squares of tiny and huge rows in range; it does not change
    the direction, so it needs no gradient of its own.
    """
    peak = z.detach().abs().amax(dim=1, keepdim=True)
    # Below, the gradient 1/|z| itself would leave the dtype's range.
    present = peak > 1e8 * torch.finfo(z.dtype).tiny
    z = torch.where(present, z, 1.0) / torch.where(present, peak, 1.0)
    return torch.where(present, z / z.square().sum(dim=1, keepdim=True).sqrt(), 0.0)


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


def _check_views(views: Sequence[Tensor], queue: KeyQueue | None, *, alone: bool) -> None:
    if len(views) < 2:
        raise ValueError(f"The loss compares views: pass at least two embeddings, loss(z0, z1), not {len(views)}.")
    for number, view in enumerate(views):
        if not isinstance(view, Tensor):
            raise TypeError(f"View {number} must be a tensor, not {type(view).__name__}.")
        if not view.is_floating_point():
            raise TypeError(f"View {number} is {view.dtype}; embeddings must be of a float dtype: call .float().")
        if view.dim() != 2:
            raise ValueError(f"View {number} has shape {tuple(view.shape)}, needs (batch, dim): flatten it.")
        if view.shape != views[0].shape:
            raise ValueError(
                f"View {number} has shape {tuple(view.shape)}, view 0 {tuple(views[0].shape)}; they must agree."
            )
        if view.device != views[0].device:
            raise ValueError(f"View {number} is on {view.device}, view 0 on {views[0].device}; move them together.")
        if view.numel() == 0:
            raise ValueError(f"View {number} is empty, shape {tuple(view.shape)}.")
        if view.device.type == "cpu" and not torch.isfinite(view).all():
            bad = int((~torch.isfinite(view)).any(dim=1).sum())
            raise ValueError(f"View {number} has {bad} of {len(view)} rows with NaN or infinity: the model diverged.")
    if queue is not None:
        if len(views) != 2:
            raise ValueError(f"With a queue the loss takes anchors and keys, two views, not {len(views)}.")
        if views[0].shape[1] != queue.keys.shape[1]:
            raise ValueError(
                f"Embeddings have {views[0].shape[1]} dims, the queue {queue.keys.shape[1]}; set queue_size."
            )
    elif len(views[0]) == 1 and alone:
        raise ValueError("A batch of one image has no negatives; use at least two images, or a queue.")
