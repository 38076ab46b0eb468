import copy
import io
import pickle

import numpy as np
import oracle
import pytest
import torch
from grid import (
    CASES,
    EPOCH,
    KINDS,
    OBJECTIVES,
    SAMPLES,
    Pair,
    assert_agree,
    assert_close,
    assert_result,
    embeddings,
    indices,
    tolerance,
    trained_on,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import dystress_plugin as dp
from dystress_plugin import ContrastiveLoss, objectives
from dystress_plugin.layout import LAYOUTS
from dystress_plugin.temperature import (
    Constant,
    CosineSchedule,
    DySTreSS,
    Individual,
    Learnable,
    ModelAware,
    TemperatureFree,
    WarmUp,
)

every_case = pytest.mark.parametrize("name", CASES)
every_kind = pytest.mark.parametrize("name", KINDS)
every_objective = pytest.mark.parametrize("objective", OBJECTIVES)


# Against the oracle


@every_kind
@every_objective
@pytest.mark.parametrize(
    ("images", "dim", "views"),
    [(2, 1, 2), (33, 64, 2), (3, 4, 4)],
)
def test_value_and_gradient_equal_the_double_loop(name, objective, images, dim, views):
    pair = Pair(name, objective)
    assert_agree(pair, embeddings(images, dim, views=views), indices(images))


@pytest.mark.filterwarnings("ignore:rho=0.4 is at least")  # of few negatives
@settings(max_examples=120)
@given(
    name=st.sampled_from(list(CASES)),
    objective=st.sampled_from(OBJECTIVES),
    images=st.integers(2, 33),
    dim=st.integers(2, 64),
    views=st.integers(2, 3),
    layout=st.sampled_from(list(LAYOUTS)),
    seed=st.integers(0, 10_000),
    scale=st.floats(-30, 30),
)
def test_value_and_gradient_equal_the_double_loop_for_any_batch(
    name, objective, images, dim, views, layout, seed, scale
):
    if layout != "views":
        views = 2
    if views * images > 70:
        images //= 2
    batch = [view * 2.0**scale for view in embeddings(images, dim, views=views, seed=seed)]
    assert_agree(Pair(name, objective, layout=layout).with_history(), batch, indices(images, seed))


@every_kind
@every_objective
@pytest.mark.parametrize(("images", "dim", "keys"), [(1, 4, 2), (2, 1, 5), (9, 16, 6)])
def test_value_and_gradient_equal_the_double_loop_over_a_queue(name, objective, images, dim, keys):
    pair = Pair(name, objective, queue_size=(keys, dim))
    for step in range(2):  # the second one reads what the first one left
        assert_agree(pair, embeddings(images, dim, seed=step), indices(images))


@every_objective
def test_individual_temperatures_equal_the_double_loop_as_they_move(objective):
    pair = Pair("isogclr", objective)
    for step in range(6):
        assert_agree(pair, embeddings(9, 4, seed=step), indices(9, seed=step))
    assert len(set(pair.tables.tables[0].tau)) > 9


@every_case
@every_objective
def test_zero_rows_have_similarity_zero_and_no_gradient(name, objective):
    views = embeddings(5, 3)
    views[0][1] = 0
    views[1][1] = 0
    views[1][3] = 0
    pair = Pair(name, objective)
    assert_agree(pair, views, indices(5))
    _, gradients = pair.package(views, indices(5))
    assert not gradients[0][1].any()
    assert not gradients[1][3].any()
    assert gradients[0][3].any()


@every_kind
@every_objective
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_zero_embeddings_have_a_finite_value_and_no_gradient(name, objective, dtype):
    value, gradients = Pair(name, objective).package([torch.zeros(3, 4, dtype=dtype)] * 2, indices(3))
    assert value.isfinite()
    assert not torch.stack(gradients).any()


@every_kind
@every_objective
def test_coinciding_embeddings_have_a_finite_value_and_gradient(name, objective):
    same = embeddings(1, 4)[0].expand(4, 4)
    value, gradients = Pair(name, objective).package([same, same.clone()], indices(4))
    assert value.isfinite()
    assert torch.stack(gradients).isfinite().all()


@every_kind
@pytest.mark.parametrize("exponent", [-900, -80, 900])
def test_value_does_not_depend_on_the_scale_of_rows_and_gradient_divides_by_it(name, exponent):
    views = embeddings(4, 3)
    factor = 2.0 ** torch.tensor([[exponent], [0.0], [3.0], [-exponent]], dtype=torch.float64)
    value, gradients = Pair(name, "ntxent").package(views, indices(4))
    scaled_value, scaled_gradients = Pair(name, "ntxent").package([views[0] * factor, views[1]], indices(4))
    assert_close(scaled_value, value, 1e-12)
    assert_close(scaled_gradients[0] * factor, gradients[0], tolerance(name))
    assert_close(scaled_gradients[1], gradients[1], tolerance(name))


@pytest.mark.parametrize("scale", [1e-29, 1e-20, 1e20, 1e38])
@every_objective
def test_float32_rows_of_any_length_keep_their_direction(scale, objective):
    views = [(view / view.abs().amax(1, keepdim=True)).float() for view in embeddings(6, 4)]
    value, gradients = Pair("dystress-cosine", objective).package(views, indices(6))
    scaled_value, scaled_gradients = Pair("dystress-cosine", objective).package([v * scale for v in views], indices(6))
    assert_close(scaled_value, value, 1e-5)
    expected = torch.stack(gradients).double() / scale
    error = (torch.stack(scaled_gradients).double() - expected).abs().max()
    assert error <= 1e-5 * expected.abs().max() + torch.finfo(torch.float32).smallest_normal


@every_objective
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_too_short_for_a_gradient_in_their_dtype_count_as_zero_rows(objective, dtype):
    short, zero = ([view.to(dtype) for view in embeddings(4, 3)] for _ in range(2))
    short[0][1] = torch.finfo(dtype).tiny
    zero[0][1] = 0
    short_value, short_gradients = Pair("constant", objective).package(short, indices(4))
    zero_value, zero_gradients = Pair("constant", objective).package(zero, indices(4))
    assert torch.equal(short_value, zero_value)
    assert torch.equal(torch.stack(short_gradients), torch.stack(zero_gradients))


@every_case
@every_objective
def test_float32_is_as_close_to_the_double_loop_as_its_precision_allows(name, objective):
    views = embeddings(12, 16)
    rounded = [view.float() for view in views]
    expected = Pair(name, objective).oracle([view.double() for view in rounded], indices(12))
    pair = Pair(name, objective)
    assert_result(pair, pair.package(rounded, indices(12)), expected, 1e-5)


# Types


@every_kind
@every_objective
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, objective, dtype):
    views = [view.to(dtype) for view in embeddings(5, 4)]
    value, gradients = Pair(name, objective).package(views, indices(5))
    wide_value, wide_gradients = Pair(name, objective).package([view.float() for view in views], indices(5))
    assert value.dtype == torch.float32
    assert torch.equal(value, wide_value)
    for gradient, wide in zip(gradients, wide_gradients, strict=True):
        assert gradient.dtype == dtype
        assert torch.equal(gradient, wide.to(dtype))


