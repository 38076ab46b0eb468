import csv
import importlib
import json
import re
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import dystress  # beside this file
from omegaconf import OmegaConf
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from dystress_plugin import training
from dystress_plugin.experiment import devices
from dystress_plugin.experiment.data import folders
from dystress_plugin.experiment.io.config import read_config
from dystress_plugin.experiment.pretrain import command as pretraining
from dystress_plugin.experiment.pretrain.trainer import COLUMNS, SeedEveryEpoch
from dystress_plugin.experiment.settings import PretrainSettings
from dystress_plugin.recipes import METHODS


def rows(out):
    with open(f"{out}/metrics.csv") as file:
        return list(csv.DictReader(file))


def settings_of(method, tiny):
    settings = tiny | {"method": method}
    if method.startswith("ts"):
        settings["method_kwargs.period"] = 1
    if method.endswith("_moco"):
        settings["queue_size"] = 32
    return settings


def interrupt(settings, epoch, monkeypatch):
    """Runs until an epoch begins that it does not do any more."""
    begin = SeedEveryEpoch.on_train_epoch_start

    def power_cut(self, trainer, module):
        if trainer.current_epoch == epoch:
            raise SystemExit("power cut")
        begin(self, trainer, module)

    with monkeypatch.context() as patch:
        patch.setattr(SeedEveryEpoch, "on_train_epoch_start", power_cut)
        with pytest.raises(SystemExit, match="power cut"):
            dystress("pretrain", settings)


def assert_same_end(one, other):
    """Checkpoints and tables of two runs are the same to the last bit."""
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, other)]
    assert states[0]["epoch"] == states[1]["epoch"]
    assert all(torch.equal(value, states[1]["state_dict"][name]) for name, value in states[0]["state_dict"].items())
    assert rows(one) == rows(other)


FULL = [*(name for name in METHODS if "_" not in name), "dystress_moco"]


@pytest.mark.parametrize("method", [name for name in METHODS if name not in FULL])
def test_every_variant_trains_for_two_steps(method, tiny, quick):
    # What they leave is checked below for the others.
    settings = settings_of(method, tiny) | {"epochs": 1, "batch_size": 9, "diagnostics_every_n_steps": 1}
    assert dystress("pretrain", settings) == 0
    (row,) = rows(tiny["out"])
    assert float(row["tau_negative_min"]) > 0
    with open(f"{tiny['out']}/diagnostics.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0"] * 4 + ["1"] * 4


@pytest.mark.parametrize("method", FULL)
def test_every_method_leaves_what_is_promised(method, tiny, capsys):
    settings = settings_of(method, tiny) | {"epochs": 2}
    assert dystress("pretrain", settings) == 0

    out = Path(tiny["out"])
    config = OmegaConf.load(out / "config.yaml")
    assert config.settings.method == method
    assert config.settings.seed == 0
    assert {"torch", "lightly", "dystress_plugin"} <= set(config.versions)
    table = rows(out)
    assert [row["epoch"] for row in table] == ["0", "1"]
    assert list(table[0]) == [name for name in COLUMNS if name != "effective_rank"]  # for images without labels
    for row in table:
        for pairs in ("positive", "negative"):
            low, mean, high = (float(row[f"tau_{pairs}_{how}"]) for how in ("min", "mean", "max"))
            assert 0 < low <= mean * (1 + 1e-6)
            assert mean <= high * (1 + 1e-6)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["method"], summary["seed"], summary["epochs"]) == (method, 0, 2)
    for name in ("knn_top1", "linear_top1", "untrained_knn_top1", "untrained_linear_top1"):
        assert 0 <= summary[name] <= 100
    assert (out / "checkpoints" / "last.ckpt").exists()
    assert (out / "diagnostics.csv").read_text().count("\n") == 1 + 4 * 2 * 3  # of each step
    assert sorted(path.name for path in (out / "figures").glob("*.png")) == ["curves.png", "temperature.png"]
    assert all(path.stat().st_size > 10_000 for path in (out / "figures").glob("*.png"))
    printed = capsys.readouterr().out
    assert "untrained   trained    gain" in printed
    assert "figure: " in printed


