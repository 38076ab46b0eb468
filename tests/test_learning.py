"""Which batches move a loss's queue and tables, and that a checkpoint, which computes it twice, moves them once."""

import copy
import pickle
from functools import partial

import pytest
import torch
from grid import EPOCH, embeddings, trained_on
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from dystress_plugin import ContrastiveLoss
from dystress_plugin.diagnostics import summaries
from dystress_plugin.metrics import temperature_summary
from dystress_plugin.temperature import Individual, Learnable, WarmUp

DIM, IMAGES, SAMPLES = 4, 6, 30
QUEUE = (17, DIM)
LOSSES = {
    "queue": lambda: ContrastiveLoss("dystress", queue_size=QUEUE),
    "queue in tiles": lambda: ContrastiveLoss("macl", queue_size=QUEUE, engine="blockwise"),
    "tables": lambda: ContrastiveLoss(Individual(SAMPLES)),
    "tables both ways": lambda: ContrastiveLoss(Individual(SAMPLES, gradient="difference"), layout="both_ways"),
    "tables and queue": lambda: ContrastiveLoss(WarmUp(Individual(SAMPLES), epochs=EPOCH), queue_size=QUEUE),
    "learned and queue": lambda: ContrastiveLoss(Learnable(0.2), queue_size=QUEUE),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def build(name):
    torch.manual_seed(0)
    return LOSSES[name]()


def index(seed=0):
    return torch.randint(SAMPLES, (IMAGES,), generator=torch.Generator().manual_seed(seed))


def value_of(loss, views, seed=0):
    return loss(*views, index=index(seed), epoch=EPOCH)


def value_of_views(loss, *views):
    return value_of(loss, views)


def moved(loss, before):
    """Names of the state that is another than before."""
    return {name for name, entry in loss.state_dict().items() if not torch.equal(entry, before[name])}


def state_of(loss):
    return copy.deepcopy(loss.state_dict())


MOVES = {
    "queue": {"queue.keys", "queue.position"},
    "tables": {f"temperature.{name}" for name in ("tau", "log_s", "u", "visited")},
    "tables and queue": {f"temperature.temperature.{name}" for name in ("tau", "log_s", "u", "visited")},
}
MOVES["queue in tiles"] = MOVES["learned and queue"] = MOVES["queue"]
MOVES["tables both ways"] = MOVES["tables"] | {
    name.replace("temperature", "temperature_back") for name in MOVES["tables"]
}
MOVES["tables and queue"] |= MOVES["queue"]


# What counts


@every_loss
def test_a_training_batch_moves_the_state(name):
    loss = build(name)
    before = state_of(loss)
    value_of(loss, trained_on(embeddings(IMAGES, DIM)))
    assert moved(loss, before) == MOVES[name]


def in_inference_mode():
    with torch.inference_mode():
        return embeddings(IMAGES, DIM)


@every_loss
@pytest.mark.parametrize("keys", [lambda: embeddings(IMAGES, DIM), in_inference_mode], ids=["detached", "inference"])
@pytest.mark.parametrize("trained", [0, 1])
def test_one_view_with_gradient_is_enough(name, keys, trained):
    loss = build(name)
    before = state_of(loss)
    views = keys()
    views[trained] = embeddings(IMAGES, DIM)[trained].requires_grad_()
    value_of(loss, views).backward()
    assert views[trained].grad.abs().sum() > 0
    assert moved(loss, before) == MOVES[name]


def evaluated(loss, views):
    loss.eval()
    return value_of(loss, views)


WITHOUT_LEARNING = {
    "no_grad": lambda loss, views: torch.no_grad()(value_of)(loss, trained_on(views)),
    "embedded under no_grad": value_of,
    "inference_mode": lambda loss, views: torch.inference_mode()(value_of)(loss, views),
    "embedded in inference_mode": lambda loss, views: value_of(loss, in_inference_mode()),
    "eval": lambda loss, views: evaluated(loss, trained_on(views)),
}


@every_loss
@pytest.mark.parametrize("how", WITHOUT_LEARNING)
def test_any_other_batch_leaves_the_state_alone(name, how):
    loss = build(name)
    value_of(loss, trained_on(embeddings(IMAGES, DIM, seed=1)), 1)
    before, views = state_of(loss), embeddings(IMAGES, DIM)
    value = WITHOUT_LEARNING[how](loss, views)
    assert moved(loss, before) == set()
    assert torch.equal(value.detach(), value_of(loss.eval(), views).detach())


@every_loss
def test_looking_at_a_training_batch_leaves_the_state_alone(name):
    loss = build(name)
    before, views = state_of(loss), trained_on(embeddings(IMAGES, DIM))
    for look in (ContrastiveLoss.pairs, temperature_summary, summaries):
        look(loss, *views, index=index(), epoch=EPOCH)
    assert moved(loss, before) == set()


def test_a_learned_temperature_outside_of_its_range_is_held_by_every_batch_and_moved_by_training():
    loss = ContrastiveLoss(WarmUp(Learnable(0.2, 0.1, 0.5), epochs=1))
    views = embeddings(IMAGES, DIM)
    for outside, inside in ((0.01, 0.1), (0.9, 0.5)):
        with torch.no_grad():
            loss.temperature.temperature.log_tau.fill_(outside).log_()
        before, expected = state_of(loss), ContrastiveLoss("simclr", tau=inside)(*views)
        loss.pairs(*views, epoch=EPOCH)
        for how in ("no_grad", "inference_mode", "eval"):
            value = WITHOUT_LEARNING[how](loss, [view.clone() for view in views])
            assert value.item() == pytest.approx(expected.item(), rel=1e-6)
        assert moved(loss, before) == set()
        assert value_of(loss.train(), views).item() == pytest.approx(expected.item(), rel=1e-6)
        assert loss.temperature.temperature.log_tau.exp().item() == pytest.approx(inside)


# Checkpoints


def encoder():
    torch.manual_seed(1)
    layers = [torch.nn.Linear(5, 8), torch.nn.Dropout(0.3), torch.nn.Tanh(), torch.nn.Linear(8, DIM)]
    return torch.nn.Sequential(*layers).double()


def around_the_loss(model, loss, seed, run):
    z = [model(view) for view in embeddings(IMAGES, 5, seed=seed)]
    return run(lambda *views: value_of(loss, views, seed), *z)


def around_model_and_loss(model, loss, seed, run):
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)  # which has the value saved for its gradient

    def step(*views):
        value = value_of(loss, [model(view) for view in views], seed)
        return weight * value + value.exp()

    return run(step, *trained_on(embeddings(IMAGES, 5, seed=seed)))


