"""torch.func over the losses: every transform gives what torch.autograd does with the dense engine."""

import copy
from typing import NamedTuple

import pytest
import torch
from grid import EPOCH, KINDS, assert_close, build, embeddings
from torch import func

from dystress_plugin import ContrastiveLoss, tracing
from dystress_plugin.engine import blockwise
from dystress_plugin.temperature import Individual, Learnable, ModelAware

IMAGES, DIM = 5, 3
NAMES = [*KINDS, "dystress-exponential-live", "dystress-linear", "warm-up-learnable", "warm-up-tempfree"]
LAYOUTS = {
    "two-views": {},
    "queue": {"queue_size": (11, DIM)},
    "one-way": {"layout": "one_way"},
    "both-ways": {"layout": "both_ways"},
}
# Of torch about itself; and of the tiles, which has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated", "ignore:torch.func, forward-mode")


def loss_of(name, objective, layout, engine):
    torch.manual_seed(0)  # for the queue's keys
    return ContrastiveLoss(build(name), objective=objective, engine=engine, **LAYOUTS[layout]).double().eval()


def call(loss, z):
    return loss(*z, index=torch.arange(len(z[0])), epoch=EPOCH)


class Known(NamedTuple):
    """What torch.autograd finds at z, and v, a direction."""

    z: torch.Tensor
    v: torch.Tensor
    values: torch.Tensor  # at z and at v
    gradient: torch.Tensor
    hessian: torch.Tensor
    by_parameters: tuple[torch.Tensor, ...]


def known(loss):
    z = torch.stack(embeddings(IMAGES, DIM)).requires_grad_()
    v = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(1))
    value = call(loss, z)
    gradient, *rest = torch.autograd.grad(
        value, [z, *loss.parameters()], create_graph=True, allow_unused=True, materialize_grads=True
    )
    rows = [
        torch.autograd.grad(entry, z, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
        for entry in gradient.flatten()
    ]
    hessian = torch.stack(rows).view(*z.shape, *z.shape)
    values = torch.stack([value, call(loss, v)])
    return Known(*(x.detach() for x in (z, v, values, gradient, hessian)), tuple(x.detach() for x in rest))


def functionally(loss, by):
    """The gradient by the embeddings (1) or by the parameters (0) of a call without the module's own state."""
    parameters, buffers = dict(loss.named_parameters()), dict(loss.named_buffers())

    def value(parameters, z):
        keywords = {"index": torch.arange(IMAGES), "epoch": EPOCH}
        return func.functional_call(loss, (parameters, buffers), tuple(z), keywords)

    return lambda z: func.grad(value, argnums=by)(parameters, z)


TRANSFORMS = {
    "grad": lambda f, loss, k: (func.grad(f)(k.z), k.gradient),
    "vjp": lambda f, loss, k: (func.vjp(f, k.z)[1](k.values[0])[0], k.gradient * k.values[0]),
    "jvp": lambda f, loss, k: (func.jvp(f, (k.z,), (k.v,))[1], (k.gradient * k.v).sum()),
    "jacrev": lambda f, loss, k: (func.jacrev(f)(k.z), k.gradient),
    "jacfwd": lambda f, loss, k: (func.jacfwd(f)(k.z), k.gradient),
    "hessian": lambda f, loss, k: (func.hessian(f)(k.z), k.hessian),
    "jacrev-twice": lambda f, loss, k: (func.jacrev(func.jacrev(f))(k.z), k.hessian),
    "jvp-of-grad": lambda f, loss, k: (
        func.jvp(func.grad(f), (k.z,), (k.v,))[1],
        (k.hessian * k.v).sum((3, 4, 5)),
    ),
    "vmap": lambda f, loss, k: (func.vmap(f)(torch.stack([k.z, k.v])), k.values),
    "vmap-of-grad": lambda f, loss, k: (func.vmap(func.grad(f))(torch.stack([k.z, k.v]))[0], k.gradient),
    "functional-call": lambda f, loss, k: (functionally(loss, 1)(k.z), k.gradient),
    "by-parameters": lambda f, loss, k: (
        torch.stack([*functionally(loss, 0)(k.z).values(), torch.zeros(())]),
        torch.stack([*k.by_parameters, torch.zeros(())]),
    ),
}


@pytest.mark.parametrize(
    ("name", "layout", "objective"),
    [
        *((name, layout, "sogclr" if "isogclr" in name else "ntxent") for name in NAMES for layout in LAYOUTS),
        *(("dystress-cosine", "two-views", objective) for objective in ("macl", "sogclr", "dcl", "dclw")),
        *(("isogclr", "both-ways", objective) for objective in ("ntxent", "dclw")),
    ],
)
def test_every_transform_is_what_autograd_finds(name, layout, objective):
    expected = known(loss_of(name, objective, layout, "dense"))
    loss = loss_of(name, objective, layout, "auto" if layout == "two-views" else "blockwise")
    for transform in TRANSFORMS.values():
        found, right = transform(lambda z: call(loss, z), loss, expected)
        assert_close(found, right, 1e-9 if name == "tempfree" else 1e-11, terms=1e-2)


@pytest.mark.skipif(not tracing.HAS_OPERATIONS, reason="this release of torch cannot linearise a sum with a number")
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # of torch about its own tracing
@pytest.mark.parametrize("name", ["dystress-cosine", "isogclr"])
def test_a_linearised_loss_is_its_derivative(name):
    loss = loss_of(name, "ntxent", "two-views", "auto")
    expected = known(loss)
    value, derivative = func.linearize(lambda z: call(loss, z), expected.z)
    assert_close(value, expected.values[0], 1e-12)
    assert_close(derivative(expected.v), (expected.gradient * expected.v).sum(), 1e-11)


def test_an_example_that_ends_leaves_nothing_of_its_transform_behind():
    loss = ContrastiveLoss("dystress")
    z = torch.stack(embeddings(23, DIM))  # of a size that no other test has
    inside = func.grad(lambda z: loss(*z))(z)
    leaf = z.clone().requires_grad_()
    (outside,) = torch.autograd.grad(loss(*leaf), leaf)
    assert_close(inside, outside, 1e-12)
    assert_close(func.vmap(lambda z: loss(*z))(torch.stack([z, z]))[1], loss(*z), 1e-14)


# State


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, z: func.vmap(f)(torch.stack([z, z])),
        lambda f, z: func.grad(f)(z),
        lambda f, z: func.jvp(f, (z,), (z,)),
        lambda f, z: func.jacfwd(f)(z),
    ],
    ids=["vmap", "grad", "jvp", "jacfwd"],
)
@pytest.mark.parametrize(
    "build_loss",
    [
        lambda: ContrastiveLoss("simclr", queue_size=(7, DIM)),
        lambda: ContrastiveLoss("isogclr", num_samples=9, rho=0.1),
    ],
    ids=["queue", "tables"],
)
def test_state_that_would_change_is_an_error_that_says_what_to_do(build_loss, transform):
    loss = build_loss()
    before = copy.deepcopy(loss.state_dict())
    with pytest.raises(ValueError, match=r"its queue or its tables: call loss\.eval\(\)"):
        transform(lambda z: call(loss, z), torch.stack(embeddings(IMAGES, DIM)))
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())


