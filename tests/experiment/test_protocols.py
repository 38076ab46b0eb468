import csv
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dystress_plugin.cli import main
from dystress_plugin.experiment.evaluate import protocols, scores
from dystress_plugin.experiment.evaluate.protocols import Features, balanced, groups, protocol
from dystress_plugin.experiment.evaluate.scores import score, score_run
from dystress_plugin.experiment.io.config import read_config


def features(counts=(30, 30, 30), test_each=10, spread=0.01, seed=0):
    """Classes along the axes, so far apart that every protocol must get them right, unless `spread` is large."""
    generator = torch.Generator().manual_seed(seed)
    classes = len(counts)

    def draw(labels):
        return torch.eye(classes)[labels] + spread * torch.randn(len(labels), classes, generator=generator)

    train_labels = torch.arange(classes).repeat_interleave(torch.tensor(counts))
    labels = torch.arange(classes).repeat_interleave(test_each)
    train, test = draw(train_labels), draw(labels)
    return Features(train, train_labels, test, labels, train, train_labels, tuple(map(str, range(classes))))


NAMES = ["weighted_knn", "knn_1", "knn_10", "linear", "few_shot_1pct", "few_shot_10pct", "few_shot_4"]


def test_every_protocol_gets_separated_classes_right_and_says_of_how_many_images():
    scores = score(features(), map(protocol, NAMES))
    whole = {each.protocol: each for each in scores if each.group == "all"}
    assert list(whole) == NAMES
    assert {each.value for each in whole.values()} == {100.0}
    assert {(each.n, each.train_images) for each in whole.values()} == {(30, 90)}
    of_class = [each for each in scores if each.group == "class 1"]
    assert [(each.n, each.train_images, each.value) for each in of_class] == [(10, 30, 100.0)] * len(NAMES)


def test_majority_knn_is_the_vote_of_the_nearest_by_cosine_with_ties_to_the_smaller_label():
    generator = torch.Generator().manual_seed(1)
    train, test = torch.randn(40, 5, generator=generator), torch.randn(25, 5, generator=generator)
    train_labels = torch.randint(4, (40,), generator=generator)
    f = Features(train, train_labels, test, torch.zeros(25, dtype=torch.long), train, train_labels, tuple("abcd"))
    for k in (1, 4, 10):
        expected = []
        for query in test.double():
            cosine = [float(query @ row / (query.norm() * row.norm())) for row in train.double()]
            nearest = sorted(range(40), key=lambda i: -cosine[i])[:k]
            votes = [sum(int(train_labels[i]) == c for i in nearest) for c in range(4)]
            expected.append(votes.index(max(votes)))
        assert protocol(f"knn_{k}").classes(f).tolist() == [expected]


def test_knn_reports_the_mean_of_classes_and_the_weighted_knn_that_of_images(monkeypatch):
    f = features()
    # 12 images of class 0, 2 of class 1; only class 0 is right.
    f = replace(f, test=f.test[[0] * 14], labels=torch.tensor([0] * 12 + [1] * 2))
    whole = {
        s.protocol: s.value for s in score(f, map(protocol, ["weighted_knn", "knn_1", "linear"])) if s.group == "all"
    }
    assert whole == pytest.approx({"weighted_knn": 100 * 12 / 14, "knn_1": 50.0, "linear": 100 * 12 / 14})


