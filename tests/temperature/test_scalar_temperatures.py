import math
import warnings

import numpy as np
import pytest
import torch
from grid import embeddings

from dystress_plugin import ContrastiveLoss
from dystress_plugin.rows import RowStats
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


def batch(alignment=0.5, epoch=None):
    return Batch(torch.full((4, 1), alignment), None, epoch, 2, torch.mean)


def prepare(temperature, **settings):
    return temperature.prepare(batch(**settings))


def learn(temperature, **settings):
    rows = torch.zeros(4)
    temperature.update(RowStats(rows, rows, rows, rows, 2), batch(**settings))


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
        (lambda: Constant(torch.tensor([0.1])), TypeError, "must be a number, not Tensor"),
        (lambda: CosineSchedule(0.0), ValueError, "tau_min=0.0 must be above 0"),
        (lambda: CosineSchedule(2.0), ValueError, "tau_min=2.0 is above tau_max=1.0; swap them"),
        (lambda: CosineSchedule(period=0), ValueError, "period=0.0 must be above 0"),
        (lambda: CosineSchedule(period=math.inf), ValueError, "period=inf must be finite"),
        (lambda: ModelAware(tau=0), ValueError, "tau=0.0 must be above 0"),
        (lambda: ModelAware(alpha=-0.1), ValueError, "alpha=-0.1 must be at least 0"),
        (lambda: ModelAware(alpha=math.nan), ValueError, "alpha=nan must be finite"),
        (lambda: ModelAware(threshold=1.1), ValueError, r"threshold=1.1 must lie in \[-1, 1\]"),
        (lambda: ModelAware(threshold=None), TypeError, "threshold=None must be a number"),
        (lambda: StepSchedule(0.0), ValueError, "tau_min=0.0 must be above 0"),
        (lambda: StepSchedule(2.0), ValueError, "tau_min=2.0 is above tau_max=1.0; swap them"),
        (lambda: StepSchedule(period=0), ValueError, "period=0.0 must be above 0"),
        (lambda: Learnable(0), ValueError, "tau=0.0 must be above 0"),
        (lambda: Learnable(0.005), ValueError, r"tau=0.005 must lie in \[tau_min, tau_max\] = \[0.01, 1.0\]"),
        (lambda: Learnable(1.5), ValueError, "tau=1.5 must lie in"),
        (lambda: Learnable(tau_min=2.0), ValueError, "tau_min=2.0 is above tau_max=1.0"),
        (lambda: WarmUp(0.1), TypeError, r"temperature=0.1 must be a Temperature, such as DySTreSS\(\)"),
        (lambda: WarmUp(Constant), TypeError, "must be a Temperature"),
        (lambda: WarmUp(Constant(), tau=0), ValueError, "tau=0.0 must be above 0"),
        (lambda: WarmUp(Constant(), epochs=0), ValueError, "epochs=0.0 must be above 0"),
        (lambda: TemperatureFree(0.0), ValueError, r"clamp=0.0 must lie in \[1e-06, 0.5\]"),
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


@pytest.mark.parametrize("temperature", [CosineSchedule(), StepSchedule(), WarmUp(Constant())])
def test_schedule_without_an_epoch_raises(temperature):
    assert temperature.needs_epoch
    with pytest.raises(ValueError, match=f"{type(temperature).__name__} needs the epoch"):
        prepare(temperature)


@pytest.mark.parametrize(
    ("epoch", "expected"), [(0, 1.0), (4.99, 1.0), (5, 0.1), (9.99, 0.1), (10, 1.0), (14, 1.0), (17, 0.1), (1005, 0.1)]
)
def test_step_is_high_in_the_first_half_of_every_period_and_low_in_the_second(epoch, expected):
    assert tau(StepSchedule(0.1, 1.0, 10), epoch=epoch) == pytest.approx(expected, rel=1e-6)


# The clock: what adapters pass as the epoch


