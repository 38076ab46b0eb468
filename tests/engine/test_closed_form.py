"""What the loss of a small batch gives as one node of the graph is what the other engines give."""

from dataclasses import dataclass

import pytest
import torch
from grid import assert_close, embeddings
from torch import Tensor

from dystress_plugin import ContrastiveLoss, recipes
from dystress_plugin.engine import closed_form
from dystress_plugin.objectives import OBJECTIVES, Objective
from dystress_plugin.temperature import Constant, DySTreSS
from dystress_plugin.temperature.base import Batch, Temperature
from dystress_plugin.temperature.maps import LogitMap, LogitMaps, Scaled

pytestmark = pytest.mark.filterwarnings("ignore:tau_max/tau_min")
SLOPED = [name for name, objective in OBJECTIVES.items() if objective.slope is not None]
TEMPERATURES = {
    "detached": DySTreSS(),
    "live": DySTreSS(detach=False),
    "two-maps": DySTreSS(negative_range=(0.2, 0.3)),
    "shifted-exponentials": DySTreSS(0.004, 0.008, detach=False),
    "constant": Constant(0.3),
}


@dataclass(frozen=True)
class RowMap(LogitMap):
    """A temperature an anchor, and all but `logit` and `bound` by default."""

    tau: Tensor

    def logit(self, cosine):
        return cosine / self.tau

    @property
    def bound(self):
        return 1 / 0.1

    @property
    def rowless(self):
        return False

    def rows(self, rows):
        return RowMap(self.tau[rows])


