import itertools
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gloo
import pytest
import torch
from grid import CASES, EPOCH, KINDS, OBJECTIVES, SAMPLES, assert_close, build, embeddings, tolerance, trained_on
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from dystress_plugin import ContrastiveLoss, distributed
from dystress_plugin.engine import ENGINES, blockwise
from dystress_plugin.temperature import Individual, ModelAware

EXAMPLE = Path(__file__).parents[1] / "scripts" / "examples" / "torchrun.py"
STEPS = 2
SIZES = {
    "equal": (3, 3),
    "unequal": (2, 4),
    "one-each": (1, 1),
    "one-and-many": (4, 1),
    "three-equal": (2, 2, 2),
    "three-unequal": (1, 4, 2),
}
LAYOUTS = {
    "two": {},
    "three": {},
    "queue": {"queue_size": (7, 5)},
    "one_way": {"layout": "one_way"},
    "both_ways": {"layout": "both_ways"},
}
MORE_LAYOUTS = LAYOUTS | {
    "three-one-by-one": {"positives": "mean"},
    "captions": {"layout": "both_ways"},
    "three-with-hard-ones": {"layout": "one_way"},
    "classes": {},
    "classes-one-by-one": {"positives": "mean"},
}


class Cell(NamedTuple):
    """One point of the grid; a test's name."""

    name: str
    objective: str
    layout: str
    sizes: str
    engine: str = "auto"


OBJECTIVES = [name for name in OBJECTIVES if name not in ("gcl", "dual")]  # but for factors "sogclr" and "macl"
KINDS = [name for name in KINDS if name != "hardness-dystress-live"]  # pointwise, as "dystress-two-ranges-live"
SOME = ["dystress-cosine", "isogclr", "macl", "learnable"]
GRID = [
    Cell(*cell)
    for cell in dict.fromkeys(  # without those that are named twice
        [
            *itertools.product(KINDS, OBJECTIVES, LAYOUTS, ["unequal", "equal", "three-unequal"]),
            *itertools.product(CASES, OBJECTIVES, ["two"], ["unequal"]),
            *itertools.product(SOME, ["sogclr", "dclw"], LAYOUTS, ["one-each", "one-and-many", "three-equal"]),
            *itertools.product(SOME, OBJECTIVES, ["two", "both_ways"], ["unequal"], ["blockwise"]),
            *itertools.product(SOME, OBJECTIVES, ["three-one-by-one"], ["unequal"]),
            *itertools.product(["isogclr", "isogclr-released"], ["sogclr"], ["captions"], SIZES),
            *itertools.product(SOME, ["dual"], ["two", "both_ways", "three-one-by-one"], ["unequal"], ["blockwise"]),
            *itertools.product(SOME, ["ntxent", "sogclr"], ["classes"], ["unequal"], ["blockwise"]),
            *itertools.product(["dystress-cosine"], ["ntxent"], ["classes-one-by-one"], SIZES),
            *itertools.product(["hardness-learnable"], ["ntxent", "sogclr"], ["three-with-hard-ones"], SIZES),
            *itertools.product(["robust-global", "robust-global-means"], ["gcl"], ["two", "captions"], SIZES),
        ]
    )
]


def train(cell, own):
    """Values and gradients of every step, of a small network and of the loss, and the state at the end.

    `own` are this process's rows.
    """
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5, dtype=torch.float64)
    loss = ContrastiveLoss(
        build(cell.name).double(),
        objective=cell.objective,
        engine=cell.engine,
        gather_distributed=True,
        **MORE_LAYOUTS[cell.layout],
    )
    parameters = [*model.parameters(), *loss.parameters()]
    images, gradients = sum(SIZES[cell.sizes]), []
    for step in range(STEPS):
        batch = embeddings(images, 6, views=3 if cell.layout.startswith("three") else 2, seed=step)
        index = torch.randint(SAMPLES, (images,), generator=torch.Generator().manual_seed(step))
        index[-1] = index[0]  # on different ranks
        index = index[own]
        if cell.layout == "captions":  # numbered apart from their images
            index = index, SAMPLES - 1 - torch.arange(images)[own]
        labels = torch.arange(images)[own] % 2 if cell.layout.startswith("classes") else None
        value = loss(*[model(view[own]) for view in batch], index=index, epoch=EPOCH, labels=labels)
        found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        gradients.append((value.detach(), *found))
    return [torch.stack(column) for column in zip(*gradients, strict=True)], loss.state_dict()