@every_kind
@every_objective
@pytest.mark.parametrize("queue_size", [None, (4, 4)])
def test_forward_under_autocast_changes_nothing(name, objective, queue_size):
    views = [view.float().requires_grad_() for view in embeddings(5, 4)]
    plain = Pair(name, objective, queue_size=queue_size).loss
    cast = copy.deepcopy(plain)
    value = plain(*views, index=indices(5), epoch=EPOCH)
    with torch.autocast("cpu", torch.bfloat16):
        cast_value = cast(*views, index=indices(5), epoch=EPOCH)
    assert torch.equal(value, cast_value)
    for gradient, cast_gradient in zip(
        torch.autograd.grad(value, views), torch.autograd.grad(cast_value, views), strict=True
    ):
        assert torch.equal(gradient, cast_gradient)
    assert all(torch.equal(cast.state_dict()[key], entry) for key, entry in plain.state_dict().items())


@every_kind
@every_objective
@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float16, torch.float16), torch.float32),
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
        ((torch.float64, torch.float64), torch.float64),
    ],
)
def test_value_is_a_scalar_in_float32_or_in_float64_if_a_view_is(name, objective, dtypes, expected):
    views = [view.to(dtype) for view, dtype in zip(embeddings(3, 4), dtypes, strict=True)]
    value, _ = Pair(name, objective).package(views, indices(3))
    assert value.shape == ()
    assert value.dtype == expected


