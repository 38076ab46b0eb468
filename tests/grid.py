"""Every temperature of the package beside the oracle's: what the tests of values and gradients run over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import oracle
import torch

from dystress_plugin import ContrastiveLoss, temperature

EPOCH = 37.5
SAMPLES = 50
OBJECTIVES = ("ntxent", "macl", "sogclr")


class Case(NamedTuple):
    build: Callable[[], temperature.Temperature]
    maps: Callable[..., oracle.Map] | None  # from the alignment to the map, or to (positives' map, negatives' map)


def dystress(profile, low=0.1, high=0.2, detach=True, **own):
    return Case(
        lambda: temperature.DySTreSS(low, high, profile, detach=detach, **own),
        lambda a: oracle.quotient(*getattr(oracle, profile)(low, high), detach),
    )


def two_ranges(profile, detach):
    return Case(
        lambda: temperature.DySTreSS(0.1, 0.2, profile, detach=detach, negative_range=(0.08, 0.15)),
        lambda a: tuple(
            oracle.quotient(*getattr(oracle, profile)(*ends), detach) for ends in [(0.1, 0.2), (0.08, 0.15)]
        ),
    )


PROFILES = ("cosine", "shifted", "cosine_constant", "exponential", "linear")
CASES = {
    "constant": Case(lambda: temperature.Constant(0.1), lambda a: oracle.constant(0.1)),
    "constant-0.5": Case(lambda: temperature.Constant(0.5), lambda a: oracle.constant(0.5)),
    **{f"dystress-{profile}": dystress(profile) for profile in PROFILES},
    **{f"dystress-{profile}-live": dystress(profile, detach=False) for profile in PROFILES},
    "dystress-two-ranges": two_ranges("cosine", True),
    "dystress-two-ranges-live": two_ranges("shifted", False),
    "dystress-own-shift": Case(
        lambda: temperature.DySTreSS(0.1, 0.15, "shifted", shift=-0.3, scale=0.9, detach=False),
        lambda a: oracle.quotient(*oracle.shifted(0.1, 0.15, -0.3, 0.9), False),
    ),
    "dystress-own-start": Case(
        lambda: temperature.DySTreSS(0.1, 0.14, "cosine_constant", shift=-0.1, scale=0.6, detach=False),
        lambda a: oracle.quotient(*oracle.cosine_constant(0.1, 0.14, -0.1, 0.6), False),
    ),
    "dystress-own-rate": Case(
        lambda: temperature.DySTreSS(0.1, 0.2, "exponential", rate=2.0, detach=False),
        lambda a: oracle.quotient(*oracle.exponential(0.1, 0.2, 2.0), False),
    ),
    "macl": Case(lambda: temperature.ModelAware(0.1, 0.5, 0.2), lambda a: oracle.model_aware(a, 0.1, 0.5, 0.2)),
    "ts": Case(lambda: temperature.CosineSchedule(), lambda a: oracle.scheduled(EPOCH, 0.1, 1.0, 400)),
    "isogclr": Case(lambda: temperature.Individual(SAMPLES), None),
    "tempfree": Case(lambda: temperature.TemperatureFree(), lambda a: oracle.log_odds(1e-6)),
}


@cache
def _built(name: str) -> temperature.Temperature:
    return CASES[name].build()


def build(name: str) -> temperature.Temperature:
    """A fresh temperature; a copy, since DySTreSS looks for its monotone limit when it is built."""
    return copy.deepcopy(_built(name))


def tolerance(name: str) -> float:
    return 1e-9 if name == "tempfree" else 1e-12


def embeddings(images: int, dim: int, *, views: int = 2, seed: int = 0) -> list[torch.Tensor]:
    """Views that share a direction, so that positives are more similar than negatives."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(images, dim, generator=generator, dtype=torch.float64)
    return [shared + 0.7 * torch.randn(images, dim, generator=generator, dtype=torch.float64) for _ in range(views)]


class Pair:
    """A loss of the package and the oracle's, with the tables that either keeps."""

    def __init__(self, name: str, objective: str, *, queue_size: tuple[int, int] | None = None) -> None:
        case = CASES[name]
        self.loss = ContrastiveLoss(build(name), objective=objective, queue_size=queue_size)
        self.name, self.case, self.objective = name, case, objective
        self.tables = oracle.Individual(SAMPLES) if case.maps is None else None

    def package(self, views, index, **more):
        """The value, and the gradient with respect to every view."""
        leaves = [view.detach().clone().requires_grad_() for view in views]
        value = self.loss(*leaves, index=index, epoch=EPOCH, **more)
        return value.detach(), torch.autograd.grad(value, leaves)

    def oracle(self, views, index):
        views, index = [view.tolist() for view in views], index.tolist()
        keys = self.loss.queue.keys.tolist() if self.loss.queue is not None else None

        def maps(image, alignment):
            if self.tables is not None:
                found = oracle.constant(self.tables.tau[index[image]])
            else:
                found = self.case.maps(alignment)
            return (found, found) if isinstance(found, oracle.Map) else found

        running = (lambda image, g: self.tables.running(index[image], g)) if self.tables is not None else None
        result = oracle.loss(views, maps, self.objective, keys=keys, running=running)
        if self.tables is not None:
            self.tables.update(index, views, keys)
        return result


def assert_close(actual, expected, tolerance: float, *, terms: float = 0.0) -> None:
    """No entry is off by more than `tolerance` times the largest entry.

    `terms` is the size of what the entries are a difference of, where they may cancel.
    """
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    error, largest = (actual - expected).abs().max().item(), max(terms, expected.abs().max().item())
    assert error <= tolerance * largest, f"off by {error:.3g} of {largest:.3g}"


def assert_agree(pair: Pair, views, index) -> None:
    expected = pair.oracle(views, index)  # first: the package writes to its queue
    value, gradients = pair.package(views, index)
    # SogCLR's value is a difference of mean cosines, exactly 0 where they agree.
    assert_close(value, expected.value, tolerance(pair.name), terms=1.0 if pair.objective == "sogclr" else 0.0)
    assert_close(torch.stack(gradients), expected.gradients, tolerance(pair.name))
