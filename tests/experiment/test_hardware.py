import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from conftest import dystress  # beside this file
from pytorch_lightning import Trainer
from test_interruption import at_epoch, last
from test_pretrain import rows
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from dystress_plugin.errors import RunStopped
from dystress_plugin.experiment import devices
from dystress_plugin.experiment.data import folders
from dystress_plugin.experiment.data.datasets import load_for
from dystress_plugin.experiment.evaluate import scores
from dystress_plugin.experiment.pretrain import command as pretrain
from dystress_plugin.experiment.pretrain import resolve
from dystress_plugin.experiment.settings import PretrainSettings
from dystress_plugin.experiment.spec import DataSpec, part

# What it trains in on a CPU, and the weights are then.
PRECISIONS = {
    "64-true": torch.float64,
    "bf16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
}


def state_of(out):
    return torch.load(last(out), weights_only=True)["state_dict"]


def stop():
    raise SystemExit("power cut")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_trains_resumes_and_is_evaluated(precision, tiny, tmp_path, monkeypatch, capsys):
    settings = tiny | {"precision": precision, "method": "macl_moco", "queue_size": 30, "epochs": 2}
    whole, cut = settings | {"out": tmp_path / "whole"}, settings | {"out": tmp_path / "cut"}
    assert dystress("pretrain", whole) == 0
    with monkeypatch.context() as patch:
        at_epoch(patch, 1, stop)
        with pytest.raises(SystemExit):
            dystress("pretrain", cut)
    assert dystress("pretrain", cut) == 0
    assert rows(cut["out"]) == rows(whole["out"])
    one, other = state_of(cut["out"]), state_of(whole["out"])
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    assert one["backbone.conv1.weight"].dtype == PRECISIONS[precision]

    weights = torch.load(whole["out"] / "backbone.pt", weights_only=True)
    for name, value in weights.items():
        assert torch.equal(value, one[f"backbone.{name}"].to(value.dtype)), name
        assert value.dtype in (torch.float32, torch.int64)
    capsys.readouterr()
    assert dystress("evaluate", {"checkpoint": whole["out"], "accelerator": "cpu"}) == 0
    summary = json.loads((whole["out"] / "summary.json").read_text())
    assert json.loads(capsys.readouterr().out) == {name: summary[name] for name in ("knn_top1", "linear_top1")}
    assert dystress("inspect", {"checkpoint": whole["out"], "methods": "[]", "constants": "[0.1]"}) == 0


def test_a_run_in_bfloat16_that_an_older_version_left_without_its_accuracies_gets_them(tiny, monkeypatch):
    settings = tiny | {"precision": "bf16-true", "method": "macl_moco", "queue_size": 30, "epochs": 1}
    untrained = {"knn_top1": 50.0, "linear_top1": 50.0}
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "_untrained", lambda *args: untrained)
        patch.setattr(pretrain, "features_of", lambda *args, **kwargs: stop())
        with pytest.raises(SystemExit):
            dystress("pretrain", settings)
    checkpoint = torch.load(last(tiny["out"]), weights_only=True)
    floating = {name: value for name, value in checkpoint["state_dict"].items() if value.dtype == torch.float32}
    assert floating  # the moving average, which was in bfloat16 as well
    checkpoint["state_dict"] |= {name: value.bfloat16() for name, value in floating.items()}
    torch.save(checkpoint, last(tiny["out"]))
    assert dystress("pretrain", settings) == 0
    assert 0 <= json.loads(Path(tiny["out"], "summary.json").read_text())["linear_top1"] <= 100


def test_a_comparison_in_bfloat16_is_scored_and_reported(tiny, tmp_path):
    out = tmp_path / "compare"
    given = tiny | {"precision": "bf16-true", "epochs": 1, "out": out, "methods": "[simclr]", "seeds": "[0]"}
    assert dystress("compare", given | {"constants": "[]", "protocols": "[knn_1]"}) == 0
    assert (out / "report.html").exists()


def test_a_moving_average_is_in_float32_at_least(tiny):
    settings = PretrainSettings(
        **{"method": "simclr_moco", "data": "digits", "backbone": "test_resnet", "queue_size": 8}
    )
    data = load_for(part(DataSpec, settings), settings.seed)
    module = resolve.build_module(resolve.resolve(settings, data, 1), data)
    before = module.key_backbone.conv1.weight.clone()
    for move, dtype in ((module.half, torch.float16), (module.bfloat16, torch.bfloat16)):
        move()
        assert module.backbone.conv1.weight.dtype == dtype
        assert torch.equal(module.key_backbone.conv1.weight, before)
        assert module.key_projection_head.layers[0].weight.dtype == torch.float32
    module.double()
    assert module.key_backbone.conv1.weight.dtype == module.backbone.conv1.weight.dtype == torch.float64
    module.to("meta")
    assert {value.device.type for value in module.state_dict().values()} == {"meta"}


