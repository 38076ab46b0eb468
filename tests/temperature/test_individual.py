import copy
import math
import warnings

import oracle
import pytest
import torch
from grid import DEVICE, assert_close, assert_tables_equal, embeddings, trained_on

from dystress_plugin import ContrastiveLoss
from dystress_plugin.temperature import Individual
from dystress_plugin.temperature.base import Batch

TABLES = ("tau", "log_s", "u", "visited")


def step(loss, index, seed=0, dtype=torch.float64, views=2):
    views = [view.to(dtype) for view in embeddings(len(index), 4, seed=seed, views=views)]
    return loss(*trained_on(views), index=torch.tensor(index)).detach()


SETTINGS = [
    {},
    {"gamma": 1.0, "beta": 1.0},
    {"clip": 0.5, "eta": 0.1},
    {"tau_init": 0.3, "tau_min": 0.29, "tau_max": 0.31, "rho": 0.05},
    {"eta": 0.0, "rho": 1.5},
    {"gradient": "difference"},
    {"gradient": "difference", "gamma": 0.3, "eta": 0.1},
]


def both(settings):
    temperature = Individual(11, **settings)
    return ContrastiveLoss(temperature).to(DEVICE), temperature, oracle.Tables(oracle.Individual(11, **settings))


def assert_step_equal(loss, reference, batch, index):
    """One step of either, from the same tables: value, gradient and the tables after it."""
    views, samples = [view.tolist() for view in batch], [index.tolist()]
    where = {"keys": loss.queue.keys.tolist() if loss.queue else None, "sides": loss.layout}

    def maps(row, _):
        return (oracle.constant(reference.tau(row, samples)),) * 2

    expected = oracle.loss(views, maps, "sogclr", running=reference.running(samples), **where)
    reference.update(samples, views, **where)
    leaves = [view.requires_grad_() for view in batch]
    value = loss(*leaves, index=index.to(DEVICE))
    assert_close(value, expected.value, 1e-12, terms=1.0)
    assert_close(torch.stack(torch.autograd.grad(value, leaves)), expected.gradients, 1e-12)
    assert_tables_equal(loss, reference)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("duplicates", [False, True])
def test_twelve_steps_equal_a_plain_loop(settings, views, duplicates):
    loss, _, reference = both(settings)
    generator = torch.Generator().manual_seed(1)
    for seed in range(12):
        index = torch.randperm(11, generator=generator)[:6]
        if duplicates:
            index[3:] = index[torch.randint(3, (3,), generator=generator)]
        assert_step_equal(loss, reference, embeddings(6, 4, seed=seed, views=views), index)


@pytest.mark.parametrize("where", [{"queue_size": (9, 4)}, {"layout": "one_way"}, {"layout": "both_ways"}])
@pytest.mark.parametrize("gradient", ["cosine", "difference"])
def test_twelve_steps_of_another_layout_equal_a_plain_loop(where, gradient):
    loss = ContrastiveLoss(Individual(11, gradient=gradient), **where).to(DEVICE)
    reference = oracle.Tables(*(oracle.Individual(11, gradient=gradient) for _ in loss.temperatures))
    for seed in range(12):
        index = torch.randperm(11, generator=torch.Generator().manual_seed(seed))[:5]
        assert_step_equal(loss, reference, embeddings(5, 4, seed=seed), index)


def trained(loss, steps, dtype):
    """What the steps leave: values and gradients; the batches hold duplicates."""
    left = []
    for seed in steps:
        views = [view.to(dtype).requires_grad_() for view in embeddings(6, 4, seed=seed)]
        index = torch.randint(9, (6,), generator=torch.Generator().manual_seed(seed))
        value = loss(*views, index=index)
        left += [value.detach(), *torch.autograd.grad(value, views)]
    return left