def test_the_backbone_is_a_plain_timm_state_dict_and_evaluates_to_the_summary(tiny, capsys):
    import timm

    assert dystress("pretrain", tiny | {"epochs": 1}) == 0
    state = torch.load(f"{tiny['out']}/backbone.pt", weights_only=True)
    reference = timm.create_model("test_resnet", num_classes=0).state_dict()
    assert {key for key in reference if not key.startswith("conv1")} == {k for k in state if not k.startswith("conv1")}
    summary = json.loads(Path(tiny["out"], "summary.json").read_text())
    capsys.readouterr()
    assert dystress("evaluate", {"checkpoint": tiny["out"], "accelerator": "cpu"}) == 0
    assert json.loads(capsys.readouterr().out) == {name: summary[name] for name in ("knn_top1", "linear_top1")}


@pytest.mark.parametrize("method", ["dystress", "isogclr", "macl_moco"])
def test_an_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(method, tiny, tmp_path, monkeypatch):
    whole = settings_of(method, tiny) | {"out": tmp_path / "whole", "diagnostics_every_n_steps": 2}
    assert dystress("pretrain", whole) == 0

    cut = whole | {"out": tmp_path / "cut"}
    interrupt(cut, 2, monkeypatch)
    assert len(rows(cut["out"])) == 2
    assert dystress("pretrain", cut) == 0

    assert_same_end(cut["out"], whole["out"])
    samples = [(run["out"] / "diagnostics.csv").read_text() for run in (cut, whole)]
    assert samples[0] == samples[1]
    assert samples[0].count("\n") == 1 + 4 * 5


HARMLESS = {
    **{"data_root": "elsewhere", "download": "true", "num_workers": 1, "nan_guard": "false", "progress": "true"},
    **{"protocols": "[knn_1]", "map": "true", "arm": "x", "family": "simclr", "diagnostics_every_n_steps": 1},
    **{"wandb": "offline", "wandb_project": "other", "tensorboard": "true"},
}
MEASURED = {"check_every_n_epochs": 3, "log_every_n_steps": 50}  # change what metrics.csv says, and nothing else


def test_a_run_goes_on_with_other_settings_that_are_free_and_with_others_spelled_otherwise(
    tiny, tmp_path, monkeypatch, quick
):
    assert {*HARMLESS, *MEASURED, "out"} == {f.name for f in fields(PretrainSettings) if f.metadata["free"]}
    monkeypatch.chdir(tmp_path)
    spelled = {"data": f"./{Path(tiny['data']).name}/", "precision": "32", "lr": "3e-1", "devices": "1"}
    for name in ("whole", "cut"):
        tiny |= {"out": tmp_path / name, "lr": 0.3}
        if name == "whole":
            assert dystress("pretrain", tiny) == 0
        else:
            interrupt(tiny, 1, monkeypatch)
    (tmp_path / "cut").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "measured")
    monkeypatch.setattr(pretraining, "score_run", lambda *args, **kwargs: None)  # of the protocols
    assert dystress("pretrain", tiny | HARMLESS | spelled | {"out": tmp_path / "moved"}) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "moved")
    assert dystress("pretrain", tiny | MEASURED | {"out": tmp_path / "measured"}) == 0
    mine, its = (torch.load(tmp_path / name / "backbone.pt", weights_only=True) for name in ("whole", "measured"))
    assert all(map(torch.equal, mine.values(), its.values()))


