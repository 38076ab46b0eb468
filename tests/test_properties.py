"""What holds for any batch: drawn by hypothesis over everything that the loss takes.

scripts/checks/fuzz_loss.py draws more.

Tolerances: rounding the cosines, whose precision is eps, moves a logit that is at most `slope` steep by some
eps * slope. A value may be off by 8 times that, and a gradient, times the length of its row, by 16 times that, relative
to what one pair may contribute to a row. Half precision rounds the gradient once more at the end.
"""

import copy
import math
from functools import partial
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from grid import CASES, EPOCH, OBJECTIVES, SAMPLES, build
from hypothesis import given, settings
from hypothesis import strategies as st

from dystress_plugin import ContrastiveLoss
from dystress_plugin.engine import ENGINES, blockwise
from dystress_plugin.temperature import Individual, TemperatureFree, WarmUp

LAYOUTS = ["views", "queue", "one_way", "both_ways"]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Rows are multiplied with powers of two, which lose no digit as long as rows and gradients stay in the range.
EXPONENTS = {"float64": (-300, 300), "float32": (-60, 60), "bfloat16": (-60, 60), "float16": (2, 5)}
SPECIAL = ["none", "zero", "twin-image", "twin-view", "opposite"]
TILED = {
    "in-tiles": partial(blockwise.negative_stats, tile=3),
    "in-tiles-anew": partial(blockwise.negative_stats, tile=4, keep_bytes=0),
}
STEEPEST = 0.01  # of TemperatureFree: its clamp here, since its slope grows up to what float32 cannot hold


class Scenario(NamedTuple):
    """A loss and its batch."""

    name: str
    objective: str
    layout: str
    dtype: str
    views: int
    images: int
    dim: int
    keys: int
    special: tuple[str, ...]
    exponents: tuple[int, int]
    history: bool
    seed: int


@st.composite
def scenarios(draw):
    layout = draw(st.sampled_from(LAYOUTS))
    dtype = draw(st.sampled_from(list(DTYPES)))
    exponent = st.integers(*EXPONENTS[dtype])
    return Scenario(
        draw(st.sampled_from(list(CASES))),
        draw(st.sampled_from(OBJECTIVES)),
        layout,
        dtype,
        draw(st.integers(2, 4)) if layout == "views" else 2,
        draw(st.integers(1 if layout == "queue" else 2, 12)),
        draw(st.integers(1, 24)),
        draw(st.integers(1, 17)),
        tuple(draw(st.lists(st.sampled_from(SPECIAL), max_size=3))),
        tuple(sorted(draw(st.tuples(exponent, exponent)))),
        draw(st.booleans()),
        draw(st.integers(0, 2**31)),
    )


def generator(scenario):
    return torch.Generator().manual_seed(scenario.seed)


def batch_of(scenario):
    """(views, images, dim) in the scenario's dtype, and the sample numbers."""
    random = generator(scenario)
    shape = scenario.views, scenario.images, scenario.dim
    z = torch.randn(shape[1:], generator=random, dtype=torch.float64)
    z = z + 0.7 * torch.randn(shape, generator=random, dtype=torch.float64)
    # Of shorter rows float16 would lose digits when they are made shorter still.
    z = torch.where(z.abs().amax(2, keepdim=True) < 0.1, 1.0, z)
    z = z.to(DTYPES[scenario.dtype])
    for special in scenario.special:
        image, other = torch.randint(scenario.images, (2,), generator=random).tolist()
        if special == "zero":
            z[0, image] = 0
        elif special == "twin-image":
            z[:, image] = z[:, other]
        elif special == "twin-view":
            z[1, image] = z[0, image]
        elif special == "opposite":
            z[1, image] = -z[0, image]
    low, high = scenario.exponents
    z = z * 2.0 ** torch.randint(low, high + 1, (*shape[:2], 1), generator=random).to(z.dtype)
    return z, torch.randint(SAMPLES, (scenario.images,), generator=random)


def temperature_of(scenario):
    if "tempfree" not in scenario.name:
        return build(scenario.name)
    free = TemperatureFree(STEEPEST)
    return WarmUp(free, tau=0.3, epochs=50) if scenario.name.startswith("warm-up") else free


def loss_of(scenario):
    torch.manual_seed(scenario.seed)
    loss = ContrastiveLoss(
        temperature_of(scenario),
        objective=scenario.objective,
        layout="views" if scenario.layout == "queue" else scenario.layout,
        queue_size=(scenario.keys, scenario.dim) if scenario.layout == "queue" else None,
    )
    loss.temperature.double()
    own, random = loss.temperature, generator(scenario)
    if isinstance(own, Individual):
        own._rho_checked = True  # too few negatives for its rho, as it would warn
        if scenario.history:
            own.tau.uniform_(0.06, 0.5, generator=random)
            own.u.uniform_(-1, 1, generator=random)
            own.log_s.uniform_(-0.5, 0.5, generator=random)
            own.visited.random_(2, generator=random)
    return loss


