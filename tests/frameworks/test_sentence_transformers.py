import csv
import dataclasses
import importlib.util
import inspect
import json
import math
import random
import typing
from contextlib import nullcontext
from functools import partial
from importlib import metadata
from pathlib import Path

import gloo
import pytest
import torch
from packaging.version import Version
from torch import distributed as dist
from torch.nn import functional as F

from dystress_plugin import ContrastiveLoss, temperature
from dystress_plugin.temperature import Constant, CosineSchedule, DySTreSS, Individual, Learnable, ModelAware, WarmUp

pytest.importorskip("sentence_transformers", reason="SENTENCE-TRANSFORMERS IS NOT TESTED: install the extra sentences")

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from transformers import BertForPreTraining, BertTokenizerFast

from dystress_plugin.frameworks.sentence_transformers import (
    SETTINGS,
    CachedContrastiveSentenceLoss,
    ContrastiveCallback,
    ContrastiveSentenceLoss,
)
from dystress_plugin.frameworks.sentence_transformers.criterion import SentenceCriterion
from dystress_plugin.frameworks.sentence_transformers.encoders import encoder, random_bert, without_head
from dystress_plugin.frameworks.sentence_transformers.sts import evaluator, read_pairs

THINGS = ("cat", "dog", "bird", "child", "train", "river", "teacher", "market")
ACTS = ("sleeps near", "runs towards", "looks at", "waits for")
SENTENCES = [f"A {a} {act} the {b}." for a in THINGS for act in ACTS for b in THINGS if a != b]


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """Folder of a BERT of a few thousand weights."""
    torch.manual_seed(0)
    sizes = {"vocabulary": 100, "dim": 8, "layers": 1, "heads": 2}
    return random_bert(SENTENCES, tmp_path_factory.mktemp("bert"), **sizes)


@pytest.fixture
def model(bert):
    return encoder(bert, pooling="mean", head=False).to("cpu").double().eval()  # no dropout


def test_the_same_seed_begins_with_the_same_bert(bert, tmp_path):
    torch.manual_seed(0)
    again = random_bert(SENTENCES, tmp_path, vocabulary=100, dim=8, layers=1, heads=2)
    a, b = (encoder(folder).to("cpu") for folder in (bert, again))
    assert a.tokenizer.get_vocab() == b.tokenizer.get_vocab()
    assert {"cat", "teacher", "##x", "[CLS]"} - set(a.tokenizer.get_vocab()) == {"##x"}  # no x in these sentences
    assert (a.encode(SENTENCES[:3]) == b.encode(SENTENCES[:3])).all()


def batch(model, columns=2, rows=slice(0, 7)):
    """Tokenised columns of different sentences."""
    return [model.preprocess(SENTENCES[20 * c : 20 * c + 20][rows]) for c in range(columns)]


