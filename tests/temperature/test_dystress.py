import math
import re
import warnings

import pytest
import torch

from dystress_plugin.temperature import DySTreSS
from dystress_plugin.temperature.base import Batch
from dystress_plugin.temperature.profiles import PROFILES, monotone_limit

DEFAULTS = {
    "cosine": {},
    "shifted": {"shift": -0.4, "scale": 0.7},
    "cosine_constant": {"shift": -0.2, "scale": 0.8},
    "exponential": {"rate": 3.5},
    "linear": {},
    "root": {},
}


def tau(temperature, *cosines, epoch=None, side="positive"):
    map_ = getattr(temperature.prepare(Batch(torch.ones(1, 1), None, epoch, 1, torch.mean)), side)
    return map_.temperature(torch.tensor(cosines, dtype=torch.float64)).tolist()


@pytest.mark.parametrize("profile", DEFAULTS)
def test_defaults_are_the_papers(profile):
    plain, spelled = DySTreSS(profile=profile), DySTreSS(0.1, 0.2, profile, **DEFAULTS[profile], detach=True)
    cosines = torch.linspace(-1, 1, 21).tolist()
    assert tau(plain, *cosines) == tau(spelled, *cosines)
    assert plain.detach is True
    assert plain.negative_range is None


def test_profiles_are_those_of_the_contract():
    assert {name: profile.defaults for name, profile in PROFILES.items()} == DEFAULTS


@pytest.mark.parametrize("profile", DEFAULTS)
def test_temperature_stays_in_its_range_and_reaches_the_top(profile):
    low, high = 0.1, 0.15
    found = tau(DySTreSS(low, high, profile), *torch.linspace(-1, 1, 2001).tolist())
    assert min(found) == pytest.approx(low + 0.05 * 1e-3 if profile == "root" else low, abs=1e-6)
    assert low - 1e-15 <= min(found)
    assert max(found) <= high + 1e-15
    assert max(found) == pytest.approx(high if profile != "exponential" else high - 0.05 * math.exp(-3.5), abs=1e-12)


def test_shifted_profile_is_lowest_at_minus_shift_minus_scale_and_flat_from_minus_shift():
    temperature = DySTreSS(0.1, 0.12, "shifted", shift=-0.3, scale=0.5)
    assert tau(temperature, -0.2, 0.3, 0.6, 1.0, -0.7) == pytest.approx([0.1, 0.12, 0.12, 0.12, 0.12], rel=1e-12)


def test_cosine_constant_profile_is_flat_from_shift():
    temperature = DySTreSS(0.1, 0.12, "cosine_constant", shift=-0.5, scale=0.5)
    assert tau(temperature, -1.0, -0.75, -0.5, 0.0, 1.0) == pytest.approx([0.1, 0.11, 0.12, 0.12, 0.12], rel=1e-12)


def test_rate_steepens_the_exponential_profile():
    assert tau(DySTreSS(0.1, 0.2, "exponential", rate=2.0), 0.5) == pytest.approx([0.2 - 0.1 * math.exp(-1)])


def test_root_profile_is_half_way_where_three_quarters_of_the_angle_are_and_bounded_in_slope_at_the_end():
    temperature = DySTreSS(0.01, 0.05, "root", detach=False)
    assert tau(temperature, -1.0, -0.5, 0.0, 1.0) == pytest.approx(
        [0.01 + 4e-5, 0.03, 0.01 + 0.04 * math.sqrt(0.5), 0.05], rel=1e-12
    )
    map_ = temperature.prepare(Batch(torch.ones(1, 1), None, None, 1, torch.mean)).positive
    end = torch.tensor([-1.0 - 1e-7, -1.0, -1.0 + 1e-7], dtype=torch.float64, requires_grad=True)
    (by_autograd,) = torch.autograd.grad(map_.logit(end).sum(), end)
    assert by_autograd.tolist() == map_.slope(end).tolist() == pytest.approx([1 / (0.01 + 4e-5)] * 3, rel=1e-12)
    inside = torch.linspace(-1 + 1e-5, 1, 2001, dtype=torch.float64)
    slopes = map_.slope(inside)
    assert slopes.min() > 0  # it never inverts the order
    assert slopes.max() < 1 / 0.01 + 0.04 / 4e-3 / 0.01**2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tau_min": 0.0}, ValueError, "tau_min=0.0 must be above 0"),
        ({"tau_min": -0.1}, ValueError, "tau_min=-0.1 must be above 0"),
        ({"tau_max": 0.0}, ValueError, "tau_max=0.0 must be above 0"),
        ({"tau_min": 0.3}, ValueError, "tau_min=0.3 is above tau_max=0.2; swap them"),
        ({"tau_max": math.inf}, ValueError, "tau_max=inf must be finite"),
        ({"tau_min": math.nan}, ValueError, "tau_min=nan must be finite"),
        ({"tau_min": "0.1"}, TypeError, "tau_min='0.1' must be a number, not str"),
        ({"tau_max": True}, TypeError, "tau_max=True must be a number, not bool"),
        ({"profile": "cosin"}, ValueError, "Unknown profile 'cosin'. Did you mean 'cosine'"),
        ({"profile": "shifted", "shift": 0.1}, ValueError, r"shift=0.1 must lie in \[-1, 0\]"),
        ({"profile": "shifted", "shift": -1.1}, ValueError, r"shift=-1.1 must lie in \[-1, 0\]"),
        ({"profile": "shifted", "shift": math.nan}, ValueError, "shift=nan must be finite"),
        ({"profile": "shifted", "scale": 0.0}, ValueError, "scale=0.0 must be above 0"),
        ({"profile": "exponential", "rate": -1.0}, ValueError, "rate=-1.0 must be above 0"),
        ({"shift": -0.4}, ValueError, "shift=-0.4: profile 'cosine' has no parameter, but no shift"),
        ({"profile": "shifted", "rate": 3.5}, ValueError, "rate=3.5: profile 'shifted' has shift, scale, but no rate"),
        ({"profile": "exponential", "scale": 0.7}, ValueError, "profile 'exponential' has rate, but no scale"),
        ({"negative_range": (0.3, 0.2)}, ValueError, r"negative_range\[0\]=0.3 is above negative_range\[1\]=0.2"),
        ({"negative_range": (0.0, 0.2)}, ValueError, r"negative_range\[0\]=0.0 must be above 0"),
        ({"stabilise": 0}, ValueError, "stabilise=0.0 must be above 0"),
        ({"stabilise": "all"}, TypeError, "stabilise='all' must be a number, not str"),
        ({"negative_range": (0.1, 0.2, 0.3)}, ValueError, r"negative_range=\(0.1, 0.2, 0.3\) must be a pair"),
    ],
)
def test_bad_settings_raise_and_name_the_value(arguments, error, message):
    with pytest.raises(error, match=message):
        DySTreSS(**arguments)