def around_two_calls(model, loss, seed, run):
    def both(*views):
        z = [model(view) for view in views]
        return value_of(loss, z, seed) ** 2 * value_of(loss, z[::-1], seed)

    return run(both, *trained_on(embeddings(IMAGES, 5, seed=seed)))


REGIONS = {f.__name__: f for f in (around_the_loss, around_model_and_loss, around_two_calls)}


def train(name, region, run, *, calls=1, steps=3):
    """Values of an epoch of steps of so many calls, the weights, and the state at the end."""
    loss, model = build(name), encoder()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    torch.manual_seed(2)  # of dropout
    values = []
    for step in range(steps):
        optimizer.zero_grad()
        value = sum(REGIONS[region](model, loss, step * calls + call, run) for call in range(calls))
        value.backward()
        with torch.no_grad():  # a validation batch after every step
            value_of(loss, embeddings(IMAGES, DIM, seed=99))
        optimizer.step()
        values.append(value.detach())
    return torch.stack(values), list(model.parameters()), loss.state_dict()


def plainly(step, *views):
    return step(*views)


def checkpointed(reentrant):
    return lambda step, *views: checkpoint(step, *views, use_reentrant=reentrant)


def assert_same_training(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-14)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-13, atol=1e-14)


@every_loss
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("early_stop", [True, False])
def test_a_checkpoint_trains_as_without_one(name, region, calls, early_stop):
    with set_checkpoint_early_stop(early_stop):
        found = train(name, region, checkpointed(False), calls=calls)
    assert_same_training(found, train(name, region, plainly, calls=calls))


@every_loss
@pytest.mark.parametrize("region", ["around_the_loss", "around_model_and_loss"])
def test_a_reentrant_checkpoint_of_one_call_trains_as_without_one(name, region):
    assert_same_training(train(name, region, checkpointed(True)), train(name, region, plainly))


@every_loss
@pytest.mark.parametrize(("region", "calls"), [("around_the_loss", 2), ("around_two_calls", 1)])
def test_a_reentrant_checkpoint_of_more_calls_is_refused(name, region, calls):
    with pytest.raises(ValueError, match=r"called again before the backward pass.*use_reentrant=False"):
        train(name, region, checkpointed(True), calls=calls)


