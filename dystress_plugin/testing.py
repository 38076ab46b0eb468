"""Whether a temperature keeps its contract: for the tests of packages that bring one of their own."""

from __future__ import annotations

import copy
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, multiprocessing
from torch import distributed as dist

from dystress_plugin.contrastive import ContrastiveLoss
from dystress_plugin.embeddings import normalize
from dystress_plugin.engine import blockwise, dense
from dystress_plugin.errors import first_line
from dystress_plugin.layout import LAYOUTS, Block, queue
from dystress_plugin.objectives import OBJECTIVES
from dystress_plugin.rows import NegativeStats, RowStats
from dystress_plugin.temperature.base import Batch, Temperature
from dystress_plugin.temperature.maps import LogitMap, LogitMaps, PartsReader

IMAGES, DIM, TILE = 6, 5, 5  # a tile of five rows cuts a batch unevenly
EPOCHS = (0.0, 12.5, 500.0)  # the first, one within a schedule, one beyond most
EXACT = 1e-9  # of float64
Build = Callable[[], Temperature]
_T = TypeVar("_T")


class ContractError(AssertionError):
    """A temperature does not do what losses and hosts rely on: what, and what to do about it, in one line."""


def check_temperature(temperature: Temperature | Build, *, distributed: bool = True) -> None:
    """Passes where a temperature keeps its contract, so that every objective, layout, engine and host can use it.

    Checked are, in float64 unless said otherwise: what the class says of itself; its maps (slope, gain, bound, rows,
    parts); that both engines agree in value and gradient, in every layout, and float32 with float64; that only `update`
    changes it; that the order of a batch means nothing; that copies, pickles and state dicts go on bit for bit; and
    that it is the same on two ranks that saw different batches.

    Args:
        temperature: an instance, which is left as it is, or a function that builds one, such as a class, or
            `lambda: YourTemperature(num_samples=50)`.
        distributed: whether to start two processes, for a temperature with parameters or buffers. They have to be able
            to import its class; in a script, call this under `if __name__ == "__main__":`.

    Raises:
        ContractError: at the first clause that is broken.
        TypeError: for what is no temperature.

    Examples:
        >>> check_temperature(YourTemperature(tau=0.1))
    """
    build = partial(copy.deepcopy, temperature) if isinstance(temperature, Temperature) else temperature
    first = build() if callable(build) else None
    if not isinstance(first, Temperature):
        raise TypeError(f"temperature={temperature!r} must be a Temperature, or a function that builds one.")
    build = partial(_seeded, build)
    name = type(first).__name__
    checks = [_declarations, _graph, _maps, _trace, _own_loss, _order, _copies, _table, _engines, _single_precision]
    if distributed and (list(first.buffers()) or list(first.parameters())):
        checks.append(_ranks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it has to say to the tiny batches of these checks
        for check in checks:
            with _wrapped(name, f"check {check.__name__[1:]!r}"):
                check(build, name)


@contextmanager
def _wrapped(where: str, doing: str, remedy: str = "") -> Iterator[None]:
    """Another error within becomes one of the contract."""
    try:
        yield
    except ContractError:
        raise
    except Exception as error:  # whatever its code may raise
        fault = f"{type(error).__name__}: {first_line(error)}"
        raise ContractError(f"{where}: {doing} raised {fault}{remedy and f' {remedy}.'}") from error


def _require(condition: bool, where: str, what: str, remedy: str) -> None:
    if not condition:
        raise ContractError(f"{where}: {what}. {remedy}.")


# What temperatures are tried on


def _seeded(function: Callable[[], _T], seed: int = 0) -> _T:
    """What a function returns that may draw random numbers, as dropout does; without a trace in the generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return function()


def _views(images: int = IMAGES, number: int = 2, seed: int = 0) -> list[Tensor]:
    """Embeddings of images that share a direction, so that positives are more similar than negatives."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(images, DIM, generator=generator, dtype=torch.float64)
    return [shared + 0.7 * torch.randn(images, DIM, generator=generator, dtype=torch.float64) for _ in range(number)]


def _index(temperature: Temperature, images: int = IMAGES, seed: int = 0) -> Tensor:
    """Sample numbers, the last of which occurs twice."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(temperature.num_samples or 50, (images,), generator=generator)
    index[-1] = index[0]
    return index


class _Seen(NamedTuple):
    """What the loss asks of a temperature in one batch."""

    blocks: list[Block]
    batch: Batch
    maps: LogitMaps
    stats: RowStats


def _see(
    temperature: Temperature,
    units: Tensor,
    *,
    layout: str = "views",
    index: Tensor | None = None,
    epoch: float | None = EPOCHS[1],
    with_cosine: bool = True,
) -> _Seen:
    if layout == "queue":
        blocks = queue(units, normalize(_views(9, seed=7)[0]).to(units.dtype))
    else:
        blocks = LAYOUTS[layout](units, gather=False)
    positive_cosine = torch.cat([block.positive_cosine for block in blocks])
    views = len(positive_cosine) // units.shape[1]
    index = index.repeat(views) if index is not None else None
    anchors = torch.cat([block.anchors for block in blocks]).detach()
    batch = Batch(positive_cosine.detach(), index, epoch, views, torch.mean, layout, anchors)
    maps = _seeded(lambda: temperature.prepare(batch))
    parts = [
        dense.negative_stats(
            block.anchors, block.candidates, block.excluded, maps.negative.rows(rows), want_cosine=with_cosine
        )
        for rows, block in _with_rows(blocks)
    ]
    stats = RowStats(
        positive=maps.positive.logit(positive_cosine).logsumexp(1),
        positive_logit=maps.positive.logit(positive_cosine).mean(1),
        negative=torch.cat([part.negative for part in parts]),
        positive_cosine=positive_cosine.mean(1),
        negative_cosine=torch.cat([part.negative_cosine for part in parts]) if with_cosine else None,  # type: ignore[misc]
        num_negatives=blocks[0].num_negatives,
    )
    return _Seen(blocks, batch, maps, stats)


def _with_rows(blocks: Sequence[Block]) -> Iterator[tuple[slice, Block]]:
    start = 0
    for block in blocks:
        yield slice(start, start + len(block.anchors)), block
        start += len(block.anchors)


def _units(number: int = 2, seed: int = 0) -> Tensor:
    return normalize(torch.cat(_views(number=number, seed=seed))).view(number, IMAGES, DIM)


def _train(
    temperature: Temperature, seeds: Sequence[int], *, gather: bool = False, images: int = IMAGES
) -> list[Tensor]:
    """Learning steps, one a seed; the values of the loss."""
    loss = ContrastiveLoss(temperature, gather_distributed=gather).train()
    parameters = [parameter for parameter in temperature.parameters() if parameter.requires_grad]
    values = []
    for step, seed in enumerate(seeds):
        views = [view.requires_grad_() for view in _views(images, seed=seed)]
        index = _index(temperature, images, seed) if temperature.needs_index else None
        value = _seeded(partial(loss, *views, index=index, epoch=EPOCHS[1] + step), step)
        gradients = torch.autograd.grad(value, [*views, *parameters], allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients[len(views) :], strict=True):
                parameter.sub_(gradient, alpha=0.01)
        values.append(value.detach())
    return values


def _trained(build: Build) -> Temperature:
    """In the middle of a training, so that rows and tables are not all alike."""
    temperature = build().double()
    _train(temperature, (1, 2, 3))
    return temperature


def _future(temperature: Temperature) -> list[Tensor]:
    """All that a training shows from here on."""
    values = _train(temperature, (3, 4))
    return [*values, *(value.clone() for value in temperature.state_dict().values())]


def _same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return len(found) == len(expected) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(found, expected, strict=True)
    )


def _off(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest entry; infinite for what cannot be compared."""
    if found.shape != expected.shape or not found.isfinite().all():
        return float("inf")
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


# The clauses


def _declarations(build: Build, name: str) -> None:
    """What the class says of itself is what it does."""
    temperature = build()
    _require(
        temperature.default_objective in OBJECTIVES,
        f"{name}.default_objective",
        f"is {temperature.default_objective!r}",
        f"Choose from {', '.join(OBJECTIVES)}",
    )
    _require(
        all(isinstance(concern, str) for concern in temperature.concerns(10.0)),
        f"{name}.concerns",
        f"gives {temperature.concerns(10.0)!r} for 10 epochs",
        "Give a list of sentences, an empty one where there is no concern",
    )
    every = {"index": _index(temperature), "epoch": EPOCHS[1], "with_cosine": True}
    for flag, without in (
        ("needs_index", {"index": None}),
        ("needs_epoch", {"epoch": None}),
        ("needs_negative_cosine", {"with_cosine": False}),
    ):
        if not getattr(temperature, flag):
            lacking = f"a batch without what {flag} = False says it can do without"
            with _wrapped(name, lacking, f"Set {flag} = True"):
                learner = build().double()
                seen = _see(learner, _units(), **{**every, **without})  # type: ignore[arg-type]
                learner.running_mean(seen.stats, seen.batch)
                learner.update(seen.stats, seen.batch)


def _graph(build: Build, name: str) -> None:
    """State holds no graph of the batch that moved it."""
    learner = build().double()
    seen = _see(learner, _units().requires_grad_(), index=_index(learner))
    learner.update(seen.stats, seen.batch)
    _require(
        not any(value.requires_grad for value in learner.buffers()),
        f"{name}.update",
        "keeps the graph of a batch in its state",
        "Decorate it with torch.no_grad()",
    )


def _own_loss(build: Build, name: str) -> None:
    """A loss of its own is worth nothing."""
    temperature = _trained(build)
    seen = _see(temperature, _units(), index=_index(temperature))
    found = temperature.own_loss(seen.maps, seen.stats, seen.batch)
    _require(
        found is None or (found.shape == seen.stats.negative.shape and not bool(found.any())),
        f"{name}.own_loss",
        "is neither None nor a zero a row",
        "Return G * (tau - tau.detach()), (rows,), with G detached",
    )


def _maps(build: Build, name: str) -> None:
    """The maps of a batch, in every epoch."""
    temperature = _trained(build)
    for epoch in EPOCHS:
        seen = _see(temperature, _units(), index=_index(temperature), epoch=epoch)
        _require(
            isinstance(seen.maps, LogitMaps) and all(isinstance(map_, LogitMap) for map_ in seen.maps),
            f"{name}.prepare",
            f"returns {type(seen.maps).__name__}",
            "Return LogitMaps(positive, negative), twice the same map unless negatives have their own",
        )
        for map_ in seen.maps:
            _map(map_, len(seen.batch.positive_cosine), f"{name}'s {type(map_).__name__}")


def _map(map_: LogitMap, rows: int, where: str) -> None:
    generator = torch.Generator().manual_seed(0)
    cosine = 1.9 * torch.rand(rows, 9, generator=generator, dtype=torch.float64) - 0.95
    _values(map_, cosine, where)
    _slope(map_, cosine, where)
    _rows(map_, cosine, where)
    _parts(map_, cosine, where)


def _values(map_: LogitMap, cosine: Tensor, where: str) -> None:
    kept = cosine.clone()
    for dtype in (torch.float64, torch.float32):
        for method in ("logit", "slope", "temperature"):
            found = getattr(map_, method)(cosine.to(dtype))
            _require(
                found.shape == cosine.shape and found.dtype == dtype,
                f"{where}.{method}",
                f"turns {tuple(cosine.shape)} {dtype} into {tuple(found.shape)} {found.dtype}",
                "Return one number a cosine, in its dtype: parameters of rows are (rows, 1), and go .to(cosine.dtype)",
            )
            _require(bool(found.isfinite().all()), f"{where}.{method}", "is not finite within (-1, 1)", "Hold it")
        ends = torch.linspace(-1, 1, 41, dtype=dtype).expand(len(cosine), -1)
        largest = map_.logit(ends).abs().max().item()
        _require(
            largest <= map_.bound * (1 + 8 * torch.finfo(dtype).eps),
            f"{where}.bound",
            f"is {map_.bound:g}, and a logit is {largest:g}",
            "Give a number that no |a(s)| exceeds, s in [-1, 1], or exponentials overflow",
        )
    _require(torch.equal(cosine, kept), where, "overwrites the cosines that it is given", "Work on a copy")
    _require(
        bool((map_.temperature(cosine) > 0).all()),
        f"{where}.temperature",
        "is not positive everywhere",
        "Give the temperature at each cosine; where the logit falls, 1 / slope is none",
    )
    _require(
        _off(map_.logit(cosine.flip(1)).flip(1), map_.logit(cosine)) < EXACT,
        f"{where}.logit",
        "depends on the other cosines of a row",
        "Compute what a whole batch decides in `prepare`: a map is evaluated on any tile",
    )


def _slope(map_: LogitMap, cosine: Tensor, where: str) -> None:
    leaf = cosine.clone().requires_grad_()
    logit = map_.logit(leaf)
    (expected,) = torch.autograd.grad(logit.sum(), leaf, allow_unused=True, materialize_grads=True)
    off = _off(map_.slope(cosine), expected)
    _require(
        off < EXACT,
        f"{where}.slope",
        f"is off by {off:.2g} from the derivative that autograd finds in `logit`",
        "Give that one; where `logit` detaches the temperature, 1 / tau",
    )
    gain = map_.gain
    _require(0 < gain < float("inf"), f"{where}.gain", f"is {gain}", "Give a number above 0, mostly 1")
    for work in ("none", "new", "in place"):
        scaled = gain * cosine
        tiles = scaled if work == "in place" else torch.empty_like(scaled), torch.empty_like(scaled)
        with torch.no_grad():
            found, times_slope = map_.logit_and_slope(scaled, None if work == "none" else tiles)
            off = _off(found.clone(), logit.detach())
            scaled.fill_(7.0)  # engines overwrite it by then
            tile = torch.full_like(cosine, 3.0)
            times_slope(tile)
        _require(
            off < EXACT and _off(gain * tile, 3 * expected) < EXACT,
            f"{where}.logit_and_slope",
            "disagrees with `logit` and `slope`",
            "Take gain * s; return a(s), and a function that multiplies a tile in place with slope / gain",
        )


def _rows(map_: LogitMap, cosine: Tensor, where: str) -> None:
    whole, slopes = map_.logit(cosine), map_.slope(cosine)
    remedy = "Return the map with each (rows, 1) tensor cut to tensor[rows]"
    for cut in (slice(0, 2), slice(3, 4), slice(4, None), slice(0, None)):
        which = f"map of rows {cut.start} to {cut.stop or len(cosine)}"
        with _wrapped(f"{where}.rows", f"does not cut: its {which}", remedy):
            part = map_.rows(cut)
            found = part.logit(cosine[cut]), part.slope(cosine[cut])
        _require(
            _off(found[0], whole[cut]) < EXACT and _off(found[1], slopes[cut]) < EXACT,
            f"{where}.rows",
            f"does not cut: its {which} is not that of these rows",
            remedy,
        )
    if map_.rowless:
        remedy = "Return False where a parameter is (rows, 1)"
        with _wrapped(f"{where}.rowless", "is True, and a tile of other rows", remedy):
            logit = map_.logit(cosine[:1].expand(3 * len(cosine), -1))  # of more rows than the batch has
        _require(bool((logit == logit[0]).all()), f"{where}.rowless", "is True, and rows differ", remedy)


def _parts(map_: LogitMap, cosine: Tensor, where: str) -> None:
    parts = map_.parts()
    if parts is None:
        return
    with _wrapped(f"{where}.parts", "to put its parts together again"):
        again = PartsReader(*parts).map()
    _require(
        type(again) is type(map_) and _off(again.logit(cosine), map_.logit(cosine)) < EXACT,
        f"{where}.parts",
        f"gives pieces that from_parts makes another {type(again).__name__} of",
        "Give both, or neither: a subclass of a map with parts needs its own, or `parts` that returns None",
    )
    _require(
        type(map_).slope is not LogitMap.slope,
        f"{where}.parts",
        "is there, and `slope` is not, which compiled tiles cannot leave to autograd",
        "Give `slope` in closed form, or no parts",
    )


def _trace(build: Build, name: str) -> None:
    """Whatever a loss asks, only what is learned from changes the temperature."""
    _require(
        _same(_future(_trained(build)), _future(_trained(build))),
        name,
        "gives different results for the same batches",
        "Draw nothing but from torch's own generator, and read no clock",
    )

    def prepare(temperature: Temperature) -> None:
        _see(temperature, _units(seed=9), index=_index(temperature, seed=9), epoch=EPOCHS[2])

    def running_mean(temperature: Temperature) -> None:
        seen = _see(temperature, _units(seed=9), index=_index(temperature, seed=9))
        before = _future_of_maps(temperature)
        found = temperature.running_mean(seen.stats, seen.batch)
        _require(
            found is None or (found.shape == seen.stats.negative.shape and bool(found.isfinite().all())),
            f"{name}.running_mean",
            "is neither None nor a finite number a row",
            "Return its logarithm, (rows,)",
        )
        _require(_same(before, _future_of_maps(temperature)), f"{name}.running_mean", "changes the maps", remedy)

    def evaluate(temperature: Temperature) -> None:
        loss = ContrastiveLoss(temperature).eval()
        loss(*_views(seed=9), index=_index(temperature, seed=9), epoch=EPOCHS[2])

    remedy = "Move state in `update` alone, which is called for batches that are learned from"
    for asked, action in (("prepare", prepare), ("running_mean", running_mean), ("prepare", evaluate)):
        touched = _trained(build)
        action(touched)
        _require(
            _same(_future(touched), _future(_trained(build))),
            f"{name}.{asked}",
            "leaves a trace: what follows differs from what follows without it",
            remedy,
        )


def _future_of_maps(temperature: Temperature) -> list[Tensor]:
    seen = _see(temperature, _units(seed=8), index=_index(temperature, seed=8))
    return [seen.stats.positive.detach(), seen.stats.negative.detach()]


def _order(build: Build, name: str) -> None:
    """Images may come in any order."""
    loss = ContrastiveLoss(_trained(build)).eval()
    index, views = _index(loss.temperature), _views()
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))
    values = [
        loss(*(view[to] for view in views), index=index[to], epoch=EPOCHS[1]) for to in (torch.arange(IMAGES), order)
    ]
    _require(
        _off(values[1], values[0]) < EXACT,
        name,
        "gives the same images in another order another loss",
        "Find a sample in a table by `batch.index`, not by its place in the batch",
    )


