"""Parameters of a loss on two ranks: equal on both, and as one process has them, wherever the loss stands."""

import itertools
from contextlib import nullcontext
from typing import NamedTuple

import gloo
import pytest
import torch
from grid import EPOCH, assert_close, embeddings
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dystress_plugin import ContrastiveLoss
from dystress_plugin.frameworks.lightly import DySTreSSLoss
from dystress_plugin.temperature import Learnable, Temperature, WarmUp
from dystress_plugin.temperature.maps import LogitMaps, Scaled

STEPS, IMAGES = 20, 6


class Several(Temperature):
    """tau = exp of two parameters, and of a third in batches of more than three images; a fourth has no part in it."""

    def __init__(self):
        super().__init__()
        self.log_tau, self.shifts = torch.nn.Parameter(torch.tensor(-2.0)), torch.nn.Parameter(torch.zeros(2, 1))
        self.in_large_batches, self.never = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))

    def prepare(self, batch):
        log_tau = self.log_tau + self.shifts.sum()
        if len(batch.positive_cosine) > 6:
            log_tau = log_tau + self.in_large_batches
        map_ = Scaled(log_tau.exp(), least=0.01)
        return LogitMaps(map_, map_)


TEMPERATURES = {
    "learnable": lambda: Learnable(0.12),
    "at its ends": lambda: Learnable(0.12, 0.1, 0.13),
    "warm-up": lambda: WarmUp(WarmUp(Learnable(0.12), epochs=2 * EPOCH), epochs=EPOCH / 2),
    "several": Several,
}


class Case(NamedTuple):
    """A training; a test's name."""

    temperature: str
    optimizer: str = "SGD"
    place: str = "outside"  # of DistributedDataParallel, which holds the model
    gather: str = "gathered"
    sizes: tuple[int, int] = (2, 4)


CASES = [
    *itertools.starmap(Case, itertools.product(list(TEMPERATURES)[:3], ["SGD", "Adam"], ["outside", "inside"])),
    *itertools.starmap(
        Case, itertools.product(["learnable", "several"], ["SGD", "Adam"], ["outside", "inside"], ["apart"])
    ),
    Case("learnable", sizes=(3, 3)),
    Case("learnable", sizes=(5, 1)),
    *(Case("learnable", "Adam", place) for place in ("accumulated", "frozen model", "lightly")),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))


class Training(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Linear(6, 5, dtype=torch.float64)
        loss = ContrastiveLoss(TEMPERATURES[case.temperature]().double(), gather_distributed=case.gather == "gathered")
        self.criterion = loss
        if case.place == "lightly":
            self.criterion = DySTreSSLoss()
            self.criterion.loss = loss

    def forward(self, views, rows):
        return self.criterion(*[self.model(view[rows]) for view in views], epoch=EPOCH)


def wrapped(training, place):
    """As a script does it for several devices."""
    if place in ("inside", "accumulated"):
        return DistributedDataParallel(training)
    if place != "frozen model":
        training.model = DistributedDataParallel(training.model)
    return training


def train(case, parts):
    """All parameters after some steps of gradient descent on the mean over parts of a batch, and who had a gradient."""
    training = Training(case)
    training.model.requires_grad_(case.place != "frozen model")
    stepped = wrapped(training, case.place) if dist.is_initialized() else training
    if dist.is_initialized() and dist.get_rank() == 1:
        for parameter in training.criterion.parameters():  # which somebody has loaded or set on rank 0 alone
            parameter.data += 0.3
    optimizer = getattr(torch.optim, case.optimizer)(training.parameters(), lr=0.1)
    micro_batches = 2 if case.place == "accumulated" else 1
    for step in range(STEPS):
        optimizer.zero_grad()
        for number in range(micro_batches):
            last = number == micro_batches - 1 or not dist.is_initialized()
            batch = embeddings(IMAGES, 6, seed=2 * step + number)
            with nullcontext() if last else stepped.no_sync():
                (sum(stepped(batch, part) for part in parts) / len(parts)).backward()
        if case.gather == "apart" and dist.is_initialized() and dist.get_rank() == 0:
            validate(training.criterion, batch)
        optimizer.step()
    return list(training.parameters()), [parameter.grad is not None for parameter in training.parameters()]


def validate(loss, batch):
    """On one rank alone, which no other has to wait for."""
    with torch.no_grad():
        loss(*batch, epoch=EPOCH)
    loss.eval()(*batch, epoch=EPOCH).backward(inputs=[view.requires_grad_() for view in batch])
    loss.train()


def rows_of(sizes):
    return [slice(0, sizes[0]), slice(sizes[0], sum(sizes))]


def second_derivatives(parts):
    loss = ContrastiveLoss(Several().double())
    inputs = [loss.temperature.log_tau, loss.temperature.shifts]
    value = sum(loss(*[view[part] for view in embeddings(IMAGES, 6)]) for part in parts) / len(parts)
    first = torch.autograd.grad(value, inputs, create_graph=True)
    return torch.autograd.grad(first[0] * (1 + first[1].sum()), inputs)


def on_a_rank(rank):
    found = {case: train(case, [rows_of(case.sizes)[rank]]) for case in CASES}
    return found, second_derivatives([rows_of((2, 4))[rank]])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return gloo.run(on_a_rank, 2, tmp_path_factory.mktemp("gloo"))


@every_case
def test_two_ranks_train_the_parameters_of_one_process(ranks, case):
    parts = [slice(None)] if case.gather == "gathered" else rows_of(case.sizes)
    expected, _ = train(case, parts)  # apart, ranks have losses of their own, and descend their mean
    for found, had_gradient in (rank[0][case] for rank in ranks):
        assert all(torch.equal(a, b) for a, b in zip(found, ranks[0][0][case][0], strict=True))
        for actual, wanted in zip(found, expected, strict=True):
            assert_close(actual, wanted.detach(), 1e-9)
        if case.temperature == "several" and case.place == "outside":
            assert had_gradient[-4:] == [True, True, True, False]


def test_two_ranks_have_the_second_derivatives_of_one_process(ranks):
    expected = second_derivatives(rows_of((2, 4)))
    for _, found in ranks:
        for actual, wanted in zip(found, expected, strict=True):
            assert_close(actual, wanted, 1e-12)
