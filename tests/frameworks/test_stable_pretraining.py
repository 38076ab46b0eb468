"""stable-pretraining's own Module and Trainer with our losses, on the CPU."""

import importlib.metadata
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dystress_plugin import ContrastiveLoss, recipes

spt = pytest.importorskip(
    "stable_pretraining", reason='STABLE-PRETRAINING IS NOT TESTED: pip install -e ".[stable-pretraining]"'
)
import lightning as pl  # noqa: E402
from stable_pretraining.backbone import TeacherStudentWrapper  # noqa: E402
from stable_pretraining.data import transforms  # noqa: E402

from dystress_plugin.frameworks.stable_pretraining import (  # noqa: E402
    METHODS,
    TemperatureCallback,
    contrastive,
    version,
)

# What the libraries say of each other's versions is not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore")
IMAGES, BATCH, DIM = 16, 8, 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def module(loss, **more):
    parts = {"backbone": network(), "projector": nn.Linear(6, DIM)}
    if loss.queue is not None:
        parts = {name: TeacherStudentWrapper(part) for name, part in parts.items()}
    optim = {"optimizer": {"type": "SGD", "lr": 0.1}}
    return spt.Module(forward=contrastive, contrastive_loss=loss, optim=optim, **(parts | more))


def loader(named=False, numbered=True):
    data = TensorDataset(torch.rand(IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(IMAGES))
    views = [transforms.ToImage(scale=False)] * 2
    views = transforms.MultiViewTransform({"first": views[0], "second": views[1]} if named else views)
    names = ["image", "label"]
    return DataLoader(spt.data.FromTorchDataset(data, names, transform=views, add_sample_idx=numbered), BATCH)


def fit(model, data=None, **settings):
    torch.manual_seed(1)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", devices=1, log_every_n_steps=1, **off, **({"max_epochs": 1} | settings))
    trainer.fit(model, loader() if data is None else data)
    return trainer


RECIPES = {"dystress": {}, "ts": {"period": 2}, "clip": {}, "isogclr": {"num_samples": 1}, "tempnet": {"dim": DIM}}


@pytest.mark.parametrize("method", RECIPES)
def test_two_steps_of_its_module_train(method):
    model = module(ContrastiveLoss(method, **RECIPES[method]))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = fit(model, callbacks=[TemperatureCallback()])
    assert trainer.global_step == 2
    assert torch.isfinite(trainer.callback_metrics["fit/loss"])
    assert trainer.callback_metrics["tau_positive_mean"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    if method == "isogclr":
        assert model.contrastive_loss.temperature.visited.tolist() == [True] * IMAGES
    if method == "clip":
        assert float(model.contrastive_loss.temperature.log_tau.exp()) != pytest.approx(0.07, rel=1e-6)


def test_a_queue_takes_the_keys_of_a_teacher():
    model = module(ContrastiveLoss("dystress_moco", queue_size=(20, DIM)))
    keys = model.contrastive_loss.queue.keys.clone()
    assert fit(model).global_step == 2
    assert (model.contrastive_loss.queue.keys != keys).any(dim=1).tolist() == [True] * 16 + [False] * 4
    with pytest.raises(ValueError, match="which Sequential does not have: wrap backbone and projector"):
        fit(module(ContrastiveLoss("dystress_moco", queue_size=(20, DIM)), backbone=network()))


@pytest.mark.parametrize("named", [False, True])
def test_in_chunks_it_trains_alike(named):
    states, sizes = [], []
    for chunk_size in (None, 3):
        model = module(ContrastiveLoss("dystress"), chunk_size=chunk_size)
        seen = []
        model.backbone.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(len(given[0])))
        fit(model, loader(named))
        sizes.append(max(seen))
        states.append(model.state_dict())
    assert sizes == [BATCH, 3]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-6)


def test_what_is_missing_is_said():
    model = module(ContrastiveLoss("isogclr", num_samples=IMAGES))
    with pytest.raises(ValueError, match="the batch has no 'sample_idx'"):
        fit(model, loader(numbered=False))
    del model.contrastive_loss
    with pytest.raises(ValueError, match="contrastive_loss=dystress_plugin"):
        fit(model)


def test_in_evaluation_there_are_embeddings_and_labels_alone():
    model = module(ContrastiveLoss("dystress")).eval()
    out = model({"image": torch.rand(5, 3, 8, 8), "label": torch.arange(5)}, "validate")
    assert set(out) == {"embedding", "label"}
    assert out["embedding"].shape == (5, 6)


# Beside its methods


def test_the_classes_are_those_of_the_table_and_can_be_pickled():
    assert set(METHODS) == {name for name, recipe in recipes.METHODS.items() if not recipe.queue}
    assert [pickle.loads(pickle.dumps(cls)) for cls in METHODS.values()] == list(METHODS.values())


def test_with_a_constant_temperature_it_is_its_simclr():
    theirs = spt.methods.SimCLR(network(), (8, DIM), temperature=0.3)
    ours = METHODS["simclr"](network(), (8, DIM), tau=0.3)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    views = torch.rand(2, 6, 3, 8, 8)
    found = []
    for model in (ours, theirs):
        out = model(*views)
        out.loss.backward()
        found.append([out.loss.detach(), out.embedding, *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-6 * float(b.abs().max()))
    assert torch.equal(ours(views[0]).embedding, theirs(views[0]).embedding)


def test_a_trainer_trains_a_class_as_it_is():
    model = METHODS["dystress"](network(), (8, DIM), tau_max=0.3)
    model.optim = {"optimizer": {"type": "SGD", "lr": 0.1}}
    assert fit(model).global_step == 2
    with pytest.raises(ValueError, match="Did you mean 'tau_max'"):
        METHODS["dystress"](network(), (8, DIM), tau_mx=0.3)


@pytest.mark.parametrize(("found", "error"), [("0.1.7", "0.1.7 is installed"), (None, "none is installed")])
def test_other_versions_are_refused(monkeypatch, found, error):
    def lookup(name):
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", lookup)
    with pytest.raises(ImportError, match=error):
        version.check()


def test_a_newer_version_is_tried_with_a_warning(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.2.0")
    with pytest.warns(UserWarning, match="nobody has tried it yet"):
        version.check()