def test_views_of_any_memory_layout_are_taken():
    views = embeddings(6, 4)
    value = ContrastiveLoss()(*views)
    assert torch.equal(ContrastiveLoss()(*[view.T.contiguous().T for view in views]), value)


def test_second_view_without_gradient_is_compared_with_all_the_same():
    z0, z1 = embeddings(4, 3)
    z0.requires_grad_()
    value = ContrastiveLoss()(z0, z1)
    value.backward()
    assert z1.grad is None
    assert torch.equal(value, ContrastiveLoss()(z0.detach(), z1))


# Defaults


@pytest.mark.parametrize(
    ("given", "objective"),
    [
        ("simclr", "ntxent"),
        ("dystress", "ntxent"),
        ("macl", "macl"),
        ("ts", "ntxent"),
        ("tempfree", "ntxent"),
        (Constant(), "ntxent"),
        (DySTreSS(), "ntxent"),
        (ModelAware(), "macl"),
        (CosineSchedule(), "ntxent"),
        (Individual(5), "sogclr"),
        (Learnable(), "ntxent"),
        (WarmUp(DySTreSS()), "ntxent"),
        (WarmUp(ModelAware()), "macl"),
        (WarmUp(Individual(5)), "sogclr"),
        (WarmUp(WarmUp(ModelAware())), "macl"),
        ("dystress_dcl", "dcl"),
        ("macl_dclw", "dclw"),
        (TemperatureFree(), "ntxent"),
    ],
)
def test_objective_defaults_to_the_methods_own(given, objective):
    assert ContrastiveLoss(given).objective == objective


