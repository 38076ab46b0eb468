import errno
import json
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import dystress  # beside this file
from omegaconf import OmegaConf

from dystress_plugin.experiment.evaluate import scores
from dystress_plugin.experiment.io import files
from dystress_plugin.experiment.io.interruption import resumable
from dystress_plugin.experiment.pretrain import command as pretrain
from dystress_plugin.experiment.pretrain import trainer
from dystress_plugin.experiment.pretrain.figures import curves
from dystress_plugin.experiment.pretrain.trainer import SeedEveryEpoch
from dystress_plugin.experiment.report import cost
from dystress_plugin.experiment.report.records import read_frame

SCRIPT = Path(__file__).parents[2] / "scripts" / "checks" / "kill_and_resume.py"


def at_epoch(monkeypatch, epoch, act):
    """Lets something happen when an epoch starts."""
    on_train_epoch_start = SeedEveryEpoch.on_train_epoch_start

    def start(self, trainer, module):
        if trainer.current_epoch == epoch:
            act()
        on_train_epoch_start(self, trainer, module)

    monkeypatch.setattr(SeedEveryEpoch, "on_train_epoch_start", start)


def last(out):
    return Path(out, "checkpoints", "last.ckpt")


def epoch_of(out):
    return torch.load(last(out), weights_only=True)["epoch"]


