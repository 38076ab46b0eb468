"""Pointwise maps from cosine similarity to logit, which an engine evaluates on any tile."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

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
        kinds = {_path(kind): kind for kind in _subclasses(LogitMap)}  # type: ignore[type-abstract]
        return kinds[next(self.words)].from_parts(self)


def _subclasses(cls: Any) -> list[type[LogitMap]]:
    return [found for child in cls.__subclasses__() for found in (child, *_subclasses(child))]


def _path(cls: type[LogitMap]) -> str:
    """What tells a class from one of another package with the same name."""
    return f"{cls.__module__}.{cls.__qualname__}"


class LogitMap(ABC):
    """A pointwise map a(s) from cosine similarity to logit, for one batch.

    A subclass has to give `logit` and `bound`. A map whose parameters differ from row to row holds them as (rows, 1),
    and gives `rowless` and `rows` too. All else is for speed, for torch.compile, or for parameters to train; `Scaled`
    has it, so that most temperatures need no map of their own. It is best a frozen dataclass.

    Every method takes cosines of shape (rows, any), or (any, any) where all rows have the same map, and returns the
    same shape and dtype.
    """

    @abstractmethod
    def logit(self, cosine: Tensor) -> Tensor:
        """a(s), differentiable in the cosine exactly as far as the method lets gradients pass."""

    @property
    @abstractmethod
    def bound(self) -> float:
        """A number that |a(s)| does not exceed, known without looking at a tensor."""

    def slope(self, cosine: Tensor) -> Tensor:
        """da/ds as `logit` differentiates it. By autograd here; in closed form it is faster, and `parts` need it so."""
        with torch.inference_mode(False), torch.enable_grad():
            cosine = cosine.detach().clone().requires_grad_()
            logit = self.logit(cosine)
            if not logit.requires_grad:
                raise NotImplementedError(f"{type(self).__name__}.logit has no gradient here: give it a `slope`.")
            (slope,) = torch.autograd.grad(logit.sum(), cosine)
        return slope

    def temperature(self, cosine: Tensor) -> Tensor:
        """The temperature at each cosine, for logs and figures; in the unit of a cosine, positive. Here 1 / a'(s)."""
        return 1 / self.slope(cosine)

    @property
    def gain(self) -> float:
        """A factor for the cosines that saves the map a pass over them; a product of matrices has it for nothing."""
        return 1.0

    def logit_and_slope(self, scaled: Tensor, work: Work = None) -> tuple[Tensor, Times]:
        """a(s), and how to multiply with da/d(gain s), in place; without autograd.

        Args:
            scaled: gain * s, any tile; it may itself be returned, and is not needed for the slope any more.
            work: two tensors of its shape, the first for the logit, which may be `scaled`, the second for what the
                slope needs.
        """
        gain = self.gain
        cosine = torch.div(scaled, gain, out=work and work[1])
        # The forward pass alone asks for no slope.
        return self.logit(cosine), lambda tile: tile.mul_(self.slope(cosine) / gain)

    @property
    def rowless(self) -> bool:
        """Whether every row has the same map."""
        return True

    def rows(self, rows: slice) -> LogitMap:
        """The map restricted to some rows."""
        if not self.rowless:
            raise NotImplementedError(f"{type(self).__name__} differs from row to row: give it `rows`.")
        return self

    @property
    def kind(self) -> str:
        """The first word of its `parts`."""
        return _path(type(self))

    def parts(self) -> Parts | None:
        """The map in pieces, the first word its `kind`; None where an engine has to take it as it is."""
        return None

    @classmethod
    def from_parts(cls, parts: PartsReader) -> LogitMap:
        """The map from its pieces, after the first word."""
        raise NotImplementedError(f"{cls.__name__}.parts gives pieces that from_parts does not take.")

    def parameter_term(self, mean_cosine: Tensor) -> Tensor | None:
        """A zero per row whose gradient, in the map's own parameters, is that of logsumexp_j a(s_j).

        For engines that differentiate in the cosines alone; a map that has it has `parts` too. None where the map has
        no parameter to train.

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
        trained: the same temperature with the graph of its parameters, where these learn by `Temperature.own_loss`
            alone, and not by the logits.
    """

    tau: float | Tensor
    least: float | None = None
    trained: Tensor | None = None

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
            return Parts((self.kind, "tensor"), (self.least,), (self.tau,))
        return Parts((self.kind, "number"), (self.tau,), ())

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
class MixedMap(LogitMap):
    """a(s) = (1 - share) * first(s) + share * second(s)."""

    first: LogitMap
    second: LogitMap
    share: float

    def logit(self, cosine: Tensor) -> Tensor:
        return (1 - self.share) * self.first.logit(cosine) + self.share * self.second.logit(cosine)

    def slope(self, cosine: Tensor) -> Tensor:
        return (1 - self.share) * self.first.slope(cosine) + self.share * self.second.slope(cosine)

    def temperature(self, cosine: Tensor) -> Tensor:
        inverse = (1 - self.share) / self.first.temperature(cosine) + self.share / self.second.temperature(cosine)
        return 1 / inverse

    def rows(self, rows: slice) -> MixedMap:
        return MixedMap(self.first.rows(rows), self.second.rows(rows), self.share)

    def parts(self) -> Parts | None:
        first, second = self.first.parts(), self.second.parts()
        if first is None or second is None:
            return None
        return Parts(
            (self.kind, *first.words, *second.words),
            (self.share, *first.numbers, *second.numbers),
            (*first.tensors, *second.tensors),
        )

    @classmethod
    def from_parts(cls, parts: PartsReader) -> MixedMap:
        share = next(parts.numbers)
        return MixedMap(parts.map(), parts.map(), share)

    def parameter_term(self, mean_cosine: Tensor) -> Tensor | None:
        term = self.second.parameter_term(mean_cosine)
        return None if term is None else self.share * term

    @property
    def bound(self) -> float:
        return max(self.first.bound, self.second.bound)

    @property
    def rowless(self) -> bool:
        return self.first.rowless and self.second.rowless


