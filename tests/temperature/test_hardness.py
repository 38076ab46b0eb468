import math

import oracle
import pytest
import torch
from grid import EPOCH, KINDS, SAMPLES, assert_close, assert_table_equal, build, embeddings, indices, trained_on
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from dystress_plugin import ContrastiveLoss
from dystress_plugin.engine import ENGINES
from dystress_plugin.temperature import Constant, DySTreSS, Hardness, Individual, Learnable, ModelAware, WarmUp

THEIRS = {"in_batch": "in_batch_negatives", "hard": "hard_negatives", "all": "all_negatives"}
every_choice = pytest.mark.parametrize("negatives", THEIRS)
every_engine = pytest.mark.parametrize("engine", ENGINES)


def value_and_gradients(loss, views):
    leaves = [view.detach().clone().requires_grad_() for view in views]
    value = loss(*leaves)
    return value.detach(), torch.stack(torch.autograd.grad(value, leaves))


def looped(logit, strength, negatives, objective):
    """The equation, pair by pair: anchors in side 0, positives in side 1, hard negatives in the others."""

    def loss(*views):
        units = [view / view.norm(dim=1, keepdim=True) for view in views]
        terms = []
        for i, anchor in enumerate(units[0]):
            positive, others, cosines = logit(anchor @ units[1][i]), [], []
            for side, candidates in enumerate(units[1:]):
                for j, candidate in enumerate(candidates):
                    s = anchor @ candidate
                    if (side, j) == (0, i):
                        continue
                    weighted = negatives == "all" or (negatives == "hard") == (j == i)
                    others.append(logit(s) + (strength * s.detach() if weighted else 0))
                    cosines.append(s)
            total = sum(a.exp() for a in others)
            if objective == "ntxent":
                terms.append(-(positive.exp() / (positive.exp() + total)).log())
            else:  # sogclr
                weights = [(a.exp() / total).detach() for a in others]
                terms.append(sum(w * s for w, s in zip(weights, cosines, strict=True)) - anchor @ units[1][i])
        return sum(terms) / len(terms)

    return loss


@every_choice
@every_engine
@pytest.mark.parametrize("objective", ["ntxent", "sogclr"])
@pytest.mark.parametrize("sides", [3, 4])
def test_hard_negatives_equal_the_double_loop(negatives, engine, objective, sides):
    inside = DySTreSS(0.1, 0.3, "linear", detach=False)
    ours = ContrastiveLoss(Hardness(inside, 5.0, negatives), objective=objective, layout="one_way", engine=engine)
    expected = looped(lambda s: s / (0.1 + 0.2 * s.abs()), 5.0, negatives, objective)
    views = embeddings(4, 3, views=sides)
    for found, right in zip(value_and_gradients(ours, views), value_and_gradients(expected, views), strict=True):
        assert_close(found, right, 1e-12, terms=1.0)