def test_killed_at_random_and_started_again_it_ends_as_if_nothing_had_happened(tmp_path):
    # A process of its own: forking one in which OpenMP has run hangs. By default the script does 200.
    done = subprocess.run(
        [sys.executable, SCRIPT, "--rounds", "5"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "5 kills over" in done.stdout
    assert "No row lost or doubled" in done.stdout


def test_sigterm_ends_at_once_with_143_and_says_how_to_go_on(tiny, monkeypatch, capsys, quick):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        at_epoch(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as stop:
            dystress("pretrain", tiny)
    assert stop.value.code == 143
    said = capsys.readouterr().err
    assert (
        f"stopped by SIGTERM. The same command again goes on from the last finished epoch in out={tiny['out']}" in said
    )
    assert epoch_of(tiny["out"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert dystress("pretrain", tiny) == 0
    assert epoch_of(tiny["out"]) == 2


@pytest.mark.parametrize(("epoch", "told"), [(0, "No epoch was finished"), (1, "goes on from the last finished epoch")])
def test_ctrl_c_ends_with_130_and_says_how_to_go_on(epoch, told, tiny, monkeypatch, capsys, quick):
    before = signal.getsignal(signal.SIGINT)
    at_epoch(monkeypatch, epoch, lambda: signal.raise_signal(signal.SIGINT))
    assert dystress("pretrain", tiny) == 130
    signal.signal(signal.SIGINT, before)  # Lightning has them ignored from then on
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith("dystress: stopped by Ctrl-C. ")
    assert told in said
    assert not Path(tiny["out"], "summary.json").exists()


@pytest.mark.parametrize("where", ["scan_images", "RunFolder.open", "make_trainer", "checked"])
def test_ctrl_c_before_a_run_begins_is_one_line(where, tiny, monkeypatch, capsys):
    monkeypatch.setattr(f"{pretrain.__name__}.{where}", lambda *args: signal.raise_signal(signal.SIGINT))
    assert dystress("pretrain", tiny) == 130
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith("dystress: stopped by Ctrl-C.")
    assert no_epoch(said)


def test_sigterm_is_told_from_what_it_surfaces_as(tmp_path):
    def surface():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except SystemExit as error:
            raise RuntimeError("Error calling __set_name__") from error

    with pytest.raises(SystemExit) as stop, resumable(tmp_path):
        surface()
    assert stop.value.code == 143


def test_other_exits_and_threads_without_signals_are_left_alone(tmp_path):
    with pytest.raises(SystemExit) as stop, resumable(tmp_path):
        raise SystemExit(7)
    assert stop.value.code == 7
    seen = []

    def elsewhere():
        with resumable(tmp_path):
            seen.append(True)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [True]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "x"
    files.write(file, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_disk_that_fills_in_the_middle_ends_clearly_and_keeps_the_checkpoint(tiny, monkeypatch, capsys, quick):
    # No file may grow beyond half a checkpoint from the second epoch on, as if the disk had no more than that.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (last(tiny["out"]).stat().st_size // 2, limits[1]))

    with monkeypatch.context() as patch:
        at_epoch(patch, 1, fill)
        try:
            assert dystress("pretrain", tiny) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert "What was written before is whole. When that is fixed: The same command again goes on" in said
    assert epoch_of(tiny["out"]) == 0
    assert [path.name for path in last(tiny["out"]).parent.iterdir()] == ["last.ckpt"]
    assert dystress("pretrain", tiny) == 0
    assert epoch_of(tiny["out"]) == 2


def no_epoch(said):
    """Whether a message speaks neither of what was written nor of going on."""
    return not any(words in said for words in ("was written", "last finished", "goes on"))


TOO_LONG = "x" * 300
COMMANDS = {
    "pretrain": {"data": TOO_LONG},
    "compare": {"data": TOO_LONG, "out": "cmp", "methods": "[simclr]"},
    "evaluate": {"checkpoint": TOO_LONG},
    "inspect": {"data": TOO_LONG, "out": "inspect"},
    "long-tail": {"data": TOO_LONG, "out": "tail", "long_tail": 0.5},
    "report": {"runs": f"[{TOO_LONG}]"},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_of_the_system_before_anything_has_begun_is_one_line(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert dystress(command, COMMANDS[command]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dystress: ")
    assert said.count("\n") == 1
    assert TOO_LONG in said
    assert no_epoch(said)


@pytest.mark.parametrize("what", [OSError(errno.ENOSPC, "No space left on device"), PermissionError("no"), "SIGTERM"])
@pytest.mark.parametrize("where", ["scan_images", "RunFolder.open", "make_trainer"])
def test_what_ends_a_run_before_it_began_does_not_speak_of_epochs(what, where, tiny, monkeypatch, capsys):
    def end(*args):
        if isinstance(what, OSError):
            raise what
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    monkeypatch.setattr(f"{pretrain.__name__}.{where}", end)
    if what == "SIGTERM":
        with pytest.raises(SystemExit):
            dystress("pretrain", tiny)
    else:
        assert dystress("pretrain", tiny) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"dystress: {what}" or "The run had not begun" in said
    assert no_epoch(said)


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_image_that_vanishes_in_the_middle_stops_in_one_line_and_goes_on_when_it_is_back(
    epoch, tiny, images, monkeypatch, capsys, quick
):
    tiny |= {"epochs": 2}
    hidden = images.with_name("hidden")
    with monkeypatch.context() as patch:
        at_epoch(patch, epoch, lambda: (images / "class2").rename(hidden))
        assert dystress("pretrain", tiny) == 1
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith(f"dystress: {images / 'class2'}")
    assert "cannot be read as an image: No such file or directory. What was written before is whole." in said
    assert ("goes on from the last finished epoch" if epoch else "starts with the first one in out=") in said
    hidden.rename(images / "class2")
    assert dystress("pretrain", tiny) == 0
    assert epoch_of(tiny["out"]) == 1


def test_a_disk_that_is_full_in_the_first_epoch_speaks_of_none_that_was_finished(tiny, monkeypatch, capsys, quick):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    at_epoch(monkeypatch, 0, full)
    assert dystress("pretrain", tiny) == 1
    said = capsys.readouterr().err
    assert (
        "No space left on device. What was written before is whole. When that is fixed: No epoch was finished" in said
    )


def test_too_little_room_for_two_checkpoints_is_said_before_training(tiny, monkeypatch, capsys, quick):
    assert dystress("pretrain", tiny | {"epochs": 1}) == 0
    size = last(tiny["out"]).stat().st_size
    counted = []
    tensor_bytes = files.checkpoint_bytes
    monkeypatch.setattr(files, "checkpoint_bytes", lambda module: counted.append(tensor_bytes(module)) or counted[-1])
    usage = shutil.disk_usage(tiny["out"])
    needed = 2 * size + files.SPARE
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed // 2))
    other = tiny | {"out": f"{tiny['out']}2"}
    assert dystress("pretrain", other) == 2
    assert "MiB free, but two checkpoints of" in capsys.readouterr().err
    assert not Path(other["out"]).exists()
    # Tensors are most of what a checkpoint holds.
    assert 0.7 * size < counted[0] < size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert dystress("pretrain", other) == 0


@pytest.mark.parametrize("place", ["file", "below a file", "read-only"])
def test_an_out_that_cannot_be_written_is_said_before_training(place, tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "letter").write_text("dear")
    out = {"file": tmp_path / "letter", "below a file": tmp_path / "letter" / "run", "read-only": tmp_path / "run"}[
        place
    ]
    if place == "read-only":  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(pretrain.data_module, "load", lambda *args, **kwargs: pytest.fail("loaded data before"))
    assert dystress("pretrain", tiny | {"out": out}) == 2
    assert f"out={out} cannot be" in capsys.readouterr().err


class Bomb:
    """What an attacker pickles."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def damage(path, how, tmp_path):
    if how == "empty":
        path.write_bytes(b"")
    elif how == "cut off":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "text":
        path.write_text("hello")
    elif how == "foreign":
        torch.save({"state_dict": {"fc.weight": torch.zeros(2)}, "epoch": 1, "settings": {}}, path)
    elif how == "a list":
        torch.save([1, 2], path)
    elif how == "no checkpoint":
        torch.save({"weight": torch.zeros(2)}, path)
    elif how == "malicious":
        torch.save({"state_dict": Bomb(tmp_path / "pwned"), "epoch": 1}, path)
    elif how == "malicious, old format":
        path.write_bytes(pickle.dumps({"state_dict": Bomb(tmp_path / "pwned")}, protocol=2))
    elif how == "other settings":
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["settings"]["seed"] = 5
        torch.save(checkpoint, path)


DAMAGES = ["empty", "cut off", "text", "foreign", "a list", "no checkpoint", "malicious", "malicious, old format"]


@pytest.fixture
def ended(tiny, quick):
    """A run of one epoch whose checkpoint and weights can be spoilt."""
    assert dystress("pretrain", tiny | {"epochs": 1}) == 0
    return tiny | {"epochs": 1}


def test_damaged_files_are_named_and_never_begun_anew_nor_run(ended, tmp_path, capsys):
    out = Path(ended["out"])
    checkpoint, weights = last(out), out / "backbone.pt"
    (out / "summary.json").unlink()
    good = {path: path.read_bytes() for path in (checkpoint, weights)}
    for how in [*DAMAGES, "other settings"]:
        damage(checkpoint, how, tmp_path)
        assert dystress("pretrain", ended) == 2, how
        said = capsys.readouterr().err
        assert f"dystress: {checkpoint}" in said, how
        assert ("seed=0 (there: 5)" if how == "other settings" else "or delete the file") in said, how
        assert not (tmp_path / "pwned").exists(), how
        checkpoint.write_bytes(good[checkpoint])
    for how in DAMAGES:
        damage(weights, how, tmp_path)
        assert dystress("evaluate", {"checkpoint": out, "accelerator": "cpu"}) == 2, how
        assert f"dystress: {weights}" in capsys.readouterr().err, how
        assert not (tmp_path / "pwned").exists(), how
    weights.write_bytes(good[weights])
    assert dystress("pretrain", ended) == 0


def test_the_attack_would_work_elsewhere(ended, tmp_path):
    damage(last(ended["out"]), "malicious", tmp_path)
    torch.load(last(ended["out"]), weights_only=False)
    assert (tmp_path / "pwned").is_dir()


@pytest.mark.parametrize(
    "content", ["", "settings: 3", "{", "a: !!python/object/apply:os.mkdir [pwned]", "settings: {lr: [}", "\x00\x01"]
)
def test_a_damaged_config_is_named(content, ended, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = Path(ended["out"], "config.yaml")
    config.write_text(content)
    for command, settings in (("pretrain", ended), ("evaluate", {"checkpoint": ended["out"]})):
        assert dystress(command, settings) == 2
        assert f"{config} is no config.yaml of `dystress pretrain`" in capsys.readouterr().err
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["summary.json", "images.json"])
@pytest.mark.parametrize("content", ["", "[]", '{"x": 1', '{"folder": "a", "good": 2, "bad": 3}'])
def test_a_damaged_record_is_named(name, content, ended, capsys):
    Path(ended["out"], name).write_text(content)
    assert dystress("pretrain", ended) == 2
    assert f"dystress: {Path(ended['out'], name)} " in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", '{"knn_top1": 3}'])
def test_scores_of_the_start_that_are_not_there_are_measured_again(content, ended):
    out = Path(ended["out"])
    good = (out / "untrained.json").read_text()
    (out / "summary.json").unlink()
    (out / "untrained.json").write_text(content)
    assert dystress("pretrain", ended) == 0
    assert (out / "untrained.json").read_text() == good


def test_a_config_that_is_older_than_a_key_has_its_default(ended):
    config = Path(ended["out"], "config.yaml")
    content = OmegaConf.load(config)
    del content.settings["gather_distributed"]
    OmegaConf.save(content, config)
    assert dystress("pretrain", ended) == 0
    assert dystress("pretrain", ended | {"gather_distributed": "false"}) == 2


def test_what_an_interruption_leaves_before_the_config_is_no_other_run(tiny, quick):
    Path(tiny["out"]).mkdir()
    Path(tiny["out"], "config.yaml.part").write_text("setti")
    assert dystress("pretrain", tiny | {"epochs": 1}) == 0
    assert OmegaConf.load(Path(tiny["out"], "config.yaml")).settings.epochs == 1


def test_slurm_does_not_make_checkpoints_of_its_own(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert [plugin.auto_requeue for plugin in trainer._plugins() if hasattr(plugin, "auto_requeue")] == [False]


def test_a_key_for_wandb_is_written_nowhere_and_nothing_is_connected_to(tiny, monkeypatch, capsys, caplog, quick):
    secret = "0123456789abcdef" * 2 + "deadbeef"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    asked = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    assert dystress("pretrain", tiny | {"epochs": 1}) == 0
    monkeypatch.undo()
    monkeypatch.setenv("WANDB_API_KEY", secret)
    assert asked == []
    offline = tiny | {"epochs": 1, "out": f"{tiny['out']}-wandb", "wandb": "offline"}
    assert dystress("pretrain", offline) == 0
    written = [path for out in (tiny["out"], offline["out"]) for path in Path(out).rglob("*") if path.is_file()]
    assert any("offline-run" in str(path) for path in written)
    for path in written:
        assert secret.encode() not in path.read_bytes(), path
    printed = capsys.readouterr()
    assert secret not in printed.out + printed.err + caplog.text


def test_shell_characters_in_paths_are_characters(tiny, images, tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    odd = "a b; touch pwned; $(touch pwned) `touch pwned` & | > pwned 'q' \"r\" * #x"
    data, out = tmp_path / f"data {odd}", tmp_path / f"out {odd}"
    images.rename(data)
    settings = tiny | {"data": data, "out": out, "epochs": 1}
    assert dystress("pretrain", settings) == 0
    assert not (tmp_path / "pwned").exists()
    assert OmegaConf.load(out / "config.yaml").settings.data == str(data)
    assert dystress("evaluate", {"checkpoint": out, "accelerator": "cpu"}) == 0
    assert dystress("pretrain", settings | {"method_kwargs.profile": "$(touch pwned)", "out": "x"}) == 2
    assert not (tmp_path / "pwned").exists()


def test_workers_change_nothing_and_the_seed_everything(tiny, tmp_path, quick):
    states = {}
    for workers, seed in ((0, 0), (2, 0), (0, 1)):
        out = tmp_path / f"{workers}-{seed}"
        settings = tiny | {"method": "simclr_moco", "queue_size": 30, "epochs": 2, "out": out}
        assert dystress("pretrain", settings | {"num_workers": workers, "seed": seed}) == 0
        states[workers, seed] = torch.load(last(out), weights_only=True)["state_dict"]
    one, same, other = states.values()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["loss.queue.keys"], other["loss.queue.keys"])
    assert not torch.equal(one["backbone.conv1.weight"], other["backbone.conv1.weight"])


TABLES = [b"", b"epoch,loss\n", b"epoch,loss\n0,much\n", b"epoch\n0\n", b"epoch,loss\n\xff,1\n"]


@pytest.mark.parametrize("content", [TABLES[0], TABLES[2]])
def test_damaged_tables_of_a_run_lose_nothing_that_its_checkpoint_has(content, ended):
    out = Path(ended["out"])
    good = (out / "metrics.csv").read_bytes()
    (out / "summary.json").unlink()
    for name in ("metrics.csv", "speed.csv"):
        (out / name).write_bytes(content)
    assert dystress("pretrain", ended) == 0
    assert (out / "metrics.csv").read_bytes() == good
    assert json.loads((out / "summary.json").read_text())["images_per_second"] is None


@pytest.mark.parametrize("content", TABLES)
@pytest.mark.parametrize(
    "read",
    [
        scores.read,
        partial(pretrain._last_epoch, data=SimpleNamespace(evaluated=SimpleNamespace(classes=()))),
        lambda table: curves(table, table.with_suffix(".png"), "SimCLR", "red"),
        lambda table: cost.read([], table),
        lambda table: read_frame(table, ["loss"], "Delete it."),
    ],
)
def test_a_table_that_cannot_be_read_is_named(read, content, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "measured_arms", lambda runs: ({}, ""))
    table = tmp_path / "table.csv"
    table.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(table))} is damaged: .*\. Delete it") as caught:
        read(table)
    assert "\n" not in str(caught.value)
