"""iSogCLR with two sides: a table each, as for images and captions, against double loops from the equations."""

import copy

import gloo
import oracle
import pytest
import torch
from grid import assert_close, assert_tables_equal, embeddings, trained_on

from dystress_plugin import ContrastiveLoss
from dystress_plugin.diagnostics import temperature_summary
from dystress_plugin.recipes import METHODS
from dystress_plugin.temperature import Constant, CosineSchedule, Individual, WarmUp

IMAGES, CAPTIONS = 11, 17
TABLES = ("tau", "log_s", "u", "visited")
WARMED = {"tau_init": 0.1, "tau_min": 0.05, "rho": 0.4}
SETTINGS = {
    "preset": {},
    "preset, released": {"released": True},
    "warmer": WARMED,
    "warmer, released": {**WARMED, "released": True},
    "warmer, the batch alone": {**WARMED, "gamma": 1.0, "beta": 1.0},
    "warmer, cosine": {**WARMED, "gradient": "cosine"},
}
PRESET = {"tau_init": 0.01, "tau_min": 0.005, "tau_max": 1.0, "rho": 6.0, "gamma": 0.8, "beta": 0.9, "clip": 5.0}

pytestmark = pytest.mark.filterwarnings("ignore:rho=6.0 is at least log")  # of the few images here


def captions_of(index, step):
    """One of the captions of every image, in numbers of their own."""
    return (index * 3 + torch.arange(len(index)) * step) % CAPTIONS


def batches(steps, images=6, *, duplicates=True, captions=True):
    """(views, index) of every step; sizes differ."""
    for step in steps:
        generator, number = torch.Generator().manual_seed(step), images - step % 3
        index = torch.randperm(IMAGES, generator=generator)[:number]
        if duplicates:
            index[-1] = index[0]
        views = trained_on(embeddings(number, 4, seed=step))
        yield views, (index, captions_of(index, step)) if captions else index


def train(loss, steps, **how):
    """What the steps leave: values and gradients."""
    left = []
    for views, index in batches(steps, **how):
        value = loss(*views, index=index)
        left += [value.detach(), *torch.autograd.grad(value, views)]
    return left


