"""TempNet, against its network and its losses as the paper's code writes them, and on ranks as in one process."""

import copy

import gloo
import oracle
import pytest
import torch
from grid import DEVICE, OBJECTIVES, assert_close, embeddings, trained_on
from torch import distributed as dist
from torch.nn import functional as F

from dystress_plugin import ContrastiveLoss
from dystress_plugin.metrics import temperature_summary
from dystress_plugin.temperature import TempNet, WarmUp

DIM, IMAGES, CAPTIONS = 4, 11, 17


def network(net, e, drop=False):
    """tau of every embedding, as bimodal TempNet's code computes it; of a copy of the parameters, by name."""
    x = torch.sigmoid(e @ net["transform.weight"].T + net["transform.bias"])
    x = F.dropout(x, 0.5) if drop else x
    p = x @ (net["prototypes"] / net["prototypes"].norm(dim=1, keepdim=True)).T
    w = torch.softmax(p / torch.exp(net["scaler"]), dim=1)
    r = ((w - 1 / 256) * torch.sigmoid(p)) @ net["head.weight"].T + net["head.bias"]
    return 0.005 + (0.05 - 0.005) * torch.sigmoid(r)


def parameters_of(temperature):
    return {name: p.detach().clone().requires_grad_() for name, p in temperature.named_parameters()}


def build(seed=0, **settings):
    torch.manual_seed(seed)
    return TempNet(DIM, **settings)


def units(views):
    return [F.normalize(view, dim=1) for view in views]


def test_it_has_as_many_parameters_as_the_papers_and_starts_in_the_middle():
    torch.manual_seed(0)
    net = TempNet(256)
    assert sum(p.numel() for p in net.parameters()) == 131_586
    loss = ContrastiveLoss(net, layout="both_ways")
    tau = loss.pairs(torch.randn(64, 256), torch.randn(64, 256)).positive_tau
    assert tau.min() > 0.027
    assert tau.max() < 0.033


# Training


class Reference:
    """A side of iSogCLR_TempNet_Loss: sums over the batch, in plain exponentials, with a mean from the first visit."""

    def __init__(self, temperature, samples, rho, gamma):
        self.net, self.rho, self.gamma = parameters_of(temperature), rho, gamma
        self.s = torch.full((samples,), torch.nan, dtype=torch.float64)

    def __call__(self, sim, e, index):
        b = len(sim)
        tau = network(self.net, e.detach(), drop=True).flatten()
        h = sim - sim.diagonal()[:, None]
        others = (~torch.eye(b, dtype=torch.bool)).double()
        exponential = torch.exp(h.detach() / tau.detach()[:, None]) * others
        g = exponential.sum(1)
        new = (1 - self.gamma) * self.s[index] / 1.0 + self.gamma * g / (b - 1)
        s = self.s[index] = torch.where(self.s[index].isnan(), g / (b - 1), new)
        w = exponential / ((b - 1) * s)[:, None]
        features = (w * h).sum(1).mean()
        gradient = s.log() + self.rho - (w * h.detach() / tau.detach()[:, None]).sum(1)
        return features + (gradient.detach() * tau).mean()


def batches(steps):
    for step in steps:
        generator, number = torch.Generator().manual_seed(step), 6 - step % 3
        own = [torch.randperm(n, generator=generator)[:number] for n in (IMAGES, CAPTIONS)]
        yield step, trained_on(embeddings(number, DIM, seed=step)), tuple(own)


@pytest.mark.parametrize("gamma", [1.0, 0.6])
def test_twelve_steps_equal_the_papers_losses_with_dropout(gamma):
    own = {} if gamma == 1 else {"gamma": gamma, "num_samples": IMAGES}
    pair = (build(0, **own, rho=0.3), build(1, **own | ({"num_samples": CAPTIONS} if own else {}), rho=0.3))
    loss = ContrastiveLoss(pair, layout="both_ways").double()
    references = None
    for step, views, index in batches(range(12)):
        torch.manual_seed(step)
        value = loss(*views, index=index)
        found = torch.autograd.grad(value, [*views, *loss.parameters()])
        if references is None:  # its prototypes are there by now
            references = [Reference(t, n, 0.3, gamma) for t, n in zip(pair, (IMAGES, CAPTIONS), strict=True)]
        torch.manual_seed(step)
        e0, e1 = units(views)
        sims = (e0 @ e1.T, e0), (e1 @ e0.T, e1)
        total = sum(ref(sim, e, own) for ref, (sim, e), own in zip(references, sims, index, strict=True))
        theirs = [p for ref in references for p in ref.net.values()]
        expected = torch.autograd.grad(total, [*views, *theirs])
        assert_close(torch.stack(found[:2]), torch.stack(expected[:2]), 1e-12)
        for a, b in zip(found[2:], expected[2:], strict=True):
            assert_close(a, b, 1e-11, terms=1e-3)
        with torch.no_grad():
            for p, q, gradient in zip(loss.parameters(), theirs, expected[2:], strict=True):
                p -= 0.1 * gradient
                q -= 0.1 * gradient
        for temperature, reference in zip(pair, references if gamma < 1 else (), strict=False):
            seen = temperature.means.visited
            assert torch.equal(seen, ~reference.s.isnan())
            assert_close(temperature.means.log_s[seen].exp(), reference.s[seen], 1e-12)


