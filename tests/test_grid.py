"""Everything x everything: temperature x objective x layout x engine, against the double loop in float64."""

import inspect
from functools import cache, partial

import pytest
import torch
from grid import (
    CASES,
    DEVICE,
    KINDS,
    OBJECTIVES,
    SAMPLES,
    Pair,
    assert_close,
    assert_result,
    assert_tables_equal,
    embeddings,
    indices,
    tolerance,
)

from dystress_plugin import ContrastiveLoss, temperature
from dystress_plugin.engine import ENGINES
from dystress_plugin.layout import LAYOUTS as NAMED_LAYOUTS
from dystress_plugin.objectives import OBJECTIVES as NAMED_OBJECTIVES
from dystress_plugin.temperature import Temperature

DIM = 3
LAYOUTS = {
    "two-views": {},
    "three-views": {},
    "queue": {"queue_size": (11, DIM)},
    "one-way": {"layout": "one_way"},
    "both-ways": {"layout": "both_ways"},
}
# An engine that works in tiles is asked for small ones too, and once for keeping none of them for the backward pass.
TILED = [name for name, engine in ENGINES.items() if "tile" in inspect.signature(engine).parameters]
OPTIONS = {name: {} for name in ENGINES} | {f"{name}-in-fours": {"tile": 4} for name in TILED}


def engine_of(name, options, monkeypatch):
    """The name of an engine that is called with these options."""
    function = ENGINES[name]
    known = inspect.signature(function).parameters
    monkeypatch.setitem(ENGINES, "optioned", partial(function, **{k: v for k, v in options.items() if k in known}))
    return "optioned"


def batch_of(layout, images):
    return embeddings(images, DIM, views=3 if layout == "three-views" else 2), indices(images)


def pair_of(name, objective, layout, engine="auto"):
    torch.manual_seed(0)  # for the queue's keys
    return Pair(name, objective, engine=engine, **LAYOUTS[layout]).with_history()


@cache
def expectation(name, objective, layout, images):
    """The double loop's value and gradients, and its tables after the step."""
    pair = pair_of(name, objective, layout)
    return pair.oracle(*batch_of(layout, images)), pair.tables


def check(name, objective, layout, images, engine):
    expected, tables = expectation(name, objective, layout, images)
    pair = pair_of(name, objective, layout, engine)
    assert_result(pair, pair.package(*batch_of(layout, images)), expected)
    if tables is not None:
        assert_tables_equal(pair.loss, tables)


def test_the_grid_has_every_name_there_is():
    assert set(OBJECTIVES) == set(NAMED_OBJECTIVES)
    assert {own.get("layout", "views") for own in LAYOUTS.values()} == set(NAMED_LAYOUTS)
    ours = {kind for kind in vars(temperature).values() if isinstance(kind, type) and issubclass(kind, Temperature)}
    ours -= {temperature.TempNet}  # which knows the length of embeddings, and has a grid of its own
    assert {type(CASES[name].build()) for name in KINDS} == {kind for kind in ours if not inspect.isabstract(kind)}


# Of the dual one all but the second temperature is "macl".
CELLS = [(name, objective) for name in CASES for objective in OBJECTIVES if objective != "dual" or name in KINDS]


@pytest.mark.parametrize("engine", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "objective"), CELLS)
def test_value_gradient_and_tables_equal_the_double_loop(name, objective, layout, engine, monkeypatch):
    options = OPTIONS[engine]
    engine = engine_of(engine.removesuffix("-in-fours"), options, monkeypatch) if options else engine
    check(name, objective, layout, 7, engine)


# More than 2^16 entries: past where "auto" takes another engine, and odd.
BEYOND = {"two-views": 131, "three-views": 89, "queue": 5987, "one-way": 257, "both-ways": 257}


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "dense"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("objective", ["ntxent", "sogclr"])
@pytest.mark.parametrize("name", KINDS)
def test_every_engine_equals_the_dense_one_on_a_batch_beyond_the_double_loop(name, objective, layout, engine):
    expected, found = (pair_of(name, objective, layout, e) for e in ("dense", engine))
    views = embeddings(BEYOND[layout], DIM, views=3 if layout == "three-views" else 2)
    index = torch.arange(BEYOND[layout], device=DEVICE) % SAMPLES
    (value, gradients), (own_value, own_gradients) = (pair.package(views, index) for pair in (expected, found))
    assert_close(own_value, value, tolerance(name), terms=1.0)
    assert_close(torch.stack(own_gradients), torch.stack(gradients), tolerance(name))
    for own_gradient, gradient in zip(found.by_parameter, expected.by_parameter, strict=True):
        assert_close(own_gradient, gradient, 1e-12, terms=1.0)


ROWS_OF_AN_IMAGE = {"two-views": 2, "three-views": 3, "queue": 1, "one-way": 1, "both-ways": 1}
OVER = [(engine, over) for engine in ENGINES for over in ((1, 2, 3) if engine in TILED else (0,))]