def test_features_are_in_float32_whatever_the_network_was_trained_in():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    images, labels = torch.randn(5, 3, 2, 2), torch.arange(5)
    expected = network.bfloat16().float()(images).detach()
    for dtype in (torch.bfloat16, torch.float64):
        made, found = scores.extract(network.to(dtype), [(images, labels, labels)], "cpu")
        assert made.dtype == torch.float32
        assert torch.equal(made, expected)
        assert torch.equal(found, labels)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"precision": "16-mixed"}, "precision=16-mixed needs a GPU"),
        ({"precision": "16"}, "precision=16 needs a GPU"),
        ({"precision": "16-true"}, "precision=16-true needs a GPU"),
        ({"precision": "16-true", "accelerator": "auto"}, "precision=16-true needs a GPU"),
        ({"precision": "transformer-engine"}, "Unknown precision 'transformer-engine'"),
        ({"precision": "transformer-engine-float16"}, "Unknown precision 'transformer-engine-float16'"),
        ({"strategy": "ddp_fork"}, "Unknown strategy 'ddp_fork'"),
        ({"strategy": "ddp_notebook_find_unused_parameters_true"}, "Unknown strategy"),
    ],
)
@pytest.mark.parametrize("command", ["pretrain", "compare"])
def test_what_a_cpu_cannot_do_is_said_in_one_line_before_training(command, setting, message, tiny, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    own = {"methods": "[simclr]", "constants": "[]", "seeds": "[0]"} if command == "compare" else {}
    assert dystress(command, tiny | own | setting) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert [line for line in said if line.startswith("dystress: ")] == said[-1:]
    assert message in said[-1]
    assert not list(Path(tiny["out"]).rglob("config.yaml"))


class Spectrum(nn.Module):
    """A layer that torch has in no half precision on a CPU."""

    def forward(self, x):
        return torch.fft.fft2(x).real.flatten(1)


def test_a_layer_that_a_precision_does_not_have_is_said_before_training():
    def trainer(precision):
        return Trainer(accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False)

    network = nn.Sequential(nn.Conv2d(3, 3, 1), Spectrum())
    with pytest.raises(
        ValueError, match=r"precision=bf16-true cannot train this backbone on cpu: .*\. Choose 32"
    ) as it:
        devices.check_step(network, trainer("bf16-true"), 8)
    assert len(str(it.value).splitlines()) == 1
    state = torch.get_rng_state()
    devices.check_step(network, trainer("64-true"), 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert network[0].weight.dtype == torch.float32
    assert network[0].weight.grad is None


@pytest.mark.parametrize("command", ["pretrain", "compare"])
def test_it_is_said_before_the_images_are_read(command, tiny, capsys, monkeypatch):
    network = nn.Sequential(nn.Conv2d(3, 3, 1), Spectrum())
    monkeypatch.setattr(resolve, "new_backbone", lambda _: network)
    monkeypatch.setattr(folders, "read", lambda *_: pytest.fail("read the images"))
    own = {"methods": "[simclr]", "constants": "[]", "seeds": "[0]"} if command == "compare" else {}
    assert dystress(command, tiny | own | {"precision": "bf16-true"}) == 2
    assert "precision=bf16-true cannot train this backbone on cpu" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.parametrize("command", ["pretrain", "compare"])
def test_of_the_network_that_was_tried_nothing_stays(command, precision, tiny, capsys, monkeypatch):
    made = []
    build = resolve.build_backbone

    def kept(*args):
        found = build(*args)
        made.append(weakref.ref(found[0]))
        return found

    def read(*args, **rest):
        gc.collect()
        raise ValueError(f"of {len(made)} there is {[tried() for tried in made]}")

    monkeypatch.setattr(resolve, "build_backbone", kept)
    monkeypatch.setattr(folders, "read", read)
    own = {"methods": "[simclr]", "constants": "[]", "seeds": "[0]"} if command == "compare" else {}
    assert dystress(command, tiny | own | {"precision": precision}) == 2
    assert "of 1 there is [None]" in capsys.readouterr().err


TRACEBACK = """

-- Process 1 terminated with the following error:
Traceback (most recent call last):
  File "spawn.py", line 90, in _wrap
    fn(i, *args)
  File "guard.py", line 84, in _stop
    raise RunStopped(
        ^^^^^
dystress_plugin.errors.RunStopped: the loss, nan, is not finite: epoch 1. What is finite:
  length of an embedding: mean 3
The checkpoint is as it was.
"""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ProcessRaisedException(TRACEBACK, 1, 7),
            "the loss, nan, is not finite: epoch 1. What is finite:\n  length of an embedding: mean 3\n"
            "The checkpoint is as it was.",
        ),
        (
            ProcessRaisedException('Traceback\n  File "a.py", line 1, in b\n    c\nKeyboardInterrupt\n', 0, 7),
            "KeyboardInterrupt",
        ),
        (
            ProcessExitedException("process 0 terminated with signal SIGKILL", 0, 7, -9, "SIGKILL"),
            "A process of this training has died: process 0 terminated with signal SIGKILL.",
        ),
    ],
)
def test_the_error_of_a_spawned_process_is_told_without_its_traceback(error, told):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(RunStopped) as stopped, devices.processes(trainer):
        raise error
    assert str(stopped.value) == told
