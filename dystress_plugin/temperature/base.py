"""The temperature axis: how a cosine similarity becomes a logit.

A `Temperature` is a module with the method's settings and state. Once per batch its `prepare` returns
`LogitMaps`: pointwise maps without state, which an engine may evaluate on any tile of the similarity matrix.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dystress_plugin.rows import RowStats
from dystress_plugin.temperature.maps import LogitMap, LogitMaps


@dataclass(frozen=True)
class Batch:
    """What a temperature may look at before the logits are computed.

    Attributes:
        positive_cosine: (rows, positives), detached cosines of every anchor with its positives.
        index: (rows,) int64 sample numbers, or None.
        epoch: the current epoch as a float, 0 first, or None.
        views: how many consecutive blocks of `rows / views` anchors show the same images.
        mean: mean of a tensor over the batch; over all ranks where the batch is gathered from them.
        layout: the loss's, by name.
        anchors: (rows, dim) of length 1, detached.
        hard_negatives: how many hard negatives of its own an anchor has, at most.
    """

    positive_cosine: Tensor
    index: Tensor | None
    epoch: float | None
    views: int
    mean: Callable[[Tensor], Tensor]
    layout: str = "views"
    anchors: Tensor | None = None
    hard_negatives: int = 0


class Temperature(nn.Module, ABC):
    """How a cosine similarity becomes a logit. Subclasses are final: one file, one method.

    A subclass has to give `prepare` alone. One that learns from batches gives `update` too; one with a table of samples
    `num_samples`, `resize` and `has_learned`, and sets `needs_index`. `dystress_plugin.testing.check_temperature` tells
    whether it all fits together, `dystress_plugin.recipes.register` how to make a method of it. Ours raise an
    error that names a setting out of its range.

    Attributes:
        needs_index: the loss must be given `index`.
        needs_epoch: the loss must be given `epoch`.
        needs_negative_cosine: `running_mean` and `update` read `RowStats.negative_cosine`.
        scalar: name of its parameter log tau, where it learns one number for all pairs; a host may put its model's
            own in the place.
        per_side: with the layout "both_ways" each side has a temperature, and so a state, of its own.
        per_step: adapters pass the epoch with the fraction of it that is over, not the whole number.
        default_objective: name of the objective that it was published with, which `ContrastiveLoss` takes unless told.
    """

    needs_index = False
    needs_epoch = False
    needs_negative_cosine = False
    scalar: str | None = None
    per_side = False
    per_step = False
    default_objective: str = "ntxent"

    @property
    def num_samples(self) -> int | None:
        """Length of its table of samples; None where it keeps none."""
        return None

    @property
    def table_lengths(self) -> tuple[int, ...]:
        """Lengths of its tables of samples: of two where it keeps those of both sides."""
        return () if self.num_samples is None else (self.num_samples,)

    @property
    def has_learned(self) -> bool:
        """Whether its table of samples holds more than it started with."""
        return False

    def resize(self, num_samples: int) -> None:
        """Starts a fresh table of another length, for hosts that know the data set only after the loss exists.

        Raises:
            TypeError: if it keeps no table.
            ValueError: if its table is given, not learned, and so of one length.
        """
        if self.num_samples is not None:
            raise ValueError(
                f"{type(self).__name__} was given numbers of {self.num_samples} samples, but the training data have "
                f"{num_samples}."
            )
        raise TypeError(f"{type(self).__name__} keeps no table of samples that could have num_samples={num_samples}.")

    def concerns(self, epochs: float) -> list[str]:
        """What a training of so many epochs should be warned of, a sentence each."""
        return []

    def begin(self, opposite: Tensor) -> None:
        """Sees what anchors are compared with, (batch, dim) of this rank, before a batch that is learned from.

        For parameters that start from the first batch; on every rank alike.
        """
        return

    @abstractmethod
    def prepare(self, batch: Batch) -> LogitMaps:
        """The maps for this batch, from state as it was before the batch. Changes nothing."""

    def hard_map(self, maps: LogitMaps) -> LogitMap | None:
        """The map of an anchor's own hard negatives, where it is not that of the others, from those of `prepare`."""
        return None

    def forward(self, batch: Batch) -> LogitMaps:
        """`prepare`, by the name that `torch.func.functional_call` knows."""
        return self.prepare(batch)

    def hold_parameters(self) -> None:
        """Moves parameters back into their range, out of which the optimizer may have carried them."""
        return

    def running_mean(self, stats: RowStats, batch: Batch) -> Tensor | None:
        """Log of the running mean of the negatives' exponentials that SogCLR divides by, (rows,). Changes nothing.

        None where there is none, which means the batch's own.
        """
        return None

    def own_loss(self, maps: LogitMaps, stats: RowStats, batch: Batch) -> Tensor | None:
        """A term of every anchor's loss that trains the temperature's parameters, (rows,); None where the logits do.

        Its value is zero and its gradient what they descend on: G (tau - sg[tau]) with G detached. With G = dL/dtau of
        a loss L of the temperature's own, that is L's gradient, whatever the objective.

        Args:
            maps: what `prepare` returned for this batch.
            stats: with `log_s`, where there is a running mean.
            batch: as for `prepare`.
        """
        return None

    def by_difference(self, batch: Batch) -> bool:
        """Whether `running_mean` is of exp((s_j - s_p) / tau), and SogCLR's loss of s_j - s_p, p the positive."""
        return False

    def update(self, stats: RowStats, batch: Batch) -> None:
        """Moves the temperature's state; called once a batch, after its loss, and only for one that is learned from."""
        return

    def clock(self, epoch: int, batch: int, batches: int) -> float:
        """What an adapter passes as the epoch at batch `batch` of the `batches` of an epoch, both 0 first."""
        return epoch + batch / batches if self.per_step else float(epoch)

    def extra_repr(self) -> str:
        own = {name: getattr(self, name, None) for name in inspect.signature(type(self)).parameters}
        return ", ".join(f"{name}={value}" for name, value in own.items() if not isinstance(value, nn.Module))


def given_epoch(epoch: float | None, needed_by: str) -> float:
    """The epoch, or a ValueError where there is none."""
    if epoch is None:
        raise ValueError(f"{needed_by} needs the epoch: call loss(z0, z1, epoch=current_epoch).")
    return epoch


def given_index(index: Any, needed_by: str) -> Any:
    """The sample numbers, or a ValueError where there are none."""
    if index is None:
        raise ValueError(f"{needed_by} needs the sample numbers: call loss(z0, z1, index=index), int64 (batch,).")
    return index