@pytest.mark.parametrize("build", [ModelAware, lambda: Individual(SAMPLES, rho=0.2)])
def test_a_warm_up_that_is_over_is_the_method_it_warmed_up(build):
    warm, plain = ContrastiveLoss(WarmUp(build(), epochs=2)), ContrastiveLoss(build())
    for seed in range(3):  # twice from the tables of the steps before
        values = [loss(*trained_on(embeddings(5, 4, seed=seed)), index=indices(5), epoch=2) for loss in (warm, plain)]
        assert_close(*values, 0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_may_be_given_as_an_instance(name):
    by_name = ContrastiveLoss("dystress", objective=name)
    by_instance = ContrastiveLoss("dystress", objective=objectives.OBJECTIVES[name])
    assert by_instance.objective == name
    assert repr(by_instance) == repr(by_name)
    assert_close(by_instance(*embeddings(4, 3)), by_name(*embeddings(4, 3)), 0)


def power(stats, *, power):
    return (stats.negative - stats.positive) ** power


def test_an_objective_of_ones_own_has_its_parameters_and_is_pickled():
    mine = objectives.Objective("mine", power, parameters={"power": 1.0})
    loss = ContrastiveLoss(Constant(), objective=mine)
    assert_close(loss(*embeddings(4, 3)), ContrastiveLoss(Constant(), objective="dcl")(*embeddings(4, 3)), 1e-6)
    squared = ContrastiveLoss("simclr", objective=mine, power=2, tau=0.3)
    assert (squared.objective, squared.objective_settings) == ("mine", {"power": 2.0})
    copied = pickle.loads(pickle.dumps(squared))
    assert_close(copied(*embeddings(4, 3)), squared(*embeddings(4, 3)), 0)
    assert "mine" not in objectives.OBJECTIVES


@pytest.mark.parametrize("name", dp.recipes.METHODS)
def test_every_method_can_be_named_and_trains(name):
    needs = {"queue_size": (6, 3)} if name.endswith("_moco") else {}
    loss = ContrastiveLoss(name, **needs, **dp.recipes.METHODS[name].sized({}, 10, 3))
    assert (loss.queue is not None) == name.endswith("_moco")
    views = [view.requires_grad_() for view in embeddings(4, 3)]
    loss(*views, index=torch.arange(4), epoch=0).backward()
    assert all(view.grad.isfinite().all() and view.grad.any() for view in views)


def test_settings_reach_a_temperature_given_by_name():
    loss = ContrastiveLoss("dystress", tau_min=0.05, tau_max=0.09, profile="linear", detach=False)
    assert_close(
        loss(*embeddings(4, 3)), ContrastiveLoss(DySTreSS(0.05, 0.09, "linear", detach=False))(*embeddings(4, 3)), 0
    )


def test_sigma_reaches_the_objective_beside_an_instance_too():
    loss = ContrastiveLoss(Constant(), objective="dclw", sigma=0.2)
    assert "objective=dclw, sigma=0.2" in repr(loss)
    assert loss(*embeddings(4, 3)) != ContrastiveLoss(Constant(), objective="dclw")(*embeddings(4, 3))


def test_default_method_is_dystress():
    assert isinstance(ContrastiveLoss().temperature, DySTreSS)


@pytest.mark.parametrize("none", [None, 0])
def test_queue_size_of_none_or_zero_is_no_queue(none):
    assert ContrastiveLoss("simclr", queue_size=none).queue is None


def test_repr_shows_the_settings():
    text = repr(ContrastiveLoss("dystress", tau_max=0.19, queue_size=(8, 3)))
    for part in (
        "objective=ntxent",
        "layout=views",
        "positives=sum",
        "engine=auto",
        "gather_distributed=False",
        "tau_max=0.19",
        "keys=8, dim=3",
    ):
        assert part in text


# State


@every_case
def test_every_loss_survives_pickling_and_deepcopy(name):
    torch.manual_seed(0)
    pair = Pair(name, "sogclr", queue_size=(7, 4))
    pair.package(embeddings(5, 4), indices(5))
    copies = [copy.deepcopy(pair.loss), pickle.loads(pickle.dumps(pair.loss))]
    buffer = io.BytesIO()
    torch.save(pair.loss, buffer)
    buffer.seek(0)
    copies.append(torch.load(buffer, weights_only=False))
    views = embeddings(5, 4, seed=1)
    expected = pair.loss(*views, index=indices(5), epoch=EPOCH)
    for loss in copies:
        assert torch.equal(loss(*views, index=indices(5), epoch=EPOCH), expected)


@every_kind
@pytest.mark.parametrize("objective", ["ntxent", "sogclr"])
@pytest.mark.parametrize("queue_size", [None, (7, 4)])
def test_eval_mode_changes_no_state(name, objective, queue_size):
    loss = Pair(name, objective, queue_size=queue_size).loss
    loss(*trained_on(embeddings(5, 4)), index=indices(5), epoch=EPOCH)
    loss.eval()
    before = copy.deepcopy(loss.state_dict())
    values = [loss(*trained_on(embeddings(5, 4, seed=1)), index=indices(5), epoch=EPOCH) for _ in range(2)]
    assert torch.equal(*values)
    assert all(torch.equal(before[key], value) for key, value in loss.state_dict().items())


@every_case
@pytest.mark.parametrize(
    "where", [{}, {"queue_size": (7, 4)}, {"layout": "one_way"}, {"layout": "both_ways"}], ids=lambda where: str(where)
)
def test_pairs_are_those_of_the_double_loop_and_change_no_state(name, where):
    pair = Pair(name, "ntxent", **where)
    before = copy.deepcopy(pair.loss.state_dict())
    found = pair.loss.pairs(*embeddings(5, 4), index=indices(5), epoch=EPOCH)
    assert all(torch.equal(before[key], value) for key, value in pair.loss.state_dict().items())

    keys = pair.loss.queue.keys.tolist() if "queue_size" in where else None
    _, _, rows = oracle.layout([view.tolist() for view in embeddings(5, 4)], keys, pair.loss.layout)
    assert_close(found.positive_cosine, [s for row in rows for s in row.positive_cosine], 1e-12)
    assert_close(found.negative_cosine, [s for row in rows for s in row.negative_cosine], 1e-12)
    assert found.positive_tau.shape == found.positive_cosine.shape
    assert found.negative_tau.shape == found.negative_cosine.shape


def test_pairs_report_the_temperature_of_each_side():
    loss = ContrastiveLoss(DySTreSS(0.1, 0.2, "linear", negative_range=(0.3, 0.5)))
    found = loss.pairs(*embeddings(5, 4))
    assert_close(found.positive_tau, 0.1 + 0.1 * found.positive_cosine.abs(), 1e-12)
    assert_close(found.negative_tau, 0.3 + 0.2 * found.negative_cosine.abs(), 1e-12)


# Bad input


def raises(error, match):
    return pytest.raises(error, match=match)


Z = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("views", "error", "message"),
    [
        ([], ValueError, "at least two embeddings.*not 0"),
        ([Z], ValueError, "at least two embeddings.*not 1"),
        ([Z, Z.tolist()], TypeError, "View 1 must be a tensor, not list"),
        ([None, Z], TypeError, "View 0 must be a tensor, not NoneType"),
        ([Z.long(), Z], TypeError, r"View 0 is torch.int64.*float dtype"),
        ([Z, Z.bool()], TypeError, r"View 1 is torch.bool"),
        ([Z.to(torch.complex64), Z], TypeError, r"View 0 is torch.complex64"),
        ([Z[0], Z[0]], ValueError, r"View 0 has shape \(4,\), needs \(batch, dim\)"),
        ([Z[None], Z[None]], ValueError, r"View 0 has shape \(1, 3, 4\)"),
        ([Z, Z[:2]], ValueError, r"View 1 has shape \(2, 4\), view 0 \(3, 4\)"),
        ([Z, Z[:, :3]], ValueError, r"View 1 has shape \(3, 3\), view 0 \(3, 4\)"),
        ([Z, Z, Z[:2]], ValueError, r"View 2 has shape \(2, 4\)"),
        ([Z, Z.to("meta")], ValueError, "View 1 is on meta, view 0 on cpu"),
        ([Z[:0], Z[:0]], ValueError, r"View 0 is empty, shape \(0, 4\)"),
        ([Z[:, :0], Z[:, :0]], ValueError, r"View 0 is empty, shape \(3, 0\)"),
        ([Z[:1], Z[:1]], ValueError, "one image has no negatives"),
        ([Z * torch.nan, Z], ValueError, "View 0 has 3 of 3 rows with NaN or infinity"),
        ([Z, Z.where(torch.eye(3, 4) == 0, torch.inf)], ValueError, "View 1 has 3 of 3 rows"),
        ([Z, torch.cat([Z[:2], -torch.inf * Z[2:]])], ValueError, "View 1 has 1 of 3 rows"),
        ([Z.half() * torch.inf, Z.half()], ValueError, "View 0 has 3 of 3 rows"),
    ],
)
@pytest.mark.parametrize("method", ["loss", "pairs"])
def test_bad_views_raise_and_say_which(views, error, message, method):
    loss = ContrastiveLoss()
    with raises(error, message):
        (loss if method == "loss" else loss.pairs)(*views)


