import csv
import importlib
import json
from pathlib import Path

import pytest
import torch
from conftest import dystress  # beside this file
from omegaconf import OmegaConf

from dystress_plugin import training
from dystress_plugin.experiment.pretrain.trainer import COLUMNS, SeedEveryEpoch
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
    on_train_epoch_start = SeedEveryEpoch.on_train_epoch_start

    def power_cut(self, trainer, module):
        if trainer.current_epoch == 2:
            raise SystemExit("power cut")
        on_train_epoch_start(self, trainer, module)

    with monkeypatch.context() as patch:
        patch.setattr(SeedEveryEpoch, "on_train_epoch_start", power_cut)
        with pytest.raises(SystemExit):
            dystress("pretrain", cut)
    assert len(rows(cut["out"])) == 2
    assert dystress("pretrain", cut) == 0

    assert rows(cut["out"]) == rows(whole["out"])
    looks = [(run["out"] / "diagnostics.csv").read_text() for run in (cut, whole)]
    assert looks[0] == looks[1]
    assert looks[0].count("\n") == 1 + 4 * 5
    states = [
        torch.load(run["out"] / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (cut, whole)
    ]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tiny, tmp_path):
    weights = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        assert dystress("pretrain", tiny | {"epochs": 1, "seed": seed, "out": out}) == 0
        weights.append(torch.load(out / "backbone.pt", weights_only=True))
    name = next(key for key in weights[0] if key.endswith("weight"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0][name], weights[2][name])


def test_a_finished_run_is_shown_again_and_not_repeated(tiny, capsys):
    assert dystress("pretrain", tiny | {"epochs": 1}) == 0
    first = capsys.readouterr().out
    assert dystress("pretrain", tiny | {"epochs": 1}) == 0
    assert capsys.readouterr().out == first


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
        ({"diagnostics_every_n_steps": -1}, "diagnostics_every_n_steps=-1 must be at least 0"),
        ({"wandb": "onlin"}, "Unknown wandb 'onlin'. Did you mean 'online'?"),
    ],
)
def test_bad_settings_stop_before_anything_is_written(setting, message, tiny, tmp_path, capsys):
    assert dystress("pretrain", tiny | setting) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


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
    assert "holds no finished run" in capsys.readouterr().err
