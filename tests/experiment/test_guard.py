import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import dystress  # beside this file

from dystress_plugin.experiment.pretrain import guard
from dystress_plugin.experiment.pretrain.guard import NanGuard
from dystress_plugin.experiment.pretrain.module import PretrainModule


@pytest.fixture
def poisoned(monkeypatch):
    """Lets something go wrong in the second step of the second epoch, the fifth of all, or of another epoch."""

    def at_step(poison, epoch=1):
        training_step = PretrainModule.training_step

        def step(self, batch, batch_idx):
            here = self.current_epoch == epoch and batch_idx == 1
            return poison(training_step, self, batch, batch_idx) if here else training_step(self, batch, batch_idx)

        monkeypatch.setattr(PretrainModule, "training_step", step)

    return at_step


def loss_is_nan(step, self, batch, number):
    loss = step(self, batch, number)
    self.last_step = self.last_step._replace(loss=torch.tensor(torch.nan))
    return loss * torch.nan


def gradient_is_infinite(step, self, batch, number):
    loss = step(self, batch, number)
    weight = next(self.backbone.parameters())
    weight.register_hook(lambda gradient: gradient * torch.inf)
    return loss


def embedding_is_nan(step, self, batch, number):
    batch[0][0][2] = torch.nan
    self.backbone.eval()  # or batch norm would spread it over all images
    self.projection_head.eval()
    return step(self, batch, number)


def weight_is_nan(step, self, batch, number):
    next(self.backbone.parameters()).data.fill_(torch.nan)
    return step(self, batch, number)


def test_in_the_first_epoch_there_is_no_checkpoint_to_speak_of(tiny, poisoned, capsys, quick):
    poisoned(loss_is_nan, epoch=0)
    assert dystress("pretrain", tiny) == 1
    said = capsys.readouterr().err
    assert "the loss, nan, is not finite: epoch 0, step 1" in said
    assert "last finished epoch" not in said


@pytest.mark.parametrize(
    ("poison", "what"),
    [
        (loss_is_nan, "the loss, nan, is not finite"),
        (gradient_is_infinite, "the gradient is not finite"),
        (embedding_is_nan, "the embedding is not finite"),
        (weight_is_nan, "the embedding is not finite"),
    ],
)
def test_the_step_where_it_happens_is_named_and_the_checkpoint_stays(poison, what, tiny, poisoned, capsys, quick):
    poisoned(poison)
    assert dystress("pretrain", tiny | {"method": "isogclr"}) == 1
    said = capsys.readouterr().err
    assert f"{what}: epoch 1, step 4, images " in said
    assert "The checkpoint of the last finished epoch is as it was" in said

    report = json.loads(Path(tiny["out"], "not_finite.json").read_text())
    assert (report["epoch"], report["step"]) == (1, 4)
    assert len(set(report["images"])) == 6
    assert set(report["images"]) <= set(range(18))
    if poison is weight_is_nan:
        assert report["rows_not_finite"] == [6, 6]
        assert "nothing" in said
        assert report["statistics"] == {}
    else:
        assert report["rows_not_finite"] == ([1, 0] if poison is embedding_is_nan else [0, 0])
        assert set(report["statistics"]) == {
            "length of an embedding",
            *(f"{q} of {p} pairs" for q in ("similarity", "temperature") for p in ("positive", "negative")),
        }
        assert 0.05 <= report["statistics"]["temperature of negative pairs"]["min"] <= 1
    if poison is gradient_is_infinite:
        assert report["gradients_not_finite"] == ["backbone.conv1.weight"]

    checkpoint = torch.load(f"{tiny['out']}/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 0
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_a_checkpoint_is_never_made_of_nan(tiny, monkeypatch, capsys, quick):
    # A running mean, which training does not read: no loss and no gradient tells.
    on_validation_end = PretrainModule.on_validation_epoch_end

    def spoil(self):
        on_validation_end(self)
        if self.current_epoch == 1:
            self.backbone.bn1.running_mean[0] = torch.nan

    monkeypatch.setattr(PretrainModule, "on_validation_epoch_end", spoil)
    assert dystress("pretrain", tiny) == 1
    assert "'backbone.bn1.running_mean', with 0 other tensors of the model, is not finite" in capsys.readouterr().err
    checkpoint = torch.load(f"{tiny['out']}/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 0
    assert checkpoint["state_dict"]["backbone.bn1.running_mean"].isfinite().all()


def test_without_the_guard_it_goes_on(tiny, poisoned, quick):
    poisoned(loss_is_nan)
    assert dystress("pretrain", tiny | {"nan_guard": "false", "epochs": 2, "batch_size": 9}) == 0
    assert not Path(tiny["out"], "not_finite.json").exists()
    state = torch.load(f"{tiny['out']}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert state["backbone.conv1.weight"].isnan().any()


def step_of(module, loss):
    module.last_step = SimpleNamespace(loss=torch.tensor(loss))


@pytest.fixture
def stopped(monkeypatch, tmp_path):
    """A guard with a fake trainer: which steps it would have stopped at."""
    monkeypatch.setattr(guard, "PretrainModule", torch.nn.Linear)
    watch = NanGuard(tmp_path)
    stops = []
    monkeypatch.setattr(watch, "_stop", lambda trainer, module, what: stops.append(what))
    return watch, stops


def trainer(scaler):
    return SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))


def test_steps_that_gradscaler_leaves_out_are_no_fault_until_there_are_too_many(stopped):
    watch, stops = stopped
    module = torch.nn.Linear(2, 1)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def step(factor):
        optimizer.zero_grad()
        loss = module(torch.ones(1, 2)).sum()
        step_of(module, float(loss.detach()))
        scaler.scale(loss * factor).backward()
        scaler.unscale_(optimizer)
        watch.on_before_optimizer_step(trainer(scaler), module, optimizer)
        scaler.step(optimizer)
        scaler.update()

    before = module.weight.clone()
    for _ in range(guard.SKIPPED_STEPS - 1):
        step(torch.inf)
    assert stops == []
    assert torch.equal(module.weight, before)
    step(1.0)  # and the count begins anew
    for _ in range(guard.SKIPPED_STEPS - 1):
        step(torch.inf)
    assert stops == []
    step(torch.inf)
    assert stops == ["the gradient"]


@pytest.mark.parametrize(
    ("dtype", "large"), [(torch.float32, 1e38), (torch.float64, 1e300), (torch.bfloat16, 1e38), (torch.float16, 6e4)]
)
def test_finite_gradients_whose_squares_overflow_are_no_fault(dtype, large, stopped):
    watch, stops = stopped
    module = torch.nn.Linear(2, 1, dtype=dtype)
    module.last_step = SimpleNamespace(loss=torch.tensor(large, dtype=torch.promote_types(dtype, torch.float32)))
    module.weight.grad = torch.full((1, 2), large, dtype=dtype)
    watch.on_before_optimizer_step(trainer(None), module, None)
    assert stops == []
    module.weight.grad[0, 1] = torch.nan
    watch.on_before_optimizer_step(trainer(None), module, None)
    assert stops == ["the gradient"]