def rows_of(rank, sizes):
    start = sum(SIZES[sizes][:rank])
    return slice(start, start + SIZES[sizes][rank])


def averaged(result):
    tensors, state = result
    together = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(together)
    parts = (together / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)], state


def grid_on_a_rank(rank):
    world = dist.get_world_size()
    cells = [cell for cell in GRID if len(SIZES[cell.sizes]) == world]
    return {cell: averaged(train(cell, rows_of(rank, cell.sizes))) for cell in cells}


def on_a_rank_of_two(rank):
    return {
        "grid": grid_on_a_rank(rank),
        "tables": individual_tables(rank),
        "queue": queue_of_ranks_seeded_differently(rank),
        "wrapped": {name: wrapped_and_by_hand(name, queue_size) for name, queue_size in WRAPPED.items()},
        "collectives": collectives(rank),
        "one_image": one_image(rank),
        "counts": {cell: count_collectives(*cell, rows_of(rank, "unequal")) for cell in COUNTS},
        "second": {layout: second_derivative(layout, rows_of(rank, "unequal")) for layout in SECOND},
    }


def on_a_rank_of_three(rank):
    return {
        "grid": grid_on_a_rank(rank),
        "entries": {(name, images): entries_of_a_step(name, images) for name, images in STEPS_TO_COUNT},
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return gloo.run(on_a_rank_of_two, 2, tmp_path_factory.mktemp("gloo"))


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory):
    return gloo.run(on_a_rank_of_three, 3, tmp_path_factory.mktemp("gloo"))


@pytest.mark.filterwarnings("ignore:rho=0.4 is at least")  # one negative
@pytest.mark.parametrize("cell", GRID, ids="-".join)
def test_processes_equal_one(cell, two_ranks, three_ranks):
    tensors, state = train(cell, slice(None))
    ranks = [rank["grid"][cell] for rank in (two_ranks if len(SIZES[cell.sizes]) == 2 else three_ranks)]
    for found, found_state in ranks:
        for actual, expected in zip(found, tensors, strict=True):
            terms = 0.0 if cell.objective in ("ntxent", "macl") else 1.0
            assert_close(actual, expected, tolerance(cell.name), terms=terms)
        assert found_state.keys() == state.keys()
        for name in state:
            assert_close(found_state[name], state[name], 1e-7 if name == "queue.keys" else tolerance(cell.name))
            assert torch.equal(found_state[name], ranks[0][1][name])


# Without gathering, negatives are local, but tables are still those of all ranks


def individual_tables(rank):
    loss = ContrastiveLoss(Individual(12))
    for step in range(3):
        images, index = embeddings(7, 4, seed=step), torch.arange(12).roll(step)[:7]
        own = slice(3) if rank == 0 else slice(3, 7)
        loss(*[view[own] for view in trained_on(images)], index=index[own])
    return loss.state_dict()


def test_tables_take_in_every_rank_without_gathering(two_ranks):
    alone = ContrastiveLoss(Individual(12))
    for step in range(3):
        images, index = embeddings(7, 4, seed=step), torch.arange(12).roll(step)[:7]
        for own in (slice(3), slice(3, 7)):  # no image is on both, so that one after the other is the same
            alone(*[view[own] for view in trained_on(images)], index=index[own])
    for rank in two_ranks:
        for name, expected in alone.state_dict().items():
            assert_close(rank["tables"][name], expected, 1e-12)
            assert torch.equal(rank["tables"][name], two_ranks[0]["tables"][name])


# A queue starts at random, and a training script may seed its ranks differently


