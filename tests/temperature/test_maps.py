import math

import pytest
import torch
from grid import CASES, EPOCH, assert_close, build, tolerance

from dystress_plugin.temperature import (
    Constant,
    CosineSchedule,
    DySTreSS,
    Individual,
    Learnable,
    ModelAware,
    StepSchedule,
    TemperatureFree,
    WarmUp,
)
from dystress_plugin.temperature.base import Batch

EDGES = torch.tensor([1 - 1e-6, 1 - 1e-7, -0.4, 0.4, -0.2], dtype=torch.float64)
COSINES = torch.cat([torch.linspace(-1, 1, 201, dtype=torch.float64), EDGES])
SIDES = ("positive", "negative")


def prepare(temperature, rows=1):
    index = torch.arange(rows) if temperature.needs_index else None
    return temperature.double().prepare(
        Batch(torch.full((rows, 1), 0.7, dtype=torch.float64), index, EPOCH, 1, torch.mean)
    )


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", CASES)
def test_slope_equals_autograd_of_the_logit(name, side):
    map_ = getattr(prepare(build(name)), side)
    s = COSINES[None].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(map_.logit(s).sum(), s)
    assert_close(map_.slope(COSINES[None]), gradient, 1e-12)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", CASES)
def test_logit_and_slope_equal_the_oracles(name, side):
    map_ = getattr(prepare(build(name)), side)
    expected = CASES[name].maps(0.7) if CASES[name].maps else CASES["constant"].maps(0.7)
    expected = expected[SIDES.index(side)] if isinstance(expected[0], tuple) else expected
    cosines = COSINES.tolist()
    assert_close(map_.logit(COSINES[None])[0], [expected.logit(s) for s in cosines], tolerance(name))
    # At the edge of temperature-free's clamp either slope is right.
    inside = [s for s in cosines if abs(1 - abs(s) - 1e-6) > 1e-9]
    slope = map_.slope(torch.tensor([inside], dtype=torch.float64))[0]
    assert_close(slope, [expected.slope(s) for s in inside], tolerance(name))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", CASES)