def gradients(loss, features, labels=None, weight=1.0):
    """Value, and gradients of everything there is to train."""
    loss.zero_grad()
    value = loss(features, labels)
    (weight * value).backward()
    return value.detach(), {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, tolerance=1e-9):
    """Values and gradients of every weight, in float64; a learned temperature itself is float32."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=tolerance * max(1.0, abs(theirs[0].item())))
    largest = max(gradient.abs().max().item() for gradient in theirs[1].values())
    weights = {name for name in theirs[1] if name.startswith("model.")}
    assert weights == {name for name in ours[1] if name.startswith("model.")}
    assert largest > 0.01
    for name, gradient in theirs[1].items():
        atol = tolerance if name in weights else 1e-6
        torch.testing.assert_close(ours[1][name], gradient, rtol=0, atol=atol * max(1.0, largest))


# With a constant temperature: the library's loss


@pytest.mark.parametrize("cls", [ContrastiveSentenceLoss, CachedContrastiveSentenceLoss])
@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_a_constant_is_multiple_negatives_ranking(model, cls, columns, tau):
    theirs = losses.MultipleNegativesRankingLoss(model, scale=1 / tau)
    features = batch(model, columns)
    assert_same(gradients(cls(model, Constant(tau)), features), gradients(theirs, features))


@pytest.mark.parametrize("columns", [2, 3])
def test_both_ways_is_the_librarys_symmetric_form(model, columns):
    theirs = losses.MultipleNegativesRankingLoss(
        model, scale=5, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )
    ours = ContrastiveSentenceLoss(model, Constant(0.2), layout="both_ways")
    features = batch(model, columns)
    assert_same(gradients(ours, features), gradients(theirs, features))


@pytest.mark.parametrize("columns", [2, 3])
def test_a_batch_of_one_is_multiple_negatives_ranking(model, columns):
    features = batch(model, columns, slice(0, 1))
    theirs = losses.MultipleNegativesRankingLoss(model, scale=5)(features, None)
    assert ContrastiveSentenceLoss(model, Constant(0.2))(features).item() == pytest.approx(theirs.item(), abs=1e-6)


def test_a_batch_of_one_without_negatives_pulls_at_nothing(model):
    value, found = gradients(ContrastiveSentenceLoss(model, "dystress"), batch(model, rows=slice(0, 1)))
    assert value == 0
    assert all((gradient == 0).all() for gradient in found.values())


# The paper's settings for sentences, from its equations


def reference(z, tau_of, macl=False):
    """Cross-entropy -log p of anchors z[0] with all other rows, in autograd; times MACL's 1 / (1 - p) where asked."""
    anchors, others = F.normalize(z[0], dim=1), F.normalize(torch.cat(z[1:]), dim=1)
    cosine = anchors @ others.T
    logit = cosine / tau_of(cosine.detach())
    positive = torch.diagonal(logit)
    own = torch.eye(*logit.shape, dtype=torch.bool)
    odds = torch.exp(logit.masked_fill(own, -math.inf) - positive[:, None]).sum(1)  # (1 - p) / p; p itself rounds to 1
    weight = (1 + odds.detach()) / odds.detach() if macl else 1.0
    return (weight * torch.log1p(odds)).mean()


def shifted(s):
    """tau_max above 0.4; below half a cosine wave to tau_min at -0.3."""
    wave = 0.04 + 0.005 * (1 + torch.cos(math.pi * (s - 0.4) / 0.7))
    return torch.where(s > 0.4, torch.full_like(s, 0.05), wave)


def model_aware(s):
    return 0.05 * (1 + 2 * (torch.diagonal(s).mean() - 0.8))


@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize(
    ("method", "tau_of"),
    [("simclr", lambda s: torch.full_like(s, 0.05)), ("dystress", shifted), ("macl", model_aware)],
)
def test_the_papers_settings_are_its_formulas(method, tau_of, columns):
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    noise = torch.randn(columns - 1, 6, 8, generator=generator, dtype=torch.float64)
    # Positives near, as dropout makes them; the negatives' cosines on both sides of the profile's plateau.
    z = [part.requires_grad_() for part in (first, first + 0.5 * noise[0], *noise[1:].unbind())]
    ours = SentenceCriterion(method, **SETTINGS[method])(z)
    theirs = reference(z, tau_of, macl=method == "macl")
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for a, b in zip(torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * b.abs().max().item())


# SimCSE, caching, evaluation


def test_one_column_is_embedded_twice_with_dropout(model):
    loss = ContrastiveSentenceLoss(model, "dystress", **SETTINGS["dystress"])
    features = batch(model, 1)
    embedded = []
    model.register_forward_hook(lambda module, args, out: embedded.append(out["sentence_embedding"]))
    loss(features)
    assert torch.equal(*embedded)
    embedded.clear()
    model.train()
    torch.manual_seed(0)
    once = loss(features)
    assert F.cosine_similarity(*embedded).max() < 0.999
    torch.manual_seed(0)
    assert once == loss([features[0], dict(features[0])])


@pytest.mark.parametrize(
    ("build", "layout", "columns"),
    [(ModelAware, "one_way", 3), (Learnable, "both_ways", 3), (lambda: DySTreSS(0.1, 0.2), "views", 2)],
)
def test_cached_is_uncached(model, build, layout, columns):
    features = batch(model, columns)
    torch.manual_seed(0)
    plain = ContrastiveSentenceLoss(model, build(), layout=layout)
    cached = CachedContrastiveSentenceLoss(model, build(), layout=layout, mini_batch_size=3)
    a, b = (gradients(loss, features, weight=0.25) for loss in (cached, plain))
    assert_same(a, b)
    assert ("criterion.loss.temperature.log_tau" in b[1]) == (build is Learnable)