def queue_of_ranks_seeded_differently(rank, rows=None):
    torch.manual_seed(rank)
    loss = ContrastiveLoss("simclr", queue_size=(9, 4))
    values = []
    for step in range(2):
        batch = embeddings(6, 4, seed=step)
        values.append(loss(*[view[rows or slice(3 * rank, 3 * rank + 3)] for view in trained_on(batch)]))
    return torch.stack(values).detach(), loss.queue.keys


def test_a_queue_is_rank_0s_on_every_rank_from_the_first_step(two_ranks):
    values, keys = queue_of_ranks_seeded_differently(0, slice(0, 6))
    assert_close(sum(rank["queue"][0] for rank in two_ranks) / 2, values, 1e-6)
    for rank in two_ranks:
        assert_close(rank["queue"][1], keys, 1e-6)
        assert torch.equal(rank["queue"][1], two_ranks[0]["queue"][1])


# DistributedDataParallel averages gradients by itself, and overwrites buffers with rank 0's before every forward pass

WRAPPED = {"dystress-cosine": None, "isogclr": None, "learnable": None, "constant": (7, 5)}


class Training(torch.nn.Module):
    def __init__(self, name, queue_size):
        super().__init__()
        self.model = torch.nn.Linear(6, 5, dtype=torch.float64)
        self.loss = ContrastiveLoss(
            build(name).double(), objective="ntxent", queue_size=queue_size, gather_distributed=True
        )

    def forward(self, views, index):
        return self.loss(*[self.model(view) for view in views], index=index, epoch=EPOCH)


def steps(training, rows):
    """State after three steps of gradient descent."""
    optimizer = torch.optim.SGD(training.parameters(), lr=0.5)
    for step in range(3):
        batch = embeddings(6, 6, seed=step)
        optimizer.zero_grad()
        training([view[rows] for view in batch], index=torch.arange(6)[rows]).backward()
        optimizer.step()
    return training.state_dict()


def wrapped_and_by_hand(name, queue_size):
    torch.manual_seed(0)
    training = torch.nn.parallel.DistributedDataParallel(Training(name, queue_size))
    state = steps(training, slice(2) if distributed.rank() == 0 else slice(2, 6))
    return {key.removeprefix("module."): value for key, value in state.items()}


@pytest.mark.parametrize("name", WRAPPED)
def test_training_through_distributed_data_parallel_ends_where_one_process_does(two_ranks, name):
    torch.manual_seed(0)
    alone = steps(Training(name, WRAPPED[name]), slice(None))
    for rank in two_ranks:
        assert rank["wrapped"][name].keys() == alone.keys()
        for key, expected in alone.items():
            assert_close(rank["wrapped"][name][key], expected, 1e-6 if key == "loss.queue.keys" else 1e-11)


# Memory

STEPS_TO_COUNT = [*itertools.product(["in-tiles"], [64, 128]), ("dense", 128)]
DIM = 8