@pytest.mark.parametrize("captions", [True, False])
@pytest.mark.parametrize("layout", ["both_ways", "one_way"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_twelve_steps_equal_the_double_loop(settings, layout, captions):
    captions = captions and layout == "both_ways"
    own = {"gradient": "difference" if layout == "both_ways" or "released" in settings else "cosine"} | settings
    numbers = (IMAGES, CAPTIONS) if captions else IMAGES
    loss = ContrastiveLoss("isogclr", layout=layout, num_samples=numbers, **settings)
    preset = PRESET if layout == "both_ways" else {}
    lengths = [temperature.num_samples for temperature in loss.temperatures]
    assert lengths == ([IMAGES, CAPTIONS if captions else IMAGES] if layout == "both_ways" else [IMAGES])
    tables = oracle.Tables(*(oracle.Individual(length, **preset | own) for length in lengths))
    for views, index in batches(range(12), captions=captions):
        both = [own.tolist() for own in (index if captions else [index])]
        lists = [view.tolist() for view in views]

        def maps(row, _, both=both):
            return (oracle.constant(tables.tau(row, both)),) * 2

        expected = oracle.loss(lists, maps, "sogclr", running=tables.running(both), sides=layout)
        tables.update(both, lists, sides=layout)
        value = loss(*views, index=index)
        assert_close(value.detach(), expected.value, 1e-12, terms=1.0)
        assert_close(torch.stack(torch.autograd.grad(value, views)), expected.gradients, 1e-12)
        assert_tables_equal(loss, tables)


SPLIT = 2  # rows of the first rank; the second has the rest


def on_a_rank(rank):
    """Values, gradients and state that 12 steps leave, for each form."""
    left = []
    for released in (False, True):
        loss = two_sides(released, gather_distributed=True)
        steps = []
        for views, index in batches(range(12)):
            part = slice(SPLIT) if rank == 0 else slice(SPLIT, None)
            leaves = [view.detach()[part].requires_grad_() for view in views]
            value = loss(*leaves, index=tuple(own[part] for own in index))
            value.backward()
            steps.append((value.detach(), [leaf.grad for leaf in leaves]))
        left.append((steps, loss.state_dict()))
    return left


def two_sides(released, **how):
    numbers = (IMAGES, CAPTIONS)
    return ContrastiveLoss("isogclr", layout="both_ways", num_samples=numbers, released=released, **WARMED, **how)


def test_twelve_steps_on_two_ranks_are_those_of_one_process(tmp_path):
    ranks = gloo.run(on_a_rank, 2, tmp_path)
    for number, released in enumerate((False, True)):
        loss = two_sides(released)
        for step, (views, index) in enumerate(batches(range(12))):
            value = loss(*views, index=index)
            expected = torch.autograd.grad(value, views)
            found = [rank[number][0][step] for rank in ranks]
            assert_close(sum(own for own, _ in found) / 2, value.detach(), 1e-12, terms=1.0)
            for side, gradient in enumerate(expected):
                assert_close(torch.cat([own[side] for _, own in found]) / 2, gradient, 1e-12)
        for name, entry in loss.state_dict().items():
            first, second = (rank[number][1][name] for rank in ranks)
            assert torch.equal(first, second)
            assert_close(first.double(), entry.double(), 1e-12, terms=1.0)


class Released:
    """SogCLR_DRO_Loss of the bimodal code, line by line, without its 1e-10 and its bound b, which float64 can spare."""

    def __init__(self, rho, gamma, beta, eta, clip, low, high):
        self.rho, self.gamma, self.beta, self.eta, self.clip, self.low, self.high = (
            rho,
            gamma,
            beta,
            eta,
            clip,
            low,
            high,
        )
        self.tau, self.s, self.u = (torch.full((2, IMAGES), x, dtype=torch.float64) for x in (0.1, 0.0, 0.0))

    def __call__(self, z0, z1, index):
        e0, e1 = (torch.nn.functional.normalize(z, dim=1) for z in (z0, z1))
        total = 0.0
        for side, sim in enumerate((e0 @ e1.T, e1 @ e0.T)):
            n = len(sim) - 1
            d = sim - sim.diagonal()[:, None]
            x = (d / self.tau[side, index, None]).detach()
            e = x.exp()
            s = self.s[side, index] = (1 - self.gamma) * self.s[side, index] + self.gamma * e.sum(1) / n
            w = e / s[:, None]
            total = total + (w * d).sum(1).mean() / n
            grad = (s.log() + self.rho - (w * x).sum(1) / n).clamp(-self.clip, self.clip)
            u = self.u[side, index] = (1 - self.beta) * self.u[side, index] + self.beta * grad
            self.tau[side, index] = (self.tau[side, index] - self.eta * u).clamp(self.low, self.high)
        return total


def test_released_is_the_released_code():
    released = Released(0.7, 0.8, 0.9, 0.03, 5.0, 0.005, 1.0)
    loss = ContrastiveLoss("isogclr", layout="both_ways", num_samples=IMAGES, tau_init=0.1, rho=0.7, released=True)
    for views, index in batches(range(12), duplicates=False, captions=False):
        value, expected = loss(*views, index=index), released(*views, index)
        assert_close(value.detach(), expected.detach(), 1e-12, terms=1.0)
        assert_close(*(torch.stack(torch.autograd.grad(x, views)) for x in (value, expected)), 1e-12)
        for side, own in enumerate(loss.temperatures):
            assert_close(own.tau, released.tau[side], 1e-12)
            assert_close(own.u, released.u[side], 1e-12)
            assert_close(own.log_s[own.visited].exp(), released.s[side][own.visited], 1e-12)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_interrupted_after_six_steps_ends_as_if_it_had_not_been(tmp_path, released, dtype):
    def build():
        return ContrastiveLoss("isogclr", layout="both_ways", num_samples=(IMAGES, CAPTIONS), released=released)

    def run(loss, steps):
        left = []
        for views, index in batches(steps):
            leaves = [view.detach().to(dtype).requires_grad_() for view in views]
            value = loss(*leaves, index=index)
            left += [value.detach(), *torch.autograd.grad(value, leaves)]
        return left

    whole, first, second = build(), build(), build()
    expected, found = run(whole, range(12)), run(first, range(6))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    found += run(second, range(6, 12))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    state = second.state_dict()
    assert set(state) == {f"{side}.{name}" for side in ("temperature", "temperature_back") for name in TABLES}
    assert all(torch.equal(state[name], entry) for name, entry in whole.state_dict().items())


# How two sides come about


def test_the_bimodal_preset_is_that_of_the_name_both_ways_and_of_nothing_else():
    named = ContrastiveLoss("isogclr", layout="both_ways", num_samples=(IMAGES, CAPTIONS))
    assert [own.num_samples for own in named.temperatures] == [IMAGES, CAPTIONS]
    assert named.temperature is named.temperatures[0]
    for own in named.temperatures:
        assert {name: getattr(own, name) for name in PRESET} == PRESET
        assert own.eta == 0.03
    instance = ContrastiveLoss(Individual(IMAGES), layout="both_ways")
    plain = repr(Individual(IMAGES))
    assert [repr(own) for own in instance.temperatures] == [plain, plain]
    assert repr(ContrastiveLoss("isogclr", layout="one_way", num_samples=IMAGES).temperature) == plain
    assert METHODS["isogclr"].build_temperature(num_samples=IMAGES).rho == 0.4


def test_a_single_instance_has_its_tables_to_itself():
    given = Individual(IMAGES)
    loss = ContrastiveLoss(given, layout="both_ways")
    train(loss, range(2), captions=False)
    assert loss.temperature is given
    assert not torch.equal(loss.temperatures[0].tau, loss.temperatures[1].tau)


def test_a_pair_of_instances_is_what_a_name_with_two_lengths_builds():
    named = ContrastiveLoss("isogclr", layout="both_ways", num_samples=(IMAGES, CAPTIONS))
    pair = ContrastiveLoss((Individual(IMAGES, **PRESET), Individual(CAPTIONS, **PRESET)), layout="both_ways")
    assert pair.objective == "sogclr"
    for a, b in zip(train(pair, range(3)), train(named, range(3)), strict=True):
        assert torch.equal(a, b)


def test_a_pair_may_be_of_different_kinds():
    """Each way is then the one-way loss of its own temperature."""
    views = embeddings(5, 4)
    pair = ContrastiveLoss((Constant(0.1), CosineSchedule()), layout="both_ways")
    there, back = ContrastiveLoss(Constant(0.1), layout="one_way"), ContrastiveLoss(CosineSchedule(), layout="one_way")
    expected = (there(*views) + back(*views[::-1], epoch=30)) / 2
    assert_close(pair(*views, epoch=30), expected, 1e-13)
    with pytest.raises(ValueError, match="CosineSchedule needs the epoch"):
        pair(*views)


def test_a_side_that_learns_later_divides_by_its_batch_until_then():
    views, index = embeddings(5, 4), torch.arange(5)
    pair = ContrastiveLoss((Individual(5, tau_init=0.2), WarmUp(Individual(5, tau_init=0.2), 0.2)), layout="both_ways")
    both = ContrastiveLoss(Individual(5, tau_init=0.2), layout="both_ways")
    for step in range(2):  # one side, as both do, and the other without a running mean
        values = [loss(*trained_on(views), index=index, epoch=step) for loss in (pair, both)]
        assert torch.allclose(*values, rtol=1e-12) == (step == 0)
    assert [own.has_learned for own in pair.temperatures] == [True, False]


def test_a_state_of_one_table_loads_into_both_sides():
    """As versions before 0.2 had it."""
    before, loss = ContrastiveLoss(Individual(IMAGES)), ContrastiveLoss(Individual(IMAGES), layout="both_ways")
    train(before, range(2), captions=False)
    state = before.state_dict()
    kept = copy.deepcopy(state)
    loss.load_state_dict(state)
    assert state.keys() == kept.keys()
    for own in loss.temperatures:
        assert all(torch.equal(getattr(own, name), kept[f"temperature.{name}"]) for name in TABLES)


def test_diagnostics_take_a_pair_of_indices_and_see_both_tables():
    loss = ContrastiveLoss((Individual(IMAGES, 0.1), Individual(CAPTIONS, 0.3)), layout="both_ways")
    ((views, index),) = batches([0])
    pairs = loss.pairs(*views, index=index)
    assert pairs.positive_tau.tolist() == [0.1] * 6 + [0.3] * 6
    assert pairs.negative_tau.tolist() == [0.1] * 30 + [0.3] * 30
    assert temperature_summary(loss, *views, index=index, max_images=3)["tau_positive_mean"] == pytest.approx(0.2)


# Errors


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (None, ValueError, "Individual needs the sample numbers"),
        (torch.arange(4), ValueError, r"tables of 11 and 17 samples, .* index=\(index_0, index_1\)"),
        ((torch.arange(4),) * 3, ValueError, "index is a tuple of 3: a pair of tensors is for the two sides"),
        ((torch.arange(4), torch.arange(3)), ValueError, r"index has shape \(3,\), the batch needs \(4,\)"),
        ((torch.arange(4), torch.arange(4.0)), TypeError, "not torch.float32"),
        ((torch.arange(4), [0, 1, 2, 3]), TypeError, "int64 tensor of sample numbers, not list"),
        ((torch.arange(8, 12), torch.arange(4)), ValueError, "index runs from 8 to 11, but num_samples=11"),
        ((torch.arange(4), torch.arange(14, 18)), ValueError, "index runs from 14 to 17, but num_samples=17"),
    ],
)
def test_bad_index_raises_and_leaves_both_tables_alone(index, error, message):
    loss = ContrastiveLoss("isogclr", layout="both_ways", num_samples=(IMAGES, CAPTIONS))
    with pytest.raises(error, match=message):
        loss(*trained_on(embeddings(4, 3)), index=index)
    assert not any(own.visited.any() for own in loss.temperatures)


