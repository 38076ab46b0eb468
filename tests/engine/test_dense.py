import pytest
import torch
from grid import CASES, DEVICE, EPOCH, assert_close, build, embeddings, tolerance
from oracle import naive_row_stats

from dystress_plugin.engine import ENGINES
from dystress_plugin.layout import NOTHING, Excluded
from dystress_plugin.temperature.base import Batch

dense = ENGINES["dense"]


def units(rows, dim, seed=0):
    return torch.nn.functional.normalize(embeddings(rows, dim, seed=seed)[0], dim=1)


def map_of(name, rows, side="negative"):
    index = torch.arange(rows, device=DEVICE)
    batch = Batch(torch.full((rows, 1), 0.7, dtype=torch.float64, device=DEVICE), index, EPOCH, 1, torch.mean)
    temperature = build(name)
    if CASES[name].maps is None:
        temperature.tau[:rows] = torch.linspace(0.06, 0.5, rows)
    return getattr(temperature.prepare(batch), side)


def excluded_of(anchor, excluded):
    return [excluded.start + anchor % excluded.batch + copy * excluded.images for copy in range(excluded.copies)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("rows", "columns", "excluded"),
    [(4, 9, Excluded(2, 4, 1, 2)), (3, 4, Excluded(3, 4, 1, 1)), (3, 5, NOTHING), (1, 2, Excluded(1, 2, 1, 1))],
)
def test_rows_equal_the_naive_double_loop(name, rows, columns, excluded):
    anchors, candidates = units(rows, 5), units(columns, 5, seed=1)
    map_ = map_of(name, rows)
    found = dense(anchors, candidates, excluded, map_, want_cosine=True)
    for i in range(rows):
        row_map = map_.rows(slice(i, i + 1))

        def logit(s, row_map=row_map):
            return row_map.logit(torch.tensor([[s]], dtype=torch.float64, device=DEVICE)).item()

        _, negative, _, negative_cosine = naive_row_stats(
            anchors[i : i + 1].tolist(), candidates.tolist(), [[0]], [excluded_of(i, excluded)], logit
        )[0]
        assert_close(found.negative[i], negative, tolerance(name))
        assert_close(found.negative_cosine[i], negative_cosine, tolerance(name))


def test_naive_double_loop_tells_positives_from_negatives():
    anchors, candidates = [[1.0, 0.0]], [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]]
    (row,) = naive_row_stats(anchors, candidates, [[1, 2]], [[0, 1, 2]], lambda s: 2 * s)
    assert row == pytest.approx((torch.tensor([1.6, 1.2]).logsumexp(0).item(), 0.0, 0.7, 0.0), rel=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_softmax_weights_times_slopes_and_plain_softmax_weights(engine, name):
    anchors, candidates = units(4, 3).requires_grad_(), units(6, 3, seed=1).requires_grad_()
    excluded = Excluded(batch=2, images=6, start=3, copies=1)
    map_ = map_of(name, 4)
    found = ENGINES[engine](anchors, candidates, excluded, map_, want_cosine=True)

    cosine = (anchors @ candidates.T).detach()
    out = torch.tensor([[3], [4], [3], [4]], device=DEVICE)
    weight = torch.softmax(map_.logit(cosine).scatter(1, out, -torch.inf), 1)
    for statistic, coefficient in ((found.negative, weight * map_.slope(cosine)), (found.negative_cosine, weight)):
        by_anchors, by_candidates = torch.autograd.grad(statistic.sum(), (anchors, candidates), retain_graph=True)
        assert_close(by_anchors, coefficient @ candidates.detach(), tolerance(name))
        assert_close(by_candidates, coefficient.T @ anchors.detach(), tolerance(name))


@pytest.mark.parametrize("engine", ENGINES)
def test_mean_cosine_is_left_out_unless_wanted(engine):
    arguments = units(2, 3), units(4, 3), Excluded(2, 4, 0, 1), map_of("constant", 2)
    assert ENGINES[engine](*arguments, want_cosine=False).negative_cosine is None
    assert ENGINES[engine](*arguments, want_cosine=True).negative_cosine.shape == (2,)
