import csv
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import dystress  # beside this file
from test_interruption import at_epoch

from dystress_plugin.experiment.pretrain import command as pretrain
from dystress_plugin.experiment.pretrain import speed
from dystress_plugin.experiment.terminal import summary_table


@pytest.fixture
def two_seconds(monkeypatch):
    """Every look at the clock is two seconds after the one before."""
    ticks = itertools.count(0, 2)
    monkeypatch.setattr(speed, "time", SimpleNamespace(monotonic=lambda: next(ticks)))


def table(out):
    with Path(out, "speed.csv").open(newline="") as file:
        return [(int(row["epoch"]), float(row["images_per_second"]), row["device"]) for row in csv.DictReader(file)]


def summary(out):
    return json.loads(Path(out, "summary.json").read_text())


@pytest.mark.parametrize(("world_size", "batches"), [(1, 3), (2, 1), (3, 4)])
def test_a_speed_is_that_of_all_processes_together(world_size, batches, tmp_path, two_seconds):
    module = SimpleNamespace(device=torch.device("cpu"))
    # Of an epoch that comes again, as the checkpoint has it not.
    (tmp_path / "speed.csv").write_text("epoch,images_per_second,device\n0,7,before\n")
    for rank in reversed(range(world_size)):
        state = SimpleNamespace(world_size=world_size, global_rank=rank, num_training_batches=batches, current_epoch=0)
        each = speed.ImagesPerSecond(tmp_path)
        each.on_train_start(state, module)
        each.on_train_epoch_start(state, module)
        for number in range(batches):
            state.is_last_batch = number == batches - 1
            each.on_train_batch_end(state, module, None, ([torch.zeros(5, 1)] * 2, torch.zeros(5), torch.arange(5)), 0)
    cpu = speed.device_name(module.device)
    name = cpu if world_size == 1 else f"{world_size} x {cpu}"
    assert table(tmp_path) == [(0, world_size * batches * 5 / 2, name)]
    assert speed.summary(tmp_path) == {
        **{"images_per_second": world_size * batches * 5 / 2, "device": name},
        "torch": torch.__version__,
    }


@pytest.mark.parametrize("augment", ["loader", "batch"])
def test_a_run_that_was_stopped_twice_knows_the_speed_of_every_epoch(
    augment, tiny, quick, two_seconds, monkeypatch, capsys
):
    settings = tiny | {"augment": augment}

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_epoch(patch, 1, stop)
        assert dystress("pretrain", settings) == 130
    assert [epoch for epoch, *_ in table(tiny["out"])] == [0]
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "score_features", stop)  # when nothing is left to train
        at_epoch(patch, 0, lambda: pytest.fail("trained again"))
        assert dystress("pretrain", settings) == 130
    assert not Path(tiny["out"], "summary.json").exists()
    capsys.readouterr()
    assert dystress("pretrain", settings) == 0
    assert table(tiny["out"]) == [(epoch, 9.0, speed.device_name(torch.device("cpu"))) for epoch in range(3)]
    assert summary(tiny["out"])["images_per_second"] == 9.0
    assert ", 9 images/s in training" in capsys.readouterr().out


def test_a_run_that_goes_on_elsewhere_names_both_places_and_the_speed_of_the_last(tmp_path):
    rows = [(0, 10, "A"), (1, 30, "A"), (2, 500, "B"), (3, 100, "B"), (4, 300, "B")]
    lines = [",".join(map(str, row)) for row in rows]
    (tmp_path / "speed.csv").write_text("\n".join(["epoch,images_per_second,device", *lines, ""]))
    found = speed.summary(tmp_path)
    assert (found["images_per_second"], found["device"]) == (300, "A, then B")


def test_of_a_training_by_an_earlier_version_nothing_is_said(tmp_path):
    found = speed.summary(tmp_path)
    assert (found["images_per_second"], found["device"]) == (None, None)
    shown = {"method": "macl", "data": "digits", "seed": 0, "epochs": 1, "seconds": 1.0}
    assert "images/s" not in summary_table(shown | found)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"epoch,images_per_second,device\n",
        b"epoch,images_per_second,device\n0,fast,A\n",
        b"epoch,images_per_second,device\n0,3.5,A\n1\n",
        b"epoch,images_per_second\n0,3.5\n",
        b"epoch,images_per_second,device\n\xff,3.5,A\n",
    ],
)
def test_speeds_that_cannot_be_read_end_no_training(content, tmp_path, capsys):
    (tmp_path / "speed.csv").write_bytes(content)
    speed.ImagesPerSecond(tmp_path).on_train_start(SimpleNamespace(current_epoch=2), None)
    found = speed.summary(tmp_path)
    assert (found["images_per_second"], found["device"]) == (None, None)
    assert f"dystress: {tmp_path}/speed.csv is damaged: " in capsys.readouterr().err