@dataclass(frozen=True)
class WeightedMap(LogitMap):
    """a(s) = map(s) + strength * sg[s]."""

    map: LogitMap
    strength: float

    def logit(self, cosine: Tensor) -> Tensor:
        return self.map.logit(cosine) + self.strength * cosine.detach()

    def slope(self, cosine: Tensor) -> Tensor:
        return self.map.slope(cosine)

    def temperature(self, cosine: Tensor) -> Tensor:
        return 1 / (1 / self.map.temperature(cosine) + self.strength)

    @property
    def gain(self) -> float:
        return self.map.gain

    def logit_and_slope(self, scaled: Tensor, work: Work = None) -> tuple[Tensor, Times]:
        added = scaled * (self.strength / self.gain)  # now, as the map may overwrite it
        logit, multiply_by_slope = self.map.logit_and_slope(scaled, work)
        return torch.add(logit, added, out=work and work[0]), multiply_by_slope

    def rows(self, rows: slice) -> WeightedMap:
        return WeightedMap(self.map.rows(rows), self.strength)

    def parts(self) -> Parts | None:
        parts = self.map.parts()
        if parts is None:
            return None
        return Parts((self.kind, *parts.words), (self.strength, *parts.numbers), parts.tensors)

    @classmethod
    def from_parts(cls, parts: PartsReader) -> WeightedMap:
        strength = next(parts.numbers)
        return WeightedMap(parts.map(), strength)

    def parameter_term(self, mean_cosine: Tensor) -> Tensor | None:
        return self.map.parameter_term(mean_cosine)

    @property
    def bound(self) -> float:
        return self.map.bound + self.strength

    @property
    def rowless(self) -> bool:
        return self.map.rowless
