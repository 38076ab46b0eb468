import itertools

import gloo
import pytest
import torch
from grid import CASES, EPOCH, KINDS, OBJECTIVES, SAMPLES, assert_close, build, embeddings, tolerance
from torch import distributed as dist

from dystress_plugin import ContrastiveLoss, distributed
from dystress_plugin.temperature import Individual, ModelAware

STEPS = 2
SIZES = {"equal": (3, 3), "unequal": (2, 4), "one-each": (1, 1), "one-and-many": (4, 1)}
LAYOUTS = {"two": ("views", 2), "three": ("views", 3), "one_way": ("one_way", 2), "both_ways": ("both_ways", 2)}
SOME = ["dystress-cosine", "isogclr", "macl", "learnable"]
TOUCHY = ["sogclr", "dclw"]  # read tables, and weights of the whole batch
GRID = dict.fromkeys(  # without those that are named twice
    [
        *itertools.product(CASES, ["ntxent"], ["unequal"], ["two"], [None]),
        *itertools.product(KINDS, OBJECTIVES, ["unequal"], ["two"], [None]),
        *itertools.product(SOME, OBJECTIVES, ["equal", "one-each", "one-and-many"], ["two"], [None]),
        *itertools.product(SOME, OBJECTIVES, ["unequal"], ["three", "one_way", "both_ways"], [None]),
        *itertools.product(SOME, TOUCHY, ["equal", "one-and-many"], ["one_way", "both_ways"], [None]),
        *itertools.product(SOME, OBJECTIVES, ["unequal"], ["two"], [(7, 5)]),
        *itertools.product(SOME, TOUCHY, ["equal"], ["two"], [(7, 5)]),
        *itertools.product(["constant"], OBJECTIVES, ["one-each", "one-and-many"], ["two"], [(7, 5)]),
    ]
)


def train(case, own):
    """Values and gradients of every step, of a small network and of the loss, and the state at the end.

    `own` are this process's rows.
    """
    name, objective, sizes, arrangement, queue_size = case
    layout, views = LAYOUTS[arrangement]
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5, dtype=torch.float64)
    loss = ContrastiveLoss(
        build(name).double(), objective=objective, queue_size=queue_size, layout=layout, gather_distributed=True
    )
    parameters = [*model.parameters(), *loss.parameters()]
    gradients = []
    for step in range(STEPS):
        images = embeddings(sum(SIZES[sizes]), 6, views=views, seed=step)
        index = torch.randint(SAMPLES, (sum(SIZES[sizes]),), generator=torch.Generator().manual_seed(step))
        index[-1] = index[0]  # on different ranks
        value = loss(*[model(view[own]) for view in images], index=index[own], epoch=EPOCH)
        found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        gradients.append((value.detach(), *found))
    return [torch.stack(column) for column in zip(*gradients, strict=True)], loss.state_dict()


def rows_of(rank, sizes):
    start = sum(SIZES[sizes][:rank])
    return slice(start, start + SIZES[sizes][rank])


def averaged(result):
    tensors, state = result
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensors, state


