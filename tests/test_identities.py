"""Methods that are the same at some setting: two paths through the package, one result."""

import math

import pytest
import torch
from grid import (
    CASES,
    DEVICE,
    EPOCH,
    KINDS,
    OBJECTIVES,
    Pair,
    assert_close,
    build,
    embeddings,
    indices,
    kept,
    tolerance,
)

from dystress_plugin import ContrastiveLoss
from dystress_plugin.embeddings import normalize
from dystress_plugin.engine import ENGINES, RowStats
from dystress_plugin.layout import NOTHING, Excluded
from dystress_plugin.objectives import OBJECTIVES as DEFINITIONS
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

every_objective = pytest.mark.parametrize("objective", OBJECTIVES)
every_engine = pytest.mark.parametrize("engine", ENGINES)
every_layout = pytest.mark.parametrize("layout", ["views", "queue", "one_way", "both_ways"])


def result(temperature, objective="ntxent", *, epoch=EPOCH, views=None, layout="views", **settings):
    """(value, gradients), of a batch of 7; every queue begins with the same keys."""
    torch.manual_seed(0)
    where = {"queue_size": (9, 4)} if layout == "queue" else {"layout": layout}
    loss = ContrastiveLoss(temperature, objective=objective, **where, **settings).to(DEVICE)
    leaves = [view.requires_grad_() for view in views or embeddings(7, 4)]
    value = loss(*leaves, index=indices(7), epoch=epoch)
    return value.detach(), torch.stack(torch.autograd.grad(value, leaves))


def assert_same(found, expected, exactly=1e-12):
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, exactly, terms=1.0)


def assert_differ(found, expected):
    """An identity says something only where its two sides can differ."""
    assert (found[1] - expected[1]).abs().max() > 1e-3 * expected[1].abs().max()


# Temperatures at the ends of their settings


@every_objective
@every_layout
@pytest.mark.parametrize(
    ("temperature", "constant"),
    [
        *[
            (lambda p=p, d=d: DySTreSS(0.2, 0.2, p, detach=d), 0.2)
            for p in ("cosine", "shifted", "cosine_constant", "exponential", "linear")
            for d in (True, False)
        ],
        (lambda: DySTreSS(0.1, 0.2, stabilise=EPOCH), 0.2),
        (lambda: DySTreSS(0.1, 0.2, stabilise=EPOCH / 3, detach=False), 0.2),
        (lambda: DySTreSS(0.2, 0.2, negative_range=(0.2, 0.2)), 0.2),
        (lambda: ModelAware(0.2, alpha=0), 0.2),
        (lambda: CosineSchedule(0.1, 0.3, period=1e9), 0.3),
        (lambda: CosineSchedule(0.2, 0.2, period=7), 0.2),
        (lambda: StepSchedule(0.1, 0.3, period=1e9), 0.3),
        (lambda: StepSchedule(0.2, 0.2, period=7), 0.2),
        (lambda: Learnable(0.2).double(), math.exp(torch.tensor(math.log(0.2)).item())),
        (lambda: Individual(50, tau_init=0.2), 0.2),
        (lambda: WarmUp(Constant(0.2), tau=0.2), 0.2),
    ],
)
def test_a_temperature_that_cannot_move_is_constant(temperature, constant, objective, layout):
    found = result(temperature(), objective, layout=layout)
    assert_same(found, result(Constant(constant), objective, layout=layout))
    assert_differ(found, result(Constant(1.1 * constant), objective, layout=layout))


@every_objective
@pytest.mark.parametrize("name", CASES)
def test_warm_up_starts_as_constant_and_ends_as_the_temperature(name, objective):
    start = result(WarmUp(build(name), tau=0.3, epochs=EPOCH), objective, epoch=0)
    assert_same(start, result(Constant(0.3), objective), tolerance(name))
    for epochs in (EPOCH, EPOCH / 2):
        end = result(WarmUp(build(name), tau=0.3, epochs=epochs), objective)
        assert_same(end, result(build(name), objective), tolerance(name))


@pytest.mark.parametrize("name", ["isogclr", "isogclr-difference"])
def test_tables_after_a_warm_up_are_those_of_the_temperature_itself(name):
    warmed, plain = WarmUp(build(name), epochs=EPOCH), build(name)
    losses = [ContrastiveLoss(temperature, objective="sogclr") for temperature in (warmed, plain)]
    for seed in range(3):
        for loss in losses:
            loss(*embeddings(7, 4, seed=seed), index=indices(7), epoch=EPOCH)
    for table in ("tau", "log_s", "u"):
        assert_close(getattr(warmed.temperature, table), getattr(plain, table), 1e-12)


