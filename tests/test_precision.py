"""Hostile but finite embeddings in every precision: finite results, close to those of float64.

The tolerance, eps being the dtype's: a float32 value is off by at most 8 eps times the largest logit (1 / tau), and a
gradient, times the length of its row, by at most 32 eps / tau times what a single pair may contribute, 1 / tau. Half
precision is float32 rounded at the end.
"""

from contextlib import nullcontext
from functools import cache, partial

import pytest
import torch
from grid import DEVICE, EPOCH, OBJECTIVES, SAMPLES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dystress_plugin import ContrastiveLoss, hardware
from dystress_plugin.engine import ENGINES as engines
from dystress_plugin.engine import blockwise
from dystress_plugin.engine.tiles import _Sums
from dystress_plugin.temperature import (
    Constant,
    CosineSchedule,
    DySTreSS,
    Individual,
    Learnable,
    ModelAware,
    RobustGlobal,
    StepSchedule,
    TemperatureFree,
    WarmUp,
)

IMAGES, DIM = 6, 8
ENGINES = ["dense", "blockwise"]
COLD = 0.01
TEMPERATURES = {
    "constant": lambda: Constant(COLD),
    "dystress": lambda: DySTreSS(COLD, 0.02),
    "dystress-live": lambda: DySTreSS(COLD, 0.02, "shifted", detach=False),
    "dystress-linear-live": lambda: DySTreSS(COLD, 0.02, "linear", detach=False),
    "macl": lambda: ModelAware(COLD, 0.5, 0.0),
    "ts": lambda: CosineSchedule(COLD, 0.05, period=2 * EPOCH),
    "step": lambda: StepSchedule(COLD, 0.05, period=EPOCH),
    "isogclr": lambda: Individual(SAMPLES, tau_init=COLD, tau_min=COLD),
    "isogclr-difference": lambda: Individual(SAMPLES, tau_init=COLD, tau_min=COLD, gradient="difference"),
    "learnable": lambda: Learnable(COLD),
    "robust-global": lambda: RobustGlobal(COLD, rho=0.01, tau_min=COLD),
    "warm-up": lambda: WarmUp(Constant(COLD), tau=COLD, epochs=2 * EPOCH),
    "tempfree": lambda: TemperatureFree(),
}
SMOOTH = [name for name in TEMPERATURES if name != "tempfree"]  # whose slopes do not outgrow the precision


