import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import dystress  # beside this file
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from dystress_plugin.experiment.evaluate.scores import Score, read, score_run
from dystress_plugin.experiment.io import lock
from dystress_plugin.experiment.io.files import write_table
from dystress_plugin.experiment.io.lock import alone
from dystress_plugin.experiment.pretrain import command as pretrain

PAUSED = """
import sys, time
from pathlib import Path
from dystress_plugin.cli import main
from dystress_plugin.experiment.pretrain.trainer import SeedEveryEpoch

def pause(self, trainer, module, start=SeedEveryEpoch.on_train_epoch_start):
    if trainer.current_epoch == 1:
        Path(sys.argv[1]).touch()
        time.sleep(600)
    start(self, trainer, module)

SeedEveryEpoch.on_train_epoch_start = pause
main(sys.argv[2:])
"""


def everything(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_a_second_run_is_refused_and_goes_on_once_the_first_is_killed(tiny, tmp_path, capsys, quick):
    tiny |= {"num_workers": 1}  # a process that the first one forks, and that outlives it for some seconds
    out, paused = Path(tiny["out"]), tmp_path / "paused"
    command = [sys.executable, "-c", PAUSED, paused, "pretrain", *(f"{key}={value}" for key, value in tiny.items())]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        try:
            deadline = time.monotonic() + 300
            while not paused.exists():
                assert first.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            before = everything(out)
            for settings in (tiny, tiny | {"epochs": 4}, tiny | {"out": f"{out}/"}):
                assert dystress("pretrain", settings) == 2
                *_, line = capsys.readouterr().err.splitlines()
                assert f"out={Path(settings['out'])} is in use by process {first.pid} on " in line
                assert line.endswith("Wait until it has ended, or choose another out.")
            assert everything(out) == before
        finally:
            first.kill()
    assert (out / lock.NAME).exists()
    assert dystress("pretrain", tiny) == 0
    assert (out / "metrics.csv").read_text().count("\n") == 1 + 3
    assert not (out / lock.NAME).exists()


@pytest.mark.parametrize("command", ["pretrain", "inspect", "report", "long-tail"])
def test_what_writes_to_a_folder_is_refused_where_another_does(command, tiny, images, tmp_path, capsys):
    out = tmp_path / "run"
    file = tmp_path / ".run.lock" if command == "long-tail" else None
    settings = {
        "pretrain": tiny,
        "inspect": {"data": images, "image_size": 12, "backbone": "test_resnet", "out": out},
        "report": {"runs": f"[{tmp_path}]", "out": out},
        "long-tail": {"data": images, "long_tail": 0.5, "out": out},
    }[command]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").touch()
    with alone(out, file=file):
        before = everything(tmp_path)
        assert dystress(command, settings) == 2
        assert f"out={out} is in use by process {os.getpid()} on " in capsys.readouterr().err
        assert everything(tmp_path) == before
    assert not out.exists()
    assert not (tmp_path / ".run.lock").exists()


def test_the_other_processes_of_a_training_are_not_refused(tiny, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(pretrain, "_run", lambda settings, trainer, progress: started.append(trainer.global_rank))
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # which Lightning sets
    with alone(Path(tiny["out"])):
        for rank in (1, 0):
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            assert dystress("pretrain", tiny | {"devices": "2"}) == (2 if rank == 0 else 0)
    assert started == [1]


@pytest.mark.parametrize("stale", [False, True])
def test_a_folder_is_left_as_it_was(stale, tmp_path):
    out = tmp_path / "a" / "b"
    if stale:  # of a process that was killed
        out.mkdir(parents=True)
        (out / lock.NAME).write_text("{")
    with alone(out), pytest.raises(ValueError, match=f"out={out} is in use by process {os.getpid()} "), alone(out):
        pass
    assert list(out.iterdir() if stale else tmp_path.iterdir()) == []
    with alone(out):
        (out / "letter").touch()
    assert [path.name for path in out.iterdir()] == ["letter"]


def test_a_killed_process_leaves_no_lock_nor_a_folder_that_is_taken_for_anothers(tiny, quick):
    Path(tiny["out"]).mkdir()
    Path(tiny["out"], lock.NAME).touch()
    assert dystress("pretrain", tiny | {"epochs": 1}) == 0
    assert not Path(tiny["out"], lock.NAME).exists()


def test_many_that_come_and_go_are_inside_one_by_one(tmp_path):
    inside, most = [], []

    def visit():
        for _ in range(20):
            with alone(tmp_path / "out", wait=True):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0001)
                inside.pop()

    threads = [threading.Thread(target=visit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 80
    assert not (tmp_path / "out" / lock.NAME).exists()


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    def none(descriptor):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_try_lock", none)
    with alone(tmp_path / "out") as descriptor:
        assert descriptor is None
    assert "cannot be locked: [Errno 37] No locks available. Start nothing else with" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_reports_lose_no_row_of_each_other(tiny, quick):
    assert dystress("pretrain", tiny | {"epochs": 1}) == 0
    run = Path(tiny["out"])
    with alone(run):
        other = threading.Thread(target=score_run, args=(run, ["knn_1"]))
        other.start()
        time.sleep(0.2)
        write_table(run / "protocols.csv", list(Score.__annotations__), [vars(Score("linear", "all", 12.5, 6, 18))])
    other.join()
    scores = read(run / "protocols.csv")
    assert scores[0] == Score("linear", "all", 12.5, 6, 18)
    assert {score.protocol for score in scores} == {"linear", "knn_1"}