@every_objective
def test_temperature_free_is_not_any_constant_but_tends_to_a_half_near_orthogonality(objective):
    z0 = torch.eye(8, dtype=torch.float64, device=DEVICE) + 1e-5
    views = [z0[:4] + 1e-6 * z0[4:], z0[4:] + 1e-6 * z0[:4]]
    found, half = (result_of(t, objective, views) for t in (TemperatureFree(), Constant(0.5)))
    assert_same(found, half, 1e-8)
    assert_differ(result(TemperatureFree(), objective), result(Constant(0.5), objective))


def result_of(temperature, objective, views):
    leaves = [view.clone().requires_grad_() for view in views]
    value = ContrastiveLoss(temperature, objective=objective)(*leaves)
    return value.detach(), torch.stack(torch.autograd.grad(value, leaves))


# Objectives


@every_layout
@pytest.mark.parametrize("name", KINDS)
def test_macl_has_the_gradient_of_dcl_at_the_same_temperature(name, layout):
    (value, macl), (_, dcl) = (result(build(name), objective, layout=layout) for objective in ("macl", "dcl"))
    assert_close(macl, dcl, tolerance(name))
    assert value > 1  # while the value is another: V log(1/p) exceeds its limit


@pytest.mark.parametrize("engine", ["dense", "blockwise"])
@pytest.mark.parametrize("name", ["constant", "dystress-cosine-live", "dystress-two-ranges"])
def test_the_dual_gradient_is_dcls_by_the_softened_share_of_the_negatives_of_every_anchor(name, engine):
    views, maps = embeddings(5, 4, views=6), build(name).prepare(None)
    for anchor in range(5):  # each alone with hard negatives, so that the mean over anchors hides nothing
        gradients = {}
        leaves = [view[anchor : anchor + 1].clone().requires_grad_() for view in views]
        for objective in ("dual", "dcl"):
            loss = ContrastiveLoss(build(name), objective=objective, layout="one_way", engine=engine)
            gradients[objective] = torch.stack(torch.autograd.grad(loss(*leaves), leaves))
        first, positive, *hard = (normalize(leaf.detach()) for leaf in leaves)
        up = (maps.positive.logit(first @ positive.T) / 10).exp()
        down = sum((maps.negative.logit(first @ other.T) / 10).exp() for other in hard)
        assert_close(gradients["dual"], down / (up + down) * gradients["dcl"], 1e-12)


@every_layout
def test_dual_over_a_ratio_of_one_has_the_gradient_of_ntxent(layout):
    found = result(DySTreSS(0.1, 0.2), "dual", layout=layout, ratio=1.0)
    expected = result(DySTreSS(0.1, 0.2), "ntxent", layout=layout)
    assert_same(found, expected)


@every_layout
def test_model_aware_without_awareness_has_the_gradient_of_dcl_at_its_tau(layout):
    _, found = result(ModelAware(0.2, alpha=0), "macl", layout=layout)
    assert_close(found, result(Constant(0.2), "dcl", layout=layout)[1], 1e-12)


@every_layout
def test_model_aware_has_the_gradient_of_dcl_at_its_own_temperature(layout):
    units = [normalize(view) for view in embeddings(7, 4)]
    tau = 0.1 * (1 + 0.5 * ((units[0] * units[1]).sum(1).mean().item() - 0.2))
    _, found = result(ModelAware(0.1, 0.5, 0.2), "macl", layout=layout)
    assert_close(found, result(Constant(tau), "dcl", layout=layout)[1], 1e-12)


@every_layout
@pytest.mark.parametrize("name", KINDS)
def test_dclw_tends_to_dcl_as_sigma_grows(name, layout):
    dcl = result(build(name), "dcl", layout=layout)
    errors = []
    for sigma in (1e3, 1e6, 1e15):
        weighted = result(build(name), "dclw", layout=layout, sigma=sigma)
        errors.append((weighted[1] - dcl[1]).abs().max().item())
    assert_same(weighted, dcl, tolerance(name))
    assert 500 < errors[0] / errors[1] < 2000  # it tends to it as 1 / sigma
    assert_differ(result(build(name), "dclw", layout=layout, sigma=0.1), dcl)


@pytest.mark.parametrize("name", CASES)
def test_dclw_is_dcl_where_all_positives_are_alike(name):
    z = embeddings(7, 4)[0]
    dclw, dcl = (result(build(name), objective, views=[z.clone(), z.clone()]) for objective in ("dclw", "dcl"))
    assert_same(dclw, dcl, tolerance(name))


@every_layout
@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_sogclr_gradient_is_tau_times_that_of_dcl_summed_over_views(tau, layout):
    _, found = result(Constant(tau), "sogclr", layout=layout)
    views = 1 if layout in ("queue", "one_way") else 2
    assert_close(found, tau * views * result(Constant(tau), "dcl", layout=layout)[1], 1e-12)


# Layouts