def plain(dtype):
    z = torch.randn(2, IMAGES, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z[1] = z[0] + 0.5 * z[1]
    return z.to(DEVICE, dtype)


def duplicates(dtype):
    z = plain(dtype)
    z[:, 1:3] = z[:, :1]
    z[1, 3] = z[0, 3]
    return z


def collapsed(dtype):
    return plain(dtype)[:1, :1].expand(2, IMAGES, DIM).clone()


def zeros_among_them(dtype):
    z = plain(dtype)
    z[0, 0] = z[1, 1] = z[:, 2] = 0
    return z


def zeros(dtype):
    return torch.zeros(2, IMAGES, DIM, dtype=dtype, device=DEVICE)


def opposite(dtype):
    z = plain(dtype)
    return torch.stack([z[0], -z[0]])


def all_opposite(dtype):
    z = collapsed(dtype)
    return torch.stack([z[0], -z[0]])


def orthogonal(dtype):
    return torch.eye(2 * IMAGES, dtype=dtype, device=DEVICE).view(2, IMAGES, -1)


def almost_the_same(dtype):
    z = plain(torch.float64)
    return torch.stack([z[0], z[0] + 2 * torch.finfo(dtype).eps * z[1]]).to(dtype)


def one_dimension(dtype):
    return plain(dtype)[:, :, :1].clone()


def huge(dtype):
    """As far as the length of a row is still a number of this dtype."""
    z = plain(torch.float64)
    return (z / z.abs().amax(2, keepdim=True)).to(dtype) * (torch.finfo(dtype).max / DIM)


def of_all_lengths(dtype):
    """From the shortest rows that are not taken for zero to the longest, and one that is."""
    z = plain(torch.float64)
    z /= z.abs().amax(2, keepdim=True)
    low = {torch.float16: -13, torch.bfloat16: -99, torch.float32: -99, torch.float64: -990}[dtype]
    high = {torch.float16: 14, torch.bfloat16: 126, torch.float32: 126, torch.float64: 1022}[dtype]
    powers = torch.linspace(low, high, 2 * IMAGES, dtype=torch.float64).round().view(2, IMAGES, 1)
    z *= (2.0**powers).to(DEVICE)
    z = z.to(dtype)
    z[0, 3] *= 0
    z[0, 3, 0] = torch.finfo(dtype).smallest_normal / 8
    return z


INPUTS = {
    function.__name__: function
    for function in (
        plain,
        duplicates,
        collapsed,
        zeros_among_them,
        zeros,
        opposite,
        all_opposite,
        orthogonal,
        almost_the_same,
        one_dimension,
        huge,
        of_all_lengths,
    )
}


def step(name, objective, engine, z):
    """Value and gradient, with tables that a batch in float64 has left."""
    loss = ContrastiveLoss(TEMPERATURES[name](), objective=objective, engine=engine)
    loss.to(DEVICE).temperature.double()
    index = torch.arange(IMAGES, device=DEVICE)
    if loss.temperature.needs_index:
        loss(*plain(torch.float64), index=index, epoch=EPOCH)
    z = z.detach().requires_grad_()
    value = loss(*z, index=index, epoch=EPOCH)
    (gradient,) = torch.autograd.grad(value, z)
    return value.detach(), gradient


def times_length(gradient, z):
    """By row, in float64: what no longer depends on how long the rows are."""
    z = z.double()
    peak = z.abs().amax(2, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return gradient.double() * peak * torch.linalg.vector_norm(z / peak, dim=2, keepdim=True)


@cache
def truth(name, objective, kind, dtype):
    """In float64, of the embeddings as `dtype` holds them."""
    z = INPUTS[kind](dtype).double()
    if dtype != torch.float64:  # what counts as a zero row there
        short = z.abs().amax(2) < (torch.finfo(dtype).tiny if dtype == torch.float16 else 1.2e-30)
        z[short] = 0
    return step(name, objective, "dense", z)


every_objective = pytest.mark.parametrize("objective", OBJECTIVES)
every_input = pytest.mark.parametrize("kind", INPUTS)
every_engine = pytest.mark.parametrize("engine", ENGINES)


@every_engine
@every_input
@every_objective
@pytest.mark.parametrize("name", SMOOTH)
def test_float32_is_close_to_float64_on_hostile_embeddings(name, objective, kind, engine):
    z = INPUTS[kind](torch.float32)
    value, gradient = step(name, objective, engine, z)
    exact_value, exact_gradient = truth(name, objective, kind, torch.float32)
    assert exact_value.isfinite()
    assert exact_gradient.isfinite().all()
    eps = torch.finfo(torch.float32).eps
    assert abs(value - exact_value) <= 8 * eps * max(1 / COLD, abs(exact_value))
    error = times_length(gradient.double() - exact_gradient, z).abs()
    subnormal = times_length(torch.full_like(z, torch.finfo(torch.float32).tiny), z)
    assert (error <= 32 * eps / COLD**2 + subnormal).all()


@every_engine
@every_input
@every_objective
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_temperature_free_is_finite_where_cosines_approach_one(objective, kind, engine, dtype):
    z = INPUTS[kind](dtype)
    value, gradient = step("tempfree", objective, engine, z)
    exact_value, _ = truth("tempfree", objective, kind, dtype)
    bound = TemperatureFree().prepare(None).negative.bound
    # Rounding of a cosine alone moves a logit near the clamp, by up to half of itself.
    assert abs(value - exact_value) <= (bound / 2 if dtype == torch.float32 else 1e-8)
    # A slope 2 / sin^2 of the angle meets a derivative sin of it: no pair contributes more than 2 / angle.
    assert (times_length(gradient, z).abs() <= 2 * 1500).all()


@every_input
@pytest.mark.parametrize("objective", ["ntxent", "sogclr"])
@pytest.mark.parametrize("name", TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded_at_the_end(name, objective, kind, dtype):
    z = INPUTS[kind](dtype)
    value, gradient = step(name, objective, "blockwise", z)
    wide = z.float()
    if dtype == torch.float16:  # rows of subnormal numbers count as zero rows
        wide[wide.abs().amax(2) < torch.finfo(dtype).tiny] = 0
    wide_value, wide_gradient = step(name, objective, "blockwise", wide)
    assert gradient.dtype == dtype
    assert torch.equal(value, wide_value)
    assert torch.equal(gradient, wide_gradient.to(dtype))  # infinite where the true one is beyond the range, never NaN


# Training

# A torch without a scaler for CPUs has no float16 autocast there either.
AUTOCAST = [torch.bfloat16, torch.float16] if hasattr(torch.amp, "GradScaler") else [torch.bfloat16]


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(DIM, 16), torch.nn.ReLU(), torch.nn.Linear(16, DIM)).to(DEVICE)


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="this release of torch scales on CUDA only")
@pytest.mark.parametrize("name", TEMPERATURES)
def test_a_scaled_step_is_the_step(name):
    """The scale is a power of two: scaling and unscaling are exact."""
    results = []
    for scale in (1.0, 2.0**16):
        model, loss = network(), ContrastiveLoss(TEMPERATURES[name]()).to(DEVICE)
        parameters = [*model.parameters(), *loss.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.01)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=scale)
        for seed in range(3):
            z = plain(torch.float32) * 2.0**seed
            value = loss(*[model(view) for view in z], index=torch.arange(IMAGES, device=DEVICE), epoch=EPOCH)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == scale
        results.append([p.detach() for p in parameters])
    for plainly, scaled in zip(*results, strict=True):
        assert torch.allclose(plainly, scaled, rtol=1e-6, atol=1e-9)


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="this release of torch scales on CUDA only")
def test_an_overflow_of_half_precision_is_left_to_the_scaler_and_changes_no_weight():
    z = (plain(torch.float32) * 1e-3).requires_grad_()
    optimizer = torch.optim.SGD([z], lr=1e-9)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**16)
    before, skipped = z.detach().clone(), 0
    for _ in range(30):
        optimizer.zero_grad()
        scaler.scale(ContrastiveLoss("simclr")(*z.half())).backward()
        assert not z.grad.isnan().any()
        skipped += not z.grad.isfinite().all()
        scaler.step(optimizer)
        scaler.update()
        assert z.isfinite().all()
        if not torch.equal(z.detach(), before):
            break
    assert 0 < skipped < 29
    assert scaler.get_scale() == 2.0 ** (16 - skipped)


