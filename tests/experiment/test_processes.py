"""What crosses to another process when that is not forked: pickled here, and sent to real ones."""

import copy
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dystress, write_images  # beside this file
from omegaconf import OmegaConf
from test_pretrain import rows, settings_of

from dystress_plugin.experiment.data import datasets as data_module
from dystress_plugin.experiment.data import scan as images_module
from dystress_plugin.experiment.data.datasets import OwnGenerator, Views
from dystress_plugin.experiment.data.transforms import plain_transform, view_transform
from dystress_plugin.experiment.keys import parse
from dystress_plugin.experiment.pretrain import resolve
from dystress_plugin.experiment.pretrain.trainer import make_loaders, make_trainer
from dystress_plugin.experiment.settings import PretrainSettings
from dystress_plugin.experiment.spec import AugmentationSpec, DataSpec, part
from dystress_plugin.recipes import METHODS

TIMES = {"seconds": 0, "images_per_second": 0}
AUGMENTATION = AugmentationSpec("loader", min_scale=0.2, jitter=0.5, grayscale=0.2, blur=0.5, flip=0.5, rotate=15.0)


def sent(thing):
    """What another process receives."""
    return pickle.loads(ForkingPickler.dumps(thing))


def load(name):
    return data_module.load(name, root="", download=False, long_tail=None, seed=0)


def sources(images):
    digits = load("digits")
    yield "digits", digits
    yield "long tail", replace(digits, train=digits.train.subset(np.array([5, 3])))
    yield "folder", load(str(images))
    array = data_module.Images(np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3), np.array([0, 1]))
    yield "CIFAR", replace(digits, train=array)


def test_data_sets_and_their_transforms_arrive_as_they_were(images):
    for name, data in sources(images):
        plain = Views(data.train, plain_transform(8, data.normalize))
        random = Views(data.train, view_transform(AUGMENTATION, 8, data.normalize), seed=3)
        for views in (plain, random):
            for mine, its in zip(views[1][0], sent(views)[1][0], strict=True):
                assert torch.equal(mine, its), name
        assert sent(plain)[1][1:] == plain[1][1:]


def test_the_scan_of_a_folder_arrives_as_it_was(images):
    faults = images_module._Faults(str(images), ["class0/0.png", "nothing.png"])
    assert sent(faults)[0] == faults[0] == ("class0/0.png", "", False)


@pytest.mark.parametrize("method", METHODS)
def test_what_lightning_spawns_a_training_with_arrives_as_it_was(method, tiny, tmp_path):
    # trainer.fit(module, *loaders) in another process, as ddp_spawn calls it.
    given = parse(
        PretrainSettings, [f"{k}={v}" for k, v in settings_of(method, tiny | {"tensorboard": "true"}).items()]
    )
    data = data_module.load_for(part(DataSpec, given), given.seed)
    spec = resolve.resolve(given, data, 1)
    module = resolve.build_module(spec, data)
    trainer = make_trainer(given, tmp_path)
    loaders = make_loaders(spec, data, trainer)
    again, its_trainer, (its_loader, _) = sent((module, trainer, loaders))

    assert [type(callback) for callback in its_trainer.callbacks] == [type(callback) for callback in trainer.callbacks]
    values = []
    for received, loader in ((module, loaders[0]), (again, its_loader)):
        received = copy.deepcopy(received)  # what is sent shares its memory
        views, _, index = next(iter(loader))
        torch.manual_seed(0)  # of dropout
        values.append(received.loss(*received.embed(views), index=index, epoch=0.0))
    assert torch.equal(*values)


def test_a_generator_arrives_as_a_new_one():
    generator = OwnGenerator()
    new = generator.get_state()
    generator.manual_seed(5)
    assert torch.equal(sent(generator).get_state(), new)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Folders of runs in fresh processes, and what they printed."""
    folder = tmp_path_factory.mktemp("elsewhere")
    data = write_images(folder / "images")
    script = Path(__file__).with_name("start_methods.py")
    done = subprocess.run(
        [sys.executable, script, data, folder],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_workers_that_are_not_forked_change_no_number(elsewhere):
    folder, printed = elsewhere
    outs = (folder / "no_workers", folder / "forkserver")
    mine, its = map(rows, outs)
    assert mine == its
    mine, its = (json.loads((out / "summary.json").read_text()) | TIMES for out in outs)
    assert mine == its
    evaluated = json.loads(printed[printed.index("{") : printed.index("}") + 1])
    assert evaluated == {name: mine[name] for name in ("knn_top1", "linear_top1")}
    mine, its = (json.loads((out / "inspect" / "inspect.json").read_text())["similarities"] for out in outs)
    assert mine == its


def test_processes_that_lightning_spawns_share_the_images_and_return_the_weights(elsewhere):
    folder, printed = elsewhere
    out = folder / "ddp_spawn"
    assert [row["epoch"] for row in rows(out)] == ["0", "1"]
    state = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    # Each of the 18 images was on one of the two, and iSogCLR's tables know it.
    assert int(state["loss.temperature.visited"].sum()) == 18
    backbone = torch.load(out / "backbone.pt", weights_only=True)
    assert all(torch.equal(value, state[f"backbone.{name}"]) for name, value in backbone.items())
    assert list(out.glob("tensorboard/events*"))
    # In the spawned process, which makes the loggers: the learning rate of both devices together.
    hparams, config = OmegaConf.load(out / "tensorboard" / "hparams.yaml"), OmegaConf.load(out / "config.yaml")
    assert hparams == config.settings
    assert hparams.lr == pytest.approx(0.075 * 6**0.5)
    # Measured in a process that has ended.
    summary = json.loads((out / "summary.json").read_text())
    assert summary["images_per_second"] > 0
    assert summary["device"].startswith("2 x ")
    assert printed.count(" images/s in training") == 3


def test_every_process_that_a_launcher_starts_sees_that_a_run_has_finished(tiny):
    # As torchrun and SLURM do, who start all of them at once; Lightning starts the others when it trains.
    assert dystress("pretrain", tiny | {"epochs": 1, "devices": 1, "batch_size": 12}) == 0
    config = Path(tiny["out"]) / "config.yaml"
    config.write_text(
        config.read_text().replace("devices: '1'", "devices: '2'").replace("batch_size: 12", "batch_size: 6")
    )
    launched = {"RANK": 1, "LOCAL_RANK": 1, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    launched |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 29500, "TORCHELASTIC_RUN_ID": "run"}
    program = "import sys; from dystress_plugin.cli import main; raise SystemExit(main(sys.argv[1:]))"
    keys = [f"{key}={value}" for key, value in (tiny | {"epochs": 1, "devices": 2}).items()]
    second = subprocess.run(
        [sys.executable, "-c", program, "pretrain", *keys],
        env=os.environ | {key: str(value) for key, value in launched.items()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (second.returncode, second.stdout) == (0, ""), second.stderr
