"""A temperature around any other."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from dystress_plugin.rows import RowStats
from dystress_plugin.temperature.base import Batch, Temperature
from dystress_plugin.temperature.maps import LogitMaps


class Around(Temperature):
    """What the temperature inside needs, keeps and learns is its own; what it computes goes through this one.

    Args:
        temperature: any `Temperature`.

    Raises:
        TypeError: if it is none.
    """

    def __init__(self, temperature: Temperature) -> None:
        super().__init__()
        if not isinstance(temperature, Temperature):
            raise TypeError(f"temperature={temperature!r} must be a Temperature, such as DySTreSS().")
        self.temperature = temperature
        self.per_step = temperature.per_step
        self.needs_index = temperature.needs_index
        self.needs_epoch = temperature.needs_epoch
        self.needs_negative_cosine = temperature.needs_negative_cosine
        self.per_side = temperature.per_side
        self.scalar = temperature.scalar and f"temperature.{temperature.scalar}"
        self.default_objective = temperature.default_objective

    @abstractmethod
    def _acts(self, batch: Batch) -> bool:
        """Whether the temperature inside learns from such a batch."""

    @abstractmethod
    def _inside(self, maps: LogitMaps) -> LogitMaps:
        """The maps of the temperature inside, of which `prepare` made these."""

    @property
    def num_samples(self) -> int | None:
        return self.temperature.num_samples

    @property
    def table_lengths(self) -> tuple[int, ...]:
        return self.temperature.table_lengths

    @property
    def has_learned(self) -> bool:
        return self.temperature.has_learned

    def resize(self, num_samples: int) -> None:
        self.temperature.resize(num_samples)

    def begin(self, opposite: Tensor) -> None:
        self.temperature.begin(opposite)

    def hold_parameters(self) -> None:
        self.temperature.hold_parameters()

    def running_mean(self, stats: RowStats, batch: Batch) -> Tensor | None:
        return self.temperature.running_mean(stats, batch) if self._acts(batch) else None

    def own_loss(self, maps: LogitMaps, stats: RowStats, batch: Batch) -> Tensor | None:
        own = self.temperature.own_loss(self._inside(maps), stats, batch)
        return None if own is None else own * float(self._acts(batch))

    def by_difference(self, batch: Batch) -> bool:
        return self.temperature.by_difference(batch) and self._acts(batch)

    def update(self, stats: RowStats, batch: Batch) -> None:
        if self._acts(batch):
            self.temperature.update(stats, batch)
