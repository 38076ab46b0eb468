"""DySTreSS: a temperature for every pair, from its own cosine similarity."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, final

import torch
from torch import Tensor

from dystress_plugin import tracing
from dystress_plugin.checks import check_number, check_positive, check_range, unknown_name
from dystress_plugin.temperature.base import Batch, Temperature, given_epoch
from dystress_plugin.temperature.maps import LogitMap, LogitMaps, Parts, PartsReader, Times, Work


class Curve(Protocol):
    """A function of x = gain * s, put into `out` if that is given."""

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor: ...


class Phase(NamedTuple):
    """A temperature as a function of x = gain * s, the cosine in the unit that suits its profile.

    Attributes:
        gain: the unit.
        t: gain * tau, so that s / tau = x / t.
        t_slope: dt/dx.
    """

    gain: float
    t: Curve
    t_slope: Curve


@dataclass(frozen=True)
class Profile:
    """A shape of temperature over cosine, between tau_min and tau_min + delta.

    Attributes:
        defaults: the parameters this profile has, with its own values.
        build: from (tau_min, delta) and the parameters by keyword to the temperature.
    """

    defaults: dict[str, float]
    build: Callable[..., Phase]


def _affine(x: Tensor, factor: float, summand: float, out: Tensor | None) -> Tensor:
    """factor * x + summand, in one pass."""
    if tracing.compiled(x):  # numbers that change with the epoch would be constants of its graph
        return x * factor + summand
    return torch.add(x.new_full((), summand), x, alpha=factor, out=out)


def _cosine(low: float, delta: float) -> Phase:
    middle, half = (low + delta / 2) * math.pi, delta * math.pi / 2
    return Phase(
        math.pi,
        lambda x, out=None: _affine(torch.cos(x, out=out), -half, middle, out),
        lambda x, out=None: torch.sin(x, out=out) * half,
    )


def _plateau(low: float, delta: float, shift: float, scale: float) -> Phase:
    """low + delta above `shift`; below it a cosine that first falls to low at `shift - scale`."""
    gain = math.pi / scale
    middle, half = (low + delta / 2) * gain, delta * gain / 2

    def phase(x: Tensor, out: Tensor | None) -> Tensor:
        # On the plateau the phase is 0: the curve and its slope join it without a branch, since sin 0 = 0.
        return torch.sub(x, shift * gain, out=out).clamp_max_(0)

    return Phase(
        gain,
        lambda x, out=None: _affine(phase(x, out).cos_(), half, middle, out),
        lambda x, out=None: phase(x, out).sin_() * -half,
    )


def _exponential(low: float, delta: float, rate: float) -> Phase:
    return Phase(
        rate,
        lambda x, out=None: _affine(torch.abs(x, out=out).neg_().exp_(), -delta * rate, (low + delta) * rate, out),
        lambda x, out=None: torch.abs(x, out=out).neg_().exp_() * (torch.sign(x) * (delta * rate)),
    )


def _linear(low: float, delta: float) -> Phase:
    return Phase(
        1.0,
        lambda x, out=None: _affine(torch.abs(x, out=out), delta, low, out),
        lambda x, out=None: torch.sign(x, out=out) * delta,
    )


PROFILES: dict[str, Profile] = {
    "cosine": Profile({}, _cosine),
    "shifted": Profile(
        {"shift": -0.4, "scale": 0.7}, lambda low, delta, shift, scale: _plateau(low, delta, -shift, scale)
    ),
    "cosine_constant": Profile({"shift": -0.2, "scale": 0.8}, _plateau),
    "exponential": Profile({"rate": 3.5}, _exponential),
    "linear": Profile({}, _linear),
}


@dataclass(frozen=True)
class ProfiledMap(LogitMap):
    """a(s) = s / tau(s) = x / t(x).

    Attributes:
        profile: name of the shape of tau.
        tau_min: the lowest temperature.
        delta: the highest above it.
        parameters: the profile's.
        detach: whether tau counts as a constant in the gradient.
        phase: tau, from the others.
    """

    profile: str
    tau_min: float
    delta: float
    parameters: dict[str, float]
    detach: bool
    phase: Phase = field(init=False)

    def __post_init__(self) -> None:
        phase = PROFILES[self.profile].build(self.tau_min, self.delta, **self.parameters)
        object.__setattr__(self, "phase", phase)  # the class is frozen

    def temperature(self, cosine: Tensor) -> Tensor:
        return self.phase.t(cosine * self.gain) / self.gain

    @property
    def gain(self) -> float:
        return self.phase.gain

    def logit(self, cosine: Tensor) -> Tensor:
        x = cosine * self.gain
        return x / self.phase.t(x.detach() if self.detach else x)

    def slope(self, cosine: Tensor) -> Tensor:
        x = cosine * self.gain
        return self.gain * self._slope(x, self.phase.t(x))

    def _slope(self, x: Tensor, t: Tensor) -> Tensor:
        return 1 / t if self.detach else (1 - x * self.phase.t_slope(x) / t) / t

    def logit_and_slope(self, scaled: Tensor, work: Work = None) -> tuple[Tensor, Times]:
        t = self.phase.t(scaled, out=work and work[1])
        slope = None if self.detach else self._slope(scaled, t)
        logit = torch.div(scaled, t, out=work and work[0])
        return logit, lambda tile: tile.div_(t) if slope is None else tile.mul_(slope)

    def parts(self) -> Parts:
        words = (self.kind, self.profile, "detached" if self.detach else "live")
        return Parts(words, (self.tau_min, self.delta, *self.parameters.values()), ())

    @classmethod
    def from_parts(cls, parts: PartsReader) -> ProfiledMap:
        profile, detach = next(parts.words), next(parts.words) == "detached"
        tau_min, delta = next(parts.numbers), next(parts.numbers)
        parameters = {name: next(parts.numbers) for name in PROFILES[profile].defaults}
        return ProfiledMap(profile, tau_min, delta, parameters, detach)

    @property
    def bound(self) -> float:
        return 1 / self.tau_min


def monotone_limit(profile: str, **parameters: float) -> float:
    """The largest tau_max / tau_min at which s / tau(s) still never falls on [-1, 1]; infinite if there is none.

    With tau = tau_min * (1 + r f), f the profile from 0 to 1 and r = ratio - 1, the logit falls where
    1 + r (f - s f') < 0, so each s with s f' > f bounds r by 1 / (s f' - f).
    """
    gain, f, f_slope = PROFILES[profile].build(0.0, 1.0, **parameters)
    x = torch.linspace(-gain, gain, 20_001, dtype=torch.float64)
    excess = (x * f_slope(x) - f(x)).max().item() / gain
    return 1 + 1 / excess if excess > 1e-12 else math.inf


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

    DySTreSS, 2023, https://arxiv.org/abs/2308.01140 (ImageNet 0.1 and 0.2; CIFAR code default 0.07 and 0.2;
    sentences 0.04 and 0.05 with "shifted").

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
            if not isinstance(negative_range, (tuple, list)) or len(negative_range) != 2:
                raise ValueError(f"negative_range={negative_range} must be a pair (tau_min, tau_max) or None.")
            self.negative_range = check_range(*negative_range, "negative_range[0]", "negative_range[1]")
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