def test_cached_replays_dropout(model):
    features = batch(model)
    model.train()
    found = []
    for cls, more in [(ContrastiveSentenceLoss, {}), (CachedContrastiveSentenceLoss, {"mini_batch_size": 7})]:
        torch.manual_seed(0)
        found.append(gradients(cls(model, "dystress", **more), features))
    assert_same(*found)


def test_cached_splits_the_batch(model):
    sizes = []
    handle = model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0]["input_ids"])))
    gradients(CachedContrastiveSentenceLoss(model, "dystress", mini_batch_size=3), batch(model))
    handle.remove()
    assert sizes == [3, 3, 1] * 4  # two columns, without and with gradient


needs_six = pytest.mark.skipif(
    Version(metadata.version("sentence-transformers")) < Version("6"), reason="sentence-transformers 6 has it"
)


@needs_six
def test_cached_splits_the_batch_by_tokens(model):
    features = batch(model, 3)
    tokens = int(max(column["attention_mask"].sum(1).max() for column in features)) * 2
    sizes = []
    loss = CachedContrastiveSentenceLoss(model, "dystress", mini_batch_num_tokens=tokens)
    handle = model.register_forward_pre_hook(lambda module, args: sizes.append(int(args[0]["attention_mask"].sum())))
    found = gradients(loss, features)
    handle.remove()
    assert tokens // 2 < max(sizes) <= tokens
    assert_same(found, gradients(ContrastiveSentenceLoss(model, "dystress"), features))
    assert loss.get_config_dict()["mini_batch_num_tokens"] == tokens


def test_tokens_that_cannot_be_are_said(model, monkeypatch):
    with pytest.raises(ValueError, match="mini_batch_num_tokens=0 "):
        CachedContrastiveSentenceLoss(model, "dystress", mini_batch_num_tokens=0)
    monkeypatch.setattr(losses.CachedMultipleNegativesRankingLoss, "__signature__", inspect.Signature(), raising=False)
    with pytest.raises(ValueError, match="mini_batch_num_tokens=5 needs sentence-transformers 6"):
        CachedContrastiveSentenceLoss(model, "dystress", mini_batch_num_tokens=5)


@needs_six
def test_columns_of_candidates_are_embedded_together(model):
    sizes = []
    handle = model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0]["input_ids"])))
    ContrastiveSentenceLoss(model, "dystress")(batch(model, 3))
    handle.remove()
    assert sizes == [7, 14]


@pytest.mark.parametrize("cls", [ContrastiveSentenceLoss, CachedContrastiveSentenceLoss])
def test_a_table_learns_from_training_alone(model, cls):
    loss = cls(model, "isogclr", num_samples=9, rho=0.2)
    features, labels = batch(model), torch.arange(7) + 2
    with torch.no_grad():
        loss(features, labels)
    assert not loss.criterion.loss.temperature.visited.any()
    loss(features, labels).backward()
    assert loss.criterion.loss.temperature.visited.tolist() == [False] * 2 + [True] * 7


@pytest.mark.parametrize("cls", [ContrastiveSentenceLoss, partial(CachedContrastiveSentenceLoss, mini_batch_size=3)])
def test_questions_and_answers_have_a_table_each(model, cls):
    settings = {"layout": "both_ways", "num_samples": (9, 30), "rho": 1.0}
    loss, features = cls(model, "isogclr", **settings), batch(model)
    questions, answers = torch.tensor([0, 0, 1, 2, 3, 4, 5]), torch.arange(20, 27)
    plain = ContrastiveLoss("isogclr", **settings)
    for _ in range(3):
        value, _ = gradients(loss, features, torch.stack([questions, answers], dim=1))
        embeddings = [model(column)["sentence_embedding"] for column in features]
        assert value == pytest.approx(plain(*embeddings, index=(questions, answers)).item(), abs=1e-12)
    mine, its = (dict(each.named_buffers()) for each in (loss.criterion.loss, plain))
    assert all(torch.allclose(mine[name].double(), its[name].double(), rtol=0, atol=1e-12) for name in its)


@pytest.mark.parametrize(("method", "settings"), [("fastclip", {"rho": 1.0}), ("tempnet", {"dim": 8, "rho": 1.0})])
def test_a_temperature_that_learns_learns_from_sentences(model, method, settings):
    loss = ContrastiveSentenceLoss(model, method, layout="both_ways", **settings)
    _, found = gradients(loss, batch(model))
    own = {name: gradient for name, gradient in found.items() if "temperature" in name}
    assert own
    assert all(gradient.abs().sum() > 0 for name, gradient in own.items() if "bias" not in name)


