import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dystress_plugin.frameworks.lightly import (
    DySTreSSLoss,
    ISogCLRLoss,
    MACLLoss,
    TemperatureFreeLoss,
    TemperatureScheduleLoss,
)
from dystress_plugin.metrics import alignment
from dystress_plugin.recipes import METHODS

pytest.importorskip("lightly")
pytest.importorskip("pytorch_lightning")

from lightly import loss as lightly_loss
from lightly.data import LightlyDataset
from lightly.transforms import SimCLRTransform
from PIL import Image
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision.transforms import ToTensor

from dystress_plugin.frameworks.lightly import __main__ as launcher
from dystress_plugin.frameworks.lightly import modules

EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"
IMAGES = 12  # in the training folder, in two classes


def views(batch=6, dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, dim, generator=generator).requires_grad_() for _ in range(2)]


def assert_same(ours, theirs, z):
    """Same value and, for the embeddings, same gradient; to 1e-6, of the largest entry where that is above 1."""
    values = [loss(*z) for loss in (ours, theirs)]
    gradients = [torch.autograd.grad(value, z) for value in values]
    for a, b in (values, *zip(*gradients, strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * max(1.0, b.abs().max().item()))


# The criteria


@pytest.mark.parametrize("tau", [0.07, 0.5])
@pytest.mark.parametrize("batch", [2, 33])
def test_equal_bounds_are_lightlys_ntxent(tau, batch):
    assert_same(DySTreSSLoss(tau_min=tau, tau_max=tau), lightly_loss.NTXentLoss(tau), views(batch))


def test_equal_bounds_are_lightlys_ntxent_with_a_memory_bank():
    theirs = lightly_loss.NTXentLoss(0.2, memory_bank_size=(16, 5))
    ours = DySTreSSLoss(0.2, 0.2, memory_bank_size=(16, 5))
    with torch.no_grad():
        ours.loss.queue.keys.copy_(theirs.memory_bank.bank)
    assert_same(ours, theirs, views())
    # both banks took in the same keys
    torch.testing.assert_close(ours.loss.queue.keys, theirs.memory_bank.bank, rtol=0, atol=1e-6)
    assert_same(ours, theirs, views(seed=1))


@pytest.mark.parametrize(("alpha", "A_0"), [(0.0, 0.0), (0.5, 0.0), (1.0, 0.3)])
def test_macl_is_lightlys_macl(alpha, A_0):
    assert_same(MACLLoss(0.2, alpha, A_0), lightly_loss.MACLLoss(0.2, alpha, A_0), views(9))


def test_macl_takes_the_papers_setting_for_sentences():
    z0, z1 = views()
    z1 = (z0 + 0.1 * z1).detach().requires_grad_()  # well aligned, or the temperature would be negative
    tau = 0.2 * (1 + 2 * (alignment(z0, z1).item() - 0.8))  # lightly's own takes no alpha above 1
    assert_same(MACLLoss(0.2, alpha=2, A_0=0.8), lightly_loss.MACLLoss(tau, alpha=0), [z0, z1])


@pytest.mark.parametrize("profile", ["cosine", "shifted", "cosine_constant", "exponential", "linear"])
def test_every_profile_by_keyword(profile):
    z0, z1 = views()
    loss = DySTreSSLoss(0.1, 0.15, profile=profile, detach=True, negative_range=(0.1, 0.12))
    assert torch.isfinite(loss(z0=z0, z1=z1))


def test_schedule_and_temperature_free():
    z0, z1 = views()
    schedule = TemperatureScheduleLoss(tau_min=0.1, tau_max=0.5, period=10)
    expected = lightly_loss.NTXentLoss(0.1)(z0, z1)
    torch.testing.assert_close(schedule(z0, z1, epoch=5), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="needs the epoch"):
        schedule(z0, z1)
    assert torch.isfinite(TemperatureFreeLoss()(z0, z1))


def test_isogclr_learns_from_what_it_trains_on_alone():
    loss = ISogCLRLoss(num_samples=20)
    index = torch.arange(6) + 10
    with torch.no_grad():
        z0, z1 = (torch.randn(6, 5) for _ in range(2))
    loss(z0, z1, index=index)
    assert not loss.loss.temperature.visited.any()
    loss(*views(), index=index)
    assert loss.loss.temperature.visited.nonzero().flatten().tolist() == index.tolist()
    fresh = ISogCLRLoss(num_samples=20)
    fresh.load_state_dict(loss.state_dict())
    assert torch.equal(fresh.loss.temperature.tau, loss.loss.temperature.tau)
    with pytest.raises(ValueError, match="needs the sample numbers"):
        loss(*views())


def test_a_batch_without_gradient_does_not_enter_the_memory_bank():
    loss = DySTreSSLoss(memory_bank_size=(16, 5))
    before = loss.loss.queue.keys.clone()
    loss(*(z.detach() for z in views()))
    assert torch.equal(loss.loss.queue.keys, before)
    loss(*views())
    assert not torch.equal(loss.loss.queue.keys, before)


@pytest.mark.parametrize("size", [0, (0, 128), [0]])
def test_memory_bank_of_no_keys_is_none(size):
    assert DySTreSSLoss(memory_bank_size=size).loss.queue is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DySTreSSLoss(memory_bank_size=4096), r"memory_bank_size=4096 .* pair \(num_features, dim\)"),
        (lambda: MACLLoss(memory_bank_size=(1, 2, 3)), r"memory_bank_size=\(1, 2, 3\) must be the pair"),
        (lambda: TemperatureFreeLoss(memory_bank_size=(-4, 8)), r"\(-4, 8\)"),
        (lambda: DySTreSSLoss(tau_min=0.3), "tau_min=0.3 is above tau_max=0.2"),
        (lambda: DySTreSSLoss(profile="cosin"), "Did you mean 'cosine'"),
        (lambda: MACLLoss(temperature=0.0), "temperature=0.0 must be above 0"),
        (lambda: MACLLoss(A_0=1.5), r"A_0=1.5 must lie in \[-1, 1\]"),
        (lambda: ISogCLRLoss(num_samples=0), "num_samples=0"),
    ],
)
def test_bad_values_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# The modules


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        path = root / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
    return str(root)


