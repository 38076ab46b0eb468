import math
import re
import statistics
import warnings
from types import SimpleNamespace

import matplotlib as mpl
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from scipy.stats import dunnett, ttest_ind

from dystress_plugin.experiment.arms import family_of
from dystress_plugin.experiment.evaluate.protocols import Features, protocol
from dystress_plugin.experiment.evaluate.scores import score
from dystress_plugin.experiment.report import command, figures, records
from dystress_plugin.experiment.report.differences import Difference, differences, interval, sentence, simultaneous
from dystress_plugin.experiment.report.page import spread
from dystress_plugin.experiment.settings import ReportSettings
from dystress_plugin.experiment.style import styles


def row(name, seed, value, protocol="linear", group="all", method=None):
    about = {"name": name, "method": method or name.partition("-")[0], "seed": seed}
    return about | {"protocol": protocol, "group": group, "value": value, "n": 10, "train_images": 90}


def found(rows, constants, protocols):
    """The differences, where the family of each arm is that of its method."""
    families = {row["name"]: family_of(row["method"]) for row in rows}
    return differences(pd.DataFrame(rows), families, constants, protocols)


def table(values, protocol="linear"):
    """Rows from the accuracies over seeds of each arm; constants are of method simclr."""
    return [
        row(name, seed, value, protocol, method="simclr" if name.startswith("constant") else None)
        for name, of_seed in values.items()
        for seed, value in enumerate(of_seed)
    ]


def test_interval_is_students():
    values = [1.0, 2.0, 4.5]
    mean, low, high = interval([5.0, 5.0, 5.5], [4.0, 3.0, 1.0])
    # 4.303: the 97.5 % point of Student's t with 2 degrees of freedom, from any table
    half = 4.30265 * statistics.stdev(values) / math.sqrt(3)
    assert mean == 2.5
    assert (low, high) == pytest.approx((2.5 - half, 2.5 + half), rel=1e-5)
    assert interval([3.0], [0.0]) == (3.0, None, None)
    assert interval([3.0, 4.0], [1.0, 2.0]) == (2.0, 2.0, 2.0)


def test_differences_are_paired_by_seed_with_the_best_constant():
    rows = table({"dystress": [90.0, 80.0, 70.0], "constant-0.1": [50, 50, 50], "constant-0.2": [89, 79, 69]})
    first, second = found(rows, ["constant-0.1", "constant-0.2"], ["linear"])
    # Far less than the spread between seeds, but the same every time.
    assert (first.name, first.constant, first.seeds) == ("dystress", "constant-0.2", 3)
    assert (first.mean, first.low, first.high, first.verdict) == (1.0, 1.0, 1.0, "better")
    assert (second.name, second.verdict) == ("constant-0.1", "worse")