def _copies(build: Build, name: str) -> None:
    """A copy goes on bit for bit, and without its original."""

    def load(original: Temperature) -> Temperature:
        fresh = build().double()
        fresh.load_state_dict(original.state_dict())
        return fresh

    for how, duplicate, remedy in (
        ("copy.deepcopy", copy.deepcopy, "Keep nothing in it that cannot be copied"),
        (
            "pickle",
            lambda original: pickle.loads(pickle.dumps(original)),
            "Keep no lambda, generator or open file in it, and define its class at the top of a module",
        ),
        ("a state_dict", load, "Register all that `update` moves as a buffer or parameter"),
    ):
        original = _trained(build)
        with _wrapped(name, f"does not survive {how}, which", remedy):
            again = duplicate(original)  # type: ignore[no-untyped-call]
        futures = _future(again), _future(original)
        _require(_same(*futures), name, f"does not go on as before after {how}", remedy)


def _table(build: Build, name: str) -> None:
    """A table of samples tells its length, and takes another."""
    temperature = _trained(build)
    length = temperature.num_samples
    if length is None:
        return
    _require(temperature.needs_index, f"{name}.needs_index", f"is False, with a table of {length}", "Set it to True")
    if type(temperature).resize is Temperature.resize:
        return  # it is given, not learned
    _require(
        temperature.has_learned,
        f"{name}.has_learned",
        "is False for a table that batches moved",
        "Say whether it holds more than it started with: hosts refuse to resize one that does",
    )
    temperature.resize(length + 3)
    _require(
        temperature.num_samples == length + 3 and not temperature.has_learned,
        f"{name}.resize",
        f"to {length + 3} leaves num_samples={temperature.num_samples}, has_learned={temperature.has_learned}",
        "Register fresh buffers of the new length",
    )
    seen = _see(temperature, _units(), index=torch.full((IMAGES,), length + 2))  # the last of the new ones
    temperature.update(seen.stats, seen.batch)


