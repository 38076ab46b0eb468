"""DySTreSS: a temperature for every pair, from its own cosine similarity."""

from __future__ import annotations

import warnings
from typing import final

from dystress_plugin.checks import check_number, check_positive, check_range, unknown_name
from dystress_plugin.temperature.base import Batch, Temperature, given_epoch
from dystress_plugin.temperature.maps import LogitMaps
from dystress_plugin.temperature.profiles import PROFILES, ProfiledMap, monotone_limit


@final
class DySTreSS(Temperature):
    """a(s) = s / tau(s), tau(s) = tau_min + (tau_max - tau_min) * (1 - cos(pi * s)) / 2.

    The temperature is tau_max for s = -1 and 1 and tau_min for s = 0 (profile "cosine"). Other profiles:

    - "shifted": tau_max for s > -shift; below, tau_min + (tau_max - tau_min) * (1 + cos(pi * (s + shift) / scale)) / 2.
      With the paper's best pair (-0.4, 0.7) the minimum lies at s = -0.3 and the plateau starts at 0.4.
    - "cosine_constant": tau_max for s > shift; below, the same cosine with (s - shift); -0.2 and 0.8, so that
      tau_min is reached at s = -1 only.
    - "exponential": tau_max - (tau_max - tau_min) * exp(-rate * |s|), rate 3.5.
    - "linear": tau_min + (tau_max - tau_min) * |s|. The paper names a linear form without giving it; this
      definition is ours.
    - "root": tau_min + (tau_max - tau_min) * sqrt((s + 1) / 2), the root held at 0.001 and above, so that its slope
      is bounded. s / tau(s) grows with s for every range.

    DySTreSS, 2023, https://arxiv.org/abs/2308.01140 (ImageNet 0.1 and 0.2; CIFAR code default 0.07 and 0.2;
    sentences 0.04 and 0.05 with "shifted"). "root" is of TeMo, 2025, https://openreview.net/forum?id=rIv5ftmR3v (images
    with captions, 0.01 and 0.05, not detached), whose code also trains CLIP with "cosine" and "shifted", 0.01 and 0.04;
    of these ranges the latter is beyond the limit below, so it compares with a logit that falls.

    Args:
        tau_min: lowest temperature, above 0.
        tau_max: highest temperature, at least tau_min.
        profile: one of the above.
        shift: in [-1, 0], for "shifted" and "cosine_constant"; None takes the profile's own.
        scale: half a period of the cosine, above 0, for the same two.
        rate: above 0, for "exponential".
        detach: whether tau(s) counts as a constant in the gradient. The released code does so everywhere but
            in its DCL loss.
        negative_range: another (tau_min, tau_max) for the negatives; None uses the same.
        stabilise: epochs over which tau_min rises linearly to tau_max, so that training ends with a constant; None
            leaves it. Off in the released code, where it stands commented out without a result.

    Raises:
        ValueError: for a range that is not 0 < tau_min <= tau_max, an unknown profile, or a parameter that the
            profile does not have or that is out of its range.

    Warns:
        UserWarning: when the range is so wide that s / tau(s) falls somewhere as s grows: a more similar pair
            would get a smaller logit. The message names the ratio tau_max / tau_min at which this begins.
    """

    def __init__(
        self,
        tau_min: float = 0.1,
        tau_max: float = 0.2,
        profile: str = "cosine",
        *,
        shift: float | None = None,
        scale: float | None = None,
        rate: float | None = None,
        detach: bool = True,
        negative_range: tuple[float, float] | None = None,
        stabilise: float | None = None,
    ) -> None:
        super().__init__()
        self.tau_min, self.tau_max = check_range(tau_min, tau_max)
        self.profile = profile
        self.parameters_ = _profile_parameters(profile, {"shift": shift, "scale": scale, "rate": rate})
        self.detach = bool(detach)
        self.negative_range = None
        if negative_range is not None:
            ends = tuple(negative_range) if hasattr(negative_range, "__len__") else ()
            if len(ends) != 2:
                raise ValueError(f"negative_range={negative_range} must be a pair (tau_min, tau_max) or None.")
            self.negative_range = check_range(*ends, "negative_range[0]", "negative_range[1]")
        self.stabilise = None if stabilise is None else check_positive("stabilise", stabilise)
        self.needs_epoch = self.stabilise is not None

        limit = monotone_limit(profile, **self.parameters_)
        for low, high in filter(None, [(self.tau_min, self.tau_max), self.negative_range]):
            if high / low > limit * (1 + 1e-9):
                warnings.warn(
                    f"tau_max/tau_min = {high}/{low} = {high / low:.3g} is above {limit:.2f}, the limit of profile "
                    f"'{profile}': the logit s/tau(s) then falls over part of [-1, 1], so a more similar pair can "
                    f"get a smaller logit. Narrow the range to stay below the limit.",
                    stacklevel=2,
                )

    def concerns(self, epochs: float) -> list[str]:
        if self.stabilise is None or epochs > self.stabilise:
            return []
        return [
            f"tau_min never arrives at tau_max={self.tau_max}: it takes stabilise={self.stabilise:g} epochs, but "
            f"training ends after {epochs:g}."
        ]

    def prepare(self, batch: Batch) -> LogitMaps:
        positive = self._map(self.tau_min, self.tau_max, batch)
        if self.negative_range is None:
            return LogitMaps(positive, positive)
        return LogitMaps(positive, self._map(*self.negative_range, batch))

    def _map(self, tau_min: float, tau_max: float, batch: Batch) -> ProfiledMap:
        if self.stabilise is not None:
            epoch = given_epoch(batch.epoch, "DySTreSS with stabilise")
            tau_min += (tau_max - tau_min) * min(1.0, epoch / self.stabilise)
        return ProfiledMap(self.profile, tau_min, tau_max - tau_min, self.parameters_, self.detach)

    def extra_repr(self) -> str:
        own = {
            "profile": self.profile,
            **self.parameters_,
            "detach": self.detach,
            "negative_range": self.negative_range,
            "stabilise": self.stabilise,
        }
        return f"tau_min={self.tau_min}, tau_max={self.tau_max}, " + ", ".join(f"{k}={v}" for k, v in own.items())


def _profile_parameters(profile: str, given: dict[str, float | None]) -> dict[str, float]:
    if profile not in PROFILES:
        raise ValueError(unknown_name("profile", profile, PROFILES))
    parameters = dict(PROFILES[profile].defaults)
    for name, value in given.items():
        if value is None:
            continue
        if name not in parameters:
            has = ", ".join(parameters) or "no parameter"
            raise ValueError(f"{name}={value}: profile '{profile}' has {has}, but no {name}; leave it out.")
        parameters[name] = check_number(name, value) if name == "shift" else check_positive(name, value)
    if not -1 <= parameters.get("shift", 0.0) <= 0:
        raise ValueError(f"shift={parameters['shift']} must lie in [-1, 0]; the paper's best is -0.4.")
    return parameters
