import csv
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from threading import Timer

import pandas as pd
import pytest

from dystress_plugin.cli import main
from dystress_plugin.experiment.commands import parse_compare
from dystress_plugin.experiment.compare import command as module
from dystress_plugin.experiment.compare.plan import Arm, plan
from dystress_plugin.experiment.compare.workers import Workers, tokens
from dystress_plugin.experiment.data.datasets import load_for
from dystress_plugin.experiment.evaluate import scores
from dystress_plugin.experiment.evaluate.scores import features_of
from dystress_plugin.experiment.keys import read
from dystress_plugin.experiment.pretrain import command as pretraining
from dystress_plugin.experiment.pretrain.command import pretrain
from dystress_plugin.experiment.pretrain.resolve import resolve
from dystress_plugin.experiment.report import cost
from dystress_plugin.experiment.settings import CompareSettings, PretrainSettings
from dystress_plugin.experiment.spec import DataSpec, part


def names(**settings):
    return [arm.name for arm in plan(CompareSettings(**settings))]


def test_constants_are_the_ends_and_the_middle_of_the_range_but_not_twice():
    assert names(methods=["dystress"]) == ["dystress", "constant-0.1", "constant-0.15", "constant-0.2"]
    assert names(methods=["simclr", "dystress", "macl"]) == [
        *("simclr", "dystress", "macl"),
        *("constant-0.15", "constant-0.2"),
    ]
    kwargs = {"dystress": {"tau_max": 0.3}, "simclr": {"tau": 0.3}}
    assert names(methods=["simclr", "dystress"], method_kwargs=kwargs)[2:] == ["constant-0.1", "constant-0.2"]
    assert names(methods=["macl"], method_kwargs={"macl": {"tau": 0.2}}) == ["macl", "constant-0.2"]
    assert names(methods=["tempfree"])[1:] == ["constant-0.1", "constant-0.15", "constant-0.2"]
    assert names(methods=["dystress"], constants=[0.5]) == ["dystress", "constant-0.5"]
    assert names(methods=["dystress"], constants=[]) == ["dystress"]


def test_constants_have_the_queue_or_objective_of_the_method():
    arms = plan(CompareSettings(methods=["dystress_moco", "macl_dcl"]))
    assert arms[2:5] == [Arm(f"constant_moco-{tau:g}", "simclr_moco", {"tau": tau}) for tau in (0.1, 0.15, 0.2)]
    assert arms[5:] == [Arm("constant_dcl-0.1", "simclr_dcl", {"tau": 0.1})]


