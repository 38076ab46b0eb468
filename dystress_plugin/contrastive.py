"""The loss: layout -> temperature -> engine -> objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dystress_plugin import checkpointing, distributed, hardware, tracing
from dystress_plugin import layout as layouts
from dystress_plugin.arguments import Index, Indices, indices_of, instances, labels_of, objective_of, queue_of
from dystress_plugin.checks import check_at_least, unknown_name
from dystress_plugin.embeddings import check_view, units_of
from dystress_plugin.engine import (
    ENGINES,
    NegativeStats,
    PositiveStats,
    RowStats,
    closed_form,
    mean_loss,
    positive_stats,
)
from dystress_plugin.layout import LAYOUTS, Alike, Block
from dystress_plugin.objectives import Objective
from dystress_plugin.recipes import recipe
from dystress_plugin.temperature import Temperature
from dystress_plugin.temperature.base import Batch, given_epoch
from dystress_plugin.temperature.maps import LogitMap, LogitMaps


class Pairs(NamedTuple):
    """Cosines and temperatures of every pair of a batch, flat: what figures and logs are made of."""

    positive_cosine: Tensor
    positive_tau: Tensor
    negative_cosine: Tensor
    negative_tau: Tensor


# What a temperature overrides that has more to learn, or to be learned from, than `update` says.
OF_STATE = ("begin", "hold_parameters", "running_mean", "own_loss")


class _Side(NamedTuple):
    """What a temperature is asked about: its blocks, where their anchors lie among all, and what it may look at."""

    temperature: Temperature
    blocks: list[Block]
    rows: slice
    batch: Batch


@final
class ContrastiveLoss(nn.Module):
    """mean_i -log( exp(a(s_ip)) / (exp(a(s_ip)) + sum_n exp(a(s_in))) ), with a(s) = s / tau given by the temperature.

    i runs over all views of all images (NT-Xent), s is the cosine similarity, p the other view of i's image, n all
    views of all other images. With several positives their exponentials are added, see `positives`.
    `objective` replaces the outer form, `temperature` the map a. With a queue, i runs over view 0, p is view 1 and n
    the keys in the queue.

    State, which is a queue and tables of samples, moves with the batches that are learned from: in train mode, with
    gradients enabled, where an embedding requires one. Keys need none beside queries that do. A batch under `no_grad`
    or `inference_mode`, or of a frozen encoder, is compared and leaves no trace. Within `torch.utils.checkpoint` a
    batch is learned from once; what a loss with state saves for the backward pass is kept rather than computed again,
    as it would come from a later state.

    Where torch.distributed runs, every rank begins with rank 0's state and parameters, takes in what all ranks learn,
    and gets the mean over ranks of its parameters' gradients, outside of DistributedDataParallel as well. A loss that
    has any of these, or gathers, is to be trained with equally often on every rank.

    Args:
        temperature: a method's name, from `dystress_plugin.recipes.METHODS`, or an instance of a class in
            `dystress_plugin.temperature`; with the layout "both_ways" also a pair of instances, one a side. There each
            side has a state of its own where the temperature keeps one per side, as `Individual` does; of a single
            instance the other side takes a copy.
        objective: "ntxent", "macl", "sogclr", "dcl", "dclw" or "dual", or a `dystress_plugin.objectives.Objective`.
            None takes the recipe's; for an instance of a temperature its own: "macl" for ModelAware, "sogclr" for
            Individual, for WarmUp and Hardness that of the temperature inside, "ntxent" for the others.
        queue_size: (keys, dim) for a queue of negatives, which a recipe named `..._moco` needs; None or 0 for none.
        layout: "views"; or for two sides whose rows belong together, such as images and captions, "one_way"
            (anchors from the first, candidates from the second, as in SimCSE) or "both_ways" (CLIP).
        positives: how several positives of an anchor, in three or more views or with labels, are joined. "sum" adds
            their exponentials: -log( sum_p e^a_p / (sum_p e^a_p + sum_n e^a_n) ). "mean" is the mean over p of the
            objective of p alone, in NT-Xent with the other positives among what it is compared with, as in SupCon:
            mean_p -log( e^a_p / (sum_p e^a_p + sum_n e^a_n) ). The same with labels, where "dclw" has no "mean".
        engine: "dense" holds the matrix of similarities, "blockwise" tiles of it, so that memory grows with the batch
            and not with its square. "auto" takes the whole matrix up to 2^16 entries (128 images in two views) on a
            CPU and up to 64 MiB (2048 images) elsewhere, where that is the faster one: for two views without state in
            closed form, else as "dense" does. Also up to 2^26 entries where torch.func or forward-mode differentiation
            need all of it.
        gather_distributed: compare with the batches of all ranks, with gradient. The loss of a rank is scaled such
            that the mean over ranks is the loss of the whole batch. MACL's alignment and DCLW's weights are then
            those of the whole batch.
        **settings: parameters of the temperature where it is given by name, such as `tau_max=0.3`, and of the
            objective, `sigma=0.5` for "dclw" and `ratio=10` for "dual"; "isogclr" needs `num_samples`, which may be a
            pair with "both_ways".

    Raises:
        ValueError: for an unknown name (with the nearest valid one) or a parameter out of its range.
        TypeError: for a temperature that is neither a name nor a `Temperature`, or its settings beside an instance;
            for an objective that is neither a name nor an `Objective`.

    Attributes:
        objective: the objective's name, also where an instance was given.
        temperature: the temperature; of two the first side's.
        temperatures: a tuple of it, or of both sides'.

    Examples:
        >>> loss = ContrastiveLoss("dystress", tau_min=0.1, tau_max=0.2)
        >>> value = loss(model(view_0), model(view_1))
    """

    def __init__(
        self,
        temperature: str | Temperature | Sequence[Temperature] = "dystress",
        *,
        objective: str | Objective | None = None,
        queue_size: tuple[int, int] | int | None = None,
        layout: str = "views",
        positives: str = "sum",
        engine: str = "auto",
        gather_distributed: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        chosen = recipe(temperature) if isinstance(temperature, str) else None
        given = () if isinstance(temperature, str) else instances(temperature, layout)
        if objective is None:
            objective = chosen.objective if chosen else given[0].default_objective
        self._objective = objective_of(objective)
        for kind, name, known in (
            ("layout", layout, LAYOUTS),
            ("positives", positives, ("sum", "mean")),
            ("engine", engine, ENGINES),
        ):
            if name not in known:
                raise ValueError(unknown_name(kind, name, known))

        own = {name: settings.pop(name) for name in self._objective.parameters if name in settings}
        if chosen:
            given = chosen.build_temperatures(layout, settings)
            if chosen.queue and not queue_size:
                raise ValueError(
                    f"Method '{chosen.name}' keeps a queue: give queue_size=(keys, dim), such as (65536, 128)."
                )
        elif settings:
            raise TypeError(
                f"{', '.join(settings)}: settings go into the temperature itself when it is given as an instance, "
                f"{type(given[0]).__name__}(...)."
            )

        self.temperature: Temperature = given[0]
        self.temperature_back: Temperature | None = given[1] if len(given) > 1 else None
        self.objective = self._objective.name
        self.objective_settings = self._objective.checked(own)
        self.layout = layout
        self.positives = positives
        self.engine = engine
        self.gather_distributed = bool(gather_distributed)
        self._passes = checkpointing.Passes()
        self._begun = False
        self.queue = queue_of(queue_size)
        if self.queue is not None and layout != "views":
            raise ValueError(f"layout='{layout}' takes no queue: leave queue_size out.")

    @property
    def temperatures(self) -> tuple[Temperature, ...]:
        """One temperature, or one a side."""
        return (self.temperature,) if self.temperature_back is None else (self.temperature, self.temperature_back)

    def forward(
        self,
        *views: Tensor,
        index: Index | None = None,
        epoch: float | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            *views: two or more (batch, dim) tensors of any float dtype, row i of each showing image i. They need
                not be normalised; a zero row has similarity 0 to everything and no gradient. Half precision is
                computed in float32. With a queue: anchors, then keys. With another layout than "views": two sides, then
                any hard negatives, row i of each for anchor i, which all anchors of side 0 are compared with.
            index: (batch,) int64, sample numbers, where the temperature keeps a table; with "both_ways" also a pair of
                them, where the sides are numbered apart, as an image with several captions is.
            epoch: the current epoch, 0 first, where the temperature is scheduled; a fraction lies within it.
            labels: (batch,) int64 classes: all views of all images of an anchor's class are then its positives, and its
                negatives those of other classes, as in SupCon, https://arxiv.org/abs/2004.11362, whose loss is
                positives="mean". For the layout "views" without a queue.

        Returns:
            0-dim tensor, float32, or float64 if a view is.

        Raises:
            TypeError: for views, index, epoch or labels of another type.
            ValueError: for shapes that do not fit, too few images, a missing index or epoch; for labels in another
                layout, or of a single class; for state that a transform of torch.func would have to change; or for
                embeddings that are not finite. Labels, embeddings and how far an index runs are looked at on the CPU
                alone (in compiled code and under torch.func there is nothing to look at, and on CUDA a step would wait
                for the device: numbers that are not finite propagate, and an index beyond a table is CUDA's own error).
        """
        indices, epoch = self._checked(views, index, epoch)
        trains = self.training and torch.is_grad_enabled()
        learns = trains and any(view.requires_grad for view in views)
        if trains:
            self._begin_as_rank_0(views)
            for temperature in self.temperatures:
                temperature.hold_parameters()
        classes = None if labels is None else self._checked_labels(labels, views[0])
        if self._has_closed_form and classes is None and closed_form.takes(views):
            step = closed_form.Step(self.temperature, self._objective, self.objective_settings, epoch, learns)
            value = closed_form.value(step, views)
            if value is not None:
                return value
        units = units_of(views)
        compute = partial(self._value, units, indices, epoch, classes, learns=learns)
        ranks = distributed.world_size() > 1
        with distributed.batch_of(units.shape[1], units.device) if ranks else nullcontext():
            return self._passes.value(compute, units, list(self.buffers()) if self.training else [], learns=learns)

    def _value(
        self, units: Tensor, indices: Indices, epoch: float | None, labels: Tensor | None, *, learns: bool
    ) -> Tensor:
        with hardware.without_autocast(units.device):
            for number, temperature in enumerate(self.temperatures if learns else ()):
                temperature.begin(units[0 if self._in_views or number else 1])
            stats, sides, one_by_one, own = self._row_stats(units, indices, epoch, labels)
            rows = one_by_one() if self.positives == "mean" else self._objective.rows(stats, self.objective_settings)
            views = len(stats.positive) // units.shape[1]
            value = rows.mean() if own is None else rows.mean() + own
            share = self._share() * (views if self._objective.sum_over_views else 1)
        if learns:
            for side in sides:
                side.temperature.update(stats.rows(side.rows), side.batch)
            if self.queue is not None:
                self.queue.push(units[1])
        return value if share == 1 else value * share

    @torch.no_grad()
    def pairs(
        self,
        *views: Tensor,
        index: Index | None = None,
        epoch: float | None = None,
        max_keys: int | None = None,
    ) -> Pairs:
        """Every pair of a batch with its temperature; of this rank alone, and without a change of state.

        It holds the whole matrix of similarities: give it a few hundred images. The arguments are those of the loss,
        and how many keys of a queue to compare with at most, all of them where that is None.
        """
        indices, epoch = self._checked(views, index, epoch)
        units = units_of(views)
        with hardware.without_autocast(units.device):
            found: Any = Pairs([], [], [], [])  # type: ignore[arg-type]  # lists of tensors until they are joined
            for side in self._sides(units, indices, epoch, gather=False, max_keys=max_keys):
                maps = side.temperature.prepare(side.batch)
                found.positive_cosine.append(side.batch.positive_cosine.flatten())
                found.positive_tau.append(maps.positive.temperature(side.batch.positive_cosine).flatten())
                for rows, block in _rows(side.blocks):
                    candidates = block.anchors if block.candidates is None else block.candidates
                    cosine = block.anchors @ candidates.T
                    excluded = block.excluded.fill_(torch.zeros_like(cosine, dtype=torch.uint8), 1)
                    # Sorted, not masked: how many a mask leaves would have to be waited for.
                    negatives = excluded.argsort(dim=1, stable=True)[:, : block.num_negatives]
                    tau = maps.negative.rows(rows).temperature(cosine)
                    if block.hard is not None and (hard := side.temperature.hard_map(maps)) is not None:
                        columns = block.own.columns(len(tau), tau.device)[:, 1:]
                        tau.scatter_(1, columns, hard.rows(rows).temperature(block.hard))
                    found.negative_cosine.append(cosine.gather(1, negatives).flatten())
                    found.negative_tau.append(tau.gather(1, negatives).flatten())
            return Pairs(*map(torch.cat, found))

    def lacks_negatives(self, *views: Tensor) -> bool:
        """Whether a batch is of one image that nothing is there to be compared with, at which the loss raises."""
        others = self.gather_distributed and distributed.world_size() > 1
        hard = self.layout == "one_way" and len(views) > 2
        return len(views[0]) == 1 and self.queue is None and not others and not hard

    def zero(self, *views: Tensor) -> Tensor:
        """0 with gradients of 0, for hosts that go on after a batch that lacks negatives.

        Its backward pass takes part in what other ranks, whose batches may have more images, do in theirs.
        """
        for number, view in enumerate(views):
            check_view(number, view, views[0])
        first = views[0]
        parameters: list[dict[str, Tensor]] = [dict(own.named_parameters()) for own in self.temperatures]
        if self.training and torch.is_grad_enabled():
            self._begin_as_rank_0(views)
            first, parameters = self._with_mean_gradients(first)
        dtype = torch.promote_types(torch.float32, first.dtype)
        trained = [parameter for own in parameters for parameter in own.values()]
        return torch.stack([(x.to(dtype) * 0).sum() for x in (first, *views[1:], *trained)]).sum()

    def _begin_as_rank_0(self, views: Sequence[Tensor]) -> None:
        """Once: ranks may have been seeded differently, as data loading wants it, and so hold different queues."""
        if self._begun or distributed.world_size() == 1:
            return
        if any(tensor.requires_grad for tensor in (*views, *self.parameters())):
            distributed.from_rank_0(*self.parameters(), *self.buffers())
            self._begun = True

    def _blocks(
        self, units: Tensor, *, gather: bool, max_keys: int | None = None, labels: Tensor | None = None
    ) -> list[Block]:
        if labels is not None:
            return layouts.classes(units, labels, gather=gather)
        if self.queue is not None:
            return layouts.queue(units, self.queue.read(max_keys))
        return LAYOUTS[self.layout](units, gather=gather)

    def _sides(
        self,
        units: Tensor,
        indices: Indices,
        epoch: float | None,
        *,
        gather: bool,
        max_keys: int | None = None,
        labels: Tensor | None = None,
    ) -> list[_Side]:
        """What each temperature is asked about: all blocks, or the block of its side."""
        blocks = self._blocks(units, gather=gather, max_keys=max_keys, labels=labels)
        alone = self.temperature_back is None
        sides, start = [], 0
        for number, temperature in enumerate(self.temperatures):
            own = blocks if alone else [blocks[number]]
            positive_cosine = _together([block.positive_cosine for block in own])
            views = len(positive_cosine) // units.shape[1]
            # A side may have sample numbers of its own.
            index = [indices[view % len(indices)] for view in (range(views) if alone else [number])] if indices else []
            batch = Batch(
                positive_cosine=positive_cosine.detach(),
                index=_together(index) if index else None,
                epoch=epoch,
                views=views,
                mean=distributed.mean_over_ranks if gather else torch.mean,
                layout="queue" if self.queue is not None else self.layout,
                anchors=_together([block.anchors for block in own]).detach(),
                hard_negatives=max(0 if block.hard is None else block.hard.shape[1] for block in own),
            )
            rows = slice(start, start + len(positive_cosine))
            sides.append(_Side(temperature, own, rows, batch))
            start = rows.stop
        return sides

    def _row_stats(
        self, units: Tensor, indices: Indices, epoch: float | None, labels: Tensor | None
    ) -> tuple[RowStats, list[_Side], Callable[[], Tensor], Tensor | None]:
        """The statistics with all positives joined, the loss of rows with each alone, and the temperatures' own."""
        if self.training and tracing.captured(self.buffers()):
            raise ValueError(
                "torch.func would have to change the state of this loss, its queue or its tables: call loss.eval(), or "
                "hand the state over by torch.func.functional_call."
            )
        units, parameters = self._with_mean_gradients(units)
        sides = self._sides(units, indices, epoch, gather=self.gather_distributed, labels=labels)
        maps: list[LogitMaps] = [
            functional_call(side.temperature, own, (side.batch,)) if own else side.temperature(side.batch)
            for side, own in zip(sides, parameters, strict=True)
        ]
        negatives = [
            self._negative_stats(block, own.negative.rows(rows), hard and hard.rows(rows))
            for side, own in zip(sides, maps, strict=True)
            for hard in [side.temperature.hard_map(own)]
            for rows, block in _rows(side.blocks)
        ]
        cosines = [_together([block.positive_cosine for block in side.blocks]) for side in sides]
        positive_cosine = _together(cosines)
        of_classes = None
        if labels is not None:  # one block, and of one side
            anchors, _, candidates, alike, _ = sides[0].blocks[0]
            assert isinstance(alike, Alike)  # as `classes` gives it; narrows the type
            of_classes = anchors, candidates, alike, maps[0].positive
            joined = positive_stats(*of_classes, ratio=self._ratio)
        else:
            logits = [own.positive.logit(cosine) for own, cosine in zip(maps, cosines, strict=True)]
            positive_logit = _together(logits)
            joined = _joined_positives(positive_logit, self._ratio)
        negative_cosines = [part.negative_cosine for part in negatives if part.negative_cosine is not None]
        stats = RowStats(
            positive=joined.positive,
            negative=_together([part.negative for part in negatives]),
            positive_cosine=_over_positives(torch.mean, positive_cosine),
            negative_cosine=_together(negative_cosines) if negative_cosines else None,
            num_negatives=sides[0].blocks[0].num_negatives,
            positive_logit=joined.positive_logit,
            mean=sides[0].batch.mean,
        )
        if self._ratio is not None:
            soft = [part.soft_negative for part in negatives if part.soft_negative is not None]
            stats = replace(stats, soft_positive=joined.soft_positive, soft_negative=_together(soft))
        stats = _with_running_means(stats, sides)
        own_losses = [
            side.temperature.own_loss(its, stats.rows(side.rows), side.batch)
            for side, its in zip(sides, maps, strict=True)
        ]
        terms = [term.sum() / len(stats.positive) for term in own_losses if term is not None]

        def one_by_one() -> Tensor:
            if of_classes is not None:
                return mean_loss(*of_classes, stats, objective=self._objective, settings=self.objective_settings)
            terms = _one_by_one(stats, positive_logit, positive_cosine, self._objective.competing, self._ratio)
            return self._objective.rows(terms, self.objective_settings)

        return stats, sides, one_by_one, torch.stack(terms).sum() if terms else None

    def _negative_stats(self, block: Block, negative: LogitMap, hard: LogitMap | None) -> NegativeStats:
        """The engine's, to which an anchor's own hard negatives are added here where they have a map of their own."""
        of_engine = partial(
            ENGINES[self.engine],
            block.anchors,
            block.candidates,
            logit_map=negative,
            want_cosine=self._counts_negatives,
            ratio=self._ratio,
        )
        if hard is None or block.hard is None:
            return of_engine(excluded=block.excluded)
        added = _stats_of(block.hard, hard, self._counts_negatives, self._ratio)
        if block.candidates is not None and block.own.copies == len(block.candidates):  # nothing is left
            return added
        return _joined(of_engine(excluded=block.own), added)

    def _with_mean_gradients(self, units: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The temperatures' parameters, their gradients averaged over ranks: nobody else may do it for a loss."""
        trained: list[dict[str, Tensor]] = [
            {name: p for name, p in temperature.named_parameters() if p.requires_grad}
            for temperature in self.temperatures
        ]
        if not (self.training and torch.is_grad_enabled()):
            return units, trained
        units, *parameters = distributed.with_mean_gradients(units, *(p for own in trained for p in own.values()))
        averaged = iter(parameters)
        return units, [{name: next(averaged) for name in own} for own in trained]

    def _share(self) -> float:
        """By what a rank's loss is multiplied, so that ranks of different batches weigh by their images."""
        ranks = self.gather_distributed and distributed.world_size() > 1
        return distributed.share_of_batch() if ranks else 1.0

    def _checked(
        self, views: Sequence[Tensor], index: Index | None, epoch: float | None
    ) -> tuple[Indices, float | None]:
        """The sample numbers of every side on the views' device, and the epoch as a float."""
        self._check_views(views)
        indices = indices_of(index, views[0], self.temperatures, self.layout)
        for temperature in self.temperatures:
            if temperature.needs_epoch:
                given_epoch(epoch, type(temperature).__name__)
        if epoch is not None:
            epoch = check_at_least("epoch", epoch, 0)
        return indices, epoch

    def _checked_labels(self, labels: Tensor, view: Tensor) -> Tensor:
        if not self._in_views:
            has = "a queue" if self.queue is not None else f"layout='{self.layout}'"
            raise ValueError(f"labels make positives of all views of a class, and this loss has {has}: leave them out.")
        return labels_of(labels, view)

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
            check_view(number, view, views[0])
        if self.queue is not None:
            if views[0].shape[1] != self.queue.keys.shape[1]:
                raise ValueError(
                    f"Embeddings have {views[0].shape[1]} dims, the queue {self.queue.keys.shape[1]}; set queue_size."
                )
        elif self.lacks_negatives(*views):
            raise ValueError("A batch of one image has no negatives; use at least two images, or a queue.")

    @property
    def _has_closed_form(self) -> bool:
        """Whether `closed_form` has a batch of two views: of a temperature without tensors, by P and L alone."""
        own = self.temperature
        return (
            self._in_views
            and self.engine == "auto"
            and self.positives == "sum"
            and self._objective.has_closed_form
            and not (own._parameters or own._buffers or own._modules or own.needs_index or own.needs_negative_cosine)
            and not any(isinstance(kept, Tensor) for kept in vars(own).values())
            and all(getattr(type(own), name) is getattr(Temperature, name) for name in OF_STATE)
            and distributed.world_size() == 1
        )

    @property
    def _in_views(self) -> bool:
        """Whether anchors are compared with those of their own kind, and not with another side or keys."""
        return self.layout == "views" and self.queue is None

    @property
    def _ratio(self) -> float | None:
        return self._objective.ratio(self.objective_settings)

    @property
    def _counts_negatives(self) -> bool:
        return self._objective.needs_negative_cosine or any(own.needs_negative_cosine for own in self.temperatures)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        first, back = f"{prefix}temperature.", f"{prefix}temperature_back."
        if self.temperature_back is not None and not any(name.startswith(back) for name in state_dict):
            # Of 0.1.0, where both sides had one.
            state_dict.update({back + k[len(first) :]: v for k, v in state_dict.items() if k.startswith(first)})
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        own = "".join(f", {name}={value}" for name, value in self.objective_settings.items())
        return (
            f"objective={self.objective}{own}, layout={self.layout}, positives={self.positives}, engine={self.engine}, "
            f"gather_distributed={self.gather_distributed}"
        )


def _together(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts, at no cost where there is one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _over_positives(reduce: Callable[..., Tensor], x: Tensor) -> Tensor:
    """`reduce` over the positives of every anchor, at no cost where there is one."""
    return x.squeeze(1) if x.shape[1] == 1 else reduce(x, dim=1)


def _joined_positives(logit: Tensor, ratio: float | None) -> PositiveStats:
    """The statistics of positives whose logits are there, (rows, positives)."""
    soft = None if ratio is None else _over_positives(torch.logsumexp, logit.detach() / ratio)
    return PositiveStats(_over_positives(torch.logsumexp, logit), _over_positives(torch.mean, logit), soft)


def _with_running_means(stats: RowStats, sides: Sequence[_Side]) -> RowStats:
    """The statistics with what SogCLR divides by; of a side that keeps no mean, the batch's own."""
    means = [side.temperature.running_mean(stats.rows(side.rows), side.batch) for side in sides]
    if all(mean is None for mean in means):
        return stats
    log_s = stats.negative.detach() - stats.log_num_negatives
    log_s = torch.cat([log_s[side.rows] if mean is None else mean for side, mean in zip(sides, means, strict=True)])
    of_sides = [side.temperature.by_difference(side.batch) for side in sides]
    difference = None
    if any(of_sides):
        each = zip(sides, of_sides, strict=True)
        difference = torch.cat([torch.full_like(log_s[side.rows], own, dtype=torch.bool) for side, own in each])
    return replace(stats, log_s=log_s, difference=difference)


def _one_by_one(stats: RowStats, logit: Tensor, cosine: Tensor, competing: bool, ratio: float | None) -> RowStats:
    """A row for every positive of every anchor; the anchor's others are among its negatives if they are `competing`."""

    def repeated(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, None].expand_as(logit).flatten()

    negative = stats.negative[:, None].expand_as(logit)
    if competing:
        itself = torch.eye(logit.shape[1], dtype=torch.bool, device=logit.device)
        others = logit[:, None].masked_fill(itself, -math.inf)  # (rows, positives, their rivals)
        negative = torch.cat([negative[:, :, None], others], dim=2).logsumexp(2)
    return replace(
        stats,
        positive=logit.flatten(),
        negative=negative.flatten(),
        positive_cosine=cosine.flatten(),
        negative_cosine=repeated(stats.negative_cosine),
        log_s=repeated(stats.log_s),
        difference=repeated(stats.difference),
        positive_logit=logit.flatten(),
        soft_positive=None if ratio is None else logit.detach().flatten() / ratio,
        soft_negative=repeated(stats.soft_negative),
    )


def _stats_of(cosine: Tensor, logit_map: LogitMap, want_cosine: bool, ratio: float | None) -> NegativeStats:
    """What an engine computes, of negatives whose cosines are there, (rows, negatives)."""
    logit = logit_map.logit(cosine)
    mean = (torch.softmax(logit.detach(), dim=1) * cosine).sum(dim=1) if want_cosine else None
    soft = None if ratio is None else torch.logsumexp(logit.detach() / ratio, dim=1)
    return NegativeStats(torch.logsumexp(logit, dim=1), mean, soft)


def _joined(one: NegativeStats, other: NegativeStats) -> NegativeStats:
    """The statistics of the negatives of both."""
    mean = soft = None
    if one.negative_cosine is not None and other.negative_cosine is not None:
        share = torch.sigmoid((other.negative - one.negative).detach())
        mean = (1 - share) * one.negative_cosine + share * other.negative_cosine
    if one.soft_negative is not None and other.soft_negative is not None:
        soft = torch.logaddexp(one.soft_negative, other.soft_negative)
    return NegativeStats(torch.logaddexp(one.negative, other.negative), mean, soft)


def _rows(blocks: Sequence[Block]) -> list[tuple[slice, Block]]:
    """Every block with where its anchors lie among the rows of the batch."""
    ends = [0]
    for block in blocks:
        ends.append(ends[-1] + len(block.anchors))
    return [(slice(start, end), block) for start, end, block in zip(ends, ends[1:], blocks, strict=False)]