@pytest.mark.parametrize("gradient", ["cosine", "difference"])
@pytest.mark.parametrize("where", [{}, {"queue_size": (8, 4)}, {"layout": "both_ways"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_interrupted_after_six_steps_ends_as_if_it_had_not_been(tmp_path, gradient, where, dtype):
    whole, first, second = (ContrastiveLoss(Individual(9, gradient=gradient), **where) for _ in range(3))
    first.load_state_dict(whole.state_dict())
    expected = trained(whole, range(12), dtype)
    found = trained(first, range(6), dtype)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    found += trained(second, range(6, 12), dtype)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(expected) == 36
    for name, entry in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], entry)
    assert not torch.equal(first.temperature.tau, whole.temperature.tau)


def test_a_queue_of_one_image_updates_its_own_entry_only():
    loss = ContrastiveLoss(Individual(4), queue_size=(9, 4))
    step(loss, [2])
    assert loss.temperature.visited.tolist() == [False, False, True, False]


def test_untouched_samples_keep_their_entries():
    loss = ContrastiveLoss(Individual(9))
    step(loss, [1, 5, 2])
    before = copy.deepcopy(loss.temperature.state_dict())
    step(loss, [0, 3, 5], seed=1)
    for name in TABLES:
        now = getattr(loss.temperature, name)
        assert torch.equal(before[name][[1, 2, 4, 6, 7, 8]], now[[1, 2, 4, 6, 7, 8]])
    assert (before["tau"] != loss.temperature.tau).nonzero().flatten().tolist() == [0, 3, 5]


def test_the_loss_of_a_step_uses_the_temperatures_from_before_it():
    loss, frozen = ContrastiveLoss(Individual(5)), ContrastiveLoss(Individual(5, eta=0.0))
    assert torch.equal(step(loss, [0, 1, 2]), step(frozen, [0, 1, 2]))
    assert not torch.equal(step(loss, [0, 1, 2]), step(frozen, [0, 1, 2]))


def test_order_of_a_batch_with_duplicates_does_not_matter():
    batch, index = embeddings(6, 4), torch.tensor([3, 1, 3, 0, 1, 3])
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    first, second = ContrastiveLoss(Individual(5)), ContrastiveLoss(Individual(5))
    for _ in range(3):
        first(*trained_on(batch), index=index)
        second(*[view[order] for view in batch], index=index[order])
    assert (first.temperature.tau[[0, 1, 3]] != 0.1).all()
    for name in ("tau", "log_s", "u"):
        assert_close(getattr(first.temperature, name), getattr(second.temperature, name), 1e-13)


@pytest.mark.parametrize("gradient", ["cosine", "difference"])
def test_the_same_batches_with_duplicates_give_the_same_bits(gradient):
    first, second = (ContrastiveLoss(Individual(9, gradient=gradient)) for _ in range(2))
    for a, b in zip(trained(first, range(5), torch.float32), trained(second, range(5), torch.float32), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


def test_order_of_a_batch_with_duplicates_does_not_matter_to_value_and_gradient():
    index, order = torch.tensor([3, 1, 3, 0, 1, 3]), torch.tensor([5, 2, 0, 4, 1, 3])
    results = []
    for permuted in (torch.arange(6), order):
        loss = ContrastiveLoss(Individual(5))
        for seed in range(3):
            views = [view[permuted].requires_grad_() for view in embeddings(6, 4, seed=seed)]
            value = loss(*views, index=index[permuted])
        back = permuted.argsort()
        results.append((value.detach(), *[g[back] for g in torch.autograd.grad(value, views)]))
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, 1e-12)


def test_a_duplicate_counts_once_with_the_mean_of_its_occurrences():
    """Two occurrences that are alike move a sample as far as one does, which two updates in turn would not."""
    z0, z1 = trained_on(embeddings(3, 4))
    twice, once = ContrastiveLoss(Individual(3)), ContrastiveLoss(Individual(4))
    views = [torch.cat([z, z[:1]]) for z in (z0, z1)]
    twice(*views, index=torch.tensor([0, 1, 2, 0]))
    once(*views, index=torch.tensor([0, 1, 2, 3]))  # the same rows, but each image its own sample
    assert_close(twice.temperature.tau, once.temperature.tau[:3], 1e-13)
    assert once.temperature.tau[0] != 0.1
    assert_close(once.temperature.tau[3], once.temperature.tau[0], 1e-13)


@pytest.mark.parametrize(("rho", "end"), [(1.7, 0.09), (1e-6, 0.11)])
def test_temperatures_stay_in_their_range(rho, end):
    loss = ContrastiveLoss(Individual(4, tau_min=0.09, tau_max=0.11, rho=rho, eta=0.1))
    for _ in range(2):
        step(loss, [0, 1, 2, 3])
        assert loss.temperature.tau.tolist() == [end] * 4


def test_temperature_settles_where_the_divergence_of_the_weights_is_rho():
    rho = 0.3
    loss = ContrastiveLoss(Individual(6, rho=rho, gamma=1.0, eta=0.1))
    for _ in range(100):
        step(loss, [0, 1, 2, 3, 4, 5])
    _, _, rows = oracle.layout([view.tolist() for view in embeddings(6, 4)])
    for image, tau in enumerate(loss.temperature.tau.tolist()):
        divergence = []
        for row in (row for row in rows if row.image == image):
            _, weights = oracle.exponentials(oracle.constant(tau), row.negative_cosine)
            divergence.append(sum(w * math.log(w * len(weights)) for w in weights))
        assert sum(divergence) / 2 == pytest.approx(rho, abs=1e-4)


@pytest.mark.parametrize("gradient", ["cosine", "difference"])
def test_tiny_temperatures_overflow_nothing(gradient):
    loss = ContrastiveLoss(Individual(4, tau_init=1e-4, tau_min=1e-4, gradient=gradient))
    for seed in range(3):
        assert step(loss, [0, 1, 2, 3], seed, torch.float32).isfinite()
    assert all(getattr(loss.temperature, name).isfinite().all() for name in TABLES)


# State


def test_state_dict_resumes_where_it_stopped():
    loss, fresh = ContrastiveLoss(Individual(9)), ContrastiveLoss(Individual(9))
    for seed in range(3):
        step(loss, [seed, 5, 8], seed)
    fresh.load_state_dict(loss.state_dict())
    assert torch.equal(step(loss, [1, 5, 7], 3), step(fresh, [1, 5, 7], 3))
    for name in TABLES:
        assert torch.equal(getattr(loss.temperature, name), getattr(fresh.temperature, name))


def test_both_gradients_agree_at_the_first_visit_and_only_there():
    """They differ by s_p / tau (g / s - 1), and at the first visit s is g."""
    losses = [ContrastiveLoss(Individual(3, gradient=gradient, clip=100.0)) for gradient in ("cosine", "difference")]
    for loss in losses:
        step(loss, [0, 1, 2])
    assert_close(losses[0].temperature.tau, losses[1].temperature.tau, 1e-13)
    for loss in losses:
        step(loss, [0, 1, 2], 1)
    assert (losses[0].temperature.tau - losses[1].temperature.tau).abs().min() > 1e-4


def test_state_dict_of_another_size_is_refused():
    with pytest.raises(RuntimeError, match=r"size mismatch for temperature\.tau"):
        ContrastiveLoss(Individual(9)).load_state_dict(ContrastiveLoss(Individual(8)).state_dict())


def test_resize_starts_fresh_tables():
    loss = ContrastiveLoss(Individual(3, tau_init=0.2))
    step(loss, [0, 1, 2])
    loss.temperature.resize(5)
    assert loss.temperature.num_samples == 5
    assert loss.temperature.tau.tolist() == [0.2] * 5
    assert not loss.temperature.visited.any()
    assert set(loss.state_dict()) == {f"temperature.{name}" for name in TABLES}
    step(loss, [4, 3, 0])
    assert loss.temperature.visited.tolist() == [True, False, False, True, True]


@pytest.mark.parametrize("move", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.float])
def test_tables_stay_float64_when_the_module_is_moved_to_another_precision(move):
    loss, moved = ContrastiveLoss(Individual(5)), ContrastiveLoss(Individual(5))
    step(loss, [0, 1, 2])
    step(moved, [0, 1, 2])
    move(moved)
    assert [getattr(moved.temperature, name).dtype for name in TABLES] == [torch.float64] * 3 + [torch.bool]
    assert [torch.equal(getattr(moved.temperature, name), getattr(loss.temperature, name)) for name in TABLES] == [
        True
    ] * 4
    assert torch.equal(step(loss, [2, 3, 4], 1), step(moved, [2, 3, 4], 1))


