"""Every temperature of the package beside the oracle's: what the tests of values and gradients run over."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import oracle
import torch

from dystress_plugin import ContrastiveLoss, temperature

DEVICE = torch.device("cpu")  # before any test is imported, --device sets another
EPOCH = 37.5
SAMPLES = 50
OBJECTIVES = ("ntxent", "macl", "sogclr", "gcl", "dcl", "dclw", "dual")


class Case(NamedTuple):
    build: Callable[[], temperature.Temperature]
    maps: Callable[..., oracle.Map] | None  # from the alignment to the map, or to (positives' map, negatives' map)
    tables: Callable[[], oracle.Individual] | None = None  # where there is a table; of temperatures if without maps
    by_sample: bool = False  # the map is made from the number of the sample as well


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


def lifted(profile, detach, *ends):
    """Stabilised: 37.5 of 100 epochs are over."""
    found = [oracle.quotient(*getattr(oracle, profile)(*oracle.lifted(EPOCH, 100, *e)), detach) for e in ends]
    return found[0] if len(found) == 1 else tuple(found)


def warm_up(build, maps):
    return Case(
        lambda: temperature.WarmUp(build(), tau=0.3, epochs=50), lambda a: oracle.warm_up(EPOCH / 50, 0.3, maps(a))
    )


def hardness(build, maps, strength):
    def weighted(alignment):
        positive = maps(alignment)
        return positive, oracle.weighted(strength, positive)

    return Case(lambda: temperature.Hardness(build(), strength), weighted)


COUNTS = [7 * sample % 11 + 3 for sample in range(SAMPLES)]
LEARNED = math.exp(torch.tensor(math.log(0.12)).item())  # the parameter is float32
PROFILES = ("cosine", "shifted", "cosine_constant", "exponential", "linear")
CASES = {
    "constant": Case(lambda: temperature.Constant(0.1), lambda a: oracle.constant(0.1)),
    "constant-0.5": Case(lambda: temperature.Constant(0.5), lambda a: oracle.constant(0.5)),
    **{f"dystress-{profile}": dystress(profile) for profile in PROFILES},
    **{f"dystress-{profile}-live": dystress(profile, detach=False) for profile in PROFILES},
    "dystress-root-live": dystress("root", 0.01, 0.05, detach=False),
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
    "ts-by-count": Case(
        lambda: temperature.CosineSchedule(0.1, 0.4, 100, offset=COUNTS, amplitude=0.2),
        lambda a, sample=0: oracle.shifted_by_count(EPOCH, 0.1, 0.4, 100, 0.2, (COUNTS[sample] - 3) / 10),
        by_sample=True,
    ),
    "isogclr": Case(lambda: temperature.Individual(SAMPLES), None, lambda: oracle.Individual(SAMPLES)),
    "tempfree": Case(lambda: temperature.TemperatureFree(), lambda a: oracle.log_odds(1e-6)),
    "dystress-stabilised": Case(
        lambda: temperature.DySTreSS(0.1, 0.2, stabilise=100), lambda a: lifted("cosine", True, (0.1, 0.2))
    ),
    "dystress-stabilised-two-ranges-live": Case(
        lambda: temperature.DySTreSS(0.1, 0.2, "linear", detach=False, negative_range=(0.08, 0.15), stabilise=100),
        lambda a: lifted("linear", False, (0.1, 0.2), (0.08, 0.15)),
    ),
    "step-first-half": Case(
        lambda: temperature.StepSchedule(0.2, 0.6, 80), lambda a: oracle.stepped(EPOCH, 0.2, 0.6, 80)
    ),
    "step-second-half": Case(
        lambda: temperature.StepSchedule(0.2, 0.6, 16), lambda a: oracle.stepped(EPOCH, 0.2, 0.6, 16)
    ),
    "isogclr-difference": Case(
        lambda: temperature.Individual(SAMPLES, gradient="difference"),
        None,
        lambda: oracle.Individual(SAMPLES, gradient="difference"),
    ),
    "isogclr-released": Case(
        lambda: temperature.Individual(SAMPLES, released=True),
        None,
        lambda: oracle.Individual(SAMPLES, gradient="difference", released=True),
    ),
    "learnable": Case(lambda: temperature.Learnable(0.12), lambda a: oracle.learnable(LEARNED)),
    "robust-global": Case(
        lambda: temperature.RobustGlobal(0.12, released=True), lambda a: oracle.robust(LEARNED, 0.4, released=True)
    ),
    "robust-global-means": Case(
        lambda: temperature.RobustGlobal(0.12, rho=0.5, gamma=0.7, num_samples=SAMPLES),
        lambda a: oracle.robust(LEARNED, 0.5),
        lambda: oracle.Individual(SAMPLES, LEARNED, gamma=0.7, eta=0.0, gradient="difference"),
    ),
    "warm-up-dystress-live": warm_up(
        lambda: temperature.DySTreSS(0.1, 0.2, detach=False),
        lambda a: oracle.quotient(*oracle.cosine(0.1, 0.2), False),
    ),
    "warm-up-macl": warm_up(lambda: temperature.ModelAware(), lambda a: oracle.model_aware(a, 0.1, 0.5, 0.0)),
    "warm-up-tempfree": warm_up(lambda: temperature.TemperatureFree(), lambda a: oracle.log_odds(1e-6)),
    "hardness-dystress-live": hardness(
        lambda: temperature.DySTreSS(0.1, 0.2, "shifted", detach=False),
        lambda a: oracle.quotient(*oracle.shifted(0.1, 0.2), False),
        9.0,
    ),
    "hardness-learnable": hardness(lambda: temperature.Learnable(0.12), lambda a: oracle.learnable(LEARNED), 5.0),
    "warm-up-learnable": warm_up(lambda: temperature.Learnable(0.12), lambda a: oracle.learnable(LEARNED)),
}
# One of every class: where a test is about something else than the shape of a map.
KINDS = (
    "constant",
    "dystress-cosine",
    "dystress-two-ranges-live",
    "dystress-stabilised",
    "macl",
    "ts",
    "step-second-half",
    "isogclr",
    "isogclr-difference",
    "tempfree",
    "learnable",
    "robust-global-means",
    "hardness-dystress-live",
    "warm-up-dystress-live",
)


@cache
def _built(name: str) -> temperature.Temperature:
    return CASES[name].build()


def build(name: str) -> temperature.Temperature:
    """A fresh temperature on the device; a copy, since DySTreSS looks for its monotone limit when it is built."""
    return copy.deepcopy(_built(name)).to(DEVICE)


def tolerance(name: str) -> float:
    return 1e-9 if "tempfree" in name else 1e-12


def embeddings(images: int, dim: int, *, views: int = 2, seed: int = 0) -> list[torch.Tensor]:
    """Views that share a direction, so that positives are more similar than negatives."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(images, dim, generator=generator, dtype=torch.float64)
    noise = [torch.randn(images, dim, generator=generator, dtype=torch.float64) for _ in range(views)]
    return [(shared + 0.7 * own).to(DEVICE) for own in noise]