def test_a_run_in_its_warm_up_goes_on_to_more_epochs_as_if_it_had_been_asked_for_them(
    tiny, tmp_path, monkeypatch, capsys, quick
):
    tiny |= {"warmup_epochs": 2, "method": "ts", "method_kwargs.period": 4}
    assert dystress("pretrain", tiny | {"epochs": 5, "out": tmp_path / "whole"}) == 0
    for done in (0, 1, 2):
        settings = tiny | {"out": tmp_path / f"cut-{done}"}
        interrupt(settings, done, monkeypatch)
        capsys.readouterr()
        assert dystress("pretrain", settings | {"epochs": 5}) == 0
        assert f"dystress: out={settings['out']} goes on with epochs=5 (there: 3).\n" in capsys.readouterr().err
        assert_same_end(tmp_path / "whole", settings["out"])
        assert dystress("pretrain", settings) == 2  # and is a run of 5 epochs from now on
        assert "epochs=3 (there: 5)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("own", "change", "reason"),
    [
        ({}, {"epochs": 5}, "After 0.3 epochs its learning rate began to fall, on a cosine over all epochs=3."),
        ({"warmup_epochs": 2}, {"epochs": 5, "warmup_epochs": 3}, "Its learning rate was rising for warmup_epochs=2."),
        ({"warmup_epochs": 2}, {"warmup_epochs": 1}, "Its learning rate was rising for warmup_epochs=2."),
        ({"warmup_epochs": 1}, {"epochs": 1}, "1 epochs are done."),
        (
            {"warmup_epochs": 2, "method": "macl_moco", "queue_size": 16},
            {"epochs": 5},
            "The momentum of its keys' encoder was rising, on a cosine over all epochs=3.",
        ),
        ({"warmup_epochs": 2}, {"epochs": 5, "seed": 1}, "epochs=5 (there: 3), seed=1 (there: 0)."),
        ({}, {"knn_k": 5}, "knn_k=5 (there: 200)."),
    ],
)
def test_a_run_that_cannot_go_on_says_why(own, change, reason, tiny, monkeypatch, capsys, quick):
    interrupt(tiny | own, 1, monkeypatch)
    assert dystress("pretrain", tiny | own | change) == 2
    said = capsys.readouterr().err
    assert f"out={tiny['out']} holds a run with other settings: " in said
    assert f"{reason} Choose another out.\n" in said


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tiny, tmp_path):
    weights = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        assert dystress("pretrain", tiny | {"epochs": 1, "seed": seed, "out": out}) == 0
        weights.append(torch.load(out / "backbone.pt", weights_only=True))
    name = next(key for key in weights[0] if key.endswith("weight"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0][name], weights[2][name])


@pytest.mark.parametrize(("settings", "rate"), [({}, 0.03), ({"temperature_lr": 0.002}, 0.002)])
def test_what_a_temperature_learns_has_a_rate_of_its_own_and_no_decay(tiny, quick, settings, rate):
    assert dystress("pretrain", tiny | {"epochs": 1, "method": "clip", "lr": 0.3} | settings) == 0
    state = torch.load(Path(tiny["out"]) / "checkpoints" / "last.ckpt", weights_only=True)
    *others, own = state["optimizer_states"][0]["param_groups"]
    assert (own["initial_lr"], own["weight_decay"], len(own["params"])) == (pytest.approx(rate), 0.0, 1)
    assert {group["initial_lr"] for group in others} == {0.3}


@pytest.mark.parametrize(("method", "sizes"), [("dystress", [18, 4]), ("macl_moco", [9, 3])])
def test_in_chunks_a_run_is_the_same_but_for_batch_norm(method, sizes, tiny, quick, tmp_path, monkeypatch):
    weights, most, seen = [], [], []
    forward = VisionTransformer.forward
    monkeypatch.setattr(VisionTransformer, "forward", lambda self, x: (seen.append(len(x)), forward(self, x))[1])
    for chunk_size in ("null", 4):
        out = tmp_path / str(chunk_size)
        settings = settings_of(method, tiny) | {"epochs": 2, "backbone": "test_vit", "image_size": 16}
        assert (
            dystress(
                "pretrain", settings | {"batch_size": 9, "precision": "64-true", "chunk_size": chunk_size, "out": out}
            )
            == 0
        )
        weights.append(torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
        most.append(max(seen))
        seen.clear()
    assert most == sizes  # both views of nine images, or one; parts are of equal size
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-12, msg=lambda m, n=name: n + m)