def test_few_shot_averages_draws_that_are_balanced_and_always_the_same():
    labels = np.array([0] * 50 + [1] * 20 + [2] * 7)
    drawn = [balanced(labels, 5, seed) for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert np.bincount(labels[drawn[0]]).tolist() == [5, 5, 5]
    assert np.bincount(labels[balanced(labels, 30, 0)]).tolist() == [7, 7, 7]

    noisy = features(spread=1.0)
    found = protocol("few_shot_2").classes(noisy)
    assert found.shape == (protocols.DRAWS, 30)
    assert len({tuple(draw) for draw in found.tolist()}) > 1
    (whole,) = (s.value for s in score(noisy, [protocol("few_shot_2")]) if s.group == "all")
    assert whole == pytest.approx(100 * float((found == noisy.labels).double().mean()))


def test_percent_is_of_the_images_of_a_class():
    f = features(counts=(40, 40, 40))
    ten, four = protocol("few_shot_10pct").classes(f), protocol("few_shot_4").classes(f)
    assert torch.equal(ten, four)


def test_groups_are_thirds_by_frequency_and_the_counts_of_the_papers():
    counts = np.array([500, 19, 300, 20, 100, 101, 2])
    assert groups(counts) == {
        "head": [0, 2, 5],
        "medium": [3, 4],
        "tail": [1, 6],
        "over 100 images": [0, 2, 5],
        "20 to 100 images": [3, 4],
        "under 20 images": [1, 6],
    }
    assert groups(np.array([130, 120, 131])) == {}
    assert "under 20 images" not in groups(np.array([300, 40]))


def test_a_group_is_the_mean_of_its_classes():
    f = features(counts=(60, 6, 6), spread=0.6)
    scores = {(s.protocol, s.group): s for s in score(f, [protocol("weighted_knn")])}
    thirds = {"head": [0], "medium": [1], "tail": [2]}
    for group, classes in thirds.items():
        mean = np.mean([scores["weighted_knn", f"class {c}"].value for c in classes])
        assert scores["weighted_knn", group].value == pytest.approx(mean)
    assert scores["weighted_knn", "head"].train_images == 60
    assert len({scores["weighted_knn", group].value for group in thirds}) > 1


@pytest.mark.parametrize("name", ["knn", "knn_0", "few_shot_", "few_shot_5pc", "weighted_kn"])
def test_an_unknown_protocol_is_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match=f"Unknown protocol '{name}'.*few_shot_N"):
        protocol(name)


def test_the_scores_of_a_run_agree_with_its_summary_and_are_computed_once(tiny, tmp_path, monkeypatch):
    settings = tiny | {"epochs": 1, "long_tail": 0.4}
    assert main(["pretrain", *(f"{key}={value}" for key, value in settings.items())]) == 0
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    kept = {}
    for prefix, function in (("", score_run), ("untrained_", partial(score_run, untrained=True))):
        found = function(run, ["weighted_knn", "linear"], with_map=True)
        whole = {s.protocol: s.value for s in found if s.group == "all"}
        assert whole["weighted_knn"] == pytest.approx(summary[f"{prefix}knn_top1"])
        assert whole["linear"] == pytest.approx(summary[f"{prefix}linear_top1"])
        assert {"head", "medium", "tail"} <= {s.group for s in found}
        kept[function] = found
        with (run / f"{prefix}map.csv").open() as file:
            places = list(csv.DictReader(file))
        assert [int(place["class"]) for place in places] == [0, 0, 1, 1, 2, 2]
        names = sorted(path.name for path in Path(settings["data"]).iterdir())
        assert [names[int(place["class"])] for place in places] == [place["name"] for place in places]

    extracted = []
    monkeypatch.setattr(scores, "features_of", lambda *a, **rest: extracted.append(a))
    for function, found in kept.items():
        again = function(run, ["weighted_knn", "linear"], with_map=True)
        assert [(s.protocol, s.group, s.n) for s in again] == [(s.protocol, s.group, s.n) for s in found]
        assert [s.value for s in again] == pytest.approx([s.value for s in found])
    assert extracted == []


def test_few_labels_of_a_long_tail_are_drawn_from_what_was_cut(tiny, tmp_path):
    settings = tiny | {"epochs": 1, "long_tail": 0.2}
    assert main(["pretrain", *(f"{key}={value}" for key, value in settings.items())]) == 0
    run = tmp_path / "run"
    config = read_config(run / "config.yaml")
    backbone = scores.untrained_backbone(config)
    f = scores.features_of_run(backbone, run, config, ["linear", "few_shot_10pct"])
    assert torch.bincount(f.train_labels).tolist() == [6, 2, 1]
    assert torch.bincount(f.pool_labels).tolist() == [6, 6, 6]
