import numpy as np
import pytest
from PIL import Image

from dystress_plugin.cli import main
from dystress_plugin.experiment.data import folders
from dystress_plugin.experiment.data.scan import scan_layout
from dystress_plugin.experiment.evaluate.scores import Scores
from dystress_plugin.experiment.pretrain import command as pretrain


def dystress(command, settings):
    """Exit status of the command with key=value settings."""
    return main([command, *(f"{key}={value}" for key, value in settings.items())])


def scan_folder(folder, out, labels=None, **how):
    """What a scan of a folder, or of several, finds."""
    return scan_layout(folders.read(folder, labels), out, **how)


def write_images(folder, classes=3, per_class=8, size=12, seed=0):
    """Class folders of noisy pictures whose brightness tells the class."""
    generator = np.random.default_rng(seed)
    for c in range(classes):
        (folder / f"class{c}").mkdir(parents=True)
        for i in range(per_class):
            pixels = generator.integers(0, 80, (size, size, 3)) + 80 * c
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{c}" / f"{i}.png")
    return folder


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images")


@pytest.fixture
def tiny(images, tmp_path):
    """Settings of a run that takes two seconds."""
    return {
        "data": str(images),
        "out": str(tmp_path / "run"),
        "image_size": 12,
        "epochs": 3,
        "batch_size": 6,
        "backbone": "test_resnet",
        "accelerator": "cpu",
        "progress": "false",
    }


@pytest.fixture
def quick(monkeypatch):
    """Runs without what comes before and after the training: accuracies and figures."""
    half = Scores({"knn_top1": 50.0, "linear_top1": 50.0}, [], None)
    monkeypatch.setattr(pretrain, "features_of", lambda *args, **kwargs: None)
    monkeypatch.setattr(pretrain, "score_features", lambda *args, **kwargs: half)
    monkeypatch.setattr(pretrain.figures, "curves", lambda *args: None)
    monkeypatch.setattr(pretrain.figures, "profile", lambda *args: None)
