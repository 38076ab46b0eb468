"""Any temperature, reached from a constant one."""

from __future__ import annotations

from typing import final

from torch import Tensor

from dystress_plugin.checks import check_positive
from dystress_plugin.rows import RowStats
from dystress_plugin.temperature.base import Batch, Temperature, given_epoch
from dystress_plugin.temperature.maps import LogitMaps, MixedMap, Scaled


@final
class WarmUp(Temperature):
    """a(s) = (1 - x) s / tau + x b(s), x = min(1, e / epochs), b the logit of another temperature, e the epoch.

    Training starts at the constant temperature and arrives at the other after `epochs`. Logits are mixed, not
    temperatures, so that it works for the temperature-free logit too. A temperature that learns from the batches
    (`Individual`) begins to once it has arrived: before, they say little about it.

    Args:
        temperature: where it arrives, any `Temperature`.
        tau: the constant it starts from, above 0.
        epochs: how long it takes, above 0.
        per_step: whether adapters pass the epoch with its fraction; see `Schedule`.

    Raises:
        TypeError: if temperature is not a `Temperature`.
    """

    needs_epoch = True

    def __init__(
        self, temperature: Temperature, tau: float = 0.1, epochs: float = 10.0, *, per_step: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(temperature, Temperature):
            raise TypeError(f"temperature={temperature!r} must be a Temperature, such as DySTreSS().")
        self.temperature = temperature
        self.tau = check_positive("tau", tau)
        self.epochs = check_positive("epochs", epochs)
        self.per_step = bool(per_step) or temperature.per_step
        self.needs_index = temperature.needs_index
        self.needs_negative_cosine = temperature.needs_negative_cosine
        self.per_side = temperature.per_side
        self.scalar = temperature.scalar and f"temperature.{temperature.scalar}"
        self.default_objective = temperature.default_objective

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

    def concerns(self, epochs: float) -> list[str]:
        own = (
            f"The warm-up never arrives at {type(self.temperature).__name__}: it takes epochs={self.epochs:g}, but "
            f"training ends after {epochs:g}."
        )
        return ([own] if epochs <= self.epochs else []) + self.temperature.concerns(epochs)

    def begin(self, opposite: Tensor) -> None:
        self.temperature.begin(opposite)

    def prepare(self, batch: Batch) -> LogitMaps:
        share = min(1.0, given_epoch(batch.epoch, "WarmUp") / self.epochs)
        maps = self.temperature.prepare(batch)
        positive, negative = (MixedMap(Scaled(self.tau), map_, share) for map_ in maps)
        return LogitMaps(positive, negative)

    def hold_parameters(self) -> None:
        self.temperature.hold_parameters()

    def running_mean(self, stats: RowStats, batch: Batch) -> Tensor | None:
        return self.temperature.running_mean(stats, batch) if self._has_arrived(batch) else None

    def own_loss(self, maps: LogitMaps, stats: RowStats, batch: Batch) -> Tensor | None:
        positive, negative = (map_.second for map_ in maps if isinstance(map_, MixedMap))
        own = self.temperature.own_loss(LogitMaps(positive, negative), stats, batch)
        return None if own is None else own * float(self._has_arrived(batch))

    def by_difference(self, batch: Batch) -> bool:
        return self.temperature.by_difference(batch) and self._has_arrived(batch)

    def update(self, stats: RowStats, batch: Batch) -> None:
        if self._has_arrived(batch):
            self.temperature.update(stats, batch)

    def _has_arrived(self, batch: Batch) -> bool:
        return batch.epoch is not None and batch.epoch >= self.epochs