def test_a_finished_run_is_shown_again_and_not_repeated(tiny, capsys):
    assert dystress("pretrain", tiny | {"epochs": 1}) == 0
    first = capsys.readouterr().out
    assert dystress("pretrain", tiny | {"epochs": 1}) == 0
    assert capsys.readouterr().out == first


def test_a_runs_own_config_is_the_run_and_with_keys_after_it_another(tiny, tmp_path, capsys, quick):
    settings = tiny | {"epochs": 1, "method": "macl", "method_kwargs.tau": 0.2}
    assert dystress("pretrain", settings) == 0
    config = {"config": f"{tiny['out']}/config.yaml"}
    first = capsys.readouterr().out
    assert dystress("pretrain", config) == 0
    assert capsys.readouterr().out == first  # it has finished
    assert dystress("pretrain", config | {"seed": 3}) == 2
    assert "seed=3 (there: 0)" in capsys.readouterr().err
    assert (
        dystress("pretrain", config | {"seed": 3, "method": "ts", "method_kwargs.period": 1, "out": tmp_path / "x"})
        == 0
    )
    found = read_config(tmp_path / "x" / "config.yaml")
    assert (found.method, found.seed, found.epochs, found.method_kwargs["period"]) == ("ts", 3, 1, 1)
    assert found.model == read_config(Path(config["config"])).model
    assert "alpha" not in found.method_kwargs


def test_a_folder_with_another_run_or_other_files_is_refused(tiny, tmp_path, capsys):
    assert dystress("pretrain", tiny | {"epochs": 1}) == 0
    assert dystress("pretrain", tiny | {"epochs": 1, "seed": 3}) == 2
    assert "holds a run with other settings: seed=3 (there: 0)" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    assert dystress("pretrain", tiny | {"out": tmp_path / "full"}) == 2
    assert "is not empty and holds no run" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"method": "dystres"}, "Unknown method 'dystres'. Did you mean 'dystress'?"),
        ({"method_kwargs.profile": "cosin"}, "Unknown profile 'cosin'. Did you mean 'cosine'?"),
        ({"method_kwargs.tau_mx": 1}, "Did you mean 'tau_max'?"),
        ({"method_kwargs.tau_min": 0.5}, "tau_min=0.5 is above tau_max=0.2"),
        ({"method_kwargs.tau_min": 0}, "tau_min=0.0 must be above 0"),
        *(
            ({"method": "isogclr", "method_kwargs.num_samples": n}, f"num_samples={n} must be that of the training")
            for n in (5, 10**14, "abc")
        ),
        *(
            (
                {"method": "tempnet", "method_kwargs.dim": n},
                f"dim={n} must be that of the embeddings, proj",
            )
            for n in (3, 129, "abc")
        ),
        ({"backbone": "resnet19"}, "Unknown backbone 'resnet19'. Did you mean 'resnet1"),
        ({"optimizer": "adm"}, "Unknown optimizer 'adm'"),
        ({"data": "cifar1"}, "data=cifar1 is neither a folder nor one of cifar10"),
        ({"batch_size": 1}, "batch_size=1 must be at least 2"),
        ({"batch_size": 19}, "batch_size=19 must lie between 2 and the 18 training images"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"warmup_epochs": 4}, "warmup_epochs=4 must lie between 0 and epochs=3"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1.0 must be at least 0"),
        ({"warmup_epochs": "nan"}, "warmup_epochs=nan must be at least 0"),
        ({"queue_size": 9}, "queue_size=9 is for methods with a queue, such as 'simclr_moco', not 'dystress'."),
        ({"momentum_encoder": 0.9}, "momentum_encoder=0.9 is for methods with a queue"),
        ({"method": "ts_moco", "momentum_encoder": 1.5}, "momentum_encoder=1.5 must be at least 0 and at most 1"),
        ({"method": "ts_moco", "queue_size": 0}, "queue_size=0 must be at least 1"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"chunk_size": 1}, "chunk_size=1 leaves batch norm, which this network has, a single image"),
        ({"chunk_size": 2, "strategy": "fsdp"}, "chunk_size=2 embeds twice, for which strategy=fsdp does not"),
        ({"diagnostics_every_n_steps": -1}, "diagnostics_every_n_steps=-1 must be at least 0"),
        ({"wandb": "onlin"}, "Unknown wandb 'onlin'. Did you mean 'online'?"),
    ],
)
def test_bad_settings_stop_before_anything_is_written(setting, message, tiny, tmp_path, capsys):
    assert dystress("pretrain", tiny | setting) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Beside what follows from the key alone, which test_settings.py has.