def trained_on(views: list[torch.Tensor]) -> list[torch.Tensor]:
    """The views with gradient: a loss learns from no others."""
    return [view.requires_grad_() for view in views]


def indices(images: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed))[:images].to(DEVICE)


def kept(loss: ContrastiveLoss) -> list[torch.nn.Module]:
    """What holds the table of each side, or the one of all anchors."""
    (*tables,) = getattr(loss.temperature, "means", loss.temperatures)
    return tables if loss.layout == "both_ways" else tables[:1]


class Pair:
    """A loss of the package and the oracle's, with the tables that either keeps."""

    def __init__(
        self,
        name: str,
        objective: str,
        *,
        queue_size: tuple[int, int] | None = None,
        layout: str = "views",
        engine: str = "auto",
        labels: torch.Tensor | None = None,
        **settings: float,
    ) -> None:
        case = CASES[name]
        self.loss = ContrastiveLoss(
            build(name), objective=objective, queue_size=queue_size, layout=layout, engine=engine, **settings
        )
        self.loss.to(DEVICE).double()
        self.labels = labels
        self.name, self.case, self.objective, self.settings = name, case, objective, settings
        self.tables = oracle.Tables(*(case.tables() for _ in kept(self.loss))) if case.tables else None
        for table in self.tables.tables if self.tables and layout == "both_ways" else ():
            table.gradient = "difference"

    def with_history(self, first: int = 0) -> Pair:
        """Tables as in the middle of a training: different temperatures, and every third sample not yet visited."""
        tables = self.tables.tables if self.tables else ()
        for number, (own, table) in enumerate(zip(kept(self.loss), tables, strict=False), start=first):
            if hasattr(own, "tau"):
                table.tau = torch.linspace(0.06, 0.5 - 0.2 * number, SAMPLES, dtype=torch.float64).tolist()
                table.u = torch.linspace(-1, 1, SAMPLES, dtype=torch.float64).tolist()
                own.tau.copy_(torch.tensor(table.tau, dtype=torch.float64))
                own.u.copy_(torch.tensor(table.u, dtype=torch.float64))
            table.s = [None if i % 3 == number else 0.5 + i / SAMPLES for i in range(SAMPLES)]
            own.log_s.copy_(torch.tensor([math.log(s or 1) for s in table.s], dtype=torch.float64))
            own.visited.copy_(torch.tensor([s is not None for s in table.s]))
        return self

    def package(self, views, index, **more):
        """The value, and the gradient with respect to every view; `by_parameter` keeps that of the parameters."""
        leaves = [view.detach().clone().requires_grad_() for view in views]
        value = self.loss(*leaves, index=index, epoch=EPOCH, labels=self.labels, **more)
        inputs = [*leaves, *self.loss.parameters()]
        gradients = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
        self.by_parameter = gradients[len(leaves) :]
        return value.detach(), gradients[: len(leaves)]

    def oracle(self, views, index):
        views, index = [view.tolist() for view in views], index.tolist()
        keys = self.loss.queue.keys.tolist() if self.loss.queue is not None else None

        def maps(row, alignment):
            if self.case.maps is None:
                found = oracle.constant(self.tables.tau(row, [index]))
            else:
                found = self.case.maps(alignment, *([index[row.image]] if self.case.by_sample else []))
            return (found, found) if isinstance(found, oracle.Map) else found

        labels = None if self.labels is None else self.labels.tolist()
        where = {"keys": keys, "sides": self.loss.layout, "labels": labels}
        running = self.tables.running([index]) if self.tables is not None else None
        result = oracle.loss(views, maps, self.objective, running=running, **where, **self.settings)
        if self.tables is not None:
            self.tables.update([index], views, **where)
        return result


