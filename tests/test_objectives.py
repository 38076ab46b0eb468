import dataclasses
import math

import pytest
import torch

from dystress_plugin.engine import RowStats
from dystress_plugin.objectives import OBJECTIVES, dcl, dclw, macl, ntxent, sogclr


def stats(positive, negative, *, log_s=None, count=6):
    def leaf(values):
        return torch.tensor(values, dtype=torch.float64, requires_grad=True)

    positive_cosine = leaf([0.1 * i for i in range(len(positive))])
    negative_cosine = leaf([0.5 - 0.1 * i for i in range(len(positive))])
    return RowStats(leaf(positive), leaf(negative), positive_cosine, negative_cosine, count, log_s)


ROWS = ([3.0, -1.0, 8.0], [2.0, 4.0, -3.0])


def gradients(value, rows):
    leaves = [rows.positive, rows.negative, rows.positive_cosine, rows.negative_cosine]
    return torch.autograd.grad(value.sum(), leaves, allow_unused=True)


def test_ntxent_is_the_cross_entropy_of_the_positive():
    rows = stats(*ROWS)
    value = ntxent(rows)
    for p, n, found in zip(*ROWS, value.tolist(), strict=True):
        assert found == pytest.approx(-math.log(math.exp(p) / (math.exp(p) + math.exp(n))), rel=1e-13)
    up, down, *cosines = gradients(value, rows)
    wrong = [1 / (1 + math.exp(p - n)) for p, n in zip(*ROWS, strict=True)]
    assert down.tolist() == pytest.approx(wrong, rel=1e-13)
    assert up.tolist() == pytest.approx([-w for w in wrong], rel=1e-13)
    assert cosines == [None, None]


def test_macl_is_the_cross_entropy_over_the_probability_of_the_negatives():
    rows = stats(*ROWS)
    for p, n, found in zip(*ROWS, macl(rows).tolist(), strict=True):
        right = math.exp(p) / (math.exp(p) + math.exp(n))
        assert found == pytest.approx(-math.log(right) / (1 - right), rel=1e-11)


def test_macl_gradient_is_that_of_the_difference():
    rows = stats(*ROWS)
    up, down, *cosines = gradients(macl(rows), rows)
    assert up.tolist() == [-1, -1, -1]
    assert down.tolist() == [1, 1, 1]
    assert cosines == [None, None]


def test_dcl_is_the_difference():
    rows = stats(*ROWS)
    value = dcl(rows)
    assert value.tolist() == [n - p for p, n in zip(*ROWS, strict=True)]
    up, down, *cosines = gradients(value, rows)
    assert (up.tolist(), down.tolist(), cosines) == ([-1, -1, -1], [1, 1, 1], [None, None])