LAYOUTS = {
    "two-views": {},
    "three-views": {},
    "queue": {"queue_size": (9, DIM)},
    "one-way": {"layout": "one_way"},
    "both-ways": {"layout": "both_ways"},
}


@pytest.mark.parametrize("engine", ["dense", "blockwise", "auto"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_value_and_gradient_equal_the_double_loop(objective, layout, engine):
    torch.manual_seed(0)
    where = LAYOUTS[layout]
    loss = ContrastiveLoss(build(), objective=objective, engine=engine, **where).to(DEVICE).double().eval()
    if layout == "both-ways":
        loss.temperatures[1].load_state_dict(build(1).state_dict())
    views = trained_on(embeddings(5, DIM, views=3 if layout == "three-views" else 2))
    nets = [parameters_of(own) for own in loss.temperatures]
    tau = torch.stack([network(nets[v % len(nets)], e)[:, 0] for v, e in enumerate(units(views))]).tolist()

    def maps(row, _):
        return (oracle.constant(tau[row.way][row.image]),) * 2

    keys = loss.queue.keys.tolist() if loss.queue is not None else None
    lists = [view.tolist() for view in views]
    expected = oracle.loss(lists, maps, objective, keys=keys, sides=where.get("layout", "views"))
    value = loss(*views)
    assert_close(value.detach(), expected.value, 1e-11, terms=1.0)
    assert_close(torch.stack(torch.autograd.grad(value, views)), expected.gradients, 1e-11, terms=1e-6)


# Where prototypes come from


def test_prototypes_start_as_the_other_sides_first_embeddings_once():
    loss, views = ContrastiveLoss(build(), layout="both_ways"), embeddings(6, DIM)
    drawn = build().prototypes.detach()
    loss(*views)  # of no encoder
    loss.eval()(*trained_on(views))
    assert not any(own.begun for own in loss.temperatures)
    loss.train()(*views)
    e0, e1 = units(views)
    for own, other in zip(loss.temperatures, (e1, e0), strict=True):
        assert own.begun
        assert_close(own.prototypes[:6].detach(), other, 1e-6)
        assert torch.equal(own.prototypes[6:], drawn[6:])
    state = copy.deepcopy(loss.state_dict())
    loss(*trained_on(embeddings(6, DIM, seed=1)))
    fresh = ContrastiveLoss(build(2), layout="both_ways")
    fresh.load_state_dict(state)
    fresh(*trained_on(embeddings(6, DIM, seed=1)))
    for again in (loss, fresh):
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), state.values(), strict=True))


@pytest.mark.parametrize(("layout", "side"), [("views", 0), ("one_way", 1)])
def test_one_network_starts_with_what_its_anchors_are_compared_with(layout, side):
    loss, views = ContrastiveLoss(build(), layout=layout), trained_on(embeddings(300, DIM))
    loss(*views)
    assert len(loss.temperatures) == 1
    assert_close(loss.temperature.prototypes.detach(), units(views)[side][:256].detach(), 1e-6)


# Ranks


SIZES = {"equal": (3, 3), "unequal": (2, 4)}


def train(settings, own, sizes):
    """Values, gradients and state of three steps, without dropout, whose masks differ between ranks."""
    loss = ContrastiveLoss(build(**settings), layout="both_ways", gather_distributed=True).double()
    for temperature in loss.temperatures:
        temperature.eval()
    torch.manual_seed(0)
    model = torch.nn.Linear(6, DIM, dtype=torch.float64)
    parameters, found = [*model.parameters(), *loss.parameters()], []
    for step in range(3):
        views, index = embeddings(sum(SIZES[sizes]), 6, seed=step), torch.arange(6) + step
        index[-1] = index[0]
        value = loss(*[model(view[own]) for view in views], index=index[own])
        gradients = list(torch.autograd.grad(value, parameters))
        if dist.is_initialized():
            for part in (value := value.detach(), *gradients):
                dist.all_reduce(part)
                part /= dist.get_world_size()
        with torch.no_grad():
            for p, gradient in zip(parameters, gradients, strict=True):
                p -= 0.1 * gradient
        found += [value.detach(), *gradients]
    return found, loss.state_dict()


RUNS = [(settings, sizes) for settings in ({}, {"gamma": 0.6, "num_samples": IMAGES}) for sizes in SIZES]


