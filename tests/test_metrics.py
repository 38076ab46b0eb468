import copy
import math

import oracle
import pytest
import torch
from grid import assert_close, embeddings

import dystress_plugin as dp
from dystress_plugin import ContrastiveLoss
from dystress_plugin.metrics import alignment, inter_class_uniformity, temperature_summary, tolerance, uniformity
from dystress_plugin.temperature import DySTreSS

LABELS = torch.tensor([0, 2, 2, 0, 7, 2, 0, 0, 7])


def units(z):
    return [oracle.unit(row)[0] for row in z.tolist()]


def log_mean_potential(vectors, include_self=False):
    kernels = [
        math.exp(-2 * math.fsum((a - b) ** 2 for a, b in zip(u, v, strict=True)))
        for i, u in enumerate(vectors)
        for j, v in enumerate(vectors)
        if include_self or i != j
    ]
    return math.log(math.fsum(kernels) / len(kernels))


def test_alignment_is_the_mean_cosine_of_pairs():
    z0, z1 = embeddings(9, 5)
    expected = math.fsum(oracle.dot(a, b) for a, b in zip(units(z0), units(z1), strict=True)) / 9
    assert_close(alignment(z0, z1), expected, 1e-13)


def test_alignment_is_one_where_pairs_coincide_and_minus_one_where_they_oppose():
    z = embeddings(4, 3)[0]
    assert_close(alignment(z, 5 * z), 1, 1e-13)
    assert_close(alignment(z, -0.1 * z), -1, 1e-13)


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("shape", [(2, 3), (9, 5), (5, 1)])
def test_uniformity_is_the_log_mean_potential(include_self, shape):
    z = embeddings(*shape)[0]
    assert_close(uniformity(z, include_self=include_self), log_mean_potential(units(z), include_self), 1e-12)


def test_uniformity_excludes_a_row_with_itself_unless_told():
    z = embeddings(9, 5)[0]
    assert uniformity(z) < uniformity(z, include_self=True)
    assert_close(uniformity(torch.eye(2)), -4, 1e-6)
    assert_close(uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])), -8, 1e-6)


def test_uniformity_of_coinciding_rows_is_zero():
    assert abs(uniformity(torch.ones(3, 4).double()).item()) < 1e-14


def test_tolerance_is_the_mean_cosine_of_pairs_of_one_class():
    z = embeddings(9, 5)[0]
    u, y = units(z), LABELS.tolist()
    cosines = [oracle.dot(u[i], u[j]) for i in range(9) for j in range(9) if i != j and y[i] == y[j]]
    assert_close(tolerance(z, LABELS), math.fsum(cosines) / len(cosines), 1e-12)


def test_zero_rows_count_with_cosine_zero_in_tolerance():
    assert_close(tolerance(torch.tensor([[1.0, 0], [3.0, 0], [0, 0]]), torch.zeros(3).long()), 1 / 3, 1e-6)


