"""Derivatives of every order and by every route of torch.autograd: in tiles as in the dense engine."""

from functools import partial

import pytest
import torch
from grid import CASES, EPOCH, KINDS, OBJECTIVES, SAMPLES, assert_close, build, embeddings
from torch.autograd import forward_ad, functional

from dystress_plugin import ContrastiveLoss
from dystress_plugin.embeddings import normalize
from dystress_plugin.engine import ENGINES, blockwise, tiles
from dystress_plugin.layout import Excluded

DIM, IMAGES = 4, 9
LAYOUTS = {
    "two-views": {},
    "queue": {"queue_size": (21, DIM)},
    "one-way": {"layout": "one_way"},
    "both-ways": {"layout": "both_ways"},
}
GRID = {
    **{(name, layout): ("ntxent", "sogclr") for name in KINDS for layout in LAYOUTS},
    **{
        (name, "two-views"): OBJECTIVES
        for name in ("dystress-cosine-live", "isogclr", "learnable", "warm-up-learnable")
    },
    **{(name, "two-views"): ("ntxent",) for name in CASES if name not in KINDS},
}


@pytest.fixture
def few_rows_at_a_time(monkeypatch):
    monkeypatch.setitem(tiles.TILE_ENTRIES, "cpu", 50)


def loss_of(name, objective, layout, engine):
    torch.manual_seed(0)  # for the queue's keys
    loss = ContrastiveLoss(build(name), objective=objective, engine=engine, **LAYOUTS[layout])
    return loss.double().eval()


def call(loss, z):
    return loss(*z, index=torch.arange(len(z[0])) % SAMPLES, epoch=EPOCH)


def derivatives(loss, orders, z):
    """The first derivatives, and each next one of the sum of the last, weighted with random numbers."""
    inputs = [z, *loss.parameters()]
    random = torch.Generator().manual_seed(1)
    scalar, found = call(loss, z), []
    for _ in range(orders):
        if not scalar.requires_grad:  # of an objective that is linear in what is left
            break
        gradients = torch.autograd.grad(scalar, inputs, create_graph=True, allow_unused=True, materialize_grads=True)
        scalar = sum((g * torch.randn(g.shape, dtype=g.dtype, generator=random)).sum() for g in gradients)
        found += [g.detach() for g in gradients]
    return found


@pytest.mark.parametrize(("name", "layout", "objective"), [(*cell, o) for cell, os in GRID.items() for o in os])
def test_three_orders_of_tiles_are_those_of_the_matrix(name, layout, objective, few_rows_at_a_time):
    z = torch.stack(embeddings(IMAGES, DIM)).requires_grad_()
    expected, found = (derivatives(loss_of(name, objective, layout, e), 3, z) for e in ("dense", "blockwise"))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-11, terms=1e-3)


@pytest.mark.parametrize("keep_bytes", [0, 2**30])
@pytest.mark.parametrize("name", ["constant", "dystress-shifted-live", "tempfree", "learnable"])
@pytest.mark.parametrize("rectangle", [False, True])
def test_gradgradcheck(name, rectangle, keep_bytes, few_rows_at_a_time):
    """By the embeddings, by the parameter, and by what arrives from above, against differences of numbers."""
    temperature = build(name).double()
    anchors = torch.stack(embeddings(3, 2)).flatten(0, 1)
    excluded = Excluded(batch=3, images=3, start=0, copies=2)

    def statistics(anchors, candidates, *_):
        map_ = temperature.prepare(None if name != "learnable" else _Cosines(anchors)).negative
        others = candidates if rectangle else None
        found = blockwise.negative_stats(
            anchors, others, excluded, map_, want_cosine=False, tile=4, keep_bytes=keep_bytes
        )
        return found.negative

    inputs = normalize(anchors).requires_grad_(), normalize(anchors.flip(0)).requires_grad_(), *temperature.parameters()
    assert torch.autograd.gradgradcheck(statistics, inputs, atol=1e-6)


class _Cosines:
    """As much of a batch as a learned temperature reads."""

    def __init__(self, like):
        self.positive_cosine = like


def hessian_of(loss, z):
    z = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(call(loss, z), z, create_graph=True)
    return torch.stack([torch.autograd.grad(entry, z, retain_graph=True)[0] for entry in gradient.flatten()])


def by_backward(f, z, v):
    z = z.clone().requires_grad_()
    f(z).backward(create_graph=True)
    gradient, z.grad = z.grad, None
    (gradient * v).sum().backward()
    return z.grad


def by_what_arrives(f, z, v):
    """The derivative of a gradient in what it is multiplied with, transposed."""
    z, above = z.clone().requires_grad_(), torch.tensor(2.0, dtype=z.dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(f(z), z, above, create_graph=True)
    return torch.autograd.grad((gradient * v).sum(), above)[0]


def by_tangent(f, z, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(z, v))).tangent


