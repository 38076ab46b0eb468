"""The temperature axis: how a cosine similarity becomes a logit.

A `Temperature` is a module with the method's settings and state. Once per batch its `prepare` returns
`LogitMaps`: pointwise maps without state, which an engine may evaluate on any tile of the similarity matrix.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dystress_plugin.engine.rows import RowStats


# Fresh memory costs more than the arithmetic on a tile that fits a cache, so engines hand in tiles to overwrite.
Work: TypeAlias = "tuple[Tensor, Tensor] | None"
# Multiplies a tile with a slope in place. A function, as some slopes are a number and others a division.
Times: TypeAlias = Callable[[Tensor], Tensor]


class Parts(NamedTuple):
    """A map in pieces: what an operation of a compiled graph can be given, and a `PartsReader` puts together again."""

    words: tuple[str, ...]
    numbers: tuple[float, ...]
    tensors: tuple[Tensor, ...]


class PartsReader:
    """Hands out the pieces of a map in the order in which `LogitMap.parts` lists them."""

    def __init__(self, words: Iterable[str], numbers: Iterable[float], tensors: Iterable[Tensor]) -> None:
        self.words, self.numbers, self.tensors = iter(words), iter(numbers), iter(tensors)

    def map(self) -> LogitMap:
        """The map that comes next."""
        kinds = {kind.__name__: kind for kind in LogitMap.__subclasses__()}
        return kinds[next(self.words)].from_parts(self)


class LogitMap(ABC):
    """A pointwise map a(s) from cosine similarity to logit, for one batch.

    Every method takes cosines of shape (rows, any) and returns the same shape. A map whose parameters differ from
    row to row holds them as (rows, 1), so that `rows` can cut it to the rows of a tile.
    """

    @abstractmethod
    def logit(self, cosine: Tensor) -> Tensor:
        """a(s), differentiable in the cosine exactly as far as the method lets gradients pass."""

    @abstractmethod
    def slope(self, cosine: Tensor) -> Tensor:
        """da/ds as `logit` differentiates it, in closed form, so that tiles need no autograd."""

    @abstractmethod
    def temperature(self, cosine: Tensor) -> Tensor:
        """The temperature at each cosine, for logs and figures; in the unit of a cosine, positive."""

    @property
    def gain(self) -> float:
        """A factor for the cosines that saves the map a pass over them; a product of matrices has it for nothing."""
        return 1.0

    @abstractmethod
    def logit_and_slope(self, scaled: Tensor, work: Work = None) -> tuple[Tensor, Times]:
        """a(s), and how to multiply with da/d(gain s); without autograd.

        Args:
            scaled: gain * s, any tile; it may itself be returned, and is not needed for the slope any more.
            work: two tensors of its shape, the first for the logit, which may be `scaled`, the second for what the
                slope needs.
        """

    @abstractmethod
    def rows(self, rows: slice) -> LogitMap:
        """The map restricted to some rows."""

    @property
    @abstractmethod
    def bound(self) -> float:
        """A number that |a(s)| does not exceed, known without looking at a tensor."""

    @property
    @abstractmethod
    def rowless(self) -> bool:
        """Whether every row has the same map."""

    def parts(self) -> Parts | None:
        """The map in pieces, the first word its class's name; None where an engine has to take it as it is."""
        return None

    @classmethod
    def from_parts(cls, parts: PartsReader) -> LogitMap:
        """The map from its pieces, after the first word."""
        raise NotImplementedError(f"{cls.__name__}.parts gives pieces that from_parts does not take.")

    def parameter_term(self, mean_cosine: Tensor) -> Tensor | None:
        """A zero per row whose gradient, in the map's own parameters, is that of logsumexp_j a(s_j).

        For engines that differentiate in the cosines alone. None where the map has no parameter to train.

        Args:
            mean_cosine: (rows,) mean of the s_j under the softmax of their logits.
        """
        return None


class LogitMaps(NamedTuple):
    """The maps of one batch; the same object twice unless the method treats negatives differently."""

    positive: LogitMap
    negative: LogitMap


