import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightly.utils.benchmarking import KNNClassifier
from PIL import Image
from pytorch_lightning import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from dystress_plugin.frameworks.lightly import __main__ as launcher
from dystress_plugin.frameworks.lightly import modules

EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"

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


class Nested(LightningModule):
    """Uses lightly's kNN classifier as lightly's own benchmark methods do."""

    def __init__(self):
        super().__init__()
        self.knn_classifier = KNNClassifier(None, 5, 2, 0.1, 0, 1)

    def validation_step(self, batch, batch_idx, dataloader_idx):
        found = self.knn_classifier.validation_step(batch, batch_idx, dataloader_idx)
        if dataloader_idx == 1:
            self.log_dict(found, add_dataloader_idx=False, batch_size=len(batch[1]))


def test_the_benchmarks_own_knn_runs_within_a_method_and_still_logs_on_its_own(fake_clone, monkeypatch):
    monkeypatch.setattr(KNNClassifier, "log_dict", KNNClassifier.log_dict)  # to be undone
    launcher.load_benchmark(launcher.benchmark_directory(str(fake_clone)))
    images, targets = torch.eye(5).repeat(2, 1), torch.arange(5).repeat(2)
    loaders = [DataLoader(TensorDataset(images, targets), 10, num_workers=0) for _ in range(2)]
    trainer = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        nested = Trainer(**trainer).validate(Nested(), loaders, verbose=False)
        alone = KNNClassifier(torch.nn.Identity(), 5, 2, 0.1, 0, 1)
        alone = Trainer(**trainer).validate(alone, loaders, verbose=False)
    assert any(found.get("val_knn_top1") == 1.0 for found in nested)
    assert any(found.get("val_knn_top1/dataloader_idx_1") == 1.0 for found in alone)


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
    for method in methods:
        backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 4), torch.nn.AdaptiveAvgPool2d(1))
        model = METHODS[method]["model"](2, 2, backbone=backbone, feature_dim=8)
        dataset = LightlyDataset(train_dir, transform=SimCLRTransform(input_size=16, gaussian_blur=0.0))
        loader = torch.utils.data.DataLoader(dataset, batch_size=2, shuffle=True)
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        )
        trainer.fit(model, loader)
        torch.save(model.state_dict(), f"{log_dir}/{method}{trainer.global_rank}.pt")
"""


def test_two_ranks_started_by_lightning(fake_clone, folder):
    (fake_clone / launcher.BENCHMARK / "main.py").write_text(TWO_RANKS_MAIN)
    command = [sys.executable, "-m", "dystress_plugin.frameworks.lightly", "--methods", "isogclr", "dystress_moco"]
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
    ranks = {
        method: [torch.load(fake_clone / f"{method}{rank}.pt") for rank in (0, 1)]
        for method in ("isogclr", "dystress_moco")
    }
    for zero, one in ranks.values():
        for name, value in zero.items():
            if "running_" not in name:  # batch norm's statistics are each rank's own until the next forward pass
                assert torch.equal(value, one[name]), name
    visited = ranks["isogclr"][0]["criterion.temperature.visited"]
    assert visited.shape == (12,)
    assert visited.all()  # each rank saw half of the images
    assert ranks["dystress_moco"][0]["criterion.queue.position"] == 12


@pytest.mark.skipif("LIGHTLY_HOME" not in os.environ, reason="LIGHTLY_HOME names no clone of lightly")
def test_the_real_benchmark_takes_our_methods(monkeypatch):
    clean_import(monkeypatch)
    benchmark = launcher.load_benchmark(launcher.benchmark_directory(None))
    assert modules.BENCHMARK_METHODS.keys() <= benchmark.METHODS.keys()
    assert benchmark.METHODS["simclr"]["model"].__module__ == "simclr"
    arguments = vars(benchmark.parser.parse_args(["--methods", "dystress"]))
    assert {"knn_k", "knn_t", "batch_size_per_device", "num_classes"} <= arguments.keys()


def test_examples_run(tmp_path):
    # The scripts write scikit-learn's images only where this folder is missing; one batch of noise is quicker.
    images = tmp_path / "datasets" / "digits"
    images.mkdir(parents=True)
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (128, 8, 8), dtype=np.uint8)):
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
