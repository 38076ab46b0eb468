import math
import warnings

import pytest
import torch

from dystress_plugin import ContrastiveLoss
from dystress_plugin.temperature import Constant, CosineSchedule, ModelAware, TemperatureFree
from dystress_plugin.temperature.base import Batch


def prepare(temperature, alignment=0.5, epoch=None):
    return temperature.prepare(Batch(torch.full((4, 1), alignment), None, epoch, 2, torch.mean))


def tau(temperature, **batch):
    positive, negative = (map_.temperature(torch.zeros(1)).item() for map_ in prepare(temperature, **batch))
    assert positive == negative
    return positive


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Constant(0), ValueError, "tau=0.0 must be above 0"),
        (lambda: Constant(-1.0), ValueError, "tau=-1.0 must be above 0"),
        (lambda: Constant(math.nan), ValueError, "tau=nan must be finite"),
        (lambda: Constant("0.1"), TypeError, "tau='0.1' must be a number, not str"),
        (lambda: Constant(True), TypeError, "tau=True must be a number, not bool"),
        (lambda: Constant(torch.tensor(0.1)), TypeError, "must be a number, not Tensor"),
        (lambda: CosineSchedule(0.0), ValueError, "tau_min=0.0 must be above 0"),
        (lambda: CosineSchedule(2.0), ValueError, "tau_min=2.0 is above tau_max=1.0; swap them"),
        (lambda: CosineSchedule(period=0), ValueError, "period=0.0 must be above 0"),
        (lambda: CosineSchedule(period=math.inf), ValueError, "period=inf must be finite"),
        (lambda: ModelAware(tau=0), ValueError, "tau=0.0 must be above 0"),
        (lambda: ModelAware(alpha=-0.1), ValueError, "alpha=-0.1 must be at least 0"),
        (lambda: ModelAware(alpha=math.nan), ValueError, "alpha=nan must be finite"),
        (lambda: ModelAware(threshold=1.1), ValueError, r"threshold=1.1 must lie in \[-1, 1\]"),
        (lambda: ModelAware(threshold=None), TypeError, "threshold=None must be a number"),
        (lambda: TemperatureFree(0.0), ValueError, r"clamp=0.0 must lie in \[1e-6, 0.5\]"),
        (lambda: TemperatureFree(0.6), ValueError, "clamp=0.6"),
        (lambda: TemperatureFree(math.nan), ValueError, "clamp=nan must be finite"),
    ],
)
def test_bad_settings_raise_and_name_the_value(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_constant_is_constant():
    assert tau(Constant(0.25), alignment=0.1) == tau(Constant(0.25), alignment=0.9, epoch=5) == 0.25


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, 1.0), (1, 0.1 + 0.45 * (1 + math.cos(math.pi / 100))), (50, 0.55), (100, 0.1), (150, 0.55), (200, 1.0)],
)
def test_schedule_is_evaluated_at_the_epoch_as_given(epoch, expected):
    assert tau(CosineSchedule(0.1, 1.0, 200), epoch=epoch) == pytest.approx(expected, rel=1e-6)


def test_schedule_takes_fractions_of_an_epoch():
    assert CosineSchedule(0.1, 1.0, 200).tau(12.5) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 8)))


def test_schedule_without_an_epoch_raises():
    with pytest.raises(ValueError, match="CosineSchedule needs the epoch"):
        prepare(CosineSchedule())


@pytest.mark.parametrize(("alignment", "expected"), [(-0.5, 0.06), (0.2, 0.2), (0.9, 0.34)])
def test_better_aligned_positives_raise_the_model_aware_temperature(alignment, expected):
    assert tau(ModelAware(0.2, alpha=1.0, threshold=0.2), alignment=alignment) == pytest.approx(expected, rel=1e-6)


def test_model_aware_temperature_takes_no_gradient():
    z = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    aligned = (torch.nn.functional.normalize(z.detach(), dim=-1).prod(0)).sum(1).mean().item()
    moved = Constant(0.1 * (1 + 0.5 * aligned))
    (found,) = torch.autograd.grad(ContrastiveLoss(ModelAware(), objective="ntxent")(*z), z)
    (expected,) = torch.autograd.grad(ContrastiveLoss(moved)(*z), z)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_model_aware_temperature_is_held_at_a_tenth_and_says_so_once():
    temperature = ModelAware(0.05, alpha=2.0, threshold=0.8)
    message = r"= -0\.02 at alignment A=0\.100 is below tau/10 and is held at 0\.005"
    with pytest.warns(UserWarning, match=message) as seen:
        assert tau(temperature, alignment=0.1) == pytest.approx(0.005, rel=1e-6)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tau(temperature, alignment=-0.9) == pytest.approx(0.005, rel=1e-6)
        assert tau(temperature, alignment=0.8) == pytest.approx(0.05, rel=1e-6)


def test_model_aware_loss_at_the_floor_is_finite():
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with pytest.warns(UserWarning, match="held"):
        value = ContrastiveLoss("macl", tau=0.05, alpha=2.0, threshold=0.8)(z, -z)
    value.backward()
    assert value.isfinite()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("alignment", [-1.0, 0.0, 1.0])
def test_model_aware_defaults_never_reach_the_floor(alignment):
    assert tau(ModelAware(), alignment=alignment) == pytest.approx(0.1 * (1 + 0.5 * alignment), rel=1e-6)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (Constant(), "Constant(tau=0.1)"),
        (CosineSchedule(), "CosineSchedule(tau_min=0.1, tau_max=1.0, period=400.0)"),
        (ModelAware(), "ModelAware(tau=0.1, alpha=0.5, threshold=0.0)"),
        (TemperatureFree(), "TemperatureFree(clamp=1e-06)"),
    ],
)
def test_repr_shows_the_defaults(temperature, expected):
    assert repr(temperature) == expected
