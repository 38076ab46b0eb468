"""Differences to the best constant temperature, with intervals, and what they say."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
from scipy import stats

from dystress_plugin.experiment.evaluate.protocols import protocol
from dystress_plugin.experiment.report.records import UNTRAINED

LEVEL = 0.95

TRIES = 10  # of an interval, until its level is within a hundredth of the error that it may have

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
        together: ends of an interval that holds for all differences of the table at once, see `simultaneous`; None
            where there is none.
    """

    name: str
    protocol: str
    constant: str
    seeds: int
    mean: float
    low: float | None
    high: float | None
    together: tuple[float, float] | None = None

    @property
    def sure(self) -> bool:
        """Whether 0 is outside of the interval that holds for all at once."""
        return self.together is not None and not self.together[0] <= 0 <= self.together[1]

    @property
    def verdict(self) -> str:
        """In words."""
        if self.low is None or self.high is None:
            return "one seed: nothing can be said"
        if self.low <= 0 <= self.high:
            return "inside the noise"
        return "better" if self.mean > 0 else "worse"


def differences(
    rows: pd.DataFrame, families: Mapping[str, str], constants: Collection[str], protocols: Sequence[str]
) -> list[Difference]:
    """Of every arm to the best constant of its family, by every protocol.

    Args:
        rows: the whole table.
        families: of every arm, in their order.
        constants: the arms with a fixed temperature.
        protocols: their names.
    """
    whole = rows[(rows["group"] == "all") & (rows["name"] != UNTRAINED)]
    found: list[Difference] = []
    for name in protocols:
        accuracy = whole[whole["protocol"] == name].pivot(index="seed", columns="name", values="value")
        for arm in families:
            rivals = [other for other in constants if families[other] == families[arm]]
            if not rivals:
                continue
            best = accuracy[rivals].mean().idxmax()
            paired = accuracy[[arm, best]].dropna() if arm != best else accuracy[:0]
            if len(paired):
                found.append(Difference(arm, name, best, len(paired), *interval(paired[arm], paired[best])))
        level = 1 - (1 - LEVEL) / len(protocols)
        for best in {d.constant for d in found if d.protocol == name}:
            arms = [d.name for d in found if d.protocol == name and d.constant == best and d.name not in constants]
            ends = simultaneous({arm: accuracy[arm].dropna() for arm in arms}, accuracy[best].dropna(), level)
            found = [replace(d, together=ends.get(d.name)) if d.protocol == name else d for d in found]
    return found


def interval(values: Sequence[float], others: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean difference and the ends of its 95 % confidence interval by Student's t, paired; None for a single pair."""
    difference = np.subtract(values, others)
    mean = float(difference.mean())
    if len(difference) < 2:
        return mean, None, None
    if np.ptp(difference) == 0:  # of which scipy warns
        return mean, mean, mean
    low, high = stats.ttest_rel(values, others).confidence_interval(LEVEL)
    return mean, float(low), float(high)


def simultaneous(
    values: Mapping[str, Sequence[float]], control: Sequence[float], level: float
) -> dict[str, tuple[float, float]]:
    """Intervals of the differences from a control, by name, that hold all at once at a level: Dunnett's.

    They take one spread for all, from all seeds of all arms, which is why a few seeds say more than of a single arm;
    and they do not pair by seed. Several protocols share the error, as by Bonferroni. Those of one seed are left out.

    Dunnett, 1955, https://doi.org/10.1080/01621459.1955.10501294; computed by SciPy.
    """
    several = {name: its for name, its in values.items() if len(its) > 1}
    if not several or len(control) < 2 or not any(np.ptp(its) > 0 for its in (*several.values(), control)):
        return {}
    test = partial(stats.dunnett, *several.values(), control=control)
    for seed in range(TRIES):  # SciPy integrates with random numbers, of which few let its search end off the level
        with warnings.catch_warnings():
            warnings.simplefilter("error" if seed < TRIES - 1 else "ignore", UserWarning)
            warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)  # of an arm whose seeds all agree
            with suppress(UserWarning):
                found = test(random_state=seed).confidence_interval(level)
                break
    return dict(zip(several, zip(map(float, found.low), map(float, found.high), strict=True), strict=True))


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