def test_logit_is_the_cosine_over_the_temperature_but_for_temperature_free(name, side):
    map_ = getattr(prepare(build(name)), side)
    tau = map_.temperature(COSINES[None])
    assert (tau > 0).all()
    if "tempfree" in name:
        inside = COSINES.abs() < 1 - 1e-6
        assert_close(1 / tau[0, inside], map_.slope(COSINES[None])[0, inside], 1e-9)
    else:
        assert_close(map_.logit(COSINES[None]), COSINES / tau, 1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maps_keep_shape_and_dtype(name, dtype):
    map_ = prepare(build(name), rows=3).positive
    s = torch.linspace(-1, 1, 12, dtype=dtype).view(3, 4)
    for result in (map_.logit(s), map_.slope(s), map_.temperature(s)):
        assert result.shape == s.shape
        assert result.dtype == dtype


@pytest.mark.parametrize("name", CASES)
def test_rows_of_a_map_are_those_of_the_whole(name):
    temperature = build(name)
    if CASES[name].maps is None:
        temperature.tau[:5] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    map_ = prepare(temperature, rows=5).negative
    s = torch.linspace(-0.9, 0.9, 15, dtype=torch.float64).view(5, 3)
    for part in (slice(0, 2), slice(2, 5), slice(3, 4)):
        for whole, cut in ((map_.logit, map_.rows(part).logit), (map_.slope, map_.rows(part).slope)):
            assert torch.equal(whole(s)[part], cut(s[part]))


@pytest.mark.parametrize("name", CASES)
def test_preparing_changes_nothing(name):
    temperature = build(name)
    before = {key: value.clone() for key, value in temperature.state_dict().items()}
    first, second = (prepare(temperature).positive.logit(COSINES[None]) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(before[key], value) for key, value in temperature.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_only_learned_temperatures_have_state(name):
    expected = {
        "isogclr": {"tau", "log_s", "u", "visited"},
        "isogclr-difference": {"tau", "log_s", "u", "visited"},
        "isogclr-released": {"tau", "log_s", "u", "visited"},
        "learnable": {"log_tau"},
        "hardness-learnable": {"temperature.log_tau"},
        "robust-global": {"log_tau"},
        "robust-global-means": {"log_tau"} | {f"means.{k}.{name}" for k in (0, 1) for name in ("log_s", "visited")},
        "warm-up-learnable": {"temperature.log_tau"},
    }
    assert set(build(name).state_dict()) == expected.get(name, set())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", CASES)
def test_logit_and_slope_together_are_those_apart(name, side):
    map_ = getattr(prepare(build(name)), side)
    scaled = map_.gain * COSINES[None]
    kept = scaled.clone()
    for work in (None, (torch.empty_like(scaled), torch.empty_like(scaled)), (scaled, torch.empty_like(scaled))):
        with torch.no_grad():
            logit, times_slope = map_.logit_and_slope(scaled, work)
            assert (work and work[0] is scaled) or torch.equal(scaled, kept)
            assert_close(logit, map_.logit(COSINES[None]), 1e-13)
            logit.fill_(7.0)
            scaled.fill_(7.0)  # the slope must not need it any more
            tile = torch.full_like(scaled, 3.0)
            assert times_slope(tile) is tile
            scaled.copy_(kept)
        assert_close(map_.gain * tile, 3 * map_.slope(COSINES[None]), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", CASES)
def test_no_logit_exceeds_the_bound(name, side, dtype):
    map_ = getattr(prepare(build(name)), side)
    largest = map_.logit(COSINES.to(dtype)[None]).abs().max().item()
    assert largest <= map_.bound * (1 + 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("temperature", "bound"),
    [
        (Constant(0.05), 20.0),
        (DySTreSS(0.05, 0.2), 20.0),
        (DySTreSS(0.1, 0.2, stabilise=2 * EPOCH), 1 / 0.15),
        (CosineSchedule(0.1, 0.5, period=2 * EPOCH), 10.0),
        (StepSchedule(0.1, 0.5, period=4 * EPOCH), 2.0),
        (TemperatureFree(0.5), 2 * math.atanh(0.5)),
        (ModelAware(0.1, alpha=0.5, threshold=0.0), 20.0),  # reached at A = -1
        (ModelAware(0.1, alpha=2.0, threshold=0.0), 100.0),  # held at tau / 10
        (Learnable(0.2, tau_min=0.1), 10.0),
        (Individual(3, tau_min=0.05), 20.0),
        (WarmUp(Constant(0.05), tau=0.1), 20.0),
        (WarmUp(Constant(0.2), tau=0.1), 10.0),
    ],
)
def test_bound_follows_from_the_settings(temperature, bound):
    assert [map_.bound for map_ in prepare(temperature)] == [pytest.approx(bound, rel=1e-5)] * 2


@pytest.mark.parametrize("alignment", [-1.0, -0.9, 0.3, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
@pytest.mark.filterwarnings("ignore:MACL's temperature:UserWarning")
def test_bound_of_the_model_aware_temperature_holds_at_any_alignment(alignment, alpha):
    map_ = ModelAware(0.1, alpha).prepare(Batch(torch.full((2, 1), alignment), None, None, 1, torch.mean)).positive
    assert map_.logit(torch.ones(1)).item() <= map_.bound * (1 + 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_map_is_rowless_where_its_rows_are_all_alike(name):
    temperature = build(name)
    if CASES[name].maps is None:
        temperature.tau[:5] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    for map_ in prepare(temperature, rows=5):
        logit = map_.logit(torch.full((5, 1), 0.6, dtype=torch.float64))
        assert map_.rowless == bool((logit == logit[0]).all())
        assert map_.rows(slice(1, 3)).rowless == map_.rowless
        assert map_.rows(slice(1, 3)).bound == map_.bound


@pytest.mark.parametrize("name", CASES)
def test_parameter_term_is_zero_with_the_gradient_of_a_row(name):
    """d logsumexp_j a(s_j) / dlog tau is what autograd finds, or there is no parameter and no term."""
    temperature = build(name)
    map_ = prepare(temperature, rows=3).negative
    cosine = torch.linspace(-0.9, 0.8, 12, dtype=torch.float64).view(3, 4)
    logit = map_.logit(cosine)
    term = map_.parameter_term((torch.softmax(logit, 1) * cosine).sum(1).detach())
    parameters = list(temperature.parameters())
    assert (term is None) == (
        not parameters or getattr(map_, "trained", None) is not None
    )  # a loss of its own trains those
    if term is not None:
        assert not term.any()
        expected, found = (
            torch.autograd.grad(x.sum(), parameters, retain_graph=True)[0] for x in (torch.logsumexp(logit, 1), term)
        )
        assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("clamp", [1e-6, 1e-3, 0.5])
def test_temperature_free_is_flat_beyond_the_clamp(clamp):
    map_ = prepare(TemperatureFree(clamp)).positive
    s = torch.tensor([-1, -1 + clamp / 2, 1 - clamp / 2, 1], dtype=torch.float64)
    ends = map_.logit(torch.tensor([clamp - 1, clamp - 1, 1 - clamp, 1 - clamp], dtype=torch.float64))
    assert torch.equal(map_.logit(s), ends)
    assert not map_.slope(s).any()


def test_negative_range_leaves_positives_alone():
    maps = prepare(DySTreSS(0.1, 0.2, "linear", negative_range=(0.3, 0.5)))
    s = torch.tensor([0.0, 1.0])
    assert_close(maps.positive.temperature(s), [0.1, 0.2], 1e-7)
    assert_close(maps.negative.temperature(s), [0.3, 0.5], 1e-7)