def test_an_interval_for_all_at_once_is_students_for_one_arm_and_wider_for_several():
    best, arm, other = [70.0, 71.0, 72.5], [73.0, 75.5, 74.0], [71.0, 70.0, 73.0]
    rows = table({"constant-0.1": best, "dystress": arm}) + table({"constant-0.1": best, "dystress": arm}, "knn_1")
    one = found(rows, ["constant-0.1"], ["linear", "knn_1"])
    # Two protocols share the error of 5 %.
    low, high = ttest_ind(arm, best).confidence_interval(0.975)
    for d in (d for d in one if d.name == "dystress"):
        assert d.together == pytest.approx((low, high), abs=0.02)
    several = found(table({"constant-0.1": best, "dystress": arm, "macl": other}), ["constant-0.1"], ["linear"])
    ends = {d.name: d.together for d in several}
    assert ends["macl"] is not None
    low, high = ends["dystress"]
    theirs = dunnett(arm, other, control=best, random_state=0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((theirs.low[0], theirs.high[0]), abs=0.02)
    assert [d.sure for d in several if d.name == "dystress"] == [low > 0]


def test_no_interval_for_all_at_once_without_a_spread():
    rows = table({"constant-0.1": [70.0], "dystress": [71.0]})
    assert simultaneous({"dystress": [71.0]}, [70.0], 0.95) == {}
    assert simultaneous({"macl": [2.0] * 3}, [1.0] * 3, 0.95) == {}
    assert [d.together for d in found(rows, ["constant-0.1"], ["linear"])] == [None]


@pytest.mark.parametrize("equal", ["control", "arm"])
def test_an_interval_of_seeds_that_agree_needs_no_word(equal):
    spread, agreed = [97.5, 98.0, 98.2], [98.0] * 3
    arm, control = (spread, agreed) if equal == "control" else (agreed, spread)
    (ends,) = simultaneous({"dystress": arm}, control, 0.95).values()  # warnings are errors here
    difference = statistics.mean(arm) - statistics.mean(control)
    half = 2.776 * math.sqrt(statistics.variance(spread) / 2 * 2 / 3)  # Student's t of 4 degrees of freedom
    assert ends == pytest.approx((difference - half, difference + half), abs=0.02)


@pytest.mark.parametrize("failing", [1, 100])
def test_an_interval_whose_search_ended_off_the_level_is_searched_again(failing, monkeypatch):
    values, control, tried = {"macl": [1.0, 2.0, 4.0]}, [1.5, 2.5, 3.0], []

    class Found:
        def __init__(self, result, seed):
            self.result, self.seed = result, seed

        def confidence_interval(self, level):
            tried.append(self.seed)
            if self.seed < failing:
                warnings.warn("Computation of the confidence interval did not converge", UserWarning, stacklevel=1)
            return self.result.confidence_interval(level)

    monkeypatch.setattr(
        "dystress_plugin.experiment.report.differences.stats.dunnett",
        lambda *given, random_state, **more: Found(dunnett(*given, random_state=random_state, **more), random_state),
    )
    ends = simultaneous(values, control, 0.95)
    expected = dunnett(values["macl"], control=control, random_state=tried[-1]).confidence_interval(0.95)
    assert ends == {"macl": (float(expected.low[0]), float(expected.high[0]))}
    assert tried == ([0, 1] if failing == 1 else list(range(10)))


def test_only_common_seeds_are_paired():
    rows = table({"dystress": [90.0, 80.0], "constant-0.1": [88.0]})
    (one,) = found(rows, ["constant-0.1"], ["linear"])
    assert (one.seeds, one.mean, one.low) == (1, 2.0, None)


def test_a_queue_is_compared_with_the_constants_of_a_queue():
    rows = [
        *table({"dystress": [90.0]}),
        *(row(name, 0, value, method=method) for name, value, method in (
            ("dystress_moco", 70.0, "dystress_moco"),
            ("constant-0.1", 80.0, "simclr"),
            ("constant_moco-0.1", 60.0, "simclr_moco"),
        )),
    ]  # fmt: skip
    its = found(rows, ["constant-0.1", "constant_moco-0.1"], ["linear"])
    assert {d.name: d.mean for d in its} == {"dystress": 10.0, "dystress_moco": 10.0}


def difference(low, high, protocol="linear"):
    return Difference("dystress", protocol, "constant-0.1", 3, (low + high) / 2, low, high)


def test_words_follow_the_interval():
    assert [difference(*ends).verdict for ends in ((-1, 2), (0.1, 2), (-3, -0.1))] == [
        "inside the noise",
        "better",
        "worse",
    ]
    assert sentence("X", [difference(-1, 2), difference(-1, 1, "knn_1")]) == "X: inside the noise by every protocol."
    mixed = sentence("X", [difference(-1, 2), difference(0.5, 1.5, "knn_1"), difference(-3, -1, "weighted_knn")])
    assert mixed == (
        "X: better than the best constant by 1 of 3 protocols: kNN@1, mean of classes +1.00 (+0.50 to +1.50), and "
        "worse than the best constant by 1 of 3 protocols: weighted kNN, k=200, t=0.1 -2.00 (-3.00 to -1.00), and "
        "inside the noise by 1 of 3 protocols."
    )
    one = Difference("dystress", "linear", "constant-0.1", 1, 5.0, None, None)
    assert "nothing can be said" in sentence("X", [one])


def test_spread_is_of_the_sample():
    assert spread([1.0, 3.0]) == "2.00 ± 1.41"
    assert spread([1.0]) == "1.00"


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"dystress report runs/\*"):
        command.report(ReportSettings())
    with pytest.raises(ValueError, match="There is no folder"):
        records.run_folders([tmp_path / "nothing"])
    with pytest.raises(ValueError, match="None of these folders holds a run"):
        records.run_folders([tmp_path])
    (tmp_path / "x" / "a").mkdir(parents=True)
    (tmp_path / "x" / "a" / "config.yaml").touch()
    with pytest.raises(ValueError, match="None of the 1 runs has been run to the end"):
        command.write([tmp_path / "x" / "a"], tmp_path, ["linear"])


def test_runs_are_found_in_folders_and_in_those_of_compare(tmp_path):
    runs = [tmp_path / name for name in ("runs/a", "runs/b", "single")]
    for run in runs:
        run.mkdir(parents=True)
        (run / "config.yaml").touch()
    (tmp_path / "runs" / "report.html").touch()
    (tmp_path / "runs" / "empty").mkdir()
    assert records.run_folders([tmp_path / "runs"]) == runs[:2]
    assert records.run_folders((tmp_path / "runs").iterdir()) == records.run_folders((tmp_path / "runs").iterdir())
    assert sorted(records.run_folders((tmp_path / "runs").iterdir())) == runs[:2]
    assert sorted(records.run_folders([tmp_path])) == runs
    assert command._beside(runs[:2]) == tmp_path / "runs"
    (tmp_path / "compare.yaml").touch()
    assert command._beside(runs[:2]) == tmp_path
    with pytest.raises(ValueError, match="say where the report goes, out=FOLDER"):
        command._beside(runs)


