"""Any temperature, reached from a constant one."""

from __future__ import annotations

from dataclasses import replace
from typing import final

from dystress_plugin.checks import check_positive
from dystress_plugin.temperature.around import Around
from dystress_plugin.temperature.base import Batch, Temperature, given_epoch
from dystress_plugin.temperature.maps import LogitMap, LogitMaps, MixedMap, Scaled


@final
class WarmUp(Around):
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

    def __init__(
        self, temperature: Temperature, tau: float = 0.1, epochs: float = 10.0, *, per_step: bool = False
    ) -> None:
        super().__init__(temperature)
        self.tau = check_positive("tau", tau)
        self.epochs = check_positive("epochs", epochs)
        self.needs_epoch = True
        self.per_step = bool(per_step) or temperature.per_step

    def concerns(self, epochs: float) -> list[str]:
        own = (
            f"The warm-up never arrives at {type(self.temperature).__name__}: it takes epochs={self.epochs:g}, but "
            f"training ends after {epochs:g}."
        )
        return ([own] if epochs <= self.epochs else []) + self.temperature.concerns(epochs)

    def prepare(self, batch: Batch) -> LogitMaps:
        share = min(1.0, given_epoch(batch.epoch, "WarmUp") / self.epochs)
        maps = self.temperature.prepare(batch)
        positive, negative = (MixedMap(Scaled(self.tau), map_, share) for map_ in maps)
        return LogitMaps(positive, negative)

    def hard_map(self, maps: LogitMaps) -> LogitMap | None:
        hard = self.temperature.hard_map(self._inside(maps))
        assert isinstance(maps.negative, MixedMap)  # as `prepare` gives it; narrows the type
        return hard and replace(maps.negative, second=hard)

    def _acts(self, batch: Batch) -> bool:
        return batch.epoch is not None and batch.epoch >= self.epochs

    def _inside(self, maps: LogitMaps) -> LogitMaps:
        positive, negative = (map_.second for map_ in maps if isinstance(map_, MixedMap))
        return LogitMaps(positive, negative)