def test_a_warm_up_has_the_objective_of_what_it_arrives_at(model):
    for inner, objective in ((ModelAware(), "macl"), (Individual(9), "sogclr"), (Constant(), "ntxent")):
        assert ContrastiveSentenceLoss(model, WarmUp(inner)).criterion.loss.objective == objective


def test_a_queue_needs_no_layout(model):
    loss = ContrastiveSentenceLoss(model, "dystress_moco", queue_size=(20, 8))
    loss(batch(model)).backward()
    assert loss.criterion.loss.queue.position == 7


@pytest.mark.parametrize("cls", [ContrastiveSentenceLoss, CachedContrastiveSentenceLoss])
@pytest.mark.parametrize(
    ("build", "columns", "message"),
    [
        (lambda: {"temperature": "isogclr", "num_samples": 9, "rho": 0.2}, 2, r"add_column\('label', range"),
        (lambda: {"temperature": CosineSchedule()}, 2, "CosineSchedule changes with the epoch.*ContrastiveCallback"),
        (lambda: {"temperature": Constant(0.1), "layout": "views"}, 3, "layout='views' has no hard negatives.*3 col"),
    ],
)
def test_what_is_missing_is_said(model, cls, build, columns, message):
    with pytest.raises(ValueError, match=message):
        cls(model, **build())(batch(model, columns))


def test_an_unknown_method_is_said(model):
    with pytest.raises(ValueError, match="Did you mean 'dystress'"):
        ContrastiveSentenceLoss(model, "dystres")


# Inside of the library's losses that compute it for several embeddings of a batch

WRAPPERS = {
    "dims": lambda model, loss: losses.MatryoshkaLoss(model, loss, [8, 4, 2], [1, 0.5, 0.25]),
    "some dims": lambda model, loss: losses.MatryoshkaLoss(model, loss, [8, 4, 2], n_dims_per_step=2),
    "layers": lambda model, loss: losses.AdaptiveLayerLoss(model, loss, n_layers_per_step=-1),
    "a layer": lambda model, loss: losses.AdaptiveLayerLoss(model, loss),
    "layers without distillation": lambda model, loss: losses.AdaptiveLayerLoss(model, loss, kl_temperature=0),
    "both": lambda model, loss: losses.Matryoshka2dLoss(model, loss, [8, 4, 2], n_dims_per_step=2),
}
every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)


def steps_inside(wrapper, model, loss, features):
    """Values and gradients of two steps with the same draws of layers, dims and dropout."""
    outer, found = WRAPPERS[wrapper](model, loss), []
    for seed in range(2):
        torch.manual_seed(seed)
        random.seed(seed)
        found.append(gradients(outer, features()))
    return found


def inner(gradients):
    """Without the prefix that the loss around has."""
    return {name[name.index("model.") :]: gradient for name, gradient in gradients.items() if "model." in name}


def assert_same_inside(ours, theirs):
    for (a, of_a), (b, of_b) in zip(ours, theirs, strict=True):
        assert_same((a, inner(of_a)), (b, inner(of_b)))


@pytest.fixture
def deep_model(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"vocabulary": 100, "dim": 8, "layers": 3, "heads": 2}
    folder = random_bert(SENTENCES, tmp_path_factory.mktemp("deep"), **sizes)
    return encoder(folder, pooling="mean", head=False).to("cpu").double()


@every_wrapper
@pytest.mark.parametrize("columns", [2, 3])
def test_inside_of_another_loss_a_constant_is_multiple_negatives_ranking(deep_model, wrapper, columns):
    deep_model.train()
    ours, theirs = (
        steps_inside(wrapper, deep_model, loss, lambda: batch(deep_model, columns))
        for loss in (
            ContrastiveSentenceLoss(deep_model, Constant(0.2)),
            losses.MultipleNegativesRankingLoss(deep_model, scale=5),
        )
    )
    assert_same_inside(ours, theirs)


