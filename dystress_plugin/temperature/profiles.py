"""Profiles: the temperature of a pair as a function of its cosine similarity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from dystress_plugin import tracing
from dystress_plugin.temperature.maps import LogitMap, Parts, PartsReader, Times, Work

# Of sqrt((s + 1) / 2), whose slope has no bound at s = -1: flat for the last 2e-6 of cosines.
LEAST_ROOT = 1e-3

# A function of x = gain * s, put into the tensor `out` if that is given.
Curve: TypeAlias = Callable[..., Tensor]


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


def _root(low: float, delta: float) -> Phase:
    def root(x: Tensor, out: Tensor | None) -> Tensor:
        return torch.add(x, 1.0, out=out).mul_(0.5).clamp_min_(LEAST_ROOT**2).sqrt_()

    return Phase(
        1.0,
        lambda x, out=None: _affine(root(x, out), delta, low, out),
        lambda x, out=None: torch.where(x > 2 * LEAST_ROOT**2 - 1, delta / 4 / root(x, out), 0.0),
    )


PROFILES: dict[str, Profile] = {
    "cosine": Profile({}, _cosine),
    "shifted": Profile(
        {"shift": -0.4, "scale": 0.7}, lambda low, delta, shift, scale: _plateau(low, delta, -shift, scale)
    ),
    "cosine_constant": Profile({"shift": -0.2, "scale": 0.8}, _plateau),
    "exponential": Profile({"rate": 3.5}, _exponential),
    "linear": Profile({}, _linear),
    "root": Profile({}, _root),
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