# A route, and whether it ends in H v or in the derivative in direction v.
ROUTES = {
    "vhp": (lambda f, z, v: functional.vhp(f, z, v)[1], True),
    "hvp": (lambda f, z, v: functional.hvp(f, z, v)[1], True),
    "backward": (by_backward, True),
    "hessian": (lambda f, z, v: (functional.hessian(f, z) * v).sum((3, 4, 5)), True),
    "hessian-vectorized": (lambda f, z, v: (functional.hessian(f, z, vectorize=True) * v).sum((3, 4, 5)), True),
    "hessian-forward": (
        lambda f, z, v: (functional.hessian(f, z, vectorize=True, outer_jacobian_strategy="forward-mode") * v).sum(
            (3, 4, 5)
        ),
        True,
    ),
    "jacobian-vectorized": (lambda f, z, v: (functional.jacobian(f, z, vectorize=True) * v).sum(), False),
    "jacobian-forward": (
        lambda f, z, v: (functional.jacobian(f, z, vectorize=True, strategy="forward-mode") * v).sum(),
        False,
    ),
    "what-arrives": (by_what_arrives, False),
    "jvp": (lambda f, z, v: functional.jvp(f, z, v)[1], False),
    "tangent": (by_tangent, False),
}


# Of torch about itself, and of the tiles, once.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated", "ignore:Using backward.. with create_graph=True")
@pytest.mark.filterwarnings("ignore:torch.func, forward-mode")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["dystress-cosine", "isogclr", "learnable"])
def test_every_route_gives_the_same_number(name, layout, route, few_rows_at_a_time):
    z = torch.stack(embeddings(5, DIM))
    v = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(2))
    dense, tiled = (loss_of(name, "ntxent", layout, engine) for engine in ("dense", "blockwise"))
    derive, twice = ROUTES[route]
    if twice:
        expected = (hessian_of(dense, z).view(*z.shape, *z.shape) * v).sum((3, 4, 5))
    else:
        expected = (derivatives(dense, 1, z.clone().requires_grad_())[0] * v).sum()
    assert_close(derive(partial(call, tiled), z, v), expected, 1e-11)


@pytest.mark.parametrize("name", ["dystress-cosine", "isogclr", "macl", "learnable"])
def test_the_default_engine_beyond_the_dense_one_is_right_too(name):
    z = torch.stack(embeddings(140, 8))
    v = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(2))
    expected, found = (
        functional.vhp(partial(call, ContrastiveLoss(build(name), engine=e).double().eval()), z, v)
        for e in ("dense", "auto")
    )
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-11)


@pytest.mark.parametrize("name", ["dystress-cosine", "isogclr", "learnable"])
def test_a_gradient_that_can_be_differentiated_is_the_gradient_to_the_bit(name):
    z = torch.stack(embeddings(150, 8)).float().requires_grad_()
    loss = ContrastiveLoss(build(name), engine="blockwise").eval()
    inputs = [z, *loss.parameters()]
    plain = torch.autograd.grad(call(loss, z), inputs)
    again = torch.autograd.grad(call(loss, z), inputs, create_graph=True)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_what_a_second_derivative_saves_is_linear_in_the_batch():
    def saved(images):
        z, sizes = torch.stack(embeddings(images, 16)).float().requires_grad_(), []
        loss = ContrastiveLoss("dystress", engine="in-tiles-anew")
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            torch.autograd.grad(call(loss, z), z, create_graph=True)
        return sum(sizes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENGINES, "in-tiles-anew", partial(blockwise.negative_stats, keep_bytes=0))
        assert 0 < saved(2048) <= 8.1 * saved(256)


# The length of the rows


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_units_have_a_second_and_a_third_derivative(scale):
    z = (scale * embeddings(3, 3)[0]).requires_grad_()
    options = {"eps": 1e-6 * scale, "atol": 1e-4 / scale**2, "rtol": 1e-4}
    assert torch.autograd.gradgradcheck(normalize, z, **options)

    def gradient(z):
        return torch.autograd.grad((normalize(z) ** 3).sum(), z, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(gradient, z, eps=1e-5 * scale, atol=1e-3 / scale**3, rtol=1e-3)


def test_zero_and_short_rows_have_no_derivative_of_any_order():
    z = embeddings(4, 3)[0]
    z[1], z[2] = 0, torch.finfo(z.dtype).tiny
    z.requires_grad_()
    derivative = (normalize(z) ** 3).sum()
    for _ in range(3):
        (derivative,) = torch.autograd.grad(derivative.sum(), z, create_graph=True)
        assert derivative.isfinite().all()
        assert not derivative[1:3].any()
        assert derivative[[0, 3]].all()


def test_units_by_plain_operations_are_the_units():
    z = embeddings(5, 3)[0]
    z[1], z[2], z[3] = 0, torch.finfo(z.dtype).tiny, z[3] * 1e200
    plain, (gradient,) = torch.func.vjp(normalize, z)[0], torch.func.vjp(normalize, z)[1](torch.ones_like(z))
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(normalize(leaf).sum(), leaf)
    assert_close(plain, normalize(z), 1e-15)
    assert_close(gradient, expected, 1e-14)