@dataclass(frozen=True)
class Scaled(LogitMap):
    """a(s) = s / tau, with tau a number, a 0-dim tensor, or one per row as (rows, 1).

    Attributes:
        tau: the temperature.
        least: what it is never below; needed where it is a tensor.
    """

    tau: float | Tensor
    least: float | None = None

    def logit(self, cosine: Tensor) -> Tensor:
        return cosine / self._tau(cosine)

    def slope(self, cosine: Tensor) -> Tensor:
        return torch.ones_like(cosine) / self._tau(cosine)

    @property
    def gain(self) -> float:
        return 1.0 if isinstance(self.tau, Tensor) else 1 / self.tau

    def logit_and_slope(self, scaled: Tensor, work: Work = None) -> tuple[Tensor, Times]:
        if not isinstance(self.tau, Tensor):
            return scaled, lambda tile: tile
        tau = self._tau(scaled)
        return torch.div(scaled, tau, out=work and work[0]), lambda tile: tile.div_(tau)

    def temperature(self, cosine: Tensor) -> Tensor:
        return torch.zeros_like(cosine) + self._tau(cosine)

    def rows(self, rows: slice) -> Scaled:
        if self.rowless:
            return self
        assert isinstance(self.tau, Tensor)  # narrows the type
        return Scaled(self.tau[rows], self.least)

    def parts(self) -> Parts:
        if isinstance(self.tau, Tensor):
            assert self.least is not None  # needed where tau is a tensor; narrows the type
            return Parts(("Scaled", "tensor"), (self.least,), (self.tau,))
        return Parts(("Scaled", "number"), (self.tau,), ())

    @classmethod
    def from_parts(cls, parts: PartsReader) -> Scaled:
        if next(parts.words) == "tensor":
            return Scaled(next(parts.tensors), next(parts.numbers))
        return Scaled(next(parts.numbers))

    def parameter_term(self, mean_cosine: Tensor) -> Tensor | None:
        if not isinstance(self.tau, Tensor) or not self.tau.requires_grad:
            return None
        inverse: Tensor = 1 / self.tau.to(mean_cosine.dtype)
        return mean_cosine.detach() * (inverse - inverse.detach()).flatten()

    @property
    def bound(self) -> float:
        return 1 / (self.least or float(self.tau))

    @property
    def rowless(self) -> bool:
        return not isinstance(self.tau, Tensor) or self.tau.dim() == 0

    def _tau(self, cosine: Tensor) -> float | Tensor:
        return self.tau.to(cosine.dtype) if isinstance(self.tau, Tensor) else self.tau


@dataclass(frozen=True)
class Batch:
    """What a temperature may look at before the logits are computed.

    Attributes:
        positive_cosine: (rows, positives), detached cosines of every anchor with its positives.
        index: (rows,) int64 sample numbers, or None.
        epoch: the current epoch as a float, 0 first, or None.
        views: how many consecutive blocks of `rows / views` anchors show the same images.
        mean: mean of a tensor over the batch; over all ranks where the batch is gathered from them.
    """

    positive_cosine: Tensor
    index: Tensor | None
    epoch: float | None
    views: int
    mean: Callable[[Tensor], Tensor]


class Temperature(nn.Module, ABC):
    """How a cosine similarity becomes a logit. Subclasses are final: one file, one method.

    Attributes:
        needs_index: the loss must be given `index`.
        needs_epoch: the loss must be given `epoch`.
        needs_negative_cosine: `running_mean` and `update` read `RowStats.negative_cosine`.
        per_step: adapters pass the epoch with the fraction of it that is over, not the whole number.
    """

    needs_index = False
    needs_epoch = False
    needs_negative_cosine = False
    per_step = False

    @abstractmethod
    def prepare(self, batch: Batch) -> LogitMaps:
        """The maps for this batch, from state as it was before the batch. Changes nothing."""

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

    def update(self, stats: RowStats, batch: Batch) -> None:
        """Moves the temperature's state; called once a batch, after its loss, and only for one that is learned from."""
        return

    def clock(self, epoch: int, batch: int, batches: int) -> float:
        """What an adapter passes as the epoch at batch `batch` of the `batches` of an epoch, both 0 first."""
        return epoch + batch / batches if self.per_step else float(epoch)


def check_positive(name: str, value: float) -> float:
    """`value` as a float, or a ValueError that names it unless it is finite and above 0."""
    value = check_number(name, value)
    if value <= 0:
        raise ValueError(f"{name}={value} must be above 0.")
    return value


def check_number(name: str, value: float) -> float:
    """`value` as a float, or an error that names it unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}.")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value} must be finite.")
    return float(value)


def check_fraction(name: str, value: float) -> float:
    """`value` as a float, or an error that names it unless it lies in [0, 1]."""
    value = check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must lie in [0, 1].")
    return value


def check_range(tau_min: float, tau_max: float, low: str = "tau_min", high: str = "tau_max") -> tuple[float, float]:
    """Both ends as floats, or an error that names them unless 0 < tau_min <= tau_max."""
    tau_min, tau_max = check_positive(low, tau_min), check_positive(high, tau_max)
    if tau_min > tau_max:
        raise ValueError(f"{low}={tau_min} is above {high}={tau_max}; swap them.")
    return tau_min, tau_max