class CountEntries(TorchDispatchMode):
    """The size of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        sizes = [x.numel() for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


def entries_of_a_step(engine, images):
    """Entries of the largest tensor of a step, and of all that is saved for the backward pass.

    In small tiles of which none is kept: by default tiles, a constant number of bytes, could hold all of this batch.
    """
    ENGINES["in-tiles"] = partial(blockwise.negative_stats, tile=32, keep_bytes=0)
    loss = ContrastiveLoss("dystress", engine=engine, gather_distributed=True)
    z = [view.float().requires_grad_() for view in embeddings(images, DIM, seed=distributed.rank())]
    saved = {}
    with (
        CountEntries() as count,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t.numel()}) or t, lambda t: t),
    ):
        loss(*z).backward()
    return count.largest, sum(saved.values())


def test_no_rank_holds_the_matrix_of_the_whole_batch(three_ranks):
    rows, everything = 2 * 128, 3 * 2 * 128
    for rank in three_ranks:
        assert rank["entries"]["in-tiles", 128][0] == everything * DIM  # the gathered embeddings
        assert rank["entries"]["dense", 128][0] == rows * everything  # that the counter sees what there is


def test_memory_of_a_rank_is_linear_in_the_batch(three_ranks):
    for rank in three_ranks:
        for few, many in zip(rank["entries"]["in-tiles", 64], rank["entries"]["in-tiles", 128], strict=True):
            assert many <= 2 * few


# How many collectives a step needs: of embeddings one each way, all that tables learn together, and the numbers of
# images once

COUNTS = {
    # (temperature, objective, layout, gathered): collectives of the forward and of the backward pass
    ("constant", "ntxent", "two", True): (2, 1),  # numbers of images, embeddings; their gradient
    ("constant", "ntxent", "both_ways", True): (2, 1),
    ("constant", "ntxent", "queue", True): (2, 0),  # numbers of images, keys
    ("constant", "ntxent", "two", False): (0, 0),
    ("dystress-cosine", "dclw", "two", True): (3, 1),  # and the mean of the weights
    ("macl", "macl", "two", True): (3, 1),  # and the alignment
    ("isogclr", "sogclr", "two", True): (3, 1),  # and the table
    ("isogclr", "sogclr", "both_ways", True): (4, 1),  # and two tables
    ("isogclr", "sogclr", "two", False): (2, 0),
    ("learnable", "ntxent", "both_ways", True): (2, 2),  # and the gradient of the temperature
    ("robust-global-means", "gcl", "both_ways", True): (4, 2),
}


class CountCollectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function.namespace == "c10d"
        return function(*arguments, **(keywords or {}))


def count_collectives(name, objective, layout, gathered, own):
    """Those of the second step; the first one may compare ranks once."""
    loss = ContrastiveLoss(
        build(name).double(), objective=objective, gather_distributed=gathered, **MORE_LAYOUTS[layout]
    )
    z = [view[own].requires_grad_() for view in embeddings(6, 5)]
    index = torch.arange(6)[own]
    loss(*z, index=index, epoch=EPOCH).backward()
    with CountCollectives() as forward:
        value = loss(*z, index=index, epoch=EPOCH)
    with CountCollectives() as backward:
        value.backward()
    return forward.count, backward.count


@pytest.mark.parametrize("cell", COUNTS, ids=str)
def test_a_step_has_the_collectives_that_its_result_needs(cell, two_ranks):
    assert [rank["counts"][cell] for rank in two_ranks] == [COUNTS[cell]] * 2


# The collectives themselves


def collectives(rank):
    own = torch.arange(4.0).reshape(2, 2)[: rank + 1] + 10 * rank
    leaf = own.clone().requires_grad_()
    everything, start = distributed.all_rows_with_gradient(leaf)
    (everything * torch.tensor([[1.0], [10.0], [100.0]]) * (rank + 1)).sum().backward()
    first = torch.tensor([1.0 + rank])
    distributed.from_rank_0(first)
    return {
        "world": (distributed.world_size(), distributed.rank()),
        "all_rows": distributed.all_rows(own, own[:, 0].long()),
        "with_gradient": (everything.detach(), start),
        "gradient": leaf.grad,
        "mean": distributed.mean_over_ranks(own),
        "first": first,
    }


def test_collectives_join_batches_of_different_size(two_ranks):
    rows = torch.tensor([[0.0, 1], [10, 11], [12, 13]])
    for number, rank in enumerate(two_ranks):
        found = rank["collectives"]
        assert found["world"] == (2, number)
        assert torch.equal(found["all_rows"][0], rows)
        assert torch.equal(found["all_rows"][1], torch.tensor([0, 10, 12]))
        assert torch.equal(found["with_gradient"][0], rows)
        assert found["with_gradient"][1] == number
        assert found["mean"] == rows.mean()
        assert found["first"] == 1
    # A row's gradient is the sum over ranks, whose losses here weigh 1 and 2.
    assert torch.equal(two_ranks[0]["collectives"]["gradient"], torch.full((1, 2), 3.0))
    assert torch.equal(two_ranks[1]["collectives"]["gradient"], torch.tensor([[30.0, 30], [300, 300]]))


def test_collectives_of_one_process_are_identities():
    z = torch.arange(6.0).reshape(3, 2)
    assert (distributed.world_size(), distributed.rank()) == (1, 0)
    assert distributed.all_rows(z)[0] is z
    assert distributed.all_rows_with_gradient(z) == (z, 0)
    assert distributed.mean_over_ranks(z) == z.mean()
    distributed.from_rank_0(z)
    assert torch.equal(z, torch.arange(6.0).reshape(3, 2))


# Second derivatives

SECOND = ["two", "one_way", "both_ways"]


def second_derivative(layout, own):
    """Of the loss times the ranks: what it holds in a direction, by this rank's rows."""
    torch.manual_seed(0)
    direction = torch.randn(2, sum(SIZES["unequal"]), 5, dtype=torch.float64)[:, own]
    loss = ContrastiveLoss("dystress", detach=False, gather_distributed=True, **LAYOUTS[layout])
    z = torch.stack(embeddings(sum(SIZES["unequal"]), 5))[:, own].requires_grad_()
    (gradient,) = torch.autograd.grad(loss(*z), z, create_graph=True)
    return torch.autograd.grad((gradient * direction).sum(), z)[0]