def on_a_rank(rank):
    return {
        "grid": {case: averaged(train(case, rows_of(rank, case[2]))) for case in GRID},
        "tables": individual_tables(rank),
        "collectives": collectives(rank),
        "one_image": one_image(rank),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return gloo.run(on_a_rank, 2, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("case", GRID, ids=lambda case: "-".join(map(str, case)))
def test_two_processes_equal_one(ranks, case):
    tensors, state = train(case, slice(None))
    for rank in ranks:
        found, found_state = rank["grid"][case]
        for actual, expected in zip(found, tensors, strict=True):
            assert_close(actual, expected, tolerance(case[0]), terms=0.0 if case[1] in ("ntxent", "macl") else 1.0)
        assert found_state.keys() == state.keys()
        for name in state:
            assert_close(found_state[name], state[name], 1e-7 if name == "queue.keys" else tolerance(case[0]))
            assert torch.equal(found_state[name], ranks[0]["grid"][case][1][name])


# Without gathering, negatives are local, but tables are still those of all ranks


def individual_tables(rank):
    loss = ContrastiveLoss(Individual(12))
    for step in range(3):
        images, index = embeddings(7, 4, seed=step), torch.arange(12).roll(step)[:7]
        own = slice(3) if rank == 0 else slice(3, 7)
        loss(*[view[own] for view in images], index=index[own])
    return loss.state_dict()


def test_tables_take_in_every_rank_without_gathering(ranks):
    alone = ContrastiveLoss(Individual(12))
    for step in range(3):
        images, index = embeddings(7, 4, seed=step), torch.arange(12).roll(step)[:7]
        for own in (slice(3), slice(3, 7)):  # no image is on both, so that one after the other is the same
            alone(*[view[own] for view in images], index=index[own])
    for rank in ranks:
        for name, expected in alone.state_dict().items():
            assert_close(rank["tables"][name], expected, 1e-12)
            assert torch.equal(rank["tables"][name], ranks[0]["tables"][name])


# The collectives themselves


def collectives(rank):
    own = torch.arange(4.0).reshape(2, 2)[: rank + 1] + 10 * rank
    leaf = own.clone().requires_grad_()
    everything, start = distributed.all_rows_with_gradient(leaf)
    (everything * torch.tensor([[1.0], [10.0], [100.0]]) * (rank + 1)).sum().backward()
    return {
        "world": (distributed.world_size(), distributed.rank()),
        "all_rows": distributed.all_rows(own, own[:, 0].long()),
        "with_gradient": (everything.detach(), start),
        "gradient": leaf.grad,
        "mean": distributed.mean_over_ranks(own),
    }


def test_collectives_join_batches_of_different_size(ranks):
    rows = torch.tensor([[0.0, 1], [10, 11], [12, 13]])
    for number, rank in enumerate(ranks):
        found = rank["collectives"]
        assert found["world"] == (2, number)
        assert torch.equal(found["all_rows"][0], rows)
        assert torch.equal(found["all_rows"][1], torch.tensor([0, 10, 12]))
        assert torch.equal(found["with_gradient"][0], rows)
        assert found["with_gradient"][1] == number
        assert found["mean"] == rows.mean()
    # A row's gradient is the sum over ranks, whose losses here weigh 1 and 2.
    assert torch.equal(ranks[0]["collectives"]["gradient"], torch.full((1, 2), 3.0))
    assert torch.equal(ranks[1]["collectives"]["gradient"], torch.tensor([[30.0, 30], [300, 300]]))


def test_collectives_of_one_process_are_identities():
    z = torch.arange(6.0).reshape(3, 2)
    assert (distributed.world_size(), distributed.rank()) == (1, 0)
    assert distributed.all_rows(z)[0] is z
    assert distributed.all_rows_with_gradient(z) == (z, 0)
    assert distributed.mean_over_ranks(z) == z.mean()


# Errors in a group


def one_image(rank):
    z = torch.ones(1, 3) * (rank + 1)
    with pytest.raises(ValueError, match="one image has no negatives"):
        ContrastiveLoss("simclr")(z, z)
    return ContrastiveLoss(ModelAware(), gather_distributed=True)(z, z).item()


def test_one_image_a_rank_is_legal_only_with_gathering(ranks):
    assert [rank["one_image"] for rank in ranks] == [
        pytest.approx(ContrastiveLoss("macl")(*[torch.ones(2, 3)] * 2).item())
    ] * 2


@pytest.mark.parametrize("name", ["dystress-cosine-live", "macl", "isogclr"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gathering_in_a_single_process_changes_nothing(name, objective):
    views, index = embeddings(5, 4), torch.arange(5)
    values = [
        ContrastiveLoss(build(name), objective=objective, gather_distributed=gather)(*views, index=index)
        for gather in (False, True)
    ]
    assert torch.equal(*values)