def test_moving_to_another_device_takes_every_table_along():
    moved = Individual(5).to("meta")
    assert {getattr(moved, name).device.type for name in TABLES} == {"meta"}
    assert moved.tau.dtype == torch.float64


def test_tables_need_no_gradient():
    loss = ContrastiveLoss(Individual(5))
    step(loss, [0, 1, 2])
    assert not list(loss.parameters())
    assert not any(buffer.requires_grad for buffer in loss.buffers())


# Errors and warnings


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples=0 must be at least 1"),
        ({"num_samples": -3}, ValueError, "num_samples=-3 must be at least 1"),
        ({"num_samples": 4.0}, TypeError, "num_samples=4.0 must be an int"),
        ({"num_samples": True}, TypeError, "num_samples=True must be an int"),
        ({"num_samples": None}, TypeError, "num_samples=None must be an int"),
        ({"tau_min": 0.0}, ValueError, "tau_min=0.0 must be above 0"),
        ({"tau_min": 2.0}, ValueError, "tau_min=2.0 is above tau_max=1.0"),
        ({"tau_init": 0.01}, ValueError, r"tau_init=0.01 must lie in \[tau_min, tau_max\] = \[0.05, 1.0\]"),
        ({"tau_init": 1.5}, ValueError, "tau_init=1.5 must lie in"),
        ({"rho": 0.0}, ValueError, "rho=0.0 must be above 0"),
        ({"gamma": 0.0}, ValueError, "gamma=0.0 and beta=0.5 must be above 0"),
        ({"gamma": 1.1}, ValueError, r"gamma=1.1 must lie in \[0, 1\]"),
        ({"beta": 0.0}, ValueError, "gamma=0.8 and beta=0.0 must be above 0"),
        ({"beta": -0.1}, ValueError, r"beta=-0.1 must lie in \[0, 1\]"),
        ({"eta": -0.1}, ValueError, "eta=-0.1 must be at least 0"),
        ({"clip": 0.0}, ValueError, "clip=0.0 must be above 0"),
        ({"eta": math.nan}, ValueError, "eta=nan must be finite"),
        ({"gradient": "cosin"}, ValueError, "Unknown gradient 'cosin'. Did you mean 'cosine'.*cosine, difference"),
    ],
)
def test_bad_settings_raise_and_name_the_value(settings, error, message):
    with pytest.raises(error, match=message):
        Individual(**{"num_samples": 5, **settings})