def tiny(method, **settings):
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1))
    model = modules.BENCHMARK_METHODS[method]["model"]
    return model(4, num_classes=2, knn_k=200, knn_t=0.1, backbone=backbone, feature_dim=8, **settings)


def train_loader(folder, subset=None):
    dataset = LightlyDataset(folder, transform=SimCLRTransform(input_size=16, gaussian_blur=0.0))
    dataset = dataset if subset is None else Subset(dataset, subset)
    return DataLoader(dataset, batch_size=4, shuffle=True, drop_last=True)


def fit(model, folder, path, *, epochs=1, loader=None, **trainer):
    trainer = Trainer(
        max_epochs=epochs,
        limit_train_batches=2,
        accelerator="cpu",
        logger=False,
        default_root_dir=path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **trainer,
    )
    plain = LightlyDataset(folder, transform=ToTensor())
    val_loaders = [DataLoader(plain, batch_size=5), DataLoader(plain, batch_size=5)]
    trainer.fit(model, loader or train_loader(folder), val_loaders)
    return trainer


@pytest.mark.parametrize("method", modules.BENCHMARK_METHODS)
def test_every_method_trains_validates_and_resumes(method, folder, tmp_path):
    model = tiny(method)
    before = model.backbone[0].weight.detach().clone()
    trainer = fit(model, folder, tmp_path)
    assert not torch.equal(model.backbone[0].weight, before)
    logged = trainer.callback_metrics
    assert 0 <= logged["val_knn_top1"] <= 1
    assert 0 <= logged["val_online_cls_top1"] <= 1
    assert torch.isfinite(logged["train_loss"])
    assert logged["tau_positive_min"] <= logged["tau_positive_max"]
    assert torch.isfinite(logged["tau_negative_mean"])

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = type(model).load_from_checkpoint(tmp_path / "last.ckpt", backbone=tiny(method).backbone)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_every_two_view_method_of_the_table_is_there():
    assert modules.BENCHMARK_METHODS.keys() == {name for name, recipe in METHODS.items() if recipe.layout == "views"}


def test_classes_have_names_to_import_and_pickle():
    from dystress_plugin.frameworks.lightly.modules import MACL, DySTreSS

    assert DySTreSS is modules.BENCHMARK_METHODS["dystress"]["model"]
    assert tiny("macl", alpha=0.2).criterion.temperature.alpha == 0.2
    assert isinstance(tiny("macl"), MACL)
    assert pickle.loads(pickle.dumps(MACL)) is MACL