def by_rectangles(name, objective, rectangles, engine):
    """The loss of (anchors, positive cosines, candidates, excluded), one by one and with candidates of their own."""
    everything = torch.cat([positive for _, positive, _, _ in rectangles])
    index = indices(7).repeat(len(rectangles)) if build(name).needs_index else None
    batch = Batch(everything.detach(), index, EPOCH, len(rectangles), torch.mean)
    temperature = build(name).double()
    maps = temperature.prepare(batch)
    start, parts = 0, []
    for anchors, _, candidates, excluded in rectangles:
        rows = slice(start, start := start + len(anchors))
        part = ENGINES[engine](anchors, candidates, excluded, maps.negative.rows(rows), want_cosine=True, ratio=10.0)
        parts.append(part)
    negative, negative_cosine, soft_negative = (torch.cat(column) for column in zip(*parts, strict=True))
    logit, number = maps.positive.logit(everything), rectangles[0][2].shape[0]
    stats = RowStats(
        torch.logsumexp(logit, 1),
        negative,
        everything.mean(1),
        negative_cosine,
        number - rectangles[0][3].copies,
        soft_positive=torch.logsumexp(logit.detach() / 10, 1),
        soft_negative=soft_negative,
    )
    definition = DEFINITIONS[objective]
    rows = definition.rows(stats, definition.parameters)
    return rows.mean() * (len(rectangles) if definition.sum_over_views else 1)


def assert_rectangles_equal(pair, views, rectangles_of, engine):
    """`rectangles_of` makes the rectangles from the views at length 1."""
    keys = pair.loss.queue.read() if pair.loss.queue is not None else None
    value, gradients = pair.package(views, indices(7))
    leaves = [view.clone().requires_grad_() for view in views]
    units = [view / view.norm(dim=1, keepdim=True) for view in leaves]
    expected = by_rectangles(pair.name, pair.objective, rectangles_of(units, keys), engine)
    assert_close(value, expected.detach(), tolerance(pair.name), terms=1.0)
    assert_close(torch.stack(gradients), torch.stack(torch.autograd.grad(expected, leaves)), tolerance(pair.name))


@every_engine
@every_objective
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("name", KINDS)
def test_views_among_themselves_equal_one_rectangle_per_view(name, objective, views, engine):
    """The square of a batch with itself, of two views or of several, is a rectangle for each view's anchors."""

    def rectangles(units, _):
        everything, excluded = torch.cat(units), Excluded(batch=7, images=7, start=0, copies=views)
        return [
            (
                units[v],
                torch.stack([(units[v] * units[w]).sum(1) for w in range(views) if w != v], 1),
                everything,
                excluded,
            )
            for v in range(views)
        ]

    assert_rectangles_equal(Pair(name, objective, engine=engine), embeddings(7, 4, views=views), rectangles, engine)


@every_engine
@every_objective
@pytest.mark.parametrize("name", KINDS)
def test_a_queue_equals_a_rectangle_over_the_same_keys(name, objective, engine):
    def rectangles(units, keys):
        positive = (units[0] * units[1]).sum(1, keepdim=True)
        return [(units[0], positive, keys.double(), NOTHING)]

    pair = Pair(name, objective, engine=engine, queue_size=(9, 4))
    assert_rectangles_equal(pair, embeddings(7, 4), rectangles, engine)


@pytest.mark.parametrize("objective", ["ntxent", "macl", "sogclr", "dcl"])
@pytest.mark.parametrize("name", [name for name in KINDS if name != "macl"])  # whose temperature is the batch's
def test_a_queue_of_the_other_sides_rows_is_one_way(name, objective):
    """Image by image: its own row of the other side is the positive, the others are what a queue holds."""
    views, value = [view.float() for view in embeddings(7, 4)], 0.0  # as exact as a queue keeps its keys
    views = [normalize(view).double() for view in views]
    for i in range(7):
        loss = ContrastiveLoss(build(name), objective=objective, queue_size=(6, 4)).to(DEVICE).eval().double()
        loss.queue.keys.copy_(torch.cat([views[1][:i], views[1][i + 1 :]]))
        value += loss(views[0][i : i + 1], views[1][i : i + 1], index=indices(7)[i : i + 1], epoch=EPOCH) / 7
    one_way = ContrastiveLoss(build(name), objective=objective, layout="one_way").eval().double()
    assert_close(value.detach(), one_way(*views, index=indices(7), epoch=EPOCH).detach(), 1e-6, terms=1.0)


