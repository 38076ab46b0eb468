"""A method of another package, found by its entry point, is `method=theirs` in every host, in fresh processes."""

import configparser
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).parent / "third_party"
KEY = "temperature.alike"  # the table's


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The environment of a process for which the package in `third_party` is installed."""
    site = tmp_path_factory.mktemp("site")
    (site / "third_party.py").symlink_to(PROJECT / "third_party.py")
    project = configparser.ConfigParser()
    project.read(PROJECT / "pyproject.toml")
    about, points = project["project"], project['project.entry-points."dystress_plugin.methods"']
    information = site / f"{about['name'].strip(chr(34))}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    lines = [f"{name} = {value.strip(chr(34))}\n" for name, value in points.items()]
    (information / "entry_points.txt").write_text("[dystress_plugin.methods]\n" + "".join(lines))
    path = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "NUMBA_DISABLE_JIT": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve pictures of digits, in two classes; for training, and the same for validation."""
    from PIL import Image
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("digits")
    for number, image in enumerate(load_digits().images[:12]):
        for part in ("train", "val"):
            path = root / part / str(number % 2) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15.9).astype("uint8")).resize((16, 16)).convert("RGB").save(path)
    return root


def run(folder, environment, *command):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, command)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def assert_learned(state):
    """A table of the twelve samples, all of which two steps of six have seen."""
    (table,) = (value for name, value in state.items() if name.endswith(KEY))
    assert len(table) == 12
    assert (table != 0).all()
    assert all(math.isfinite(x) for x in table.tolist())


def test_the_command_lists_and_trains_it(installed, data, tmp_path):
    listed = run(tmp_path, installed, "-m", "dystress_plugin.cli", "methods")
    lines = [line.split() for line in listed.splitlines() if line.startswith("theirs ")]
    assert lines == [
        ["theirs", "Familiar", "ntxent", "Nobody,", "2026,", "https://example.org/familiar"],
        ["theirs", "num_samples,", "tau=0.2,", "epochs=20.0,", "share=0.5"],
    ]
    settings = [
        *("method=theirs", "method_kwargs.tau=0.3", f"data={data}", "out=out", "image_size=16", "epochs=1"),
        *("batch_size=6", "backbone=test_resnet", "accelerator=cpu", "progress=false"),
    ]
    run(tmp_path, installed, "-m", "dystress_plugin.cli", "pretrain", *settings)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["method"] == "theirs"
    assert_learned(torch.load(tmp_path / "out" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])


def test_solo_learns_own_script_trains_it(installed, data, tmp_path):
    home = os.environ.get("SOLO_LEARN_HOME")
    if not home:
        pytest.skip(
            "SOLO-LEARN IS NOT TESTED: set SOLO_LEARN_HOME to a clone of github.com/vturrisi/solo-learn (9187ea3)"
        )
    settings = [
        *("method=theirs", "+method_kwargs.share=0.25", "max_epochs=1", "scheduler.warmup_epochs=0"),
        *(f"data.train_path={data / 'train'}", f"data.val_path={data / 'val'}", "data.num_workers=0"),
        *("method_kwargs.proj_hidden_dim=32", "method_kwargs.proj_output_dim=16", "optimizer.batch_size=6"),
        *("image_size=16", "dystress_augmentations@augmentations=digits", "dystress_hardware=cpu"),
    ]
    run(tmp_path, installed, Path(home) / "main_pretrain.py", "--config-name", "dystress_custom", *settings)
    (checkpoint,) = (tmp_path / "trained_models" / "theirs").glob("*/*.ckpt")
    assert_learned(torch.load(checkpoint, weights_only=True)["state_dict"])


LIGHTLY = """
import dataclasses, sys, torch
from lightly.data import LightlyDataset
from pytorch_lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader
from dystress_plugin import recipes
from dystress_plugin.frameworks.lightly.modules import BENCHMARK_METHODS, Theirs

entry = BENCHMARK_METHODS["theirs"]
assert entry["model"] is Theirs
backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.AdaptiveAvgPool2d(1))
model = entry["model"](6, num_classes=2, backbone=backbone, feature_dim=8, share=0.25)
loader = DataLoader(LightlyDataset(sys.argv[1], transform=entry["transform"]), batch_size=6)
quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
Trainer(max_epochs=1, accelerator="cpu", **quiet).fit(model, loader)
torch.save(model.state_dict(), "state.pt")

later = recipes.register(dataclasses.replace(recipes.recipe("theirs"), name="later", title="Later"))
from dystress_plugin.frameworks.lightly.modules import Later
assert BENCHMARK_METHODS["later"]["model"] is Later
"""


def test_an_entry_of_lightlys_benchmark_trains_it(installed, data, tmp_path):
    run(tmp_path, installed, "-c", LIGHTLY, data / "train")
    assert_learned(torch.load(tmp_path / "state.pt", weights_only=True))


LIGHTLY_TRAIN = """
import dataclasses, sys, lightly_train, torch
from torch import nn
from dystress_plugin import recipes
import dystress_plugin.frameworks.lightly_train

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 4, stride=4)

    def forward_features(self, x):
        return {"features": torch.tanh(self.convolution(x))}

    def forward_pool(self, x):
        return {"pooled_features": x["features"].mean((2, 3), keepdim=True)}

    def feature_dim(self):
        return 8

    def get_model(self):
        return self

assert "theirs" in lightly_train.list_methods()
lightly_train.pretrain(
    out="out", data=sys.argv[1], model=Tiny(), method="theirs", method_args={"share": 0.25}, epochs=1, batch_size=6,
    num_workers=0, devices=1, accelerator="cpu", precision="32-true", transform_args={"image_size": (16, 16)},
    loggers={"jsonl": {}, "tensorboard": None},
)
torch.save(torch.load("out/checkpoints/last.ckpt", weights_only=False)["state_dict"], "state.pt")

recipes.register(dataclasses.replace(recipes.recipe("theirs"), name="later", title="Later"))
assert "later" in lightly_train.list_methods()
"""


def test_lightly_train_trains_it(installed, data, tmp_path):
    if importlib.util.find_spec("lightly_train") is None:
        pytest.skip('LIGHTLYTRAIN IS NOT TESTED: pip install -e ".[lightly-train]"')
    own = {"LIGHTLY_TRAIN_EVENTS_DISABLED": "1", "LIGHTLY_TRAIN_CACHE_DIR": str(tmp_path / "cache")}
    run(tmp_path, {**installed, **own}, "-c", LIGHTLY_TRAIN, data / "train")
    assert_learned(torch.load(tmp_path / "state.pt", weights_only=True))