def assert_close(actual, expected, tolerance: float, *, terms: float = 0.0) -> None:
    """No entry is off by more than `tolerance` times the largest entry.

    `terms` is the size of what the entries are a difference of, where they may cancel.
    """
    actual, expected = (torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in (actual, expected))
    assert actual.shape == expected.shape
    error, largest = (actual - expected).abs().max().item(), max(terms, expected.abs().max().item())
    assert error <= tolerance * largest, f"off by {error:.3g} of {largest:.3g}"


def assert_result(pair: Pair, found, expected, exactly: float | None = None) -> None:
    exactly = exactly or tolerance(pair.name)
    value, gradients = found
    # These values are differences of terms of the size of a cosine or of a logit, exactly 0 where they agree.
    assert_close(value, expected.value, exactly, terms=0.0 if pair.objective in ("ntxent", "macl") else 1.0)
    assert_close(torch.stack(gradients), expected.gradients, exactly)
    for gradient in pair.by_parameter:
        assert_close(gradient, expected.log_tau, exactly, terms=1.0)


def assert_agree(pair: Pair, views, index) -> None:
    expected = pair.oracle(views, index)  # first: the package writes to its queue
    assert_result(pair, pair.package(views, index), expected)


def assert_tables_equal(loss, tables: oracle.Tables, tolerance: float = 1e-12) -> None:
    for own, table in zip(kept(loss), tables.tables, strict=True):
        assert_table_equal(own, table, tolerance)


def assert_table_equal(temperature, reference, tolerance: float) -> None:
    assert temperature.visited.tolist() == [s is not None for s in reference.s]
    seen = [i for i, s in enumerate(reference.s) if s is not None]
    if hasattr(temperature, "tau"):
        assert_close(temperature.tau, reference.tau, tolerance)
        assert_close(temperature.u, reference.u, tolerance)
    assert_close(temperature.log_s[seen], [math.log(reference.s[i]) for i in seen], tolerance)
