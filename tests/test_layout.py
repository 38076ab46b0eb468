import math

import pytest
import torch

from dystress_plugin import ContrastiveLoss
from dystress_plugin.layout import NOTHING, Excluded
from dystress_plugin.temperature import Constant, DySTreSS, ModelAware

SIDES = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def one_way(sides, tau):
    """NT-Xent from side 0 to every row of all other sides, by loops; `tau` gives a pair's temperature."""
    values = []
    for i, anchor in enumerate(sides[0]):
        logits = [[(s := cosine(anchor, other)) / tau(s) for other in side] for side in sides[1:]]
        total = math.fsum(math.exp(a) for side in logits for a in side)
        values.append(math.log(total) - logits[0][i])
    return math.fsum(values) / len(values)


def profile(s):
    return 0.1 + 0.05 * (1 - math.cos(math.pi * s))


@pytest.mark.parametrize("engine", ["dense", "blockwise"])
@pytest.mark.parametrize("sides", [2, 3, 4])
def test_further_sides_are_hard_negatives_of_every_anchor(sides, engine):
    views = SIDES[:sides]
    loss = ContrastiveLoss(DySTreSS(0.1, 0.2), layout="one_way", engine=engine)
    assert loss(*views).item() == pytest.approx(one_way(views, profile), rel=1e-12)


def test_the_way_back_has_no_hard_negatives():
    there, back = one_way(SIDES, profile), one_way(SIDES[:2].flip(0), profile)
    value = ContrastiveLoss(DySTreSS(0.1, 0.2), layout="both_ways")(*SIDES)
    assert value.item() == pytest.approx((there + back) / 2, rel=1e-12)


def test_hard_negatives_get_their_gradient():
    loss = ContrastiveLoss(Constant(0.1), layout="one_way", engine="dense")
    views = [side.clone().requires_grad_() for side in SIDES[:3]]
    assert torch.autograd.gradcheck(loss, views)


def test_one_anchor_with_a_hard_negative_has_a_loss():
    value = ContrastiveLoss(Constant(0.1), layout="one_way")(*SIDES[:3, :1])
    assert value.item() == pytest.approx(one_way(SIDES[:3, :1], lambda s: 0.1), rel=1e-12)


def test_pairs_shows_hard_negatives():
    pairs = ContrastiveLoss(ModelAware(), layout="one_way").pairs(*SIDES)
    assert len(pairs.positive_cosine) == 5
    assert len(pairs.negative_cosine) == 5 * (3 * 5 - 1)


def test_both_ways_with_hard_negatives_and_a_count_of_negatives_raises():
    with pytest.raises(ValueError, match="different numbers of negatives, which objective='sogclr' with Constant"):
        ContrastiveLoss(Constant(0.1), objective="sogclr", layout="both_ways")(*SIDES)


@pytest.mark.parametrize(
    ("rows", "columns", "excluded"),
    [
        (6, 6, Excluded(batch=3, images=3, start=0, copies=2)),
        (6, 15, Excluded(batch=2, images=5, start=2, copies=3)),  # gathered, three views
        (4, 14, Excluded(batch=4, images=7, start=3, copies=1)),  # a hard negative each
        (3, 4, NOTHING),
    ],
)
def test_every_tile_has_the_excluded_entries_of_the_whole(rows, columns, excluded):
    whole = torch.zeros(rows, columns)
    for i in range(rows):
        for copy in range(excluded.copies):
            whole[i, excluded.start + i % excluded.batch + copy * excluded.images] = 1
    found = excluded.columns(rows, whole.device)
    assert found.shape == (rows, excluded.copies)
    assert torch.equal(torch.zeros_like(whole).scatter(1, found, 1), whole)
    for row in range(rows):
        for column in range(columns):
            for height in range(1, rows - row + 1):
                for width in (1, 2, columns - column):
                    tile = torch.zeros(height, min(width, columns - column))
                    expected = whole[row : row + height, column : column + tile.shape[1]]
                    assert torch.equal(excluded.fill_(tile, 1, row=row, column=column), expected)
                    cut = excluded.rows(slice(row, row + height)).fill_(torch.zeros_like(tile), 1, column=column)
                    assert torch.equal(cut, expected)
