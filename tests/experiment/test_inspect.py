import json
import math
import shlex
from pathlib import Path

import pytest
import torch

from dystress_plugin import ContrastiveLoss, recipes
from dystress_plugin.cli import main
from dystress_plugin.experiment.commands import parse_compare
from dystress_plugin.experiment.inspect import command as inspection
from dystress_plugin.experiment.inspect import effects
from dystress_plugin.recipes import METHODS
from dystress_plugin.temperature import Constant, DySTreSS, Individual

IMAGES = 12


def embeddings(images=IMAGES, dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z0 = torch.randn(images, dim, generator=generator, dtype=torch.float64)
    return z0, z0 + 0.5 * torch.randn(images, dim, generator=generator, dtype=torch.float64)


def pairs(z0, z1, epoch=0.0):
    return effects.similarities(z0, z1, index=torch.arange(len(z0)), epoch=epoch)


def loss_of(method, **settings):
    if "num_samples" in METHODS[method].parameters:
        settings["num_samples"] = IMAGES
    if "dim" in METHODS[method].parameters:
        settings["dim"] = 5
    return ContrastiveLoss(method, **settings).eval()


def test_similarities_are_those_of_every_anchor_with_the_other_images():
    z0, z1 = embeddings()
    seen = pairs(z0, z1)
    unit = torch.nn.functional.normalize(torch.cat([z0, z1]), dim=1)
    for i in range(2 * IMAGES):
        others = [j for j in range(2 * IMAGES) if j % IMAGES != i % IMAGES]
        assert torch.allclose(seen.negative[i], unit[others] @ unit[i], atol=1e-12)
        assert torch.allclose(seen.positive[i], unit[(i + IMAGES) % (2 * IMAGES)] @ unit[i], atol=1e-12)


@pytest.mark.parametrize("method", [name for name in METHODS if not name.endswith("_moco")])
def test_push_and_pull_are_the_gradient_of_the_loss(method):
    """Sent through the cosines, they are the gradient in the embeddings that the loss itself has."""
    z0, z1 = (z.requires_grad_() for z in embeddings())
    loss = loss_of(method)
    found = effects.effect(loss, pairs(z0.detach(), z1.detach()))
    unit = torch.nn.functional.normalize(torch.cat([z0, z1]), dim=1)
    anchors = 2 * IMAGES
    derivative = torch.zeros(anchors, anchors, dtype=torch.float64)
    for i in range(anchors):
        others = [j for j in range(anchors) if j % IMAGES != i % IMAGES]
        derivative[i, others] = found.push[i]
        derivative[i, (i + IMAGES) % anchors] = found.pull[i, 0]
    # The loss is the mean over anchors; SogCLR's the mean over images of the sum over views.
    rows = IMAGES if loss.objective == "sogclr" else anchors
    through_cosines = torch.autograd.grad(((unit @ unit.T) * derivative).sum() / rows, (z0, z1))
    itself = torch.autograd.grad(loss(z0, z1, index=torch.arange(IMAGES), epoch=0.0), (z0, z1))
    for a, b in zip(through_cosines, itself, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_measures_of_a_constant_follow_from_the_softmax_of_each_anchor():
    seen = pairs(*embeddings())
    found = effects.effect(ContrastiveLoss(Constant(0.3)), seen).measures
    effective, hardest, tenth = [], [], []
    for row in seen.negative.tolist():
        e = sorted((math.exp(s / 0.3) for s in row), reverse=True)
        w = [x / sum(e) for x in e]
        effective.append(1 / sum(x * x for x in w))
        hardest.append(100 * w[0])  # 1 % of 22 negatives is not one of them
        tenth.append(100 * (w[0] + w[1]))
    assert found["effective_negatives"] == pytest.approx(sum(effective) / len(effective))
    assert found["hardest_1_percent"] == pytest.approx(sum(hardest) / len(hardest))
    assert found["hardest_10_percent"] == pytest.approx(sum(tenth) / len(tenth))
    assert found["tau_negative_min"] == found["tau_positive_max"] == 0.3
    assert (found["inverted_percent"], found["falling"], found["falling_percent"]) == (0, [], 0)


def test_a_large_temperature_weighs_all_negatives_alike_and_a_small_one_the_hardest():
    seen = pairs(*embeddings())
    flat, sharp = (effects.effect(ContrastiveLoss(Constant(tau)), seen).measures for tau in (1e6, 1e-4))
    assert flat["effective_negatives"] == pytest.approx(22)
    assert flat["hardest_1_percent"] == pytest.approx(100 / 22)
    assert flat["push_cosine"] == pytest.approx(float(seen.negative.mean()), abs=1e-5)
    assert sharp["effective_negatives"] == pytest.approx(1, abs=1e-2)
    assert sharp["hardest_1_percent"] == pytest.approx(100, abs=0.5)
    assert sharp["push_cosine"] == pytest.approx(float(seen.negative.max(dim=1).values.mean()), abs=1e-3)


@pytest.mark.filterwarnings("ignore:tau_max/tau_min")
def test_where_the_logit_falls_is_found():
    # papers.md 1.2: with (0.1, 0.5) it falls in 19.4 % of the range of the base profile, none with (0.1, 0.2).
    wide = DySTreSS(tau_min=0.1, tau_max=0.5)
    maps = wide.prepare(pairs(*embeddings()).batch)
    ranges = effects.falling(maps.negative, 24)
    assert sum(high - low for low, high in ranges) / 2 == pytest.approx(0.194, abs=0.002)
    assert ranges == [[-ranges[1][1], -ranges[1][0]], ranges[1]]
    assert effects.falling(DySTreSS().prepare(pairs(*embeddings()).batch).negative, 24) == []


@pytest.mark.filterwarnings("ignore:tau_max/tau_min")
def test_inverted_pairs_are_counted_where_there_are_any():
    seen = pairs(*embeddings())
    wide = effects.effect(ContrastiveLoss(DySTreSS(tau_min=0.1, tau_max=1.0)), seen)
    cosine, logit = (torch.cat(x, dim=1) for x in ((seen.positive, seen.negative), _logits(wide, seen)))
    exact = [
        float(((c[:, None] - c) * (a[:, None] - a) < 0).double().sum() / (len(c) * (len(c) - 1)))
        for c, a in zip(cosine, logit, strict=True)
    ]
    assert wide.measures["inverted_percent"] == pytest.approx(100 * sum(exact) / len(exact), rel=0.25)
    assert wide.measures["inverted_percent"] > 1
    inside = sum(low < s < high for low, high in wide.measures["falling"] for s in seen.negative.flatten().tolist())
    assert wide.measures["falling_percent"] == pytest.approx(100 * inside / seen.negative.numel())


def _logits(found, seen):
    return found.maps.positive.logit(seen.positive), found.maps.negative.logit(seen.negative)


def test_one_in_two_pairs_are_inverted_by_noise_and_all_by_a_minus():
    cosine = torch.randn(20, 200, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(20, 200, generator=torch.Generator().manual_seed(2))
    assert effects.inverted_share(cosine, noise) == pytest.approx(0.5, abs=0.02)
    assert effects.inverted_share(cosine, -cosine) == 1
    assert effects.inverted_share(cosine, torch.ones_like(cosine)) == 0


def test_the_relative_weight_averages_to_one_over_the_negatives():
    seen = pairs(*embeddings(images=150))
    found = effects.effect(ContrastiveLoss(Constant(0.5)), seen)
    cosine, weight = effects.relative_weight(found, seen)
    assert float(cosine.min()) >= float(seen.negative.min())
    at = torch.searchsorted(cosine, seen.negative.flatten()).clamp(max=len(cosine) - 1)
    assert float(weight[at].mean()) == pytest.approx(1, abs=0.02)


def test_looking_changes_no_table():
    z0, z1 = embeddings()
    loss = ContrastiveLoss(Individual(IMAGES))
    loss(z0, z1, index=torch.arange(IMAGES))
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    effects.effect(loss, pairs(z0, z1))
    assert loss.temperature.training
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


def inspect(**settings):
    return main(["inspect", *(f"{key}={value}" for key, value in settings.items())])


def test_an_untrained_network_is_inspected(images, tmp_path, capsys):
    out = tmp_path / "seen"
    assert inspect(data=images, image_size=12, backbone="test_resnet", images=9, out=out) == 0
    report = json.loads((out / "inspect.json").read_text())
    assert (report["images"], report["negatives_per_anchor"], report["epoch"]) == (9, 16, 0)
    assert report["reference"] == "constant 0.1"
    names = [f"constant {tau}" for tau in (0.05, 0.1, 0.2, 0.5)]
    assert list(report["temperatures"]) == [*names, "DySTreSS", "MACL", "TS", "iSogCLR", "Temperature-Free"]
    assert report["temperatures"]["TS"]["tau_negative_max"] == 1.0
    for pair in ("positive", "negative"):
        assert -1 <= report["similarities"][pair]["min"] <= report["similarities"][pair]["mean"] <= 1
    figures = sorted(path.name for path in out.glob("*.png"))
    assert figures == ["gradients.png", "measures.png", "similarities.png", "temperatures.png", "weights.png"]
    printed = capsys.readouterr().out
    assert "of 16" in printed
    assert "constant 0.1 is what the others are compared with" in printed
    assert printed.count("figure: ") == 5
    assert report["try_first"] in printed.splitlines()
    settings, common = parse_compare(shlex.split(report["command"])[2:])
    assert report["try_first"].startswith(f"Try first: {recipes.recipe(settings.methods[0]).title}. ")
    assert (common.data, common.backbone, common.image_size) == (str(images), "test_resnet", 12)
    assert printed.endswith(f"{report['command']}\n")
    # Every anchor's own constant agrees with iSogCLR before its first update.
    same = [report["temperatures"][name]["effective_negatives"] for name in ("constant 0.1", "iSogCLR")]
    assert same[0] == pytest.approx(same[1])
    assert report["try_first"].endswith("before they have learned anything, and so no candidates: iSogCLR.")


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("method", ["isogclr", "tempnet", "fastclip", "clip"])
def test_what_is_still_to_learn_its_temperatures_is_not_recommended(method, images, tmp_path):
    out = tmp_path / "seen"
    asked = {"methods": f"[{method}]", "constants": "[1.0]"}
    assert inspect(data=images, image_size=12, backbone="test_resnet", images=9, out=out, **asked) == 0
    report = json.loads((out / "inspect.json").read_text())
    assert report["try_first"].startswith("Nothing to try first")
    assert report["try_first"].endswith(f"so no candidates: {recipes.recipe(method).title}.")
    assert "command" not in report


@pytest.fixture
def without_figures(monkeypatch):
    """They are drawn, and looked for, above."""
    monkeypatch.setattr(inspection.figures, "draw", lambda *args: None)


@pytest.mark.usefixtures("without_figures")
def test_a_run_is_inspected_with_its_own_temperatures(tiny, tmp_path):
    settings = tiny | {"method": "isogclr", "method_kwargs.eta": 0.1}
    assert main(["pretrain", *(f"{key}={value}" for key, value in settings.items())]) == 0
    out = tmp_path / "seen"
    options = {"checkpoint": tiny["out"], "constants": "[]", "images": 8, "seed": 1}
    own = {"methods": "[isogclr,dystress,dystress-low]", "method_kwargs.dystress-low.tau_max": 0.15}
    assert inspect(**options, **own, out=out) == 0
    report = json.loads((out / "inspect.json").read_text())
    assert list(report["temperatures"]) == ["iSogCLR, this run's", "DySTreSS", "DySTreSS (low)"]
    own = report["temperatures"][report["reference"]]
    tau = torch.load(f"{tiny['out']}/checkpoints/last.ckpt", weights_only=True)["state_dict"]["loss.temperature.tau"]
    assert any(own["tau_negative_min"] == pytest.approx(float(t)) for t in tau)
    assert own["tau_negative_min"] < own["tau_negative_max"]
    assert report["temperatures"]["DySTreSS (low)"]["tau_negative_max"] <= 0.15 + 1e-12
    assert report["temperatures"]["DySTreSS"]["tau_negative_max"] > 0.15
    assert report["epoch"] == 2
    assert "no candidates" not in report["try_first"]  # of this run's alone, which have learned

    assert inspect(**options, methods="[]", untrained="true") == 0
    fresh = json.loads(Path(tiny["out"], "inspect", "inspect.json").read_text())
    assert fresh["epoch"] == 0
    assert "no candidates: iSogCLR, this run's." in fresh["try_first"]
    assert fresh["alignment"] != report["alignment"]
    # Again, in another place: what is there stays.
    assert inspect(**options, methods="[]") == 0
    again = json.loads(Path(tiny["out"], "inspect-2", "inspect.json").read_text())
    assert again["alignment"] == report["alignment"]
    assert again["settings"]["out"] == f"{tiny['out']}/inspect-2"
    assert json.loads(Path(tiny["out"], "inspect", "inspect.json").read_text()) == fresh
    assert inspect(**options, methods="[]", out=out) == 2


@pytest.mark.usefixtures("without_figures")
def test_a_run_with_a_queue_shows_the_network_that_is_trained(tiny):
    settings = tiny | {"method": "dystress_moco", "queue_size": 16, "epochs": 1}
    assert main(["pretrain", *(f"{key}={value}" for key, value in settings.items())]) == 0
    assert inspect(checkpoint=tiny["out"], methods="[ts_moco]", constants="[0.1]", epoch=200) == 0
    report = json.loads(Path(tiny["out"], "inspect", "inspect.json").read_text())
    assert list(report["temperatures"]) == ["constant 0.1", "DySTreSS MoCo, this run's", "TS MoCo"]
    assert report["temperatures"]["TS MoCo"]["tau_negative_max"] == pytest.approx(0.1)
    assert report["negatives_per_anchor"] == 2 * 6 - 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": "[dystres]"}, "Unknown method 'dystres'. Did you mean 'dystress'?"),
        ({"method_kwargs.macl.tau": 0.2, "methods": "[dystress]"}, "Unknown method in method_kwargs 'macl'."),
        ({"method_kwargs.dystress": 0.2}, "method_kwargs.dystress=0.2 must name a parameter"),
        ({"method_kwargs.dystress.tau_mx": 0.2}, "Did you mean 'tau_max'?"),
        ({"constants": "[0.1,0]"}, "constants=[0.1, 0.0]: 0.0 must be above 0"),
        ({"accelerator": "tpus"}, "Unknown accelerator 'tpus'"),
        ({"images": 1}, "images=1 must be at least 2"),
        ({"checkpoint": "nowhere"}, "holds no run of `dystress pretrain`"),
        ({"data": "nowhere"}, "is neither a folder nor one of"),
        ({"out": "full"}, "out=full is not empty. Choose another out."),
    ],
)
def test_bad_settings_write_nothing(settings, message, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    base = {"data": images, "image_size": 12, "backbone": "test_resnet", "out": "seen"}
    base = base if "checkpoint" not in settings else {"out": "seen"}
    assert inspect(**base | settings) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "images"]


def test_what_to_try_first_is_balanced_keeps_the_order_and_differs_most():
    def of(hard, effective, falling=()):
        return {"hardest_1_percent": hard, "effective_negatives": effective, "falling": list(falling)}

    reference = of(10.0, 20.0)
    sharp, flat, wrong, near = of(90.0, 2.0), of(1.0, 80.0), of(60.0, 30.0, [[0.5, 0.6]]), of(14.0, 15.0)
    candidates = {"sharp": sharp, "flat": flat, "wrong": wrong, "near": near, "far": of(4.0, 40.0)}
    first = effects.first_to_try(candidates, reference, "now", 100)
    assert first.name == "far"
    assert "Try first: far." in first.sentence
    assert "the most similar 1 % get 4 % of the push instead of 10 %" in first.sentence
    del candidates["far"]
    assert effects.first_to_try(candidates, reference, "now", 100).name == "near"
    del candidates["near"]
    candidates["same"] = of(10.4, 20.0)
    for left in (candidates, {}):
        nothing = effects.first_to_try(left, reference, "now", 100)
        assert nothing.name is None
        assert nothing.sentence.startswith("Nothing to try first: ")


@pytest.mark.parametrize(
    ("hard", "effective", "words"),
    [
        (20.0, 50.0, "would concentrate the push on the hardest negatives: the most similar 1 % get 20 % of it"),
        (5.0, 90.0, "would spread the push away from the hardest negatives"),
        (10.2, 61.0, "would change little against constant 0.1"),
    ],
)
def test_the_advice_says_which_way(hard, effective, words):
    reference = {"hardest_1_percent": 10.0, "effective_negatives": 60.0, "falling": [], "inverted_percent": 0.0}
    measures = reference | {"hardest_1_percent": hard, "effective_negatives": effective}
    text = effects.advice("X", measures, reference, "constant 0.1", 100)
    assert text.startswith(f"X {words}")
    assert text.endswith(".")
    assert "wrong order" not in text
    falling = measures | {"falling": [[0.5, 0.75]], "inverted_percent": 3.0}
    assert "between cosines 0.50 to 0.75" in effects.advice("X", falling, reference, "constant 0.1", 100)
    assert "what the others are compared with" in effects.advice("X", reference, reference, "X", 100)
