"""Hardness weighting: negatives count the more, the more similar they are, whatever their temperature."""

from __future__ import annotations

from typing import final

from dystress_plugin.checks import check_at_least, unknown_name
from dystress_plugin.temperature.around import Around
from dystress_plugin.temperature.base import Batch, Temperature
from dystress_plugin.temperature.maps import LogitMap, LogitMaps, WeightedMap

NEGATIVES = ("in_batch", "hard", "all")


@final
class Hardness(Around):
    """a(s) = b(s) + strength * sg[s] for negatives and b(s) for positives, b the logit of another temperature.

    A negative's weight in the softmax is then that of a lower temperature, 1 / (1 / tau + strength) for b = s / tau,
    while the gradient of its logit is still b's. A temperature that learns from negatives, such as `Individual`, learns
    from them with these weights.

    LLaVE, 2025, https://arxiv.org/abs/2503.04812, equation 5 (strength 9, in-batch negatives); EmbeddingGemma, 2025,
    https://arxiv.org/abs/2509.20354 (strength 5, hard negatives). sentence-transformers has it as `hardness_mode` and
    `hardness_strength`.

    Args:
        temperature: any `Temperature`, which gives b.
        strength: how much a cosine adds to the logit, at least 0, where it changes nothing.
        negatives: which of them are weighted: "in_batch", all that an anchor is compared with but its own hard
            negatives, also the keys of a queue; "hard", its own hard negatives alone, the columns after the second of
            the layout "one_way" or "both_ways"; "all".

    Raises:
        TypeError: if temperature is not a `Temperature`.
        ValueError: for a strength below 0 or other negatives; at a batch without hard negatives, with "hard".
    """

    def __init__(self, temperature: Temperature, strength: float = 9.0, negatives: str = "in_batch") -> None:
        super().__init__(temperature)
        self.strength = check_at_least("strength", strength, 0)
        if negatives not in NEGATIVES:
            raise ValueError(unknown_name("negatives", negatives, NEGATIVES))
        self.negatives = negatives

    def concerns(self, epochs: float) -> list[str]:
        return self.temperature.concerns(epochs)

    def prepare(self, batch: Batch) -> LogitMaps:
        if self.negatives == "hard" and not batch.hard_negatives:
            raise ValueError(
                "Hardness(negatives='hard') weighs the hard negatives of an anchor, and this batch has none: give them "
                "with layout='one_way', loss(anchors, positives, hard), or weigh negatives='in_batch'."
            )
        maps = self.temperature.prepare(batch)
        if self.negatives == "hard":
            return maps
        return LogitMaps(maps.positive, WeightedMap(maps.negative, self.strength))

    def hard_map(self, maps: LogitMaps) -> LogitMap:
        inside = self._inside(maps)
        hard = self.temperature.hard_map(inside) or inside.negative
        return hard if self.negatives == "in_batch" else WeightedMap(hard, self.strength)

    def _acts(self, batch: Batch) -> bool:
        return True

    def _inside(self, maps: LogitMaps) -> LogitMaps:
        if self.negatives == "hard":
            return maps
        assert isinstance(maps.negative, WeightedMap)  # as `prepare` gives it; narrows the type
        return LogitMaps(maps.positive, maps.negative.map)