@pytest.mark.parametrize(
    ("views", "message"),
    [([Z, Z, Z], "two views, not 3"), ([Z[:, :3], Z[:, :3]], "Embeddings have 3 dims, the queue 4")],
)
def test_bad_views_for_a_queue_raise(views, message):
    with raises(ValueError, message):
        ContrastiveLoss(queue_size=(5, 4))(*views)


@pytest.mark.parametrize("layout", ["one_way", "both_ways"])
def test_a_batch_of_one_raises_for_two_sides(layout):
    with raises(ValueError, "no negatives"):
        ContrastiveLoss(layout=layout)(Z[:1], Z[:1])


def test_a_batch_of_one_is_legal_with_a_queue():
    assert ContrastiveLoss(queue_size=(5, 4))(Z[:1], Z[:1]).isfinite()


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (None, ValueError, r"Individual needs the sample numbers: call loss\(z0, z1, index=index\)"),
        ([0, 1, 2], TypeError, "int64 tensor of sample numbers, not list"),
        (torch.arange(3.0), TypeError, "not torch.float32"),
        (torch.arange(3, dtype=torch.int32), TypeError, "not torch.int32"),
        (torch.arange(4), ValueError, r"index has shape \(4,\), the batch needs \(3,\)"),
        (torch.arange(3)[:, None], ValueError, r"index has shape \(3, 1\)"),
        (torch.tensor([0, 1, 9]), ValueError, "index runs from 0 to 9, but num_samples=9.*0 to 8"),
        (torch.tensor([0, -1, 8]), ValueError, "index runs from -1 to 8"),
    ],
)
def test_bad_index_raises_and_leaves_the_tables_alone(index, error, message):
    loss = ContrastiveLoss("isogclr", num_samples=9)
    with raises(error, message):
        loss(Z, Z, index=index)
    assert not loss.temperature.visited.any()