def test_settings_of_a_profile_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        DySTreSS(0.1, 0.2, "shifted", -0.4)


def test_settings_of_none_are_the_profiles_own():
    assert tau(DySTreSS(profile="shifted", shift=None, scale=None, rate=None), 0.1) == tau(
        DySTreSS(profile="shifted"), 0.1
    )


# Stabilisation


@pytest.mark.parametrize(("epoch", "low"), [(0, 0.1), (5, 0.125), (10, 0.15), (20, 0.2), (33.0, 0.2)])
def test_stabilisation_lifts_the_lower_end_and_leaves_the_upper(epoch, low):
    temperature = DySTreSS(0.1, 0.2, "linear", stabilise=20, negative_range=(0.2, 0.6))
    assert tau(temperature, 0.0, 0.5, 1.0, epoch=epoch) == pytest.approx([low, (low + 0.2) / 2, 0.2], rel=1e-12)
    low = 0.2 + 4 * (low - 0.1)
    assert tau(temperature, 0.0, 1.0, epoch=epoch, side="negative") == pytest.approx([low, 0.6], rel=1e-12)


def test_only_stabilisation_needs_the_epoch():
    assert not DySTreSS().needs_epoch
    assert DySTreSS(stabilise=5).needs_epoch
    with pytest.raises(ValueError, match="DySTreSS with stabilise needs the epoch"):
        tau(DySTreSS(stabilise=5), 0.5)


# Order inversion

LIMITED = [
    ("cosine", {}),
    ("shifted", {}),
    ("shifted", {"shift": -0.2, "scale": 0.3}),
    ("cosine_constant", {"shift": 0.0, "scale": 0.5}),
]


@pytest.mark.parametrize(("profile", "own"), LIMITED)
def test_monotone_limit_is_where_the_logit_first_falls(profile, own):
    limit = monotone_limit(profile, **{**DEFAULTS[profile], **own})
    s = torch.linspace(-1, 1, 20_001, dtype=torch.float64)

    def logits(temperature):
        return s / torch.tensor(tau(temperature, *s.tolist()), dtype=torch.float64)

    assert (logits(DySTreSS(0.1, 0.1 * limit * 0.999, profile, **own)).diff() > 0).all()
    with pytest.warns(UserWarning, match="falls"):
        wide = DySTreSS(0.1, 0.1 * limit * 1.001, profile, **own)
    assert (logits(wide).diff() < 0).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau_max": 0.5}, "tau_max/tau_min = 0.5/0.1 = 5 is above 4.50, the limit of profile 'cosine'"),
        ({"tau_min": 0.07, "profile": "shifted"}, "0.2/0.07 = 2.86 is above 2.04, the limit of profile 'shifted'"),
        (
            {"tau_min": 0.01, "tau_max": 0.04, "profile": "shifted"},  # as published for CLIP
            "tau_max/tau_min = 0.04/0.01 = 4 is above 2.04, the limit of profile 'shifted'",
        ),
        ({"negative_range": (0.1, 0.6)}, "0.6/0.1 = 6 is above 4.50, the limit"),
    ],
)
def test_order_inversion_warns_once_and_names_the_limit(arguments, message):
    with pytest.warns(UserWarning, match=re.escape(message)) as seen:
        temperature = DySTreSS(**arguments)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tau(temperature, 0.5)


@pytest.mark.parametrize(
    ("high", "profile"),
    [
        *[(0.45, "cosine"), (0.203, "shifted"), (5.0, "cosine_constant"), (5.0, "exponential"), (5.0, "linear")],
        (5.0, "root"),
    ],
)
def test_range_within_the_limit_does_not_warn(high, profile):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DySTreSS(0.1, high, profile)


def test_repr_names_the_parameters_of_the_profile():
    assert repr(DySTreSS(profile="shifted")) == (
        "DySTreSS(tau_min=0.1, tau_max=0.2, profile=shifted, shift=-0.4, scale=0.7, detach=True, negative_range=None, "
        "stabilise=None)"
    )