def _engines(build: Build, name: str) -> None:
    """Tiles and the whole matrix agree, in every layout."""
    for layout, views in (("views", 2), ("views", 3), ("one_way", 3), ("both_ways", 2), ("queue", 2)):
        expected = _negatives(build, dense.negative_stats, layout, views)
        for keep_bytes in (0, 2**20):
            tiles = partial(blockwise.negative_stats, tile=TILE, keep_bytes=keep_bytes)
            for what, found, whole in zip(
                ("values", "gradients by embeddings", "gradients by parameters"),
                _negatives(build, tiles, layout, views),
                expected,
                strict=True,
            ):
                _require(
                    whole.numel() == 0 or _off(found, whole) < EXACT,
                    f"{name} in layout {layout!r}",
                    f"engine='blockwise' and 'dense' disagree in {what}",
                    "Give the map `parts` and `parameter_term`, or compose it of Scaled"
                    if "parameters" in what
                    else "Look at `rows` and `logit_and_slope` of its negative map",
                )


def _negatives(
    build: Build, engine: Callable[..., NegativeStats], layout: str, views: int
) -> tuple[Tensor, Tensor, Tensor]:
    """L and N of all rows; the gradients of a sum of them, by embeddings and by parameters."""
    temperature = _trained(build)
    units = _units(views).requires_grad_()
    seen = _see(temperature, units, layout=layout, index=_index(temperature))
    found = [
        value
        for rows, block in _with_rows(seen.blocks)
        for value in engine(
            block.anchors, block.candidates, block.excluded, seen.maps.negative.rows(rows), want_cosine=True
        )[:2]
    ]
    values = torch.cat(found)  # type: ignore[arg-type]
    total = (values * torch.linspace(-1, 2, len(values), dtype=values.dtype)).sum()
    parameters = [parameter for parameter in temperature.parameters() if parameter.requires_grad]
    by_units, *others = torch.autograd.grad(total, [units, *parameters], allow_unused=True, materialize_grads=True)
    return values.detach(), by_units, torch.cat([units.new_empty(0), *(gradient.flatten() for gradient in others)])


