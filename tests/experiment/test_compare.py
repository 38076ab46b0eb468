import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dystress_plugin.cli import main
from dystress_plugin.experiment.compare import command as module
from dystress_plugin.experiment.compare.plan import Arm, parse_compare, plan
from dystress_plugin.experiment.compare.workers import Workers, tokens
from dystress_plugin.experiment.keys import parse
from dystress_plugin.experiment.settings import CompareSettings, PretrainSettings


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
    monkeypatch.setattr(module, "pretrain", lambda run: pytest.fail("trained"))
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
    assert parse(PretrainSettings, tokens(run)) == run


def command(tiny, **settings):
    common = {key: value for key, value in tiny.items() if key not in ("out", "progress")}
    chosen = common | {"epochs": 1, "progress": "false", "protocols": "[weighted_knn,knn_1]"}
    chosen |= {"methods": "[simclr,dystress]", "seeds": "[0,1]", "constants": "[0.2]"} | settings
    return ["compare", *(f"{key}={value}" for key, value in chosen.items())]


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
    pretrain = module.pretrain

    def counted(run):
        trained.append(Path(run.out).name)
        if trained[-1] == "dystress-1" and trained.count("dystress-1") == 1:
            raise SystemExit("power cut")
        return pretrain(run)

    with monkeypatch.context() as patch:
        patch.setattr(module, "pretrain", counted)
        with pytest.raises(SystemExit, match="power cut"):
            main(command(tiny, out=out))
        done = ["simclr-0", "dystress-0", "constant-0.2-0", "simclr-1"]
        assert trained == [*done, "dystress-1"]
        times = {name: (out / "runs" / name / "backbone.pt").stat().st_mtime_ns for name in done}
        assert main(command(tiny, out=out)) == 0
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
    # Differences by 2 protocols, 2 curves, classes by 1 protocol, similarities of 3 arms, temperature of 1, 4 maps.
    assert text.count("<figure") == 2 + 2 + 1 + 3 + 1 + 4

    before = {name: (out / name).read_text() for name in ("results.csv", "report.html")}
    for name in before:
        (out / name).unlink()
    protocols = "protocols=[weighted_knn,knn_1]"
    assert main(["report", *map(str, (out / "runs").iterdir()), protocols]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(out / "report.html")
    assert {name: (out / name).read_text() for name in before} == before
    # Beside each other, a run and what is no run.
    assert main(["report", str(out), f"out={tmp_path / 'else'}", protocols]) == 0
    assert (tmp_path / "else" / "results.csv").read_text() == before["results.csv"]

    assert main(command(tiny, out=out, epochs=2)) == 2
    error = capsys.readouterr().err
    assert "holds a run with other settings: epochs=2 (there: 1)" in error
    assert "runs failed" not in error  # said before anything was trained


def test_a_run_that_fails_is_named_and_the_others_are_reported(tiny, tmp_path, capsys, monkeypatch):
    pretrain = module.pretrain

    def failing(run):
        if run.method == "dystress":
            Path(run.out).mkdir(parents=True, exist_ok=True)
            (Path(run.out) / "config.yaml").touch()
            raise RuntimeError("loss is not finite")
        return pretrain(run)

    monkeypatch.setattr(module, "pretrain", failing)
    assert main(command(tiny, out=tmp_path / "cmp", seeds="[0]", constants="[]")) == 2
    error = capsys.readouterr().err
    assert "1 of 2 runs failed" in error
    assert "dystress-0: RuntimeError: loss is not finite" in error
    text = (tmp_path / "cmp" / "report.html").read_text()
    assert "loss is not finite" in text
    assert "Only fixed temperatures were compared." in text


def test_jobs_are_processes_that_a_killed_comparison_leaves_and_the_next_one_waits_for(tiny, tmp_path):
    out = tmp_path / "cmp"
    arguments = command(tiny, out=out, methods="[simclr]", jobs=2, constants="[]", protocols="[weighted_knn]")
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
        assert metrics.count("\n") == 2
        # Once, by the first command's process.
        log = (out / "logs" / f"simclr-{seed}.log").read_text()
        assert log.count("top-1 accuracy") == 1
    assert Path(json.loads(second.stdout)["report"]).exists()


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
