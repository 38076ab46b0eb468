"""scripts/reproduce/long_tails.py: what it runs, in which order, and that its small files make a report."""

import importlib.util
import json
import shutil
import sys
from itertools import groupby
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import dystress, write_images  # beside this file

from dystress_plugin.experiment.devices import device_name

SCRIPT = Path(__file__).parents[2] / "scripts" / "reproduce" / "long_tails.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("long_tails", SCRIPT)
    module = sys.modules["long_tails"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["long_tails"]


def test_a_stop_at_any_time_leaves_whole_seeds(script):
    todo = script.tasks(Path("data"), Path("out"), Path("small"), [])
    starts = [task for task in todo if task.scores_start]
    assert todo[: len(starts)] == starts
    runs = [(task.group, task.run.seed) for task in todo[len(starts) :]]
    blocks = [key for key, _ in groupby(runs)]
    assert len(blocks) == len(set(blocks))  # no seed is gone back to
    assert blocks[:4] == [("long-tail", 0), ("long-tail", 1), ("long-tail", 2), ("again", 0)]
    assert {task.start for task in todo} == {task.start for task in starts}
    # Twice through the schedule of TS, in every group.
    assert {task.run.epochs / task.run.method_kwargs["period"] for task in todo if task.run.method == "ts"} == {2.0}


def test_some_groups_are_run_alone_in_their_own_order_with_the_starts_that_they_need(script, tmp_path, capsys):
    def todo(only):
        return script.tasks(Path("data"), Path("out"), Path("small"), [], only)

    whole = todo(())
    runs = [task for task in whole if not task.scores_start]
    for only in (["sensitivity"], ["sensitivity", "long-tail"], ["balanced"], [name for name, *_ in script.groups()]):
        its = todo(only)
        assert [task for task in its if not task.scores_start] == [task for task in runs if task.group in only]
        assert {task.start for task in its if task.scores_start} == {task.start for task in runs if task.group in only}
    with pytest.raises(SystemExit, match="2"):
        script.main([str(tmp_path), "--only", "tail"])
    assert "'tail' (choose from" in capsys.readouterr().err


def test_its_small_files_make_the_same_report_without_weights_and_data(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "cifar10-lt")
    settings = ["epochs=1", "warmup_epochs=0", "batch_size=6", "image_size=12", "backbone=test_resnet"]
    given = [*settings, "accelerator=cpu", "protocols=[knn_1]"]
    todo = script.tasks(tmp_path, Path("out"), tmp_path / "small", given)
    arms = ("simclr", "dystress")
    chosen = [task for task in todo if task.group == "long-tail" and task.run.seed == 0 and task.run.arm in arms]
    said = [script.attempt(task) for task in chosen]
    assert said[0] == ""  # of the start
    assert [line.partition(":")[0] for line in said[1:]] == ["long-tail/simclr-0", "long-tail/dystress-0"]
    assert all(task.kept.exists() for task in chosen[1:])  # and so left out from now on
    for folder in ("out/long-tail/runs", "small/long-tail"):
        assert dystress("report", {"runs": f"[{folder}]", "protocols": "[knn_1]", "out": f"{folder}-report"}) == 0
        shutil.rmtree(tmp_path / "cifar10-lt", ignore_errors=True)
    tables = [pd.read_csv(f"{folder}-report/results.csv") for folder in ("out/long-tail/runs", "small/long-tail")]
    pd.testing.assert_frame_equal(*tables)
    # All classes have as many images.
    page = Path("small/long-tail-report/report.html").read_text()
    assert "frequency" not in page
    assert f"<dt>trained on</dt><dd>{device_name(torch.device('cpu'))}</dd>" in page
    assert "compared on cifar10-lt</h1>" in page  # wherever it was, or would be
    assert set(tables[0]["name"]) == {"simclr", "dystress", "untrained"}
    summary = json.loads(Path("small/long-tail/simclr-0/summary.json").read_text())
    assert summary["torch"] == torch.__version__
    assert "CPU" in summary["device"]
    kept = list(Path("small").rglob("*.*"))
    assert {path.name for path in kept} <= {*script.SMALL, "report.html", "results.csv"}
    assert all(str(tmp_path) not in path.read_text() for path in Path("small/long-tail").rglob("*.*"))