@pytest.mark.parametrize(
    ("method", "constant"), [("simclr", 0.3), ("simclr_moco", 0.3), ("dystress", None), ("simco", None)]
)
def test_a_constant_is_a_fixed_temperature_and_nothing_else(method, constant, tmp_path):
    settings = SimpleNamespace(method=method, method_kwargs={"tau": 0.3}, arm=None, family=None)
    assert records.Run(tmp_path, settings, {}).constant == constant


def test_a_map_is_labelled_with_the_names_of_the_classes_whatever_they_contain(tmp_path):
    names = ["_hidden", "5 $ and $ 6", "a class with a name longer than any legend"]
    rows = "".join(f'{i},{i * i},{c},"{names[c]}"\n' for c in range(3) for i in range(2))
    (tmp_path / "map.csv").write_text("x,y,class,name\n" + rows)
    with mpl.rc_context(figures.STYLE | {"svg.fonttype": "none"}):
        svg = figures._map(tmp_path / "map.csv", "SimCLR").svg
    shown = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert [text for text in shown if text in (*names, "a class with a name lon…")] == [
        "_hidden",
        "5 $ and $ 6",
        "a class with a name lon…",
    ]


def words_of(picture):
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture.svg)


def diagnostics_of(path, steps):
    """A table of so many steps, each with one histogram of positives and one of negatives."""
    rows = [
        {"step": step, "pairs": pairs, "quantity": "similarity", "mean": 0.1, "bin_low": -1, "bin_high": 1}
        | {f"bin_{number}": 1 + number for number in range(4)}
        for step in steps
        for pairs in ("positive", "negative")
    ]
    path.write_text(pd.DataFrame(rows).to_csv(index=False))
    return path


@pytest.mark.parametrize(
    ("counts", "drawn"), [((6, 6, 6), False), ((9, 8, 6), False), ((18, 9, 2), True), ((12, 6), True)]
)
def test_classes_are_drawn_over_their_frequency_where_that_differs(counts, drawn):
    labels, features = torch.arange(len(counts)), torch.eye(len(counts))
    train = labels.repeat_interleave(torch.tensor(counts))
    shown = Features(features[train], train, features, labels, features[train], train, tuple("abc"[: len(counts)]))
    scores = score(shown, [protocol("linear"), protocol("knn_1")])
    rows = pd.DataFrame([{"name": "a", **vars(each)} for each in scores])
    assert figures._class_protocols(rows) == (["linear"] if drawn else [])
    assert bool(records.frequency_groups(rows)) == drawn


def test_one_sample_of_diagnostics_is_drawn_as_one_and_several_over_the_steps(tmp_path):
    with mpl.rc_context(figures.STYLE | {"svg.fonttype": "none"}):
        one = figures._histograms(diagnostics_of(tmp_path / "one.csv", [7]), "similarity", "TS")
        two = figures._histograms(diagnostics_of(tmp_path / "two.csv", [0, 7]), "similarity", "TS")
    assert one.alt == "TS: histograms of the similarity at training step 7"
    assert "TS, training step 7" in words_of(one)
    assert not {"training step", "share of pairs (%)"} & set(words_of(one))
    assert two.alt == "TS: histograms of the similarity over training"
    assert {"training step", "share of pairs (%)"} <= set(words_of(two))


def test_a_reports_curves_begin_with_epoch_0_as_its_tables_do(tmp_path, monkeypatch):
    axes = Figure().subplots()
    monkeypatch.setattr(figures, "_picture", lambda draw, *rest: draw(axes))
    (tmp_path / "metrics.csv").write_text("epoch,loss\n0,3\n1,2\n")
    arms = {"a": [SimpleNamespace(folder=tmp_path)]}
    figures._curves(arms, "loss", "loss", "loss (nats)", styles({"a": "ts"}, {"a": "TS"}))
    assert list(axes.lines[0].get_xdata()) == [0, 1]
    assert axes.get_xlabel() == "epoch (the first is 0)"


def test_a_map_without_names_is_labelled_with_the_numbers(tmp_path):
    (tmp_path / "map.csv").write_text("x,y,class\n0,1,7\n1,0,3\n")
    with mpl.rc_context(figures.STYLE | {"svg.fonttype": "none"}):
        svg = figures._map(tmp_path / "map.csv", "SimCLR").svg
    assert [text for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg) if text.isdigit()] == ["3", "7"]