def test_the_schedule_follows_the_epoch(folder, tmp_path):
    model = tiny("ts", tau_min=0.1, tau_max=0.9, period=4.0)
    trainer = fit(model, folder, tmp_path, epochs=3)
    assert trainer.callback_metrics["tau_positive_mean"].item() == pytest.approx(0.1)


def test_isogclr_numbers_images_by_their_filenames(folder, tmp_path):
    model = tiny("isogclr")
    trainer = fit(model, folder, tmp_path, loader=train_loader(folder, subset=[1, 3, 4, 8]))
    temperature = model.criterion.temperature
    assert temperature.visited.nonzero().flatten().tolist() == [1, 3, 4, 8]
    assert temperature.num_samples == IMAGES

    # a plain state dict, as lightly's benchmark loads it; then on with the training
    fresh = tiny("isogclr")
    fresh.load_state_dict(model.state_dict())
    fit(fresh, folder, tmp_path)
    assert fresh.criterion.temperature.visited.sum() > 4

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    smaller = tmp_path / "smaller"
    smaller.mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16)).save(smaller / f"{number}.png")
    with pytest.raises(ValueError, match="temperatures of 12 images, but the training data has 4"):
        fit(model, str(smaller), tmp_path)


def test_isogclr_needs_filenames():
    with pytest.raises(ValueError, match="TensorDataset does not list filenames"):
        modules.sample_numbers(TensorDataset(torch.zeros(3)))


def test_one_validation_loader_is_enough(folder, tmp_path):
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    plain = LightlyDataset(folder, transform=ToTensor())
    (metrics,) = trainer.validate(tiny("dystress"), DataLoader(plain, batch_size=5), verbose=False)
    assert "val_online_cls_top1" in metrics
    assert "val_knn_top1" not in metrics


# The benchmark

FAKE_MAIN = """
from argparse import ArgumentParser
import simclr

parser = ArgumentParser("fake")
parser.add_argument("--epochs", type=int, default=100)
parser.add_argument("--methods", type=str, nargs="+")
METHODS = {"simclr": {"model": simclr.SimCLR, "transform": None}}


def main(epochs, methods):
    for method in methods:
        model = METHODS[method]["model"](batch_size_per_device=4, num_classes=10, knn_k=5, knn_t=0.1)
        print("ran", method, type(model).__name__, type(METHODS[method]["transform"]).__name__, epochs)
"""


@pytest.fixture
def fake_clone(tmp_path, monkeypatch):
    directory = tmp_path / launcher.BENCHMARK
    directory.mkdir(parents=True)
    (directory / "main.py").write_text(FAKE_MAIN)
    (directory / "simclr.py").write_text("class SimCLR:\n    def __init__(self, **kwargs):\n        pass\n")
    clean_import(monkeypatch)
    return tmp_path


def clean_import(monkeypatch):
    # The benchmark's modules have bare names; both the fake's and the real one's must go again.
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    monkeypatch.delitem(sys.modules, "main", raising=False)
    monkeypatch.delitem(sys.modules, "simclr", raising=False)


def test_launcher_runs_the_benchmarks_main_with_our_methods(fake_clone, capsys):
    launcher.main(["--repo", str(fake_clone), "--methods", "simclr", "dystress", "--epochs", "3"])
    assert capsys.readouterr().out.splitlines() == [
        "ran simclr SimCLR NoneType 3",  # lightly's own stays
        "ran dystress DySTreSS SimCLRTransform 3",
    ]


def test_launcher_finds_the_clone_by_the_environment(fake_clone, capsys, monkeypatch):
    monkeypatch.setenv("LIGHTLY_HOME", str(fake_clone))
    launcher.main(["--methods", "macl"])
    assert "ran macl MACL" in capsys.readouterr().out


def test_launcher_names_the_nearest_method(fake_clone, capsys):
    with pytest.raises(SystemExit, match="2"):
        launcher.main(["--repo", str(fake_clone), "--methods", "dystres"])
    assert "Did you mean 'dystress'?" in capsys.readouterr().err