class Outcome(NamedTuple):
    value: torch.Tensor
    gradient: torch.Tensor  # times the length of each row: what does not depend on that
    underflow: torch.Tensor  # what a gradient below the range of the dtype may be off by, times the same
    by_parameter: torch.Tensor
    state: dict[str, torch.Tensor]


def outcome(loss, z, index, engine="dense"):
    """Of one step of a copy of the loss, in float64 numbers."""
    loss, z = copy.deepcopy(loss), z.detach().requires_grad_()
    loss.engine = engine
    with mock.patch.dict(ENGINES, TILED):
        value = loss(*z, index=index, epoch=EPOCH)
    inputs = [z, *loss.parameters()]
    gradient, *rest = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
    assert value.isfinite()
    assert gradient.isfinite().all()
    length = torch.linalg.vector_norm(z.detach().double(), dim=2, keepdim=True)
    return Outcome(
        value.detach().double(),
        gradient.double() * length,
        length * (torch.finfo(z.dtype).tiny * torch.finfo(z.dtype).eps),
        torch.stack(rest) if rest else torch.zeros(1),
        loss.state_dict(),
    )


def steepness(loss, scenario):
    """The largest slope of a logit."""
    if "tempfree" in scenario.name:
        return 1 / STEEPEST
    tau = float(loss.temperature.tau.min()) if isinstance(loss.temperature, Individual) else 0.05
    return 2 / tau


def assert_alike(found, expected, scenario, loss):
    eps = torch.finfo(torch.float64 if scenario.dtype == "float64" else torch.float32).eps
    slope = steepness(loss, scenario)
    moved = eps * slope
    # DCLW's weights are differences from the mean of a batch, and sum to its size.
    pair = slope * (scenario.images if scenario.objective == "dclw" else 1)
    assert abs(found.value - expected.value) <= 8 * moved * (1 + expected.value.abs())
    once_more = torch.finfo(DTYPES[scenario.dtype]).eps * expected.gradient.abs() + found.underflow
    assert ((found.gradient - expected.gradient).abs() <= 16 * moved * pair / scenario.images + once_more).all()
    assert ((found.by_parameter - expected.by_parameter).abs() <= 16 * moved * slope).all()
    for name, state in expected.state.items():
        tolerance = 32 * moved * slope if name.startswith("temperature.") else 32 * eps
        assert (found.state[name].double() - state.double()).abs().max() <= tolerance, name


def check(scenario):
    """Finite, the float64 value in every engine, and the same for another order of images and length of rows."""
    (z, index), loss = batch_of(scenario), loss_of(scenario)
    expected = outcome(loss, z.double(), index)
    for engine in ("auto", "blockwise", *TILED):
        assert_alike(outcome(loss, z, index, engine), expected, scenario, loss)

    random = generator(scenario)
    order = torch.randperm(scenario.images, generator=random)
    found = outcome(loss, z[:, order], index[order])
    state = expected.state if loss.queue is None else found.state  # keys enter in another order
    expected_there = expected._replace(gradient=expected.gradient[:, order], state=state)
    assert_alike(found, expected_there, scenario, loss)

    exponent = torch.randint(-2, 3, (scenario.views, scenario.images, 1), generator=random)
    longer = z * 2.0 ** exponent.to(z.dtype)
    assert_alike(outcome(loss, longer, index), expected, scenario, loss)


@pytest.mark.filterwarnings("ignore:rho=0.4 is at least")  # of few negatives
@settings(max_examples=200)
@given(scenarios())
def test_any_batch(scenario):
    check(scenario)


def test_the_scenarios_can_tell_a_wrong_loss():
    """The tolerances are not so wide that a wrong temperature, or one pair too many, would pass."""
    scenario = Scenario("constant", "ntxent", "views", "float32", 2, 12, 24, 1, (), (0, 0), False, 0)
    (z, index), loss = batch_of(scenario), loss_of(scenario)
    expected = outcome(loss, z.double(), index)
    wrong = copy.deepcopy(loss)
    wrong.temperature.tau *= 1.003
    found = outcome(wrong, z, index)
    for part in ({"value": found.value}, {"gradient": found.gradient}):
        try:
            assert_alike(expected._replace(**part), expected, scenario, loss)
        except AssertionError:
            continue
        raise AssertionError(f"tau off by three thousandths goes unnoticed in the {next(iter(part))}")
    assert math.isfinite(found.value)