@every_objective
@pytest.mark.parametrize("name", CASES)
def test_both_ways_is_the_mean_of_both_one_ways(name, objective):
    there, back, both = (
        Pair(name, objective, layout=layout).with_history(first)
        for layout, first in (("one_way", 0), ("one_way", 1), ("both_ways", 0))
    )
    for pair in (there, back) if CASES[name].maps is None else ():  # as it is both ways
        pair.loss.temperature.gradient = "difference"
    z0, z1 = embeddings(7, 4)
    value, gradients = both.package([z0, z1], indices(7))
    there_value, there_gradients = there.package([z0, z1], indices(7))
    back_value, back_gradients = back.package([z1, z0], indices(7))
    share = 1.0 if objective == "sogclr" else 0.5  # which is a sum over the anchors of an image
    assert_close(value, share * (there_value + back_value), tolerance(name), terms=1.0)
    expected = share * (torch.stack(there_gradients) + torch.stack(back_gradients[::-1]))
    assert_close(torch.stack(gradients), expected, tolerance(name))
    if there.tables:  # one a side
        for own, alone in zip(kept(both.loss), (there, back), strict=True):
            (table,) = kept(alone.loss)
            assert all(torch.equal(a, b) for a, b in zip(own.buffers(), table.buffers(), strict=True))


@every_objective
@every_layout
@pytest.mark.parametrize("name", KINDS)
def test_order_of_images_does_not_matter(name, objective, layout):
    where = {"queue_size": (9, 4)} if layout == "queue" else {"layout": layout}
    order, results = indices(7).argsort(), []
    for rows in (torch.arange(7, device=DEVICE), order):
        torch.manual_seed(0)
        pair = Pair(name, objective, **where).with_history()
        value, gradients = pair.package([view[rows] for view in embeddings(7, 4)], indices(7)[rows])
        results.append((value, torch.stack(gradients)[:, rows.argsort()]))
    assert_same(results[1], results[0], tolerance(name))


@every_objective
@pytest.mark.parametrize("name", KINDS)
def test_order_of_views_does_not_matter(name, objective):
    views = embeddings(7, 4, views=3)
    first = Pair(name, objective).with_history().package(views, indices(7))
    second = Pair(name, objective).with_history().package(views[::-1], indices(7))
    assert_same((second[0], torch.stack(second[1][::-1])), (first[0], torch.stack(first[1])), tolerance(name))


# The learned temperature


def by_hand(objective, views, tau):
    """dL / dlog tau of two views: with L and P the logsumexps, minus the softmax means of the logits in them."""
    z = torch.cat([normalize(view) for view in views])
    logit = z @ z.T / tau
    images = len(views[0])
    own = torch.arange(2 * images, device=DEVICE)
    positive = logit[own, own.roll(images)]
    negative = logit.masked_fill((own[:, None] - own) % images == 0, -math.inf)
    mean = (torch.softmax(negative, 1) * logit).sum(1)
    distance = torch.logsumexp(negative, 1) - positive
    e = torch.exp(positive * tau / 0.5)
    return {
        "ntxent": torch.sigmoid(distance) * (positive - mean),
        "macl": positive - mean,
        "dcl": positive - mean,
        "dclw": (2 - e / e.mean()) * positive - mean,
    }[objective].mean()


@every_engine
@pytest.mark.parametrize("objective", ["ntxent", "macl", "dcl", "dclw"])
@pytest.mark.parametrize("tau", [0.05, 0.3])
def test_gradient_of_a_learned_temperature_is_minus_the_softmax_means_of_the_logits(objective, tau, engine):
    loss = ContrastiveLoss(Learnable(tau), objective=objective, engine=engine).to(DEVICE).double()
    views = embeddings(9, 5)
    (found,) = torch.autograd.grad(loss(*views), loss.parameters())
    assert_close(found, by_hand(objective, views, math.exp(loss.temperature.log_tau.item())), 1e-12, terms=1.0)


@every_engine
@every_layout
@pytest.mark.parametrize("objective", ["ntxent", "dcl", "dclw"])  # MACL's value is not what its gradient belongs to
@pytest.mark.parametrize("warm", [False, True])
def test_gradient_of_a_learned_temperature_is_the_numerical_derivative(objective, layout, engine, warm):
    temperature = Learnable(0.2).to(DEVICE).double()
    where = {"queue_size": (9, 5)} if layout == "queue" else {"layout": layout}
    wrapped = WarmUp(temperature, tau=0.5, epochs=2 * EPOCH) if warm else temperature
    loss = ContrastiveLoss(wrapped, objective=objective, engine=engine, **where).to(DEVICE).eval()
    views, step = embeddings(9, 5), 1e-5
    (found,) = torch.autograd.grad(loss(*views, epoch=EPOCH), temperature.log_tau)
    ends = []
    with torch.no_grad():
        for moved in (step, -2 * step):
            temperature.log_tau += moved
            ends.append(loss(*views, epoch=EPOCH).item())
    assert found.item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-7)


def test_sogclr_leaves_a_learned_temperature_alone():
    """Its weights are constants and its cosines bare, so there is nothing to learn a temperature from."""
    pair = Pair("learnable", "sogclr")
    pair.package(embeddings(5, 4), indices(5))
    assert not any(gradient.any() for gradient in pair.by_parameter)