def test_launcher_says_in_two_lines_what_is_missing(tmp_path, monkeypatch, fake_clone):
    monkeypatch.delenv("LIGHTLY_HOME", raising=False)
    (tmp_path / "empty").mkdir()
    for arguments, word in (([], "LIGHTLY_HOME"), (["--repo", str(tmp_path / "empty")], "not a clone")):
        with pytest.raises(SystemExit, match=word) as caught:
            launcher.main(arguments)
        assert len(str(caught.value).splitlines()) == 2
    (fake_clone / launcher.BENCHMARK / "main.py").write_text("from lightly.loss import NoSuchLoss")
    with pytest.raises(SystemExit, match="does not start with the installed lightly") as caught:
        launcher.main(["--repo", str(fake_clone)])
    assert len(str(caught.value).splitlines()) == 2
    monkeypatch.setitem(sys.modules, "dystress_plugin.frameworks.lightly.modules", None)
    with pytest.raises(SystemExit, match="pip install") as caught:
        launcher.main(["--repo", str(fake_clone)])
    assert len(str(caught.value).splitlines()) == 2


TWO_RANKS_MAIN = """
from argparse import ArgumentParser
import torch
from lightly.data import LightlyDataset
from lightly.transforms import SimCLRTransform
from pytorch_lightning import Trainer

parser = ArgumentParser("fake")
parser.add_argument("--train-dir")
parser.add_argument("--log-dir")
parser.add_argument("--methods", nargs="+")
METHODS = {}


def main(train_dir, log_dir, methods):
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 4), torch.nn.AdaptiveAvgPool2d(1))
    model = METHODS[methods[0]]["model"](2, 2, backbone=backbone, feature_dim=8)
    dataset = LightlyDataset(train_dir, transform=SimCLRTransform(input_size=16, gaussian_blur=0.0))
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, shuffle=True)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )
    trainer.fit(model, loader)
    torch.save(model.state_dict(), f"{log_dir}/rank{trainer.global_rank}.pt")
"""


def test_two_ranks_started_by_lightning(fake_clone, folder):
    (fake_clone / launcher.BENCHMARK / "main.py").write_text(TWO_RANKS_MAIN)
    command = [sys.executable, "-m", "dystress_plugin.frameworks.lightly", "--methods", "isogclr"]
    run = subprocess.run(
        [*command, "--train-dir", folder, "--log-dir", fake_clone],
        cwd=fake_clone,
        env={**os.environ, "LIGHTLY_HOME": str(fake_clone), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout
    ranks = [torch.load(fake_clone / f"rank{rank}.pt") for rank in (0, 1)]
    assert ranks[0]["criterion.temperature.visited"].all()  # each rank saw half of the images
    assert ranks[0]["criterion.temperature.visited"].shape == (IMAGES,)
    for name, value in ranks[0].items():
        if "running_" not in name:  # batch norm's statistics are each rank's own until the next forward pass
            assert torch.equal(value, ranks[1][name]), name


@pytest.mark.skipif("LIGHTLY_HOME" not in os.environ, reason="LIGHTLY_HOME names no clone of lightly")
def test_the_real_benchmark_takes_our_methods(monkeypatch):
    clean_import(monkeypatch)
    benchmark = launcher.load_benchmark(launcher.benchmark_directory(None))
    assert modules.BENCHMARK_METHODS.keys() <= benchmark.METHODS.keys()
    assert benchmark.METHODS["simclr"]["model"].__module__ == "simclr"
    arguments = vars(benchmark.parser.parse_args(["--methods", "dystress"]))
    assert {"knn_k", "knn_t", "batch_size_per_device", "num_classes"} <= arguments.keys()


# The examples


def test_examples_run(tmp_path):
    # The scripts write scikit-learn's images only where this folder is missing; one batch of noise is quicker.
    images = tmp_path / "datasets" / "digits"
    images.mkdir(parents=True)
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (256, 8, 8), dtype=np.uint8)):
        Image.fromarray(pixels).save(images / f"{number:04}.png")
    runs = [
        subprocess.Popen(
            [sys.executable, EXAMPLES / name, "--epochs", "1"],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in ("lightly_pytorch.py", "lightly_lightning.py")
    ]
    for run in runs:
        output, _ = run.communicate(timeout=300)
        assert run.returncode == 0, output
        assert "epoch: 00, loss: " in output