BETWEEN = {
    "training": lambda loss, value: value_of(loss, trained_on(embeddings(IMAGES, DIM, seed=5))),
    "validation": lambda loss, value: value_of(loss, embeddings(IMAGES, DIM, seed=5)),
    "another backward pass": lambda loss, value: value.backward(retain_graph=True),
    "another loss of the same tables": lambda loss, value: value_of(
        ContrastiveLoss(loss.temperature), trained_on(embeddings(IMAGES, DIM, seed=5))
    ),
}


@pytest.mark.parametrize(
    ("name", "between"),
    [(name, between) for name in LOSSES for between in BETWEEN if "tables" in name or "tables" not in between],
)
def test_a_reentrant_checkpoint_is_refused_where_the_state_may_be_another(name, between):
    loss, model = build(name), encoder()
    value = around_the_loss(model, loss, 0, checkpointed(True))
    BETWEEN[between](loss, value)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        value.backward()


def test_a_loss_without_state_takes_every_checkpoint():
    losses = [ContrastiveLoss(Learnable(0.2, 0.1, 0.5)) for _ in range(3)]
    gradients = []
    for loss, run in zip(losses, (plainly, checkpointed(False), checkpointed(True)), strict=True):
        model = encoder().eval()
        sum(around_the_loss(model, loss, seed, run) for seed in range(2)).backward()
        gradients.append([p.grad for p in [*model.parameters(), *loss.parameters()]])
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0], rtol=0, atol=1e-14)


@every_loss
def test_a_second_backward_pass_of_a_checkpoint_is_the_first(name):
    loss, model = build(name), encoder()
    value = around_model_and_loss(model, loss, 0, checkpointed(False))
    before = state_of(loss)
    first, second = (torch.autograd.grad(value, [*model.parameters()], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert moved(loss, before) == set()


def test_a_value_changed_in_place_is_repeated_as_it_was():
    def halved(*views):
        value = value_of(loss, views)
        value /= 2
        return value.exp()

    gradients = []
    for run in (plainly, checkpointed(False)):
        loss, views = build("queue"), trained_on(embeddings(IMAGES, DIM))
        gradients.append(torch.autograd.grad(run(halved, *views), views))
    torch.testing.assert_close(*gradients, rtol=1e-14, atol=0)


@every_loss
def test_a_checkpoint_that_computes_other_embeddings_is_refused(name):
    loss, model = build(name), encoder()

    def forgetful(step, *views):
        return checkpoint(step, *views, use_reentrant=False, preserve_rng_state=False)

    value = around_model_and_loss(model, loss, 0, forgetful)
    with pytest.raises(ValueError, match=r"embeddings that 0 of its forward passes had.*preserve_rng_state=True"):
        value.backward()


def test_calls_that_cannot_be_told_apart_are_refused_where_it_matters():
    gradients = []
    for run in (plainly, checkpointed(False)):
        loss, views = build("queue"), trained_on(embeddings(IMAGES, DIM))
        value = sum(run(partial(value_of_views, loss), *views) for _ in range(2))
        gradients.append(torch.autograd.grad(value, views))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-14)  # the loss's value is not computed again
    value = sum(run(lambda *views: value_of(loss, views).exp(), *views) for _ in range(2))
    with pytest.raises(ValueError, match="embeddings that 2 of its forward passes had"):
        value.backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_loss_is_copied_between_forward_and_backward_pass(copied):
    loss = build("tables and queue")
    value = value_of(loss, trained_on(embeddings(IMAGES, DIM)))
    again = copied(loss)
    value.backward()
    assert moved(again, loss.state_dict()) == set()


def test_what_is_remembered_of_a_pass_is_small_and_goes_with_its_graph():
    loss, batch = build("queue"), trained_on(embeddings(1000, DIM))
    total = sum(loss(*batch) for _ in range(3))
    remembered = list(loss._passes._with_gradient)
    assert [first.mark.untyped_storage().nbytes() for first in remembered] == [2 * DIM * 8] * 3
    del total, remembered
    assert len(loss._passes._with_gradient) == 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["dystress_moco", "isogclr"])
def test_a_compiled_loss_with_state_refuses_to_be_computed_again(name, reentrant):
    """Its second pass would find another state than its first, in silence."""
    settings = {"queue_size": (32, 8)} if name == "dystress_moco" else {"num_samples": 6}
    loss = torch.compile(ContrastiveLoss(name, **settings), backend="aot_eager")
    index = None if name == "dystress_moco" else torch.arange(6)
    views = [z.requires_grad_() for z in torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))]
    value = checkpoint(lambda *z: loss(*z, index=index), *views, use_reentrant=reentrant)
    with pytest.raises(ValueError, match="leave the loss out of the checkpoint, or do not compile it"):
        value.backward()