def test_inter_class_uniformity_is_that_of_normalised_centroids():
    z = embeddings(9, 5)[0]
    u = units(z)
    centroids = []
    for label in (0, 2, 7):
        members = [u[i] for i in range(9) if LABELS[i] == label]
        centroids.append(oracle.unit([math.fsum(column) / len(members) for column in zip(*members, strict=True)])[0])
    assert_close(inter_class_uniformity(z, LABELS), log_mean_potential(centroids), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_measures_are_computed_in_float32_at_least(dtype):
    z0, z1 = (view.to(dtype) for view in embeddings(9, 5))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for value, same in [
        (alignment(z0, z1), alignment(z0.to(wide), z1.to(wide))),
        (uniformity(z0), uniformity(z0.to(wide))),
        (tolerance(z0, LABELS), tolerance(z0.to(wide), LABELS)),
        (inter_class_uniformity(z0, LABELS), inter_class_uniformity(z0.to(wide), LABELS)),
    ]:
        assert value.dtype == wide
        assert value.shape == ()
        assert torch.equal(value, same)


def test_measures_do_not_depend_on_the_scale_of_rows():
    z0, z1 = embeddings(9, 5)
    factor = 2.0 ** torch.arange(-4.0, 5.0).double()[:, None]
    assert_close(alignment(z0 * factor, z1), alignment(z0, z1), 1e-12)
    assert_close(uniformity(z0 * factor), uniformity(z0), 1e-12)
    assert_close(tolerance(z0 * factor, LABELS), tolerance(z0, LABELS), 1e-12)
    assert_close(inter_class_uniformity(z0 * factor, LABELS), inter_class_uniformity(z0, LABELS), 1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z: alignment(z, z[:2]), ValueError, r"z0 has shape \(3, 2\), z1 \(2, 2\)"),
        (lambda z: alignment(z[0], z[0]), ValueError, r"shape \(2,\), need \(rows, dim\)"),
        (lambda z: alignment(z[:0], z[:0]), ValueError, "at least 1 rows"),
        (lambda z: uniformity(z.long()), TypeError, "Embeddings are torch.int64"),
        (lambda z: uniformity(z[:1]), ValueError, "at least 2 rows"),
        (lambda z: tolerance(z, torch.arange(3)), ValueError, "Every class has a single row"),
        (lambda z: tolerance(z, torch.zeros(2).long()), ValueError, r"y has shape \(2,\)"),
        (lambda z: tolerance(z, torch.zeros(3)), ValueError, "torch.float32; needs integer labels"),
        (lambda z: inter_class_uniformity(z, torch.zeros(3).long()), ValueError, "All labels are the same"),
    ],
)
def test_bad_input_raises_and_says_what(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(3, 2))


def test_public_names_are_those_of_the_contract():
    for name in ("alignment", "uniformity", "tolerance", "inter_class_uniformity"):
        assert callable(getattr(dp.metrics, name))


# Temperature summary


def test_summary_is_that_of_the_double_loop():
    low, high = 0.1, 0.2
    views = embeddings(6, 4)
    summary = temperature_summary(ContrastiveLoss(DySTreSS(low, high, "linear")), *views)
    _, _, rows = oracle.layout([view.tolist() for view in views])
    for side in ("positive", "negative"):
        taus = [low + (high - low) * abs(s) for row in rows for s in getattr(row, f"{side}_cosine")]
        assert_close(summary[f"tau_{side}_mean"], math.fsum(taus) / len(taus), 1e-12)
        assert_close(summary[f"tau_{side}_min"], min(taus), 1e-12)
        assert_close(summary[f"tau_{side}_max"], max(taus), 1e-12)
    assert_close(summary["alignment"], oracle.alignment(rows), 1e-12)
    assert_close(summary["uniformity"], log_mean_potential(units(views[0])), 1e-12)
    assert all(value.shape == () for value in summary.values())


def test_summary_looks_at_the_first_images_only():
    views, index = embeddings(9, 4), torch.arange(9).flip(0)
    loss = ContrastiveLoss("isogclr", num_samples=9)
    loss.temperature.tau.copy_(torch.linspace(0.1, 0.9, 9))
    summary = temperature_summary(loss, *views, index=index, max_images=4)
    first = temperature_summary(loss, *[view[:4] for view in views], index=index[:4])
    assert summary == first
    assert_close(summary["tau_negative_min"], 0.6, 1e-6)


@pytest.mark.parametrize("queue_size", [None, (7, 4)])
@pytest.mark.parametrize("name", ["dystress", "macl", "isogclr"])
def test_summary_changes_no_state_and_needs_no_gradient(name, queue_size):
    loss = ContrastiveLoss(name, queue_size=queue_size, **({"num_samples": 9} if name == "isogclr" else {}))
    before = copy.deepcopy(loss.state_dict())
    views = [view.requires_grad_() for view in embeddings(5, 4)]
    summary = temperature_summary(loss, *views, index=torch.arange(5))
    assert loss.training
    assert not any(value.requires_grad for value in summary.values())
    assert all(torch.equal(before[key], value) for key, value in loss.state_dict().items())


def test_summary_takes_the_epoch_of_a_schedule():
    summary = temperature_summary(ContrastiveLoss("ts"), *embeddings(5, 4), epoch=200)
    assert_close(summary["tau_positive_max"], 0.1, 1e-6)