def test_state_that_is_handed_over_changes_as_in_a_step():
    loss = ContrastiveLoss(Individual(9, rho=0.1)).double()
    z, state = torch.stack(embeddings(IMAGES, DIM)), {k: v.clone() for k, v in loss.named_buffers()}

    def value(z, state):
        return func.functional_call(loss, state, tuple(z), {"index": torch.arange(IMAGES)}), state

    gradient, state = func.grad(value, has_aux=True)(z, state)
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(call(loss, leaf), leaf)
    assert_close(gradient, expected, 1e-12)
    for key, table in loss.named_buffers():
        assert_close(state[key], table, 1e-12)


@pytest.mark.parametrize("tau", [0.001, 5.0])
def test_a_learned_temperature_out_of_its_range_is_held_there_and_gets_its_gradient(tau):
    loss = ContrastiveLoss(Learnable()).double()
    z = torch.stack(embeddings(IMAGES, DIM))
    loss.temperature.log_tau.data.fill_(tau).log_()
    outside = loss.temperature.log_tau.item()
    gradient, value = func.grad_and_value(lambda p: func.functional_call(loss, p, tuple(z)))(
        {k: p.detach().clone() for k, p in loss.named_parameters()}
    )
    assert loss.temperature.log_tau.item() == outside  # torch.func changes nothing
    expected = call(loss, z)
    assert_close(value, expected, 1e-12)
    assert_close(gradient["temperature.log_tau"], torch.autograd.grad(expected, loss.temperature.log_tau)[0], 1e-12)


def test_a_floor_is_held_without_a_look_at_the_values():
    z = torch.stack(embeddings(IMAGES, DIM))
    z[1] = -z[0]
    loss = ContrastiveLoss(ModelAware(0.1, alpha=2.0))
    values = func.vmap(lambda z: loss(*z))(torch.stack([z, z]))
    with pytest.warns(UserWarning, match="MACL's temperature"):  # of a batch that is learned from
        assert_close(values, loss(*z.requires_grad_()).repeat(2), 1e-12)


# Size


@pytest.mark.parametrize("engine", ["auto", "blockwise"])
def test_a_matrix_too_large_to_hold_is_an_error_that_says_what_to_do(engine, monkeypatch):
    monkeypatch.setattr(blockwise, "WHOLE_ENTRIES", 20**2)
    monkeypatch.setattr("dystress_plugin.engine.dense.ENTRIES", 10**2)
    loss = ContrastiveLoss("dystress", engine=engine)
    assert func.grad(lambda z: loss(*z))(torch.stack(embeddings(10, DIM))).any()
    with pytest.raises(ValueError, match=r"484 entries are more than 400: .* engine='dense'"):
        func.grad(lambda z: loss(*z))(torch.stack(embeddings(11, DIM)))


def test_tiles_that_are_asked_for_say_that_they_are_not_made():
    z = torch.stack(embeddings(IMAGES, DIM))
    with pytest.warns(
        UserWarning, match="need the whole matrix: engine='blockwise' computes it as engine='dense' does"
    ):
        func.grad(lambda z: ContrastiveLoss("dystress", engine="blockwise")(*z))(z)