@pytest.mark.parametrize("build", [CosineSchedule, StepSchedule])
def test_a_schedule_moves_per_epoch_or_per_step(build):
    coarse, fine = build(period=8.0), build(period=8.0, per_step=True)
    steps = [(epoch, batch) for epoch in range(8) for batch in range(5)]
    by_epoch = [tau(coarse, epoch=coarse.clock(epoch, batch, 5)) for epoch, batch in steps]
    by_step = [tau(fine, epoch=fine.clock(epoch, batch, 5)) for epoch, batch in steps]
    assert by_epoch == [tau(coarse, epoch=float(epoch)) for epoch, _ in steps]
    assert by_step == [tau(coarse, epoch=epoch + batch / 5) for epoch, batch in steps]
    assert by_step[::5] == by_epoch[::5]
    assert (by_step == by_epoch) == (build is StepSchedule)  # whose half period falls on the start of an epoch


def test_clock_counts_whole_epochs_unless_told_otherwise():
    assert [CosineSchedule().clock(3, batch, 4) for batch in range(4)] == [3.0] * 4
    assert [CosineSchedule(per_step=True).clock(3, batch, 4) for batch in range(4)] == [3.0, 3.25, 3.5, 3.75]
    assert isinstance(Constant().clock(3, 1, 4), float)


