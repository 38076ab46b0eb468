"""FastCLIP's learned temperature, against the derivative of its loss and a loop written from its equations."""

import math

import pytest
import torch
from grid import assert_close, embeddings, trained_on
from torch.nn.functional import normalize

from dystress_plugin import ContrastiveLoss
from dystress_plugin.temperature import RobustGlobal, WarmUp

IMAGES, CAPTIONS = 11, 17
TAU = 0.12


def by_tau(loss, value):
    """dL / dtau, from the gradient of log tau, and the temperature."""
    (gradient,) = torch.autograd.grad(value, loss.temperature.log_tau, retain_graph=True)
    tau = loss.temperature.log_tau.detach().exp()
    return gradient / tau, tau


def differences(z0, z1):
    """s_j - s_p of both sides' anchors, (2, batch, negatives)."""
    e0, e1 = normalize(z0, dim=1), normalize(z1, dim=1)
    others = ~torch.eye(len(z0), dtype=torch.bool)
    return torch.stack([(s - s.diagonal()[:, None])[others].view(len(s), -1) for s in (e0 @ e1.T, e1 @ e0.T)])


def its_loss(h, tau, rho):
    """tau mean 1/2 (log u_I + log u_T) + rho tau, with u the batch's own."""
    return tau * (h / tau).exp().mean(2).log().mean() + rho * tau


@pytest.mark.parametrize(
    "settings", [{}, {"rho": 1.3}, {"gamma": 0.3, "num_samples": IMAGES}, {"gamma": 0.3, "num_samples": (9, CAPTIONS)}]
)
def test_without_a_past_it_descends_on_its_loss_and_so_do_the_embeddings(settings):
    loss = ContrastiveLoss(RobustGlobal(TAU, **settings), layout="both_ways").double()
    views = trained_on(embeddings(6, 4))
    value = loss(*views, index=(torch.arange(6), 5 + torch.arange(6)) if "gamma" in settings else None)
    found, tau = by_tau(loss, value)
    rho, h = loss.temperature.rho, differences(*views)
    eps = 1e-6
    numerical = (its_loss(h, tau + eps, rho) - its_loss(h, tau - eps, rho)) / (2 * eps)
    assert_close(found, numerical.detach(), 1e-8, terms=1.0)
    leaf = tau.clone().requires_grad_()
    exact = torch.autograd.grad(its_loss(h, leaf, rho), [leaf, *views], retain_graph=True)
    assert_close(found, exact[0], 1e-12, terms=1.0)
    assert_close(torch.stack(torch.autograd.grad(value, views)), torch.stack(exact[1:]), 1e-12)
    uniform = math.log(5)
    weight = torch.softmax(h.detach() / tau, 2)
    divergence = (weight * weight.log()).sum(2).mean() + uniform
    assert_close(found, rho - divergence, 1e-12, terms=1.0)


class Released:
    """FastCLIP-v3 on one process, from its equations; `twice` with the term that its release counts double."""

    def __init__(self, rho, gamma, twice):
        self.rho, self.gamma, self.twice = rho, gamma, twice
        self.u = [torch.full((n,), torch.nan, dtype=torch.float64) for n in (IMAGES, CAPTIONS)]

    def __call__(self, views, index, tau, gamma=None):
        """The gradient of tau, and that of the embeddings."""
        gamma = self.gamma if gamma is None else gamma
        h = differences(*views)
        terms, features = [], 0.0
        for u, own, h_ in zip(self.u, index, h, strict=True):
            e = (h_.detach() / tau).exp()
            g = e.mean(1)
            u[own] = torch.where(u[own].isnan(), g, (1 - gamma) * u[own] + gamma * g)
            w = e / (e.shape[1] * u[own])[:, None]
            pull = (w * h_.detach() / tau).sum(1)
            terms.append(u[own].log().mean() - (2 if self.twice else 1) * pull.mean())
            features = features + (w[:, :] * h_).sum(1).mean() / 2
        return self.rho + sum(terms) / 2, torch.stack(torch.autograd.grad(features, views))


def batches(steps):
    for step in steps:
        generator, number = torch.Generator().manual_seed(step), 6 - step % 3
        own = [torch.randperm(n, generator=generator)[:number] for n in (IMAGES, CAPTIONS)]
        yield trained_on(embeddings(number, 4, seed=step)), tuple(own)