@pytest.mark.parametrize("index", [torch.arange(3, dtype=torch.int32), torch.arange(4)])
def test_bad_index_raises_where_it_is_not_needed_too(index):
    with raises((TypeError, ValueError), "index"):
        ContrastiveLoss()(Z, Z, index=index)


@pytest.mark.parametrize(
    ("epoch", "error", "message"),
    [
        (None, ValueError, r"CosineSchedule needs the epoch: call loss\(z0, z1, epoch=current_epoch\)"),
        (-1, ValueError, "epoch=-1 must be at least 0"),
        (-0.5, ValueError, "epoch=-0.5"),
        (float("nan"), ValueError, "epoch=nan"),
        (float("inf"), ValueError, "epoch=inf"),
        ("3", TypeError, "epoch='3' must be a number, not str"),
        (True, TypeError, "epoch=True must be a number, not bool"),
    ],
)
def test_bad_epoch_raises(epoch, error, message):
    with raises(error, message):
        ContrastiveLoss("ts")(Z, Z, epoch=epoch)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        (["dystres"], {}, ValueError, "Unknown method 'dystres'. Did you mean 'dystress'\\? Choose from: simclr"),
        (["xyz"], {}, ValueError, "Unknown method 'xyz'. Choose from"),
        (["dystress"], {"tau_mx": 1}, ValueError, "Unknown parameter of method 'dystress' 'tau_mx'.*mean 'tau_max'"),
        (["tempfree"], {"tau": 1}, ValueError, "Unknown parameter of method 'tempfree' 'tau'"),
        (["isogclr"], {}, TypeError, r"Method 'isogclr' needs num_samples=\.\.\."),
        (["simclr"], {"objective": "nt-xent"}, ValueError, "Unknown objective 'nt-xent'. Did you mean 'ntxent'"),
        (["simclr"], {"objective": 3}, TypeError, "objective=3 must be a name, such as 'dcl', or an instance of"),
        (["simclr"], {"objective": objectives.dclw}, TypeError, "Objective, not function"),
        (["simclr"], {"layout": "both_way"}, ValueError, "Unknown layout 'both_way'. Did you mean 'both_ways'"),
        (["simclr"], {"layout": "one_way", "queue_size": (8, 4)}, ValueError, "layout='one_way' takes no queue"),
        (["simclr_moco"], {}, ValueError, r"Method 'simclr_moco' keeps a queue: give queue_size=\(keys, dim\)"),
        (["simclr_moco"], {"queue_size": 0}, ValueError, "Method 'simclr_moco' keeps a queue"),
        (["simclr_dclw"], {"sigma": 0.001}, ValueError, "sigma=0.001 must be at least 0.01"),
        (["simclr_dcl"], {"sigma": 0.5}, ValueError, "Unknown parameter of method 'simclr_dcl' 'sigma'"),
        ([Constant()], {"sigma": 0.5}, TypeError, "sigma: settings go into the temperature itself"),
        (["simclr"], {"positives": "means"}, ValueError, "Unknown positives 'means'. Did you mean 'mean'"),
        (["simclr"], {"engine": "dens"}, ValueError, "Unknown engine 'dens'. Did you mean 'dense'"),
        (["simclr"], {"queue_size": 16}, ValueError, r"queue_size=16 must be \(keys, dim\)"),
        (["simclr"], {"queue_size": (16,)}, ValueError, r"queue_size=\(16,\) must be \(keys, dim\)"),
        (["simclr"], {"queue_size": (0, 4)}, ValueError, "keys must be an int of at least 1"),
        (["simclr"], {"queue_size": (4, -1)}, ValueError, "dim must be an int of at least 1"),
        (["simclr"], {"queue_size": (4.0, 4)}, ValueError, "keys must be an int"),
        ([0.1], {}, TypeError, r"temperature=0.1 must be a method's name.*not float"),
        ([DySTreSS], {}, TypeError, "not ABCMeta"),
        ([Constant()], {"tau": 0.2}, TypeError, r"tau: settings go into the temperature itself.*Constant\(\.\.\.\)"),
        (["dystress"], {"tau_min": 0.3}, ValueError, "tau_min=0.3 is above tau_max=0.2; swap them"),
        (["dystress"], {"profile": "cosin"}, ValueError, "Unknown profile 'cosin'. Did you mean 'cosine'"),
    ],
)
def test_bad_construction_raises_and_names_the_value(arguments, settings, error, message):
    with raises(error, message):
        ContrastiveLoss(*arguments, **settings)