def test_rho_that_no_weights_can_reach_warns_once_and_names_the_limit():
    loss = ContrastiveLoss(Individual(9, rho=math.log(4)))
    with pytest.warns(UserWarning, match=r"rho=1\.386.* log\(n\) = 1\.386 for n=4 negatives") as seen:
        step(loss, [0, 1, 2])
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(loss, [3, 4, 5])


def test_rho_below_the_limit_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(ContrastiveLoss(Individual(9, rho=math.log(4) - 1e-9)), [0, 1, 2])


def test_negatives_of_a_queue_count_for_the_limit_of_rho():
    with pytest.warns(UserWarning, match="for n=3 negatives"):
        step(ContrastiveLoss(Individual(9, rho=1.2), queue_size=(3, 4)), [0, 1, 2])


def test_prepare_without_an_index_raises():
    with pytest.raises(ValueError, match="Individual needs the sample numbers"):
        Individual(3).prepare(Batch(torch.ones(4, 1), None, None, 2, torch.mean))


def test_defaults_are_the_papers_recipe():
    assert repr(Individual(7)) == (
        "Individual(num_samples=7, tau_init=0.1, tau_min=0.05, tau_max=1.0, "
        "rho=0.4, gamma=0.8, beta=0.5, eta=0.03, clip=3.0, gradient=None, released=False)"
    )