def _single_precision(build: Build, name: str) -> None:
    """float32 is float64 rounded."""
    exact, single = _trained(build), _trained(build).float()
    found = []
    for temperature, dtype in ((exact, torch.float64), (single, torch.float32)):
        loss = ContrastiveLoss(temperature, engine="blockwise").eval()
        views = [view.to(dtype).requires_grad_() for view in _views()]
        value = loss(*views, index=_index(temperature), epoch=EPOCHS[1])
        found.append((value, torch.stack(torch.autograd.grad(value, views))))
    bound = max(map_.bound for map_ in _see(exact, _units(), index=_index(exact)).maps)
    _require(found[1][0].dtype == torch.float32, name, "makes a float32 loss another", "Return the cosine's dtype")
    for what, a, b in zip(("value", "gradient"), found[1], found[0], strict=True):
        off = _off(a.detach(), b.detach())
        _require(
            off < 2e-6 * max(10.0, bound),
            name,
            f"is off by {off:.2g} in the {what} in float32",
            "Avoid differences of numbers that are nearly equal; keep tables in float64",
        )


def _ranks(build: Build, name: str) -> None:
    """Two ranks that saw different batches hold the same state."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            multiprocessing.spawn(_rank, (folder, build()), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
        except Exception as error:  # of either process, or of starting it
            last = [line for line in str(error).splitlines() if line.strip()][-1]
            raise ContractError(
                f"{name}: two processes could not learn together: {last} If they cannot import its class, move it into "
                "a module, or pass distributed=False; if one waited for the other, call collectives on every rank."
            ) from error
        states = [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]
    for gather, first, second in zip((False, True), *states, strict=True):
        differ = [key for key in first if not _same([first[key]], [second[key]])]
        _require(
            not differ,
            f"{name}.update",
            f"differs between ranks, with gather_distributed={gather}: after three batches {', '.join(differ)} do",
            "Move state by what all ranks saw: dystress_plugin.distributed.all_rows(index, ...) gives each rank all",
        )


def _rank(rank: int, folder: str, temperature: Temperature) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/start", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    states = []
    for gather in (False, True):
        learner = copy.deepcopy(temperature)
        _train(learner, [10 * rank + step for step in range(3)], gather=gather, images=IMAGES - rank)
        states.append(learner.state_dict())
    torch.save(states, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the group, and abort an interpreter that ends before them