WITHOUT_DATA = [
    ({"backbone": "resnet19"}, "Unknown backbone 'resnet19'. Did you mean 'resnet1"),
    ({"backbone": "fcn_resnet50"}, "backbone=fcn_resnet50 is one of torchvision's models for segmentation"),
    ({"backbone": "vit_b_16"}, "backbone=vit_b_16 cannot train on images of 12 pixels"),
    ({"chunk_size": 1}, "chunk_size=1 leaves batch norm, which this network has, a single image"),
    ({"queue_size": 9}, "queue_size=9 is for methods with a queue, such as 'simclr_moco', not 'tempnet'."),
    ({"momentum_encoder": 0.9}, "momentum_encoder=0.9 is for methods with a queue"),
    ({"method_kwargs.dim": 3}, "dim=3 must be that of the embeddings, projection_dim=128; leave it out."),
    ({"indices": "none.npy"}, "indices=none.npy cannot be read: "),
    ({"indices": "{images}/class0/0.png"}, "class0/0.png cannot be read: "),
    ({"family": "simclr_moko"}, "Unknown family 'simclr_moko'. Did you mean 'simclr_moco'?"),
    ({"labels": "false", "long_tail": 0.1}, "long_tail=0.1 is of classes, which labels=false leaves out."),
    ({"strategy": "dd"}, "Unknown strategy 'dd'. Did you mean 'ddp'?"),
    ({"devices": "two"}, "devices=two must be auto, or 1 to "),
    ({"augment": "batch"}, "The command needs more than torch: "),  # where kornia is not installed
]
OF_ONE = {"family", "method_kwargs.dim"}  # run, or method


@pytest.mark.parametrize(
    ("command", "setting", "message"),
    [
        *(("pretrain", setting, message) for setting, message in WITHOUT_DATA),
        *(("compare", setting, message) for setting, message in WITHOUT_DATA if not setting.keys() & OF_ONE),
        *(("inspect", setting, message) for setting, message in WITHOUT_DATA[:3]),
        ("inspect", {"methods": "[]", "constants": "[]"}, "methods=[] and constants=[] leave nothing to inspect."),
        ("long-tail", *next(each for each in WITHOUT_DATA if "indices" in each[0])),
    ],
)
def test_what_depends_on_neither_data_nor_devices_is_refused_before_them(
    command, setting, message, tiny, images, capsys, monkeypatch
):
    monkeypatch.setattr(devices, "Trainer", lambda **_: pytest.fail("asked for devices"))
    monkeypatch.setattr(folders, "read", lambda *_: pytest.fail("read the images"))
    if setting == {"augment": "batch"}:
        monkeypatch.setitem(sys.modules, "kornia", None)
        monkeypatch.delitem(sys.modules, "dystress_plugin.experiment.data.views", raising=False)
    own = {
        "pretrain": tiny | {"method": "tempnet"},
        "compare": tiny | {"methods": "[tempnet]", "seeds": "[0]"},
        "inspect": {key: tiny[key] for key in ("data", "out", "image_size", "backbone")},
        "long-tail": {key: tiny[key] for key in ("data", "out")},
    }[command]
    given = {key: value.format(images=images) if isinstance(value, str) else value for key, value in setting.items()}
    assert dystress(command, own | given) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dystress: ")]
    assert message in said
    assert not Path(tiny["out"]).exists()