def test_a_method_can_be_compared_with_itself():
    settings = CompareSettings(
        methods=["dystress", "dystress-shifted"], method_kwargs={"dystress-shifted": {"profile": "shifted"}}
    )
    assert plan(settings)[:2] == [
        Arm("dystress", "dystress", {}),
        Arm("dystress-shifted", "dystress", {"profile": "shifted"}),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["methods=[dystres]"], "Unknown method 'dystres'. Did you mean 'dystress'?"),
        (["methods=[macl,macl]"], "methods=['macl', 'macl'] must be each once"),
        (["methods=[macl]", "seeds=[]"], "seeds=[] must be at least one"),
        (["methods=[macl]", "method_kwargs.tau=0.3"], "method_kwargs.tau: say whose, such as method_kwargs.macl.tau="),
        (["methods=[macl]", "method_kwargs.dystress.tau_max=0.3"], "Unknown method in method_kwargs 'dystress'"),
        (["methods=[macl]", "method_kwargs.macl.tua=0.3"], "Did you mean 'tau'?"),
        (["methods=[dystress]", "method_kwargs.dystress.tau_min=0.5"], "tau_min=0.5 is above tau_max=0.2"),
        (["methods=[macl]", "constants=[0]"], "constants=[0.0]: 0.0 must be above 0 and at most 1,000,000"),
        (["methods=[macl]", "protocols=[knm_1]"], "Unknown protocol 'knm_1'"),
        (
            ["methods=[macl]", "jobs=0"],
            "jobs=0 must be at least 1 and at most 1,024: runs at once, each a process of its own.",
        ),
        (["methods=[macl]", "epochs=2", "warmup_epochs=3"], "warmup_epochs=3 must lie between 0 and epochs=2"),
        (["methods=[macl]", "epoch=3"], "Unknown key 'epoch'. Did you mean 'epochs'?"),
        (["method=macl"], "'method=macl' is for `dystress pretrain`; here it is methods=[...]."),
        (["methods=[macl]", "seed=1"], "here it is seeds=[...]."),
        (["seeds=[0]"], "methods=... must be given"),
    ],
)
def test_bad_settings_stop_before_any_training(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "Workers", lambda *args: pytest.fail("trained"))
    assert main(["compare", *arguments, f"out={tmp_path / 'cmp'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cmp" / "runs").exists()


def test_tokens_say_the_same_to_another_process():
    run = PretrainSettings(
        method="dystress",
        method_kwargs={"tau_max": 0.3, "negative_range": [0.1, 0.2], "profile": "shifted"},
        devices="1,",
        data="a folder: of 'things' #1",
        weight_decay=1e-6,
        progress=False,
    )
    assert read(PretrainSettings, tokens(run)) == run


def command(tiny, **settings):
    common = {key: value for key, value in tiny.items() if key not in ("out", "progress")}
    chosen = common | {"epochs": 1, "progress": "false", "protocols": "[weighted_knn,knn_1]"}
    chosen |= {"methods": "[simclr,dystress]", "seeds": "[0,1]", "constants": "[0.2]"} | settings
    return ["compare", *(f"{key}={value}" for key, value in chosen.items())]


class InProcess(Workers):
    """Trains in this process, where a test sees what happens."""

    before = staticmethod(lambda run: None)

    def train(self, run):
        if self.stopped:
            return
        try:
            self.before(run)
            pretrain(run)
        except BaseException as error:
            if not isinstance(error, Exception):
                self.stop()  # as in a power cut, after which nothing else begins
            raise


class Page(HTMLParser):
    """Checks that tags are balanced, and collects text and what the page would load."""

    VOID = ("meta", "link", "br", "img", "path", "use", "hr", "rect", "image")

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.text = [], [], []
        self.tags = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_compare_trains_scores_and_reports_and_only_what_is_missing(tiny, tmp_path, capsys, monkeypatch):
    out = tmp_path / "cmp"
    trained = []

    def counted(run):
        trained.append(Path(run.out).name)
        if trained[-1] == "dystress-1" and trained.count("dystress-1") == 1:
            raise SystemExit("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(InProcess, "before", staticmethod(counted))
        patch.setattr(module, "Workers", InProcess)
        with pytest.raises(SystemExit, match="power cut"):
            main(command(tiny, out=out))
        done = ["simclr-0", "dystress-0", "constant-0.2-0", "simclr-1"]
        assert trained == [*done, "dystress-1"]
        times = {name: (out / "runs" / name / "backbone.pt").stat().st_mtime_ns for name in done}
        assert main(command(tiny, out=out)) == 0
        assert trained == [*done, "dystress-1", "dystress-1", "constant-0.2-1"]
    assert {name: (out / "runs" / name / "backbone.pt").stat().st_mtime_ns for name in done} == times
    assert sorted(path.name for path in (out / "runs").iterdir()) == sorted([*done, "dystress-1", "constant-0.2-1"])
    capsys.readouterr()

    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if (row["protocol"], row["group"], row["method"]) == ("weighted_knn", "all", "dystress"):
            summary = json.loads((out / "runs" / f"{row['name']}-{row['seed']}" / "summary.json").read_text())
            assert float(row["value"]) == pytest.approx(summary["knn_top1"])
            assert (row["tau_min"], row["tau_max"], row["tau"]) == ("0.1", "0.2", "")
    found = {(row["name"], row["seed"], row["protocol"], row["group"]) for row in rows}
    arms = ("simclr", "dystress", "constant-0.2", "untrained")
    groups = ("all", "class 0", "class 1", "class 2")
    assert found == {(a, s, p, g) for a in arms for s in "01" for p in ("weighted_knn", "knn_1") for g in groups}
    assert len(rows) == len(found)
    assert {row["tau"] for row in rows if row["name"] == "constant-0.2"} == {"0.2"}

    text = (out / "report.html").read_text()
    page = Page(text)
    assert all(link.startswith(("#", "data:")) for link in page.loads)
    assert not page.tags & {"script", "link", "iframe"}
    assert re.findall(r"url\((?!#)", text) == []
    shown = " ".join(" ".join(page.text).split())
    assert re.search(r"DySTreSS: (inside the noise|better than|worse than)", shown)
    assert "SimCLR, constant 0.2" in shown
    assert "Only 2 seeds" in shown
    assert "flatters the constant" in shown
    assert re.search(r"dystress compare .*'methods=\[simclr,dystress\]'", shown)
    # Differences by 2 protocols, 2 curves, similarities of 3 arms, temperature of 1, 4 maps.
    assert text.count("<figure") == 2 + 2 + 3 + 1 + 4

    before = {name: (out / name).read_text() for name in ("results.csv", "report.html")}
    for name in before:
        (out / name).unlink()
    protocols = "protocols=[weighted_knn,knn_1]"
    assert main(["report", *map(str, (out / "runs").iterdir()), protocols]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == [f"results: {out / 'results.csv'}", f"report: {out / 'report.html'}"]
    assert printed[0].split() == ["weighted_knn", "knn_1"]
    table = {line.split("  ")[0]: line.split("  ") for line in printed[1:-2]}
    assert list(table) == ["dystress", "simclr", "constant-0.2", "untrained"]
    for arm, (_, *cells) in table.items():
        for protocol, cell in zip(("weighted_knn", "knn_1"), filter(None, cells), strict=True):
            its = [
                float(row["value"])
                for row in rows
                if (row["name"], row["protocol"], row["group"]) == (arm, protocol, "all")
            ]
            assert cell.strip() == f"{statistics.mean(its):.2f} ± {statistics.stdev(its):.2f}"
    assert {name: (out / name).read_text() for name in before} == before
    # Beside each other, a run and what is no run.
    assert main(["report", str(out), f"out={tmp_path / 'else'}", protocols]) == 0
    assert (tmp_path / "else" / "results.csv").read_text() == before["results.csv"]

    assert main(command(tiny, out=out, epochs=2)) == 2
    error = capsys.readouterr().err
    assert "holds a run with other settings: epochs=2 (there: 1)" in error
    assert "its learning rate began to fall, on a cosine over all epochs=1. Choose another out." in error
    assert "runs failed" not in error  # said before anything was trained


def test_a_run_that_fails_is_named_and_the_others_are_reported(tiny, tmp_path, capsys, monkeypatch):
    def failing(run):
        if run.method == "dystress":
            (Path(run.out) / "config.yaml").touch()
            raise RuntimeError("loss is not finite")

    monkeypatch.setattr(InProcess, "before", staticmethod(failing))
    monkeypatch.setattr(module, "Workers", InProcess)
    assert main(command(tiny, out=tmp_path / "cmp", seeds="[0]", constants="[]")) == 2
    error = capsys.readouterr().err
    assert "1 of 2 runs failed" in error
    assert "dystress-0: RuntimeError: loss is not finite" in error
    text = (tmp_path / "cmp" / "report.html").read_text()
    assert "loss is not finite" in text
    assert "Only fixed temperatures were compared." in text


def test_features_are_extracted_once_for_each_run_and_once_for_each_seed(tiny, tmp_path, monkeypatch):
    extracted, measured = [], []

    def counted(*args, **rest):
        extracted.append(1)
        return features_of(*args, **rest)

    for place in (scores, pretraining):  # each knows it by a name of its own
        monkeypatch.setattr(place, "features_of", counted)
    monkeypatch.setattr(cost, "_measure", lambda arms: measured.append(list(arms)) or {arm: [1.0] * 5 for arm in arms})
    monkeypatch.setattr(module, "Workers", InProcess)
    out = tmp_path / "cmp"
    settings = {"out": out, "long_tail": 0.4, "protocols": "[weighted_knn,linear,few_shot_1]"}
    assert main(command(tiny, **settings)) == 0
    runs = [f"{name}-{seed}" for seed in (0, 1) for name in ("simclr", "dystress", "constant-0.2")]
    assert sorted(path.name for path in (out / "runs").iterdir()) == sorted(runs)
    assert len(extracted) == len(runs) + 2
    assert measured == [["dystress", "simclr"]]
    for seed in (0, 1):  # what one of them would have found by itself
        own = [out / "runs" / name for name in runs if name.endswith(f"-{seed}")]
        summaries = [json.loads((run / "summary.json").read_text()) for run in own]
        (start,) = {(its["untrained_knn_top1"], its["untrained_linear_top1"]) for its in summaries}
        alone = tmp_path / f"alone-{seed}"
        single = tiny | {"out": alone, "epochs": 1, "seed": seed, "long_tail": 0.4}
        assert main(["pretrain", *(f"{key}={value}" for key, value in single.items())]) == 0
        summary = json.loads((alone / "summary.json").read_text())
        assert start == (summary["untrained_knn_top1"], summary["untrained_linear_top1"])

    # Another protocol is one more for each run; the page alone, and a comparison that is complete, are none.
    del extracted[:]
    assert main(command(tiny, **settings)) == 0
    assert main(["report", str(out), f"protocols={settings['protocols']}"]) == 0
    assert (extracted, len(measured)) == ([], 1)
    assert main(command(tiny, **settings | {"protocols": "[linear,knn_1]"})) == 0
    assert len(extracted) == len(runs) + 2


def test_what_was_laid_for_another_start_is_not_believed(tiny, tmp_path):
    run = PretrainSettings(**tiny | {"progress": False, "epochs": 1})
    data = load_for(part(DataSpec, run), run.seed)
    start = resolve(run, data, 1)
    laid = scores.Scores({"knn_top1": 12.5, "linear_top1": 25.0}, [scores.Score("knn_1", "all", 1.0, 6, 18)], None)
    for name, seed in (("same", 0), ("other", 1)):
        folder = tmp_path / name
        folder.mkdir()
        laid.write_untrained(folder, start)
        summary = pretrain(replace(run, out=str(folder), seed=seed))
        believed = summary["untrained_knn_top1"] == 12.5 and summary["untrained_linear_top1"] == 25.0
        assert believed == (name == "same")
        assert (folder / "untrained_protocols.csv").exists() == (name == "same")


def test_a_plan_is_lines_that_give_the_same_table_and_train_nothing_themselves(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "Workers", InProcess)
    out = tmp_path / "a plan's"
    arguments = {"methods": "[macl]", "seeds": "[0]", "protocols": "[weighted_knn,knn_1]"}
    assert main(command(tiny, out=tmp_path / "cmp", **arguments)) == 0
    capsys.readouterr()
    assert main(command(tiny, out=out, plan="true", **arguments)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not list(out.rglob("config.yaml"))
    assert [shlex.split(line)[:2] for line in lines] == [*[["dystress", "pretrain"]] * 2, ["dystress", "report"]]
    for line in lines[:-1]:
        program = [sys.executable, "-m", "dystress_plugin.cli", *shlex.split(line)[1:]]
        subprocess.run(program, check=True, timeout=300)
    assert main(shlex.split(lines[-1])[1:]) == 0
    assert (out / "results.csv").read_text() == (tmp_path / "cmp" / "results.csv").read_text()
    assert [path.name for path in sorted(out.glob("*.*"))] == ["cost.csv", "images.json", "report.html", "results.csv"]


def test_a_report_without_a_cost_says_how_to_measure_it(tiny, tmp_path, capsys):
    assert main(["pretrain", *(f"{key}={value}" for key, value in (tiny | {"epochs": 1, "arm": "mine"}).items())]) == 0
    assert main(["report", tiny["out"], "protocols=[knn_1]", f"out={tmp_path / 'page'}"]) == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert "Not measured: <code>dystress report</code> does it with <code>cost=true</code>." in page
    assert not (tmp_path / "page" / "cost.csv").exists()
    with (tmp_path / "page" / "results.csv").open() as file:
        assert {row["name"] for row in csv.DictReader(file)} == {"mine", "untrained"}


def test_a_comparison_that_is_asked_to_end_ends_its_processes(tiny, tmp_path):
    arguments = command(tiny, out=tmp_path / "cmp", methods="[simclr]", seeds="[0]", constants="[]", epochs=100_000)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "dystress_plugin.cli", *arguments], stdout=log, stderr=log)
    metrics = tmp_path / "cmp" / "runs" / "simclr-0" / "metrics.csv"
    deadline = time.monotonic() + 300
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.terminate()
    assert process.wait(timeout=300) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in (tmp_path / "cmp" / "logs" / "simclr-0.log").read_text()


def test_jobs_are_processes_that_a_killed_comparison_leaves_and_the_next_one_waits_for(tiny, tmp_path):
    out = tmp_path / "cmp"
    # More than one epoch, or the first one's processes might have ended before the second one looks at the lock.
    own = {"methods": "[simclr]", "jobs": 2, "constants": "[]", "protocols": "[weighted_knn]", "epochs": 12}
    arguments = command(tiny, out=out, **own)
    program = [sys.executable, "-m", "dystress_plugin.cli", *arguments]
    first = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list((out / "logs").glob("*.log"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    second = subprocess.run(program, capture_output=True, text=True, check=True, timeout=300)
    assert f"out={out} is in use by process {first.pid} on " in second.stderr
    assert "waiting until it has ended, and what it left running" in second.stderr
    for seed in (0, 1):
        metrics = (out / "runs" / f"simclr-{seed}" / "metrics.csv").read_text()
        assert metrics.count("\n") == 1 + 12
        # Once, by the first command's process.
        log = (out / "logs" / f"simclr-{seed}.log").read_text()
        assert log.count("top-1 accuracy") == 1
    assert Path(second.stdout.splitlines()[-1].removeprefix("report: ")).exists()


def test_several_jobs_share_the_cores_and_the_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    children = Workers(CompareSettings(methods=["macl"], out=str(tmp_path), jobs=2), None)
    chosen = [children._environment(slot, PretrainSettings()) for slot in (0, 1)]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in chosen] == ["3", "5"]
    assert {env["OMP_NUM_THREADS"] for env in chosen} == {str(max(1, (os.cpu_count() or 1) // 2))}
    assert children._environment(1, PretrainSettings(devices="2"))["CUDA_VISIBLE_DEVICES"] == "3,5"


def test_keys_are_divided_into_those_of_the_comparison_and_of_its_runs():
    settings, common = parse_compare(["methods=[macl]", "epochs=3", "out=x", "method_kwargs.macl.alpha=1"])
    assert (settings.methods, settings.out, settings.method_kwargs) == (["macl"], "x", {"macl": {"alpha": 1}})
    assert (common.epochs, common.out, common.method_kwargs) == (3, None, {})


def test_images_without_labels_are_compared_by_what_needs_none(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "Workers", InProcess)
    monkeypatch.setattr(cost, "_measure", lambda arms: {arm: [1.0] * 5 for arm in arms})
    (tmp_path / "flat").mkdir()
    for number, file in enumerate(sorted(Path(tiny["data"]).glob("*/*.png"))):
        shutil.copy(file, tmp_path / "flat" / f"{number}.png")
    out = tmp_path / "cmp"
    given = {"data": tmp_path / "flat", "out": out, "seeds": "[0]"}
    assert main(command(tiny, **given)) == 0
    rows = pd.read_csv(out / "results.csv")
    assert set(rows["name"]) == {"simclr", "dystress", "constant-0.2", "untrained"}
    assert set(rows["protocol"]) == {"effective_rank", "loss", "alignment", "uniformity"}
    for name in ("simclr", "dystress", "constant-0.2"):
        summary = json.loads((out / "runs" / f"{name}-0" / "summary.json").read_text())
        mine = rows[rows["name"] == name].set_index("protocol")["value"]
        assert mine.to_dict() == pytest.approx({each: summary[each] for each in mine.index})
    text = "".join(Page((out / "report.html").read_text()).text)
    assert "The images have no labels, so that there are no accuracies" in text
    assert "accuracy in %" not in text
    assert "best constant" not in text
    monkeypatch.setattr(InProcess, "train", lambda self, run: pytest.fail("trained again"))
    assert main(command(tiny, **given)) == 0


@pytest.mark.parametrize("show", [True, False])
def test_a_log_gets_a_line_a_finished_run(show, tiny, capsys, monkeypatch):
    runs = [PretrainSettings(**tiny | {"out": out}) for out in ("runs/a", "runs/b")]
    finished = {"runs/a"}  # before

    def end():
        finished.add("runs/b")
        future.set_result(None)

    future = Future()
    monkeypatch.setattr(module, "_finished", lambda run: run.out in finished)
    timer = Timer(0.05, end)
    timer.start()
    module._watch(runs, [future], show)
    timer.join()
    output = capsys.readouterr()
    assert output.out == ("2 of 2 runs\n" if show else "")
    assert output.err == ""