def descend(temperature, gradient):
    temperature.log_tau.data -= 0.05 * temperature.log_tau.detach().exp() * gradient


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("schedule", [None, 4.0])
def test_twelve_steps_equal_the_equations(released, schedule):
    own = RobustGlobal(TAU, 0.7, 0.3, schedule, (IMAGES, CAPTIONS), released=released)
    loss, reference = ContrastiveLoss(own, layout="both_ways").double(), Released(0.7, 0.3, released)
    taus = []
    for step, (views, index) in enumerate(batches(range(12))):
        epoch = step / 2
        value = loss(*views, index=index, epoch=epoch)
        found, tau = by_tau(loss, value)
        gamma = None
        if schedule:
            gamma = 0.3 if epoch >= 4 else (1 + math.cos(math.pi * epoch / 4)) / 2 * (1 - 0.3) + 0.3
        expected, features = reference(views, index, tau, gamma)
        assert_close(found, expected, 1e-12, terms=1.0)
        assert_close(torch.stack(torch.autograd.grad(value, views)), features, 1e-12)
        for means, u in zip(own.means, reference.u, strict=True):
            assert torch.equal(means.visited, ~u.isnan())
            assert_close(means.log_s[means.visited].exp(), u[means.visited], 1e-12)
        descend(own, found)
        taus.append(tau.item())
    assert len(set(taus)) == 12


def test_a_run_interrupted_after_six_steps_ends_as_if_it_had_not_been(tmp_path):
    def build():
        own = RobustGlobal(TAU, gamma=0.3, gamma_epochs=4, num_samples=(IMAGES, CAPTIONS))
        return ContrastiveLoss(own, layout="both_ways")

    def run(loss, steps):
        left = []
        for step, (views, index) in zip(steps, batches(steps), strict=True):
            value = loss(*views, index=index, epoch=step)
            left += [value.detach(), *torch.autograd.grad(value, views, retain_graph=True)]
            descend(loss.temperature, by_tau(loss, value)[0])
        return left

    whole, first, second = build(), build(), build()
    expected, found = run(whole, range(12)), run(first, range(6))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    found += run(second, range(6, 12))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(second.state_dict()[name], entry) for name, entry in whole.state_dict().items())


def test_gradient_descent_settles_where_the_divergence_is_rho():
    loss, views = ContrastiveLoss(RobustGlobal(TAU, rho=0.5), layout="both_ways").double(), embeddings(6, 4)
    for _ in range(300):
        gradient, tau = by_tau(loss, loss(*views))
        descend(loss.temperature, 4 * gradient)
    assert abs(gradient) < 1e-4
    assert 0.01 < tau < 1


# With a running mean or without


def test_without_running_means_it_needs_no_index_and_has_one_number():
    loss = ContrastiveLoss("fastclip", num_samples=5)  # as hosts give it that know the data
    assert (loss.temperature.rho, loss.temperature.num_samples, loss.temperature.needs_index) == (0.4, None, False)
    assert list(loss.state_dict()) == ["temperature.log_tau"]
    assert loss(*embeddings(4, 3)).isfinite()
    with pytest.raises(TypeError, match="keeps no table"):
        loss.temperature.resize(7)


def test_with_running_means_the_default_rho_is_the_papers():
    own = RobustGlobal(gamma=0.2, num_samples=5)
    assert (own.rho, own.num_samples, own.table_lengths, own.needs_index) == (6.5, 5, (5, 5), True)
    own.resize((7, 9))
    assert (own.num_samples, own.table_lengths, own.has_learned) == (7, (7, 9), False)
    assert repr(RobustGlobal()) == (
        "RobustGlobal(tau=0.07, rho=0.4, gamma=1.0, gamma_epochs=None, num_samples=None, tau_min=0.01, released=False)"
    )