@every_choice
@every_engine
@pytest.mark.parametrize("sides", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_with_hardness_is_sentence_transformers(negatives, engine, sides, dtype):
    theirs = MultipleNegativesRankingLoss(
        torch.nn.Identity(), scale=20.0, hardness_mode=THEIRS[negatives], hardness_strength=9.0
    )
    ours = ContrastiveLoss(Hardness(Constant(0.05), 9.0, negatives), layout="one_way", engine=engine)
    views = [view.to(dtype) for view in embeddings(9, 16, views=sides)]
    expected = value_and_gradients(lambda *z: theirs.compute_loss_from_embeddings(list(z), None), views)
    for found, right in zip(value_and_gradients(ours, views), expected, strict=True):
        assert_close(found, right, 1e-6 if dtype == torch.float32 else 1e-12, terms=1.0)


@pytest.mark.parametrize("negatives", ["in_batch", "all"])
@pytest.mark.parametrize("name", KINDS)
def test_without_strength_it_is_the_temperature_inside(name, negatives):
    found, expected = (
        ContrastiveLoss(temperature).double() for temperature in (Hardness(build(name), 0, negatives), build(name))
    )
    views, more = trained_on(embeddings(5, 4)), {"index": indices(5), "epoch": EPOCH}
    assert_close(found(*views, **more).detach(), expected(*views, **more).detach(), 1e-12)
    assert found.objective == expected.objective
    for key, value in expected.temperature.state_dict().items():  # it learned the same
        assert_close(found.temperature.state_dict()[f"temperature.{key}"], value, 1e-12)


@pytest.mark.parametrize("gradient", ["cosine", "difference"])
def test_a_table_learns_from_weighted_negatives(gradient):
    loss = ContrastiveLoss(Hardness(Individual(SAMPLES, gradient=gradient), 3.0)).double()
    table = oracle.Individual(SAMPLES, gradient=gradient, hardness=3.0)
    for seed in range(2):
        views, index = embeddings(5, 4, seed=seed), indices(5)
        loss(*trained_on(views), index=index)
        oracle.Tables(table).update([index.tolist()], [view.tolist() for view in views])
    assert_table_equal(loss.temperature.temperature, table, 1e-12)


def test_a_model_that_learns_its_scale_learns_from_hard_negatives_too():
    gradients = {}
    for engine in ("dense", "blockwise"):
        loss = ContrastiveLoss(Hardness(Learnable(0.2), 3.0, "hard"), layout="one_way", engine=engine).double()
        loss(*embeddings(5, 4, views=3)).backward()
        gradients[engine] = loss.temperature.temperature.log_tau.grad
        assert loss.temperature.scalar == "temperature.log_tau"
    views = [view.double() for view in embeddings(5, 4, views=3)]
    log_tau = torch.tensor(math.log(0.2)).double().requires_grad_()
    looped(lambda s: s / log_tau.exp(), 3.0, "hard", "ntxent")(*views).backward()
    for found in gradients.values():
        assert_close(found, log_tau.grad, 1e-6)


@every_engine
def test_one_anchor_with_hard_negatives_alone(engine):
    views = embeddings(1, 3, views=3)
    ours = ContrastiveLoss(Hardness(Constant(0.2), 2.0, "all"), layout="one_way", engine=engine)
    expected = looped(lambda s: s / 0.2, 2.0, "all", "ntxent")
    for found, right in zip(value_and_gradients(ours, views), value_and_gradients(expected, views), strict=True):
        assert_close(found, right, 1e-12)


def test_it_stands_inside_and_around_a_warm_up_and_in_itself():
    views = embeddings(5, 4, views=3)

    def result(temperature):
        return value_and_gradients(lambda *z: ContrastiveLoss(temperature, layout="one_way")(*z, epoch=1), views)

    for found, right in [
        (WarmUp(Hardness(Constant(0.2), 4.0, "hard"), tau=0.2, epochs=4), Hardness(Constant(0.2), 1.0, "hard")),
        (Hardness(WarmUp(Constant(0.2), tau=0.2, epochs=4), 1.0, "hard"), Hardness(Constant(0.2), 1.0, "hard")),
        (Hardness(Hardness(Constant(0.2), 2.0, "hard"), 2.0, "in_batch"), Hardness(Constant(0.2), 2.0, "all")),
    ]:
        for a, b in zip(result(found), result(right), strict=True):
            assert_close(a, b, 1e-12)


def test_pairs_have_the_temperature_of_their_weights():
    loss = ContrastiveLoss(Hardness(Constant(0.2), 5.0, "hard"), layout="one_way")
    pairs = loss.pairs(*embeddings(3, 4, views=3))
    weighted = torch.isclose(pairs.negative_tau, torch.tensor(1 / (1 / 0.2 + 5), dtype=torch.float64))
    assert weighted.sum() == 3  # each anchor's own
    assert torch.isclose(pairs.negative_tau[~weighted], torch.tensor(0.2, dtype=torch.float64)).all()
    assert torch.isclose(pairs.positive_tau, torch.tensor(0.2, dtype=torch.float64)).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0.1,), TypeError, r"temperature=0.1 must be a Temperature, such as DySTreSS\(\)"),
        ((Constant(), -1), ValueError, "strength=-1 must be at least 0"),
        ((Constant(), 9.0, "in_batch_negatives"), ValueError, "Unknown negatives .* Did you mean 'in_batch'"),
    ],
)
def test_bad_settings_raise_and_name_the_value(arguments, error, message):
    with pytest.raises(error, match=message):
        Hardness(*arguments)


@pytest.mark.parametrize("layout", ["views", "one_way", "both_ways"])
def test_hard_negatives_that_are_not_there_are_asked_for(layout):
    with pytest.raises(ValueError, match=r"this batch has none: give them with layout='one_way'"):
        ContrastiveLoss(Hardness(ModelAware(), negatives="hard"), layout=layout)(*embeddings(3, 4))


def test_defaults_are_the_papers_for_negatives_of_a_batch():
    assert repr(Hardness(Constant(0.05))) == (
        "Hardness(\n  strength=9.0, negatives=in_batch\n  (temperature): Constant(tau=0.05)\n)"
    )