def on_a_rank(rank):
    slices = {sizes: (slice(0, n[0]), slice(n[0], None))[rank] for sizes, n in SIZES.items()}
    return [train(settings, slices[sizes], sizes) for settings, sizes in RUNS]


@pytest.mark.filterwarnings("ignore:rho=0.4 is at least")
def test_two_ranks_equal_one_process(tmp_path):
    ranks = gloo.run(on_a_rank, 2, tmp_path)
    for number, (settings, sizes) in enumerate(RUNS):
        expected, state = train(settings, slice(None), sizes)
        for found, its_state in (rank[number] for rank in ranks):
            for a, b in zip(found, expected, strict=True):
                assert_close(a, b, 1e-11, terms=1e-3)
            for name, value in state.items():
                assert_close(its_state[name].double(), value.double(), 1e-11)
                assert torch.equal(its_state[name], ranks[0][number][1][name])


# State


def test_a_run_interrupted_after_six_steps_ends_as_if_it_had_not_been(tmp_path):
    def loss_of(seed):
        pair = build(seed, gamma=0.6, num_samples=IMAGES), build(seed + 1, gamma=0.6, num_samples=CAPTIONS)
        return ContrastiveLoss(pair, layout="both_ways")

    def run(loss, steps):
        optimizer, left = torch.optim.SGD(loss.parameters(), lr=0.1), []
        for step, views, index in batches(steps):
            torch.manual_seed(step)
            optimizer.zero_grad()
            value = loss(*views, index=index)
            value.backward()
            optimizer.step()
            left += [value.detach(), *(view.grad for view in views)]
        return left

    whole, first, second = loss_of(0), loss_of(0), loss_of(5)
    expected, found = run(whole, range(12)), run(first, range(6))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    found += run(second, range(6, 12))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(second.state_dict()[name], entry) for name, entry in whole.state_dict().items())


def test_looking_at_a_batch_draws_nothing_and_sees_no_dropout():
    loss, views = ContrastiveLoss(build()), embeddings(6, DIM)
    loss(*trained_on(views))
    state = torch.get_rng_state()
    summaries = [temperature_summary(loss, *views)["tau_positive_mean"] for _ in range(2)]
    assert summaries[0] == summaries[1]
    assert torch.equal(torch.get_rng_state(), state)
    value = loss(*views)
    assert not torch.equal(torch.get_rng_state(), state)
    assert value != loss.eval()(*views)


def test_after_a_warm_up_alone_it_descends():
    loss, views = ContrastiveLoss(WarmUp(build(), 0.3, epochs=2)), trained_on(embeddings(6, DIM))
    before, after = (torch.autograd.grad(loss(*views, epoch=epoch), [*loss.parameters()]) for epoch in (1, 2))
    assert not any(gradient.any() for gradient in before)
    assert all(gradient.any() for gradient in after)


def test_it_needs_no_index_without_running_means():
    net = build(num_samples=7)  # as hosts give it that know the data
    assert (net.needs_index, net.num_samples, net.rho) == (False, None, 0.4)
    assert (build(gamma=0.8, num_samples=7).rho, build(gamma=0.8, num_samples=7).num_samples) == (7.0, 7)
    with pytest.raises(TypeError, match="keeps no table"):
        net.resize(3)
    assert repr(net).startswith("TempNet(\n  dim=4, rho=0.4, gamma=1.0, num_samples=None, tau_min=0.005, tau_max=0.05")


def test_a_rho_out_of_reach_is_warned_of():
    loss = ContrastiveLoss(build(rho=2.0))
    with pytest.warns(UserWarning, match=r"rho=2.0 is at least log\(n\) = 1.386 .* every temperature sinks to"):
        loss(*trained_on(embeddings(3, DIM)))
    loss(*trained_on(embeddings(3, DIM)))  # a warning would be an error


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim=0 must be an int of at least 1"),
        ({"rho": 0.0}, ValueError, "rho=0.0 must be above 0"),
        ({"gamma": 1.1}, ValueError, r"gamma=1.1 must lie in \[0, 1\]"),
        ({"gamma": 0.5}, ValueError, "gamma=0.5 keeps a running mean of every sample: give num_samples"),
        ({"gamma": 0.5, "num_samples": 3.5}, TypeError, "num_samples=3.5 must be an int"),
        ({"tau_min": 0.1}, ValueError, "tau_min=0.1 is above tau_max=0.05"),
    ],
)
def test_bad_settings_raise_and_name_the_value(settings, error, message):
    with pytest.raises(error, match=message):
        TempNet(**{"dim": DIM, **settings})


def test_embeddings_of_another_length_are_refused():
    with pytest.raises(ValueError, match="TempNet's dim=4 is not that of the embeddings, 5"):
        ContrastiveLoss(build())(*embeddings(3, 5))