@pytest.mark.parametrize("layout", SECOND)
def test_a_second_derivative_passes_through_the_gathering(layout, two_ranks):
    found = torch.cat([rank["second"][layout] for rank in two_ranks], dim=1)
    assert_close(found / 2, second_derivative(layout, slice(None)), 1e-12)


# Errors in a group


def one_image(rank):
    z = torch.ones(1, 3) * (rank + 1)
    with pytest.raises(ValueError, match="one image has no negatives"):
        ContrastiveLoss("simclr")(z, z)
    return ContrastiveLoss(ModelAware(), gather_distributed=True)(z, z).item()


def test_one_image_a_rank_is_legal_only_with_gathering(two_ranks):
    assert [rank["one_image"] for rank in two_ranks] == [
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


# As a user starts them


def launched(command, folder):
    """Runs a program of ours as a user does, and returns what it prints."""
    run = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout
    return run.stdout


def test_torchrun_with_two_processes_trains_the_model_of_one(tmp_path):
    pytest.importorskip("sklearn")
    states = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.pt"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        printed = launched([*torchrun, EXAMPLE, "--method", "isogclr", "--epochs", 1, "--out", out], tmp_path)
        assert "epoch: 00, loss: " in printed
        states.append(torch.load(out, weights_only=True))
    for key, expected in states[0].items():
        assert_close(states[1][key], expected, 1e-9)


LIGHTNING = """
import sys
import pytorch_lightning as pl
import torch
from dystress_plugin import ContrastiveLoss


class Training(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Linear(6, 5)
        self.loss = ContrastiveLoss("isogclr", num_samples=22, gather_distributed=True)

    def training_step(self, batch, number):
        index, *views = batch
        return self.loss(*[self.model(view) for view in views], index=index, epoch=self.current_epoch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


devices, out = int(sys.argv[1]), sys.argv[2]
views = torch.randn(2, 22, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
dataset = torch.utils.data.TensorDataset(torch.arange(22), *views)
trainer = pl.Trainer(
    accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", precision="64-true", max_epochs=3,
    logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
training = Training()
# The whole data set is one batch, as Lightning shuffles for several processes and not for one.
trainer.fit(training, torch.utils.data.DataLoader(dataset, batch_size=22 // devices))
if trainer.global_rank == 0:
    torch.save(training.state_dict(), out)
"""


def test_lightning_with_two_processes_trains_the_model_of_one(tmp_path):
    pytest.importorskip("pytorch_lightning")
    (tmp_path / "train.py").write_text(LIGHTNING)
    states = []
    for devices in (1, 2):
        launched(["train.py", devices, tmp_path / f"{devices}.pt"], tmp_path)
        states.append(torch.load(tmp_path / f"{devices}.pt", weights_only=True))
    assert states[0].keys() == states[1].keys()
    assert states[0]["loss.temperature.visited"].all()
    for key, expected in states[0].items():
        assert_close(states[1][key], expected, 1e-11)