@pytest.mark.parametrize("dtype", AUTOCAST)
@pytest.mark.parametrize("name", TEMPERATURES)
def test_a_network_trains_under_autocast(name, dtype):
    model, loss = network(), ContrastiveLoss(TEMPERATURES[name]()).to(DEVICE)
    with torch.autocast(DEVICE.type, dtype):
        z = [model(view) for view in plain(torch.float32)]
        value = loss(*z, index=torch.arange(IMAGES, device=DEVICE), epoch=EPOCH)
    assert z[0].dtype == dtype
    assert value.dtype == torch.float32
    value.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad.any() for p in model.parameters())


# A device without float64, which MPS is


class NoDouble(TorchDispatchMode):
    """Fails at any tensor of float64."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for x in tree_leaves((arguments, keywords, result)):
            assert not isinstance(x, torch.Tensor) or x.dtype != torch.float64, function
        return result


def two_steps(name, objective, engine, mode):
    """Values and gradients; the second step finds what the first has left in the tables."""
    loss = ContrastiveLoss(TEMPERATURES[name](), objective=objective, engine=engine).to(DEVICE)
    found = []
    for _ in range(2):
        z = plain(torch.float32).requires_grad_()
        with mode:
            value = loss(*z, index=torch.arange(IMAGES, device=DEVICE), epoch=EPOCH)
            gradients = torch.autograd.grad(value, [z, *loss.parameters()], allow_unused=True, materialize_grads=True)
        found += [value.detach(), *gradients]
    return found


@pytest.mark.parametrize("engine", ["dense", "in-tiles"])
@pytest.mark.parametrize(
    ("name", "objective"), [*((name, "sogclr") for name in TEMPERATURES), *(("isogclr", other) for other in OBJECTIVES)]
)
def test_a_device_without_double_gets_none_and_nearly_the_same_numbers(name, objective, engine, monkeypatch):
    monkeypatch.setitem(engines, "in-tiles", partial(blockwise.negative_stats, tile=5, keep_bytes=0))
    expected = two_steps(name, objective, engine, nullcontext())
    monkeypatch.setattr(hardware, "NARROW", {DEVICE.type})
    found = two_steps(name, objective, engine, NoDouble())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 if other.dim() == 0 else 1e-4 * other.abs().max())


def test_sums_of_many_tiles_keep_their_digits_without_double(monkeypatch):
    x = torch.rand(10_000, 3, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(hardware, "NARROW", {"cpu"})
    sums, plainly = _Sums(3, x.device), torch.zeros(3)
    for part in x:
        sums.add(slice(0, 3), part)
        plainly += part
    exact = x.double().sum(0)
    assert sums.value().dtype == torch.float32
    assert ((sums.value() - exact).abs() / exact).max() < 1e-7
    assert ((plainly - exact).abs() / exact).max() > 1e-6  # that it takes more than float32