@every_wrapper
@pytest.mark.parametrize("twice", [False, True])
def test_inside_of_another_loss_one_column_is_embedded_twice_with_dropout(deep_model, wrapper, twice):
    deep_model.train()
    theirs = steps_inside(
        wrapper,
        deep_model,
        losses.MultipleNegativesRankingLoss(deep_model, scale=5),
        lambda: [batch(deep_model, 1)[0] for _ in range(2)],
    )
    loss = ContrastiveSentenceLoss(deep_model, Constant(0.2))
    ours = steps_inside(wrapper, deep_model, loss, lambda: batch(deep_model, 1) * (2 if twice else 1))
    assert_same_inside(ours, theirs)


@pytest.mark.parametrize("wrapper", ["dims", "some dims"])
def test_cached_inside_of_another_loss_is_uncached(deep_model, wrapper):
    def found(cls, **more):
        loss = cls(deep_model.eval(), Learnable(0.2), **more)
        features = partial(batch, deep_model, 3)
        return [
            (value, {name.replace("loss.criterion", "model.criterion"): g for name, g in of.items()})
            for value, of in steps_inside(wrapper, deep_model, loss, features)
        ]

    plain, cached = found(ContrastiveSentenceLoss), found(CachedContrastiveSentenceLoss, mini_batch_size=3)
    assert any("log_tau" in name for name in plain[0][1])
    assert_same_inside(cached, plain)


@every_wrapper
@pytest.mark.parametrize("cls", [ContrastiveSentenceLoss, CachedContrastiveSentenceLoss])
@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: {"temperature": "isogclr", "num_samples": 9, "rho": 0.2}, "Individual"),
        (lambda: {"temperature": "dystress_moco", "queue_size": (9, 8)}, "A queue"),
    ],
)
def test_inside_of_another_loss_a_queue_and_a_table_are_refused(deep_model, wrapper, cls, build, name):
    loss = cls(deep_model, **build())
    before = {key: entry.clone() for key, entry in loss.criterion.state_dict().items()}
    message = f"{name} keeps what it learns|AdaptiveLayerLoss and Matryoshka2dLoss take no loss with cached gradients"
    warns = cls is CachedContrastiveSentenceLoss and "dims" not in wrapper  # of itself
    with pytest.warns(UserWarning, match="AdaptiveLayerLoss is not compatible") if warns else nullcontext():
        outer = WRAPPERS[wrapper](deep_model, loss)
    with pytest.raises(ValueError, match=message):
        outer(batch(deep_model), torch.arange(7))
    assert all(torch.equal(before[key], entry) for key, entry in loss.criterion.state_dict().items())
    cls(deep_model, **build())(batch(deep_model), torch.arange(7)).backward()  # and not without


# Two processes


TEMPERATURES = {"ModelAware": {}, "Learnable": {}, "Individual": {"num_samples": 20, "rho": 0.2}}
CELLS = [
    (ContrastiveSentenceLoss, "ModelAware", "one_way", 3),
    (ContrastiveSentenceLoss, "Learnable", "both_ways", 2),
    (ContrastiveSentenceLoss, "Individual", "one_way", 2),
    (CachedContrastiveSentenceLoss, "Learnable", "one_way", 3),
]


def step(folder, rows):
    """Every cell's value, gradients and state, of these rows of the batch."""
    found = []
    for cls, name, layout, columns in CELLS:
        model = encoder(folder, pooling="mean", head=False).to("cpu").double().eval()
        build = getattr(temperature, name)(**TEMPERATURES[name])
        loss = cls(model, build, layout=layout, gather_across_devices=True)
        labels = torch.arange(20)[rows] if name == "Individual" else None
        value, grads = gradients(loss, batch(model, columns, rows), labels)
        found.append((value, grads, loss.criterion.state_dict()))
    return found


def of_rank(folder, rank):
    found = step(folder, [slice(0, 3), slice(3, 7)][rank])
    for value, grads, _ in found:
        dist.all_reduce(value.div_(2))
        for name, gradient in grads.items():
            if name.startswith("model."):  # as DistributedDataParallel, which has the model alone
                dist.all_reduce(gradient.div_(2))
    return found


def test_two_processes_are_one(bert, tmp_path):
    whole = step(bert, slice(0, 7))
    for rank in gloo.run(partial(of_rank, bert), 2, tmp_path):
        for ours, theirs in zip(rank, whole, strict=True):
            assert_same(ours, theirs)
            assert ours[2].keys() == theirs[2].keys()
            for name, kept in theirs[2].items():
                torch.testing.assert_close(ours[2][name], kept, rtol=1e-5, atol=1e-6)