def test_everything_after_the_temperature_is_keyword_only():
    with raises(TypeError, "positional"):
        ContrastiveLoss("simclr", "ntxent")


# Numbers as NumPy and torch have them

SCALARS = {
    "numpy": (np.float32, np.int64),
    "array": (lambda x: np.array(x, dtype=np.float32), np.array),
    "torch": (torch.tensor, torch.tensor),
}


@pytest.mark.parametrize("kind", SCALARS)
def test_scalars_of_numpy_and_torch_are_numbers(kind):
    real, whole = SCALARS[kind]
    for found, plain in (
        (Constant(real(0.25)), Constant(0.25)),
        (Constant(whole(1)), Constant(1)),
        (DySTreSS(real(0.25), real(0.375), negative_range=(real(0.25), real(0.5))), None),
        (Individual(whole(7), rho=real(0.5), eta=whole(0)), Individual(7, rho=0.5, eta=0)),
        (ModelAware(real(0.25), real(0.5), whole(0)), ModelAware(0.25, 0.5, 0)),
        (CosineSchedule(real(0.25), whole(1), whole(8)), CosineSchedule(0.25, 1, 8)),
        (Learnable(real(0.25)), Learnable(0.25)),
        (TemperatureFree(real(0.25)), TemperatureFree(0.25)),
        (WarmUp(Constant(), real(0.25), whole(3)), WarmUp(Constant(), 0.25, 3)),
    ):
        plain = plain or DySTreSS(0.25, 0.375, negative_range=(0.25, 0.5))
        assert repr(found) == repr(plain)
    loss = ContrastiveLoss("ts", objective="dclw", sigma=real(0.5), queue_size=(whole(8), whole(4)))
    assert loss.objective_settings == {"sigma": 0.5}
    assert loss.queue.keys.shape == (8, 4)
    assert ContrastiveLoss("simclr", queue_size=whole(0)).queue is None
    value = loss.eval()(Z, Z, epoch=whole(3))
    assert torch.equal(value, loss(Z, Z, epoch=3))
    assert torch.equal(loss.pairs(Z, Z, epoch=real(3), max_keys=whole(5))[3], loss.pairs(Z, Z, epoch=3, max_keys=5)[3])


@pytest.mark.parametrize("bad", [np.bool_(True), np.array([0.1]), np.str_("0.1"), torch.tensor(True)])
def test_other_arrays_are_no_numbers(bad):
    with raises(TypeError, "must be a number"):
        Constant(bad)


def test_positives_one_by_one_are_the_sum_where_there_is_one():
    values = [ContrastiveLoss("dystress", positives=how)(Z, Z.flip(1)) for how in ("sum", "mean")]
    assert torch.equal(*values)