def test_a_schedule_that_cannot_reach_its_minimum_warns(tiny):
    with pytest.warns(UserWarning, match=r"half a period of 200 epochs, but training ends after 1"):
        dystress("pretrain", tiny | {"method": "ts", "epochs": 1})


def test_the_encoder_of_the_keys_follows_and_the_queue_fills(tiny):
    settings = tiny | {"method": "simclr_moco", "queue_size": 30, "momentum_encoder": 0.5, "epochs": 2}
    assert dystress("pretrain", settings) == 0
    state = torch.load(f"{tiny['out']}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert state["loss.queue.keys"].shape == (30, 128)
    assert int(state["loss.queue.position"]) == 6 * 6 % 30
    backbone = torch.load(f"{tiny['out']}/backbone.pt", weights_only=True)
    name = next(key for key in backbone if key.endswith("weight"))
    assert torch.equal(backbone[name], state[f"backbone.{name}"])
    assert not torch.equal(state[f"backbone.{name}"], state[f"key_backbone.{name}"])
    assert torch.allclose(state[f"backbone.{name}"], state[f"key_backbone.{name}"], atol=0.1)


def test_the_momentum_rises_from_its_start_to_one(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "update_momentum", lambda pairs, m: seen.extend([m] * len(pairs)))
    assert dystress("pretrain", tiny | {"method": "simclr_moco", "queue_size": 30, "epochs": 2}) == 0
    assert seen[::2] == seen[1::2] == sorted(seen[::2])
    assert (len(seen[::2]), seen[0], seen[-1]) == (6, 0.99, 1.0)


def test_diagnostics_can_be_left_out(tiny):
    assert dystress("pretrain", tiny | {"epochs": 1, "diagnostics_every_n_steps": 0}) == 0
    assert not Path(tiny["out"], "diagnostics.csv").exists()


def test_tensorboard_and_offline_wandb_are_written_on_request(tiny, tmp_path):
    assert dystress("pretrain", tiny | {"epochs": 1, "tensorboard": "true", "wandb": "offline"}) == 0
    out = Path(tiny["out"])
    assert list(out.glob("tensorboard/events*"))
    assert list(out.glob("wandb/offline-run-*"))
    # A run that stays open would swallow the next one of the process.
    assert importlib.import_module("wandb").run is None


def test_evaluate_needs_a_finished_run(tmp_path, capsys):
    assert dystress("evaluate", {"checkpoint": tmp_path}) == 2
    assert "holds no run of `dystress pretrain`" in capsys.readouterr().err


def test_one_image_is_too_few_whatever_the_batch(tiny, tmp_path, capsys):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (12, 12)).save(tmp_path / "one" / "a.png")
    assert dystress("pretrain", tiny | {"data": tmp_path / "one", "batch_size": 2}) == 2
    assert "one has 1 image to train on: two or more can be told apart" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_log_gets_a_line_an_epoch_and_a_terminal_a_bar(tiny, quick, capsys, monkeypatch):
    assert dystress("pretrain", {**tiny, "progress": "true"}) == 0
    output = capsys.readouterr()
    lines = [line for line in output.out.splitlines() if line.startswith("epoch ")]
    assert [line.partition(":")[0] for line in lines] == ["epoch 1 of 3", "epoch 2 of 3", "epoch 3 of 3"]
    assert all(re.search(r"loss \d\S*, knn_top1 \d", line) for line in lines)
    assert "\r" not in output.out + output.err
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert dystress("pretrain", {**tiny, "out": tiny["out"] + "-2", "progress": "true"}) == 0
    output = capsys.readouterr().out
    assert "\r" in output
    assert "epoch 1 of" not in output