def test_gamma_comes_down_on_half_a_cosine():
    own = RobustGlobal(gamma=0.2, gamma_epochs=10, num_samples=3)
    assert [own.gamma_at(epoch) for epoch in (0, 5, 10, 37)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert RobustGlobal(gamma=0.2, num_samples=3).gamma_at(None) == 0.2
    assert len(own.concerns(10)) == 1
    assert own.concerns(11) == RobustGlobal().concerns(3) == []


def test_tau_is_held_in_its_range_and_comes_back():
    loss = ContrastiveLoss(RobustGlobal(0.011, rho=9.0, tau_min=0.01), layout="both_ways")
    loss.temperature.log_tau.data.fill_(math.log(1e-4))
    with pytest.warns(UserWarning, match="tau only sinks, to tau_min=0.01"):
        loss(*trained_on(embeddings(6, 4)))
    assert loss.temperature.log_tau.item() == pytest.approx(math.log(0.01))


def test_a_rho_out_of_reach_is_warned_of_once_and_not_with_running_means():
    loss, views = ContrastiveLoss(RobustGlobal(rho=2.0)), trained_on(embeddings(3, 4))
    with pytest.warns(UserWarning, match=r"rho=2.0 is at least log\(n\) = 1.386 for n=4 negatives"):
        loss(*views)
    loss(*views)  # a warning would be an error
    ContrastiveLoss(RobustGlobal(rho=2.0, gamma=0.5, num_samples=3))(*views, index=torch.arange(3))


def test_after_a_warm_up_alone_it_descends():
    loss = ContrastiveLoss(WarmUp(RobustGlobal(TAU), 0.3, epochs=2)).double()
    gradients = []
    for epoch in (0, 1, 2):
        (gradient,) = torch.autograd.grad(loss(*embeddings(6, 4), epoch=epoch), loss.parameters())
        gradients.append(gradient)
    alone = ContrastiveLoss(RobustGlobal(TAU)).double()
    expected = torch.autograd.grad(alone(*embeddings(6, 4)), alone.parameters())[0]
    assert gradients[0] == gradients[1] == 0
    assert_close(gradients[2], expected, 1e-12)


@pytest.mark.parametrize("objective", ["ntxent", "dcl", "gcl"])
@pytest.mark.parametrize("engine", ["dense", "blockwise"])
def test_its_own_loss_is_worth_nothing_and_the_same_beside_every_objective(objective, engine):
    loss = ContrastiveLoss(RobustGlobal(TAU), objective=objective, engine=engine).double()
    constant = ContrastiveLoss(RobustGlobal(TAU), objective=objective).double().requires_grad_(False)
    views = embeddings(6, 4, views=3)
    value = loss(*views)
    assert torch.equal(value.detach(), constant(*views)) or engine == "blockwise"
    assert_close(value.detach(), constant(*views), 1e-13, terms=1.0)
    alone = ContrastiveLoss(RobustGlobal(TAU)).double()
    assert_close(by_tau(loss, value)[0], by_tau(alone, alone(*views))[0], 1e-12)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tau": 0.005}, ValueError, r"tau=0.005 must lie in \[tau_min, tau_max\] = \[0.01, 1.0\]"),
        ({"rho": 0.0}, ValueError, "rho=0.0 must be above 0"),
        ({"gamma": 0.0}, ValueError, "gamma=0.0 must be above 0"),
        ({"gamma": 1.1}, ValueError, r"gamma=1.1 must lie in \[0, 1\]"),
        ({"gamma": 0.5}, ValueError, "gamma=0.5 keeps a running mean of every sample: give num_samples"),
        ({"gamma_epochs": 5}, ValueError, "gamma_epochs=5 is how long gamma comes down from 1: give a gamma below 1"),
        ({"gamma": 0.5, "num_samples": 3.5}, TypeError, "num_samples=3.5 must be an int"),
        ({"gamma": 0.5, "num_samples": (3, 0)}, ValueError, "num_samples=0 must be at least 1"),
    ],
)
def test_bad_settings_raise_and_name_the_value(settings, error, message):
    with pytest.raises(error, match=message):
        RobustGlobal(**settings)


@pytest.mark.parametrize(
    ("index", "epoch", "message"),
    [
        (None, 0, "RobustGlobal needs the sample numbers"),
        (torch.arange(4), 0, "tables of 11 and 17 samples"),
        ((torch.arange(4), torch.arange(14, 18)), 0, "index runs from 14 to 17, but num_samples=17"),
        ((torch.arange(4), torch.arange(4)), None, "RobustGlobal needs the epoch"),
    ],
)
def test_what_is_missing_is_said_before_anything_moves(index, epoch, message):
    own = RobustGlobal(gamma=0.5, gamma_epochs=3, num_samples=(IMAGES, CAPTIONS))
    with pytest.raises(ValueError, match=message):
        ContrastiveLoss(own, layout="both_ways")(*trained_on(embeddings(4, 3)), index=index, epoch=epoch)
    assert not own.has_learned
