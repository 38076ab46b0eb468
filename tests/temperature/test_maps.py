import pytest
import torch
from grid import CASES, EPOCH, assert_close, build

from dystress_plugin.temperature import DySTreSS, TemperatureFree
from dystress_plugin.temperature.base import Batch

EDGES = torch.tensor([1 - 1e-6, 1 - 1e-7, -0.4, 0.4, -0.2], dtype=torch.float64)
COSINES = torch.cat([torch.linspace(-1, 1, 201, dtype=torch.float64), EDGES])
SIDES = ("positive", "negative")


def prepare(temperature, rows=1):
    index = torch.arange(rows) if temperature.needs_index else None
    return temperature.prepare(Batch(torch.full((rows, 1), 0.7, dtype=torch.float64), index, EPOCH, 1, torch.mean))


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
    tolerance = 1e-9 if name == "tempfree" else 1e-12
    assert_close(map_.logit(COSINES[None])[0], [expected.logit(s) for s in cosines], tolerance)
    # At the edge of temperature-free's clamp either slope is right.
    inside = [s for s in cosines if abs(1 - abs(s) - 1e-6) > 1e-9]
    slope = map_.slope(torch.tensor([inside], dtype=torch.float64))[0]
    assert_close(slope, [expected.slope(s) for s in inside], tolerance)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", CASES)
def test_logit_is_the_cosine_over_the_temperature_but_for_temperature_free(name, side):
    map_ = getattr(prepare(build(name)), side)
    tau = map_.temperature(COSINES[None])
    assert (tau > 0).all()
    if name == "tempfree":
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
    if temperature.needs_index:
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
def test_only_individual_temperatures_have_state(name):
    keys = set(build(name).state_dict())
    assert keys == ({"tau", "log_s", "u", "visited"} if name == "isogclr" else set())


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