class OfRows(Temperature):
    """Keeps nothing but a count of the batches it has learned from."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def prepare(self, batch: Batch) -> LogitMaps:
        own = RowMap(0.3 + 0.2 * batch.positive_cosine)
        return LogitMaps(own, own)

    def update(self, stats, batch):
        self.seen.append((stats.negative.shape, batch.anchors.shape))


def losses(temperature, **settings):
    return [ContrastiveLoss(temperature, engine=engine, **settings) for engine in ("auto", "dense")]


def is_closed(value):
    return type(value.grad_fn).__name__ == "_ClosedFormBackward"


def value_and_gradients(loss, views, weight=1.0):
    views = [view.detach().clone().requires_grad_() for view in views]
    value = loss(*views, epoch=3.0)
    return value, torch.stack(torch.autograd.grad(value * weight, views))


def assert_alike(ours, plain, views, tolerance=1e-13):
    value, gradients = value_and_gradients(ours, views, weight=0.7)
    expected_value, expected = value_and_gradients(plain, views, weight=0.7)
    assert is_closed(value)
    assert not is_closed(expected_value)
    assert_close(value, expected_value, tolerance)
    assert_close(gradients, expected, tolerance)


@pytest.mark.parametrize("images", [2, 9])
@pytest.mark.parametrize("objective", SLOPED)
@pytest.mark.parametrize("name", TEMPERATURES)
def test_value_and_gradients_are_those_of_the_dense_engine(name, objective, images):
    assert_alike(*losses(TEMPERATURES[name], objective=objective), embeddings(images, 5))


@pytest.mark.parametrize("objective", SLOPED)
def test_a_slope_is_the_derivative_by_the_difference(objective):
    class Stats:
        positive = torch.zeros(61, dtype=torch.float64)
        negative = torch.linspace(-40, 60, 61, dtype=torch.float64).requires_grad_()

    own = OBJECTIVES[objective]
    (expected,) = torch.autograd.grad(own.row_loss(Stats).sum(), Stats.negative)
    assert_close(own.slope(Stats.negative.detach()), expected, 1e-14)


def test_a_map_that_differs_from_row_to_row_and_what_it_learns():
    ours, plain = losses(OfRows(), objective="ntxent")
    plain.temperature = OfRows()
    views = embeddings(6, 4)
    assert_alike(ours, plain, views)
    assert ours.temperature.seen == plain.temperature.seen == [((12,), (12, 4))]
    for loss in (ours, plain):
        loss.eval()(*views)
        loss.train()(*views)
        assert len(loss.temperature.seen) == 1


@pytest.mark.parametrize("name", [name for name in recipes.METHODS if not recipes.METHODS[name].queue])
def test_recipes_without_state_have_it(name):
    recipe = recipes.METHODS[name]
    own = recipe.sized({}, 10, 3)
    value = ContrastiveLoss(name, **own)(
        *(view.requires_grad_() for view in embeddings(5, 3)), index=torch.arange(5), epoch=0.0
    )
    loss = ContrastiveLoss(name, **own)
    stateless = not (list(loss.parameters()) or list(loss.buffers()))
    two_views = loss.layout == "views" and OBJECTIVES[loss.objective].slope is not None
    assert is_closed(value) == (stateless and two_views)


@pytest.mark.parametrize(
    ("settings", "views"),
    [
        ({"engine": "blockwise"}, 2),
        ({"layout": "both_ways"}, 2),
        ({"queue_size": (8, 3)}, 2),
        ({"positives": "mean"}, 3),
        ({}, 3),
        ({"objective": "dclw"}, 2),
        ({"objective": Objective("mine", lambda stats: stats.negative - stats.positive)}, 2),
    ],
)
def test_all_else_is_left_to_the_engines(settings, views):
    z = [view.requires_grad_() for view in embeddings(5, 3, views=views)]
    assert not is_closed(ContrastiveLoss("dystress", **settings)(*z))


def test_an_objective_of_ones_own_with_a_parameter():
    def loss(stats, *, power):
        return (stats.negative - stats.positive) ** power

    def slope(difference, *, power):
        return power * difference ** (power - 1)

    own = Objective("mine", loss, parameters={"power": 3.0}, slope=slope)
    assert_alike(*losses("dystress", objective=own, power=2.0), embeddings(5, 4))


@pytest.mark.parametrize("more", ["needs_negative_cosine", "sum_over_views"])
def test_an_objective_that_is_of_more_has_none(more):
    own = Objective("mine", OBJECTIVES["dcl"].row_loss, slope=torch.ones_like, **{more: True})
    ours, plain = losses("dystress", objective=own)
    views = embeddings(5, 4)
    (value, gradients), (expected, right) = (value_and_gradients(loss, views) for loss in (ours, plain))
    assert not is_closed(value)
    assert_close(value, expected, 1e-13)
    assert_close(gradients, right, 1e-13)


def test_a_temperature_that_reads_the_negatives_cosine_gets_it():
    class Reads(OfRows):
        needs_negative_cosine = True

        def update(self, stats, batch):
            self.seen.append(stats.negative_cosine.shape)

    loss = ContrastiveLoss(Reads(), objective="ntxent")
    loss(*(view.requires_grad_() for view in embeddings(5, 4)))
    assert loss.temperature.seen[-1] == (10,)


class Kept(Temperature):
    """A constant, kept in another place than among the parameters."""

    def __init__(self, place, tau=0.4):
        super().__init__()
        self.place, self.tau = place, torch.full((), tau, dtype=torch.float64, requires_grad=True)
        self.elsewhere = [self.tau]
        if place != "attribute":
            del self.tau

    def prepare(self, batch):
        tau = self.tau if self.place == "attribute" else self.elsewhere[0]
        own = Scaled(tau, least=0.1) if self.place == "list" else RowMap(tau.expand_as(batch.positive_cosine))
        return LogitMaps(own, own)


@pytest.mark.parametrize("place", ["attribute", "list", "map-without-parts"])
def test_what_is_trained_is_trained_wherever_it_is_kept(place):
    views, found = embeddings(5, 4), []
    for engine in ("auto", "dense"):
        temperature = Kept(place)
        value = ContrastiveLoss(temperature, objective="ntxent", engine=engine)(*(z.requires_grad_() for z in views))
        assert not is_closed(value)
        found.append(torch.autograd.grad(value, temperature.elsewhere[0])[0])
    assert found[1] != 0
    assert_close(found[0], found[1], 1e-12)


def test_a_parameter_that_was_put_in_another_place_is_seen():
    loss = ContrastiveLoss("clip", layout="views", tau=0.2)
    fast = loss.temperature.log_tau.detach().clone().requires_grad_()
    del loss.temperature.log_tau
    loss.temperature.log_tau = fast
    (gradient,) = torch.autograd.grad(loss(*embeddings(5, 4)), fast)
    assert gradient != 0


@pytest.mark.parametrize("images", [5, 200])
def test_keys_of_inference_mode_and_batches_of_it_before_a_training(images):
    loss = ContrastiveLoss("dystress")
    with torch.inference_mode():
        expected = loss(*embeddings(images, 4))
        key = embeddings(images, 4)[1]
    query = embeddings(images, 4)[0].requires_grad_()
    value = loss(query, key)
    value.backward()
    assert_close(value, expected, 1e-13)
    assert query.grad.isfinite().all()


def test_embeddings_may_be_written_into_after_the_loss():
    loss, found = ContrastiveLoss("dystress"), []
    for written in (False, True):
        leaf, key = embeddings(5, 4)[0].requires_grad_(), embeddings(5, 4)[1]
        query = leaf * 1
        value = loss(query, key)
        if written:
            query.zero_()
            key.zero_()
        found.append(torch.autograd.grad(value, leaf)[0])
    assert torch.equal(found[0], found[1])


@dataclass(frozen=True)
class SlopeOfItsLogit(LogitMap):
    """k exp(s - 1): its slope is its logit, and read after it was handed out."""

    k: float

    def logit(self, cosine):
        return self.k * (cosine - 1).exp()

    def logit_and_slope(self, scaled, work=None):
        logit = self.logit(scaled)
        return logit, lambda tile: tile.mul_(logit)

    def slope(self, cosine):
        return self.logit(cosine)

    @property
    def bound(self):
        return self.k


@pytest.mark.parametrize("k", [2.0, 70.0])
def test_a_map_may_read_its_logit_again_for_its_slope(k):
    class OfSuch(Temperature):
        def prepare(self, batch):
            return LogitMaps(SlopeOfItsLogit(k), SlopeOfItsLogit(k))

    assert_alike(*losses(OfSuch(), objective="ntxent"), embeddings(5, 4))


def test_a_map_without_a_gradient_gives_its_number():
    @dataclass(frozen=True)
    class Fixed(SlopeOfItsLogit):
        def logit(self, cosine):
            return self.k * cosine.detach()

        logit_and_slope = LogitMap.logit_and_slope
        slope = LogitMap.slope

    class OfSuch(Temperature):
        def prepare(self, batch):
            return LogitMaps(Fixed(3.0), Fixed(3.0))

    values = [loss(*embeddings(5, 4)) for loss in losses(OfSuch(), objective="ntxent")]
    assert_close(*values, 1e-13)


def test_prepare_may_differentiate():
    class Differentiates(Temperature):
        def prepare(self, batch):
            x = torch.full((), 0.3, requires_grad=True)
            (slope,) = torch.autograd.grad(x**2 / 2, x)
            own = Scaled(slope.double(), least=0.1)
            return LogitMaps(own, own)

    assert_alike(*losses(Differentiates(), objective="ntxent"), embeddings(5, 4))


def test_prepare_is_in_float32_under_autocast():
    class OfAProduct(Temperature):
        def prepare(self, batch):
            own = Scaled((batch.positive_cosine.T @ batch.positive_cosine).squeeze().abs() + 0.3, least=0.3)
            return LogitMaps(own, own)

    views, found = [view.float() for view in embeddings(5, 4)], []
    for loss in losses(OfAProduct(), objective="ntxent"):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(loss(*views))
    assert_close(*found, 1e-6)


def test_derivatives_are_of_the_temperature_that_the_batch_met():
    class Moves(Temperature):
        tau = 0.4

        def prepare(self, batch):
            own = Scaled(self.tau)
            return LogitMaps(own, own)

        def update(self, stats, batch):
            self.tau = self.tau / 2

    found = []
    for loss in (ContrastiveLoss(Moves(), objective="ntxent"), ContrastiveLoss(Constant(0.4), engine="dense")):
        views = [view.requires_grad_() for view in embeddings(5, 4)]
        gradient = torch.stack(torch.autograd.grad(loss(*views), views, create_graph=True))
        second = torch.stack(torch.autograd.grad(gradient.square().sum(), views))
        found.append(torch.cat([gradient.detach(), second]))
    assert_close(*found, 1e-13)


def test_a_backward_pass_under_autocast_is_in_float32():
    def of(autocast):
        views = [view.float().requires_grad_() for view in embeddings(20, 16)]
        value = ContrastiveLoss("dystress")(*views)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return torch.stack(torch.autograd.grad(value, views))

    assert torch.equal(of(True), of(False))


@pytest.mark.parametrize(
    "slope",
    [
        torch.sigmoid,
        lambda difference: 1.0,
        lambda difference: torch.ones(()),
        lambda difference: torch.ones_like(difference).float() * 1.1,
    ],
)
def test_a_slope_that_is_none_is_refused(slope):
    own = Objective("mine", OBJECTIVES["dcl"].row_loss, slope=slope)
    with pytest.raises(ValueError, match=r"Objective 'mine': at d = .* leave slope out"):
        ContrastiveLoss("dystress", objective=own)


@pytest.mark.parametrize(
    "row_loss",
    [
        lambda stats: stats.negative - 2 * stats.positive,
        lambda stats: stats.negative,
        lambda stats: stats.negative - stats.positive + stats.positive_cosine,
        lambda stats: (1 + stats.positive_cosine.detach()) * (stats.negative - stats.positive),
    ],
)
def test_a_slope_is_of_the_difference_alone(row_loss):
    with pytest.raises(ValueError, match="by L, P and the cosine"):
        ContrastiveLoss("dystress", objective=Objective("mine", row_loss, slope=torch.ones_like))


def test_a_loss_may_be_built_in_inference_mode():
    own = Objective("mine", OBJECTIVES["ntxent"].row_loss, slope=torch.sigmoid)
    with torch.inference_mode():
        loss = ContrastiveLoss("dystress", objective=own)
    assert_alike(loss, ContrastiveLoss("dystress", engine="dense"), embeddings(5, 4))


def test_large_batches_are_left_to_tiles():
    loss = ContrastiveLoss("dystress")
    small, large = (torch.randn(2, images, 3, generator=torch.Generator().manual_seed(0)) for images in (128, 129))
    assert is_closed(loss(*small.requires_grad_()))
    assert not is_closed(loss(*large.requires_grad_()))


@pytest.mark.parametrize("learned", [0, 1])
def test_a_view_without_gradient_and_derivatives_of_the_gradient(learned):
    found = []
    for loss in losses("dystress"):
        views = embeddings(5, 4)
        views[learned].requires_grad_()
        value = loss(*views)
        (gradient,) = torch.autograd.grad(value, views[learned], create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), views[learned])
        value = loss(*views)
        value.backward()
        assert views[1 - learned].grad is None
        found.append(torch.stack([gradient.detach(), second, views[learned].grad]))
    assert_close(found[0], found[1], 1e-13)


def test_one_view_computed_from_the_other():
    def of(loss):
        z = embeddings(5, 4)[0].requires_grad_()
        (gradient,) = torch.autograd.grad(loss(z, z.tanh()), z, create_graph=True)
        (second,) = torch.autograd.grad(gradient.pow(3).sum(), z)
        return torch.stack([gradient.detach(), second])

    assert_close(*(of(loss) for loss in losses("dystress")), 1e-13)


def test_batched_gradients():
    def of(loss):
        views = [view.requires_grad_() for view in embeddings(5, 4)]
        value = loss(*views)
        weights = torch.tensor([1.0, -2.0, 0.5], dtype=value.dtype)
        return torch.cat(torch.autograd.grad(value, views, weights, is_grads_batched=True))

    assert_close(*(of(loss) for loss in losses("dystress")), 1e-13)


def test_a_graph_that_is_kept_gives_the_same_again():
    views = [view.requires_grad_() for view in embeddings(5, 4)]
    value = ContrastiveLoss("macl")(*views)
    first, again = (torch.autograd.grad(value, views, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_under_autocast_is_computed_in_float32(dtype):
    views = [view.to(dtype) for view in embeddings(5, 4)]
    half, whole = ([view.to(kind).requires_grad_() for view in views] for kind in (dtype, torch.float32))
    loss = ContrastiveLoss("dystress")
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*half)
    expected = loss(*whole)
    assert is_closed(value)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    for ours, theirs in zip(torch.autograd.grad(value, half), torch.autograd.grad(expected, whole), strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs.to(dtype))


def test_the_number_is_the_same_with_and_without_a_gradient():
    loss, views = ContrastiveLoss("dystress"), embeddings(5, 4)
    with torch.no_grad():
        expected = loss(*views)
    assert torch.equal(loss(*(view.clone().requires_grad_() for view in views)), expected)


def test_it_stands_within_a_checkpoint():
    views = [view.requires_grad_() for view in embeddings(5, 4)]
    loss = ContrastiveLoss("dystress")
    kept = torch.autograd.grad(loss(*views), views)
    for reentrant in (False, True):
        value = torch.utils.checkpoint.checkpoint(loss, *views, use_reentrant=reentrant)
        value.backward()
        assert all(torch.equal(view.grad, expected) for view, expected in zip(views, kept, strict=True))
        for view in views:
            view.grad = None


def test_a_scaled_map_is_not_written_into():
    """What a map returns as a logit may be the tensor that it was given."""
    taus = torch.full((), 0.4, dtype=torch.float64)

    class OfATensor(Temperature):
        def prepare(self, batch):
            own = Scaled(taus, least=0.4)
            return LogitMaps(own, own)

    assert_alike(*losses(OfATensor(), objective="ntxent"), embeddings(4, 3))
    assert taus == 0.4


def test_what_it_takes():
    views = embeddings(4, 3)
    assert closed_form.takes(views)
    assert not closed_form.takes(embeddings(4, 3, views=3))
    assert not torch.func.vmap(lambda z: torch.tensor(closed_form.takes((z, z))))(views[0][None])