@pytest.mark.parametrize("sigma", [0.05, 0.5, 4.0])
def test_dclw_weighs_the_positive_by_two_minus_its_share_of_the_batch(sigma):
    rows = stats(*ROWS)
    value = dclw(rows, sigma=sigma)
    energy = [math.exp(0.1 * i / sigma) for i in range(3)]
    weight = [2 - 3 * e / sum(energy) for e in energy]
    assert sum(weight) == pytest.approx(3, rel=1e-12)
    assert value.tolist() == pytest.approx([n - w * p for p, n, w in zip(*ROWS, weight, strict=True)], rel=1e-12)
    up, down, *cosines = gradients(value, rows)
    assert up.tolist() == pytest.approx([-w for w in weight], rel=1e-12)
    assert (down.tolist(), cosines) == ([1, 1, 1], [None, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dclw_takes_the_mean_over_all_ranks_where_there_is_one(dtype):
    cosine = torch.tensor([0.2, -1.0, 1.0], dtype=dtype)
    rows = RowStats(torch.ones_like(cosine), torch.zeros_like(cosine), cosine, None, 4, mean=lambda e: e.mean() * 2)
    alone = RowStats(torch.ones_like(cosine), torch.zeros_like(cosine), cosine, None, 4)
    assert torch.allclose(-dclw(rows, sigma=0.5) - 2, (-dclw(alone, sigma=0.5) - 2) / 2)
    assert dclw(rows, sigma=0.5).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dclw_of_the_least_sigma_is_finite(dtype):
    cosine = torch.tensor([-1.0, -0.99, -0.98], dtype=dtype)
    value = dclw(RowStats(torch.ones_like(cosine), torch.zeros_like(cosine), cosine, None, 4), sigma=0.01)
    energy = [math.exp((s + 1) / 0.01) for s in cosine.tolist()]
    assert value.tolist() == pytest.approx([3 * e / sum(energy) - 2 for e in energy], abs=1e-6)


@pytest.mark.parametrize("objective", [ntxent, macl, dcl])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_rows_have_a_finite_value_and_gradient(objective, dtype):
    positive = torch.tensor([0.0, 0, 0, 0, 0, 0], dtype=dtype, requires_grad=True)
    negative = torch.tensor([-1e4, -100, -29.9, 29.9, 100, 1e4], dtype=dtype)
    value = objective(RowStats(positive, negative, positive, None, 6))
    (gradient,) = torch.autograd.grad(value.sum(), positive)
    d = negative.double().tolist()
    expected = {
        ntxent: [math.log1p(math.exp(x)) if x < 500 else x for x in d],
        macl: [1.0, 1.0, 1.0, *d[3:]],
        dcl: d,
    }[objective]
    assert value.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-37)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("d", [-31.0, -30.001, -30.0, -29.999, -25.0])
def test_macl_value_has_no_step_where_its_limit_takes_over(d):
    value = macl(stats([0.0], [d])).item()
    assert value == pytest.approx(math.log1p(math.exp(d)) / math.exp(d) * (1 + math.exp(d)), rel=1e-12)


def test_ntxent_keeps_all_digits_where_softplus_rounds():
    d = 21.0
    assert ntxent(stats([0.0], [d])).item() == pytest.approx(d + math.log1p(math.exp(-d)), rel=1e-15)


def test_sogclr_without_a_running_mean_is_the_difference_of_mean_cosines():
    rows = stats(*ROWS)
    value = sogclr(rows)
    assert torch.equal(value, rows.negative_cosine - rows.positive_cosine)
    up, down, positive, negative = gradients(value, rows)
    assert (up, down) == (None, None)
    assert positive.tolist() == [-1, -1, -1]
    assert negative.tolist() == [1, 1, 1]


def test_sogclr_weighs_by_the_batch_mean_over_the_running_mean_and_keeps_the_weight_constant():
    log_s = torch.tensor([0.5, 1.0, -2.0], dtype=torch.float64)
    rows = stats(*ROWS, log_s=log_s, count=6)
    value = sogclr(rows)
    weight = [math.exp(n) / 6 / math.exp(s) for n, s in zip(ROWS[1], log_s.tolist(), strict=True)]
    expected = [w * (0.5 - 0.1 * i) - 0.1 * i for i, w in enumerate(weight)]
    assert value.tolist() == pytest.approx(expected, rel=1e-12)
    up, down, positive, negative = gradients(value, rows)
    assert (up, down) == (None, None)
    assert positive.tolist() == [-1, -1, -1]
    assert negative.tolist() == pytest.approx(weight, rel=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_says_whether_it_reads_the_negative_cosine(name):
    rows = stats(*ROWS)
    rows = dataclasses.replace(rows, soft_positive=rows.positive.detach(), soft_negative=rows.negative.detach())
    used = gradients(OBJECTIVES[name].rows(rows, OBJECTIVES[name].parameters), rows)[3] is not None
    assert OBJECTIVES[name].needs_negative_cosine == used


def test_only_sogclr_is_summed_over_the_views_of_an_image():
    assert [name for name, objective in OBJECTIVES.items() if objective.sum_over_views] == ["sogclr"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dual_is_macl_by_the_softened_share_of_the_negatives_also_where_either_is_certain(dtype):
    d, soft = torch.tensor([[-200.0, -20.0], [-3.0, -0.3], [0.5, 0.05], [90.0, 9.0]], dtype=dtype).T.contiguous()
    zero = torch.zeros_like(d)
    rows = RowStats(zero.requires_grad_(), d, zero, None, 4, soft_positive=zero.detach(), soft_negative=soft)
    value = OBJECTIVES["dual"].rows(rows, {"ratio": 10.0})
    share = torch.sigmoid(soft.double())
    exact = torch.nn.functional.softplus(d.double()) / torch.sigmoid(d.double())
    exact[0] = 1.0  # the limit
    assert torch.allclose(value.double(), share * exact, rtol=1e-6)
    (by_positive,) = torch.autograd.grad(value.sum(), rows.positive)
    assert torch.allclose(by_positive.double(), -share, rtol=1e-6)
    with pytest.raises(ValueError, match=r"ratio=.* must be at least 1"):
        OBJECTIVES["dual"].checked({"ratio": 0.5})


def test_only_dclw_and_dual_have_a_parameter():
    parameters = {name: dict(objective.parameters) for name, objective in OBJECTIVES.items() if objective.parameters}
    assert parameters == {"dclw": {"sigma": 0.5}, "dual": {"ratio": 10.0}}
    assert OBJECTIVES["dclw"].checked({}) == {"sigma": 0.5}
    assert OBJECTIVES["dclw"].checked({"sigma": 2}) == {"sigma": 2.0}


@pytest.mark.parametrize(
    ("sigma", "error", "message"),
    [
        (0.0, ValueError, "sigma=0.0 must be at least 0.01"),
        (0.009, ValueError, "sigma=0.009 must be at least 0.01"),
        (math.nan, ValueError, "sigma=nan must be finite"),
        ("1", TypeError, "sigma='1' must be a number, not str"),
    ],
)
def test_bad_parameters_raise_and_name_the_value(sigma, error, message):
    with pytest.raises(error, match=message):
        OBJECTIVES["dclw"].checked({"sigma": sigma})