@pytest.mark.parametrize("per_step", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_warm_up_keeps_the_clock_of_what_it_warms_up(per_step, inner):
    temperature = WarmUp(CosineSchedule(per_step=inner), per_step=per_step)
    assert temperature.clock(2, 1, 2) == (2.5 if per_step or inner else 2.0)


# Warm-up


@pytest.mark.parametrize(("epoch", "share"), [(0, 0.0), (1, 0.25), (2.5, 0.625), (4, 1.0), (9, 1.0)])
def test_warm_up_mixes_logits_by_the_share_of_its_epochs(epoch, share):
    s = torch.linspace(-0.9, 0.9, 7, dtype=torch.float64)
    map_ = prepare(WarmUp(TemperatureFree(), tau=0.2, epochs=4), epoch=epoch).positive
    assert torch.allclose(map_.logit(s), (1 - share) * s / 0.2 + share * 2 * s.atanh(), rtol=1e-12)
    assert torch.allclose(1 / map_.temperature(s), (1 - share) / 0.2 + share * 2 / (1 - s * s), rtol=1e-12)


def test_warm_up_needs_what_its_temperature_needs():
    assert WarmUp(Individual(3)).needs_index
    assert WarmUp(Individual(3)).needs_negative_cosine
    assert not WarmUp(DySTreSS()).needs_index


def test_warm_up_keeps_the_table_of_what_it_warms_up():
    temperature = WarmUp(WarmUp(Individual(3)))
    temperature.resize(5)
    assert temperature.num_samples == temperature.temperature.temperature.num_samples == 5
    assert not temperature.has_learned
    temperature.temperature.temperature.visited[2] = True
    assert temperature.has_learned


@pytest.mark.parametrize("temperature", [Constant(), ModelAware(), WarmUp(Constant())])
def test_without_a_table_there_is_nothing_to_resize(temperature):
    assert temperature.num_samples is None
    assert not temperature.has_learned
    with pytest.raises(TypeError, match=r"keeps no table of samples that could have num_samples=5"):
        temperature.resize(5)


# What it says to a training of so many epochs


@pytest.mark.parametrize(
    ("temperature", "short", "messages"),
    [
        (CosineSchedule(period=8), 4, ["never comes down to tau_min=0.1: it takes half a period of 4 epochs"]),
        (StepSchedule(period=8), 4, ["never changes to tau_min=0.1"]),
        (DySTreSS(stabilise=4), 4, ["never arrives at tau_max=0.2: it takes stabilise=4 epochs"]),
        (WarmUp(Constant(), epochs=4), 4, ["warm-up never arrives at Constant: it takes epochs=4"]),
        (WarmUp(CosineSchedule(period=8), epochs=4), 4, ["never arrives at CosineSchedule", "never comes down"]),
        (WarmUp(CosineSchedule(period=8), epochs=2), 4, ["never comes down"]),
    ],
)
def test_a_training_that_is_too_short_for_a_schedule_is_told(temperature, short, messages):
    for epochs in (0, 0.5, short):
        found = temperature.concerns(epochs)
        assert len(found) >= len(messages)
        assert all("training ends after" in sentence for sentence in found)
    assert len(found) == len(messages)
    assert all(part in sentence for part, sentence in zip(messages, found, strict=True))
    assert temperature.concerns(short + 1) == []


@pytest.mark.parametrize("temperature", [Constant(), DySTreSS(), ModelAware(), Learnable(), Individual(3)])
def test_without_a_schedule_no_training_is_too_short(temperature):
    assert temperature.concerns(0) == []


# Learnable


def learnable_step(temperature, rate):
    """One step of gradient descent; returns (temperature in the loss, gradient of its logarithm)."""
    loss = ContrastiveLoss(temperature)
    views = embeddings(6, 4)
    (gradient,) = torch.autograd.grad(loss(*views), loss.parameters())
    used = math.exp(temperature.log_tau.item())
    with torch.no_grad():
        temperature.log_tau -= rate * gradient
    return used, gradient.item()


@pytest.mark.parametrize("bound", [0.05, 0.9])
def test_learnable_temperature_is_held_in_its_range_and_comes_back(bound):
    temperature = Learnable(0.2, 0.05, 0.9)
    away = math.log(bound) + (math.log(bound) - math.log(0.2))
    with torch.no_grad():
        temperature.log_tau.fill_(away)
    used, gradient = learnable_step(temperature, 0.0)
    assert used == pytest.approx(bound, rel=1e-6)
    assert (gradient < 0) == (bound == 0.05)  # these views want neither end
    for _ in range(2):
        used, _ = learnable_step(temperature, 0.1)
    assert 0.05 * 1.001 < used < 0.9 / 1.001


def test_learnable_temperature_settles_within_its_range_at_a_gradient_of_zero():
    temperature = Learnable(0.06, 0.05, 0.9)
    for _ in range(200):
        used, gradient = learnable_step(temperature, 0.5)
    assert 0.05 < used < 0.9
    assert abs(gradient) < 1e-4


def test_learnable_temperature_is_the_only_parameter_and_in_the_checkpoint():
    loss = ContrastiveLoss(Learnable(0.2))
    assert [name for name, _ in loss.named_parameters()] == ["temperature.log_tau"]
    fresh = ContrastiveLoss(Learnable(0.5))
    fresh.load_state_dict(loss.state_dict())
    assert tau(fresh.temperature) == pytest.approx(0.2, rel=1e-6)


def test_two_losses_before_one_backward_pass_are_two_gradients():
    loss = ContrastiveLoss(Learnable())
    first, second = (torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    apart = [torch.autograd.grad(loss(*views), loss.parameters())[0] for views in (first, second)]
    (together,) = torch.autograd.grad(loss(*first) + loss(*second), loss.parameters())
    assert together.item() == pytest.approx(sum(apart).item(), rel=1e-6)


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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tau(temperature, alignment=0.1) == pytest.approx(0.005, rel=1e-6)  # `prepare` says and changes nothing
        learn(temperature, alignment=0.8)
    with pytest.warns(UserWarning, match=message) as seen:
        learn(temperature, alignment=0.1)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn(temperature, alignment=0.1)
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
        (CosineSchedule(), "CosineSchedule(tau_min=0.1, tau_max=1.0, period=400.0, per_step=False)"),
        (StepSchedule(), "StepSchedule(tau_min=0.1, tau_max=1.0, period=400.0, per_step=False)"),
        (Learnable(), "Learnable(tau=0.07, tau_min=0.01, tau_max=1.0)"),
        (
            WarmUp(Constant()),
            "WarmUp(\n  tau=0.1, epochs=10.0, per_step=False\n  (temperature): Constant(tau=0.1)\n)",
        ),
        (ModelAware(), "ModelAware(tau=0.1, alpha=0.5, threshold=0.0)"),
        (TemperatureFree(), "TemperatureFree(clamp=1e-06)"),
    ],
)
def test_repr_shows_the_defaults(temperature, expected):
    assert repr(temperature) == expected