@pytest.mark.parametrize(("engine", "over"), OVER)
@pytest.mark.parametrize("images", [5, 13])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", KINDS)
def test_primes_and_one_to_three_rows_over_a_tile(name, layout, images, engine, over, monkeypatch):
    options = {"tile": ROWS_OF_AN_IMAGE[layout] * images - over, "keep_bytes": 0} if over else {}
    check(name, "dclw", layout, images, engine_of(engine, options, monkeypatch))


@pytest.mark.parametrize("engine", ["dense", "blockwise-in-fours"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", KINDS)
def test_positives_one_by_one_equal_the_double_loop(name, objective, engine, monkeypatch):
    engine = engine_of(engine.removesuffix("-in-fours"), OPTIONS[engine], monkeypatch)
    pair = Pair(name, objective, engine=engine, positives="mean").with_history()
    views, index = embeddings(5, DIM, views=4), indices(5)
    expected = pair.oracle(views, index)
    assert_result(pair, pair.package(views, index), expected)
    if pair.tables is not None:
        assert_tables_equal(pair.loss, pair.tables)


LABELS = torch.tensor([4, 7, 4, 1, 7, 4])
JOINED = {"sum": "dense", "mean": "blockwise-in-fours"}
JOINS = [(objective, how) for objective in OBJECTIVES for how in JOINED if (objective, how) != ("dclw", "mean")]


@pytest.mark.parametrize(("objective", "positives"), JOINS)
@pytest.mark.parametrize("name", KINDS)
def test_positives_by_class_equal_the_double_loop(name, objective, positives, monkeypatch):
    engine = engine_of(JOINED[positives].removesuffix("-in-fours"), OPTIONS[JOINED[positives]], monkeypatch)
    pair = Pair(name, objective, engine=engine, positives=positives, labels=LABELS).with_history()
    views, index = embeddings(6, DIM), indices(6)
    expected = pair.oracle(views, index)
    assert_result(pair, pair.package(views, index), expected)
    if pair.tables is not None:
        assert_tables_equal(pair.loss, pair.tables)


@pytest.mark.parametrize("positives", JOINED)
@pytest.mark.parametrize("name", ["dystress-cosine-live", "isogclr", "learnable"])
def test_classes_some_rows_at_a_time_equal_all_at_once(name, positives, monkeypatch):
    labels = torch.arange(50) % 7
    views, index = embeddings(50, DIM), torch.arange(50)
    settings = {"positives": positives, "labels": labels}
    expected, found = (Pair(name, "ntxent", engine=engine, **settings) for engine in ("dense", "blockwise"))
    value, gradients = expected.package(views, index)
    monkeypatch.setattr("dystress_plugin.engine.positives.entries_of_a_tile", lambda device: 1300)  # 13 rows
    own_value, own_gradients = found.package(views, index)
    assert_close(own_value, value, 1e-12)
    assert_close(torch.stack(own_gradients), torch.stack(gradients), 1e-12)
    for own_gradient, gradient in zip(found.by_parameter, expected.by_parameter, strict=True):
        assert_close(own_gradient, gradient, 1e-12, terms=1.0)


def test_a_class_for_every_image_is_no_class_at_all():
    views, index = embeddings(6, DIM, views=3), indices(6)
    for objective, positives in JOINS:
        plain = Pair("dystress-cosine-live", objective, positives=positives)
        found = Pair("dystress-cosine-live", objective, positives=positives, labels=indices(6, seed=1))
        (value, gradients), (own, own_gradients) = (pair.package(views, index) for pair in (plain, found))
        assert_close(own, value, 1e-12, terms=1.0)
        assert_close(torch.stack(own_gradients), torch.stack(gradients), 1e-12, terms=1.0)


@pytest.mark.parametrize(
    ("settings", "labels", "error", "message"),
    [
        ({}, torch.zeros(4), TypeError, "labels must be an int64 tensor of classes, not torch.float32"),
        ({}, [0, 1, 2, 3], TypeError, "labels must be an int64 tensor of classes, not list"),
        ({}, torch.arange(3), ValueError, r"labels have shape \(3,\), the batch needs \(4,\)"),
        pytest.param(
            {},
            torch.full((4,), 3),
            ValueError,
            "labels are 3 for the whole batch: there is no other class",
            marks=pytest.mark.skipif(DEVICE.type != "cpu", reason="looking would wait for the device"),
        ),
        ({"layout": "one_way"}, torch.arange(4), ValueError, "this loss has layout='one_way': leave them out"),
        ({"layout": "both_ways"}, torch.arange(4), ValueError, "this loss has layout='both_ways'"),
        ({"queue_size": (8, DIM)}, torch.arange(4), ValueError, "this loss has a queue: leave them out"),
        (
            {"objective": "dclw", "positives": "mean"},
            torch.arange(4),
            ValueError,
            "objective='dclw' weighs the positives of a whole batch .* use positives='sum'",
        ),
    ],
)
def test_labels_that_cannot_be_used_raise_and_say_why(settings, labels, error, message):
    with pytest.raises(error, match=message):
        ContrastiveLoss(temperature.Constant(), **settings)(*embeddings(4, DIM), labels=labels)