def test_a_pair_of_indices_is_for_two_sides():
    with pytest.raises(ValueError, match="this loss has 'views'"):
        ContrastiveLoss(Individual(5))(*embeddings(4, 3), index=(torch.arange(4), torch.arange(4)))


SAME = Individual(5)


@pytest.mark.parametrize(
    ("temperature", "settings", "error", "message"),
    [
        ((Individual(5),), {"layout": "both_ways"}, ValueError, "1 temperatures with layout='both_ways'"),
        ((Individual(5), Individual(5)), {}, ValueError, "2 temperatures with layout='views': a pair of them is for"),
        ((SAME, SAME), {"layout": "both_ways"}, ValueError, "The two sides have the same temperature"),
        ((Individual(5), "isogclr"), {"layout": "both_ways"}, TypeError, "temperature='isogclr' must be a method's"),
        ("isogclr", {"layout": "both_ways"}, TypeError, "Method 'isogclr' needs num_samples"),
        ("isogclr", {"num_samples": (5, 6)}, TypeError, r"num_samples=\(5, 6\) must be an int"),
        ("isogclr", {"layout": "both_ways", "num_samples": (5, 0)}, ValueError, "num_samples=0 must be at least 1"),
        (
            "isogclr",
            {"layout": "both_ways", "num_samples": (5, 6, 7)},
            TypeError,
            "num_samples=.5, 6, 7. must be an int",
        ),
        (Individual(5), {"layout": "both_ways", "queue_size": (8, 3)}, ValueError, "takes no queue"),
    ],
)
def test_bad_construction_raises_and_names_the_value(temperature, settings, error, message):
    with pytest.raises(error, match=message):
        ContrastiveLoss(temperature, **settings)


def test_released_has_the_gradient_of_the_released_code():
    with pytest.raises(ValueError, match="released=True is of the bimodal code, whose gradient is 'difference'"):
        Individual(5, gradient="cosine", released=True)
