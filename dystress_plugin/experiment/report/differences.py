"""Differences to the best constant temperature, with intervals, and what they say."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from dystress_plugin.experiment.evaluate.protocols import protocol
from dystress_plugin.experiment.report.records import UNTRAINED, Row, family

LEVEL = 0.95

FEW_SEEDS = 5  # below, the page says that the intervals are wide


@dataclass(frozen=True)
class Difference:
    """How much better than the best constant an arm is, by one protocol, seed by seed.

    Attributes:
        name: of the arm.
        protocol: its name.
        constant: name of the constant with the highest mean.
        seeds: number of seeds that both have.
        mean: of the differences, in percentage points.
        low: lower end of the 95 % confidence interval (t, paired); None for one seed.
        high: its upper end.
    """

    name: str
    protocol: str
    constant: str
    seeds: int
    mean: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """In words."""
        if self.low is None or self.high is None:
            return "one seed: nothing can be said"
        if self.low <= 0 <= self.high:
            return "inside the noise"
        return "better" if self.mean > 0 else "worse"


def differences(rows: Sequence[Row], constants: Mapping[str, str], protocols: Sequence[str]) -> list[Difference]:
    """Of every arm to the best constant of its family, by every protocol.

    Args:
        rows: the whole table.
        constants: from an arm with a fixed temperature to its family.
        protocols: their names.
    """
    families = {row.name: family(row.method) for row in rows if row.name != UNTRAINED}
    found = []
    for name in protocols:
        by_seed: dict[str, dict[int, float]] = {}
        for row in rows:
            if (row.protocol, row.group) == (name, "all") and row.name != UNTRAINED:
                by_seed.setdefault(row.name, {})[row.seed] = row.value
        for arm, values in by_seed.items():
            rivals = [c for c, its in constants.items() if its == families[arm] and c in by_seed]
            if not rivals:
                continue
            best = max(rivals, key=lambda c: statistics.fmean(by_seed[c].values()))
            paired = [values[seed] - by_seed[best][seed] for seed in values if seed in by_seed[best]]
            if arm != best and paired:
                found.append(Difference(arm, name, best, len(paired), *interval(paired)))
    return found


def interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and the ends of its 95 % confidence interval by Student's t; None for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def sentence(title: str, found: Sequence[Difference]) -> str:
    """What the differences of one arm say, in words."""
    if all(d.low is None for d in found):
        return f"{title}: one seed, so that nothing can be said about the difference from the best constant."
    parts = []
    for verdict, words in (("better", "better than"), ("worse", "worse than")):
        if chosen := [d for d in found if d.verdict == verdict]:
            each = "; ".join(
                f"{protocol(d.protocol).title} {d.mean:+.2f} ({d.low:+.2f} to {d.high:+.2f})" for d in chosen
            )
            parts.append(f"{words} the best constant by {len(chosen)} of {len(found)} protocols: {each}")
    noise = sum(d.verdict == "inside the noise" for d in found)
    if noise:
        every = "every protocol" if noise == len(found) else f"{noise} of {len(found)} protocols"
        parts.append(f"inside the noise by {every}")
    return f"{title}: {', and '.join(parts)}."