# An offset for every sample


def taus(temperature, index, epoch):
    index = torch.tensor(index)
    prepared = temperature.prepare(Batch(torch.ones(len(index), 1, dtype=torch.float64), index, epoch, 1, torch.mean))
    return prepared.negative.temperature(torch.zeros(len(index), 1, dtype=torch.float64)).flatten().tolist()


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, [0.2, 0.25, 0.3]), (25, [0.1, 0.15, 0.3]), (50, [0.1, 0.1, 0.2]), (100, [0.2, 0.25, 0.3])],
)
def test_what_is_frequent_is_warmer_and_all_swing_together_within_the_range(epoch, expected):
    temperature = CosineSchedule(0.1, 0.3, period=100, offset=[9, 1, 3], amplitude=0.2)
    assert taus(temperature, [1, 2, 0], epoch) == pytest.approx(expected, rel=1e-12)
    plain = CosineSchedule(0.1, 0.3, period=100, offset=torch.tensor([9, 1, 3]))
    assert taus(plain, [1, 2, 0], epoch) == pytest.approx(expected, rel=1e-12)  # its amplitude is the whole range


def test_counts_may_lie_in_a_file_and_are_a_setting_not_a_state(tmp_path):
    np.save(tmp_path / "counts.npy", np.array([9, 1, 3], dtype=np.int32))
    temperature = CosineSchedule(0.1, 0.3, offset=str(tmp_path / "counts.npy"))
    assert temperature.counts.tolist() == [9, 1, 3]
    assert temperature.needs_index
    assert temperature.num_samples == 3
    assert not temperature.state_dict()
    assert temperature.concerns(1) == []
    assert repr(temperature) == (
        "CosineSchedule(tau_min=0.1, tau_max=0.3, period=400.0, per_step=False, offset=3 counts, amplitude="
        f"{temperature.amplitude})"
    )
    with pytest.raises(ValueError, match="was given numbers of 3 samples, but the training data have 5"):
        temperature.resize(5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"amplitude": 0.1}, ValueError, "amplitude=0.1 is of the swing around an offset"),
        ({"offset": [1, 2], "amplitude": 0}, ValueError, "amplitude=0.0 must be above 0"),
        ({"offset": [1.5, 2.0]}, TypeError, "offset holds torch.float32, and must be whole numbers"),
        ({"offset": [[1], [2]]}, ValueError, r"offset has shape \(2, 1\), and must be \(num_samples,\)"),
        ({"offset": torch.empty(0, dtype=torch.int64)}, ValueError, r"offset has shape \(0,\)"),
        ({"offset": [4, 4]}, ValueError, "offset is 4 for every sample, which sets none apart"),
    ],
)
def test_bad_counts_raise_and_say_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        CosineSchedule(**arguments)


def test_samples_without_a_number_or_a_count_are_asked_for():
    temperature = CosineSchedule(offset=[1, 2])
    with pytest.raises(ValueError, match="CosineSchedule needs the sample numbers"):
        ContrastiveLoss(temperature)(torch.eye(3), torch.eye(3), epoch=0)
    with pytest.raises(ValueError, match="index runs from 0 to 2, but num_samples=2"):
        ContrastiveLoss(temperature)(torch.eye(3), torch.eye(3), epoch=0, index=torch.arange(3))