# In the trainer


def trainer(folder, out, loss_of, *, epochs=2, labels=False, every=1, **arguments):
    torch.manual_seed(0)
    model = encoder(folder, head=True).to("cpu")
    data = {"sentence": SENTENCES[:12]} | ({"label": list(range(12))} if labels else {})
    made = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(out),
            num_train_epochs=epochs,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **({"save_strategy": "no"} | arguments),
        ),
        train_dataset=Dataset.from_dict(data),
        loss=loss_of(model),
    )
    made.add_callback(ContrastiveCallback(made, every))
    return made


@pytest.mark.parametrize("per_step", [False, True])
def test_the_trainer_tells_the_epoch_and_logs_diagnostics(bert, tmp_path, per_step):
    schedule = CosineSchedule(0.1, 1.0, period=4, per_step=per_step)
    made = trainer(bert, tmp_path, lambda model: ContrastiveSentenceLoss(model, schedule), epochs=3)
    made.train()
    expected = [schedule.tau(step / 3 if per_step else step // 3) for step in range(9)]
    with (tmp_path / "diagnostics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["quantity"] == "temperature" and row["pairs"] == "negative"]
    assert [int(row["step"]) for row in rows] == list(range(9))
    assert [int(row["epoch"]) for row in rows] == [step // 3 for step in range(9)]
    assert [int(row["count"]) for row in rows] == [4 * 3] * 9
    assert [float(row["mean"]) for row in rows] == pytest.approx(expected, rel=1e-6)
    logged = [log for log in made.state.log_history if "diagnostics/negative_temperature_mean" in log]
    assert [log["diagnostics/negative_temperature_mean"] for log in logged] == pytest.approx(expected, rel=1e-6)
    assert [log["step"] for log in logged] == list(range(1, 10))


def test_a_table_is_resumed_with_a_checkpoint(bert, tmp_path):
    def run(checkpoint=None):
        arguments = {"labels": True, "every": 0, "save_strategy": "epoch"}
        made = trainer(bert, tmp_path, partial(ContrastiveSentenceLoss, **TABLE), **arguments)
        made.train(resume_from_checkpoint=checkpoint)
        return made.loss.criterion.loss.temperature

    whole = run()
    assert whole.visited.all()
    first = torch.load(tmp_path / "checkpoint-3" / "contrastive_loss.pt")[""]["loss.temperature.tau"]
    resumed = run(str(tmp_path / "checkpoint-3"))
    assert (first - whole.tau).abs().max() > 1e-4
    torch.testing.assert_close(resumed.tau, whole.tau, rtol=0, atol=1e-6)
    torch.testing.assert_close(resumed.u, whole.u, rtol=0, atol=1e-5)


TABLE = {"temperature": "isogclr", "num_samples": 12, "rho": 0.2}


def test_a_checkpoint_without_the_table_is_said(bert, tmp_path):
    made = trainer(bert, tmp_path, partial(ContrastiveSentenceLoss, **TABLE), labels=True)
    made.state.global_step = 3
    with pytest.warns(UserWarning, match="contrastive_loss.pt is not there.*starts anew"):
        made.callback_handler.callbacks[-1].on_train_begin(made.args, made.state, made.control)


@pytest.mark.parametrize("max_steps", [-1, 4])
def test_a_training_too_short_for_its_schedule_warns(bert, tmp_path, max_steps):
    made = trainer(bert, tmp_path, lambda model: ContrastiveSentenceLoss(model, CosineSchedule(period=8)), epochs=4)
    made.args.max_steps, made.state.num_train_epochs = max_steps, 2
    ends = 4 if max_steps == -1 else 2
    with pytest.warns(UserWarning, match=f"half a period of 4 epochs, but training ends after {ends}"):
        made.callback_handler.callbacks[-1].on_train_begin(made.args, made.state, made.control)


def test_losses_inside_of_others_are_found(bert, tmp_path):
    def wrapped(model):
        return losses.MatryoshkaLoss(model, CachedContrastiveSentenceLoss(model, CosineSchedule(period=1)), [8, 4])

    made = trainer(bert, tmp_path, wrapped, epochs=1)
    made.train()
    assert len((tmp_path / "diagnostics.csv").read_text().splitlines()) == 1 + 3 * 4


def test_a_callback_without_a_loss_of_ours_raises(bert, tmp_path):
    with pytest.raises(ValueError, match=r"MultipleNegativesRankingLoss.*no ContrastiveSentenceLoss inside"):
        trainer(bert, tmp_path, losses.MultipleNegativesRankingLoss)


def test_the_head_is_for_training_alone(bert):
    model = encoder(bert).to("cpu")
    bare = without_head(model)
    assert len(bare) == len(model) - 1
    features = model.preprocess(SENTENCES[:3])
    embedded = {}
    for training in (False, True):
        for part in (model, bare):
            torch.manual_seed(0)
            embedded[training, part] = part.train(training)(dict(features))["sentence_embedding"]
    assert torch.equal(embedded[False, model], embedded[False, bare])
    expected = torch.tanh(model[-1].linear(embedded[True, bare]))
    torch.testing.assert_close(embedded[True, model], expected)


# STS files


def write(folder, **files):
    for name, text in files.items():
        (folder / name.replace("_dot_", ".")).write_text(text, encoding="utf-8")
    return folder


def test_every_form_of_sts_files_is_read(tmp_path):
    expected = (["a, b", "c"], ["d", "e"], [5.0, 0.25])
    write(
        tmp_path,
        plain_dot_csv='"a, b",d,5\nc,e,0.25\n',
        headed_dot_csv='sentence1,sentence2,score\n"a, b",d,5.0\nc,e,.25\n',
        bench_dot_csv="genre\tf\t2012\t1\t5.000\ta, b\td\ngenre\tf\t2012\t2\t0.25\tc\te\tsource\n",
        SICK_dot_txt="pair_ID\tsentence_A\tsentence_B\trelatedness_score\tby\n1\ta, b\td\t5\tX\n2\tc\te\t0.25\tY\n",
    )
    for name in ("plain.csv", "headed.csv", "bench.csv", "SICK.txt"):
        assert read_pairs(tmp_path / name) == expected, name
    year = tmp_path / "STS12"
    year.mkdir()
    for name, pairs, scores in [("A", "a, b\td\n", "5\n"), ("B", "x\ty\nc\te\n", "\n0.25\n")]:
        (year / f"STS.input.{name}.txt").write_text(pairs)
        (year / f"STS.gs.{name}.txt").write_text(scores)
    assert read_pairs(year) == expected
    assert read_pairs(year / "STS.input.B.txt") == (["c"], ["e"], [0.25])
    assert evaluator(year).name == "STS12"


@pytest.mark.parametrize(
    ("text", "message"),
    [("a,b,5\nc,d,high\n", r"x.csv, pair 2: \['c', 'd', 'high'\] is not"), ("s,t,score\n", "x.csv has no pair")],
)
def test_a_bad_sts_file_is_said(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path / "x.csv")


def test_sts_files_that_do_not_fit_are_said(tmp_path):
    (tmp_path / "STS.input.A.txt").write_text("a\tb\nc\td\n")
    (tmp_path / "STS.gs.A.txt").write_text("1\n")
    with pytest.raises(ValueError, match=r"has 2 pairs, but its file STS.gs.* 1 scores"):
        read_pairs(tmp_path)
    with pytest.raises(ValueError, match=r"has no STS.input.\*.txt"):
        read_pairs(tmp_path.parent)


# The script


@pytest.fixture(scope="session")
def script():
    path = Path(__file__).parents[2] / "scripts" / "examples" / "simcse.py"
    spec = importlib.util.spec_from_file_location("simcse", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_trains_evaluates_and_tabulates(script, tmp_path, capsys):
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES[:48]))
    # Sentences of one subject are alike.
    pairs = [(a, b, 5 * (a.split()[1] == b.split()[1])) for a, b in zip(SENTENCES[::3], SENTENCES[1::3], strict=False)]
    with (tmp_path / "alike.csv").open("w", newline="") as file:
        csv.writer(file).writerows(pairs)
    out = tmp_path / "run"
    tokens = [f"sentences={tmp_path}/sentences.txt", f"dev={tmp_path}/alike.csv", f"out={out}", "cpu=true", "seed=3"]
    small = ["dim=8", "layers=1", "heads=2", "vocabulary=100", "batch_size=16", "eval_steps=2", "progress=false"]
    assert script.main([*tokens, *small, "method=macl", "epochs=2", "mini_batch_size=8"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["best"] in (2, 4, 6)
    assert summary["settings"]["method"] == "macl"
    # What is saved is what was evaluated: the best of the checkpoints, without its head.
    saved = SentenceTransformer(str(out / "model"), device="cpu")
    assert summary["after"] == script.evaluate(saved, [evaluator(tmp_path / "alike.csv")])
    logs = json.loads((out / "log.json").read_text())
    scores = [round(100 * log[key], 2) for log in logs for key in log if key == "eval_alike_spearman_cosine"]
    assert len(scores) == 3
    assert scores[summary["best"] // 2 - 1] == max(scores)
    assert summary["after"]["alike"] == max(scores)
    capsys.readouterr()
    assert script.main([f"table=[{tmp_path}]"]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    before, after = summary["before"]["alike"], summary["after"]["alike"]
    assert row == f"| macl | 3 | {before:.2f} | {after:.2f} | {after - before:.2f} |"


def saved(bert, folder, form):
    """The same BERT in other forms that encoders are released in."""
    if form == "sentence-transformers":
        without_head(encoder(bert, pooling="mean")).save(str(folder))
    elif form == "with a task's head":  # as bert-base-uncased
        BertForPreTraining.from_pretrained(bert).save_pretrained(folder)
        BertTokenizerFast.from_pretrained(bert).save_pretrained(folder)
    return bert if form == "transformers" else str(folder)


@pytest.mark.parametrize("form", ["transformers", "with a task's head", "sentence-transformers"])
def test_the_script_starts_from_a_saved_model(script, bert, tmp_path, form):
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES[:8]))
    pairs = [(a, b, number % 3) for number, (a, b) in enumerate(zip(SENTENCES[::9], SENTENCES[1::9], strict=False))]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows(pairs)
    files = [f"sentences={tmp_path}/sentences.txt", f"sts=[{tmp_path}/pairs.csv]", f"out={tmp_path}/run"]
    settings = ["pooling=mean", "batch_size=4", "lr=0.1", "cpu=true", "progress=false"]
    assert script.main([*files, *settings, f"model={saved(bert, tmp_path / 'saved', form)}"]) == 0
    start = encoder(bert, pooling="mean").to("cpu")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before"] == script.evaluate(start, [evaluator(tmp_path / "pairs.csv")])
    assert summary["steps"] == 2
    assert summary["best"] is None
    trained = SentenceTransformer(str(tmp_path / "run" / "model"), device="cpu")
    assert abs(trained.encode(SENTENCES[:3]) - start.encode(SENTENCES[:3])).max() > 0.01


def test_warm_up_is_a_share_of_the_steps(script, bert, tmp_path):
    settings = script.parse(script.Settings, ["warmup=0.25", "cpu=true"])
    made = script.build_trainer(settings, encoder(bert).to("cpu"), SENTENCES[:8], tmp_path)
    assert made.args.get_warmup_steps(8) == 2


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["methd=macl"], "Did you mean 'method'"),
        (["--method", "macl"], "'--method macl' is no setting; write method=macl"),
        (["alpha=1"], "Did you mean 'method_kwargs.alpha', a parameter of the method?"),
        (["method=dystress_moco"], "method=dystress_moco has a queue, which is not for sentences here."),
        (["method=macl"], "sentences=FILE must be given"),
        (["table=[/nowhere]"], "no summary.json"),
    ],
)
def test_the_script_says_what_is_wrong(script, tokens, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert script.main(tokens) == 2
    assert message in capsys.readouterr().err


def test_every_number_of_the_script_has_a_range(script, capsys):
    hints = typing.get_type_hints(script.Settings)
    numbers = [
        f for f in dataclasses.fields(script.Settings) if "int" in str(hints[f.name]) or "float" in str(hints[f.name])
    ]
    for f in numbers:
        assert len(f.metadata["bounds"]) == 2, f.name
        for bound in (min(f.metadata["bounds"].values()) - 1, max(f.metadata["bounds"].values()) + 1, "nan"):
            assert script.main([f"{f.name}={bound}"]) == 2
            assert capsys.readouterr().err.startswith(f"simcse.py: {f.name}"), f.name
