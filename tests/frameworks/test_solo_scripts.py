"""solo-learn's unmodified scripts, as a user starts them."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dystress_plugin.recipes import METHODS

LAUNCHER = "dystress_plugin.frameworks.solo"
SIZES = ["method_kwargs.proj_hidden_dim=32", "method_kwargs.proj_output_dim=16"]
DATA = ["data.train_path=data/train", "data.val_path=data/val", "data.num_workers=0", "dystress_hardware=cpu"]
PRETRAIN = [
    *DATA,
    *SIZES,
    "image_size=16",
    "dystress_augmentations@augmentations=digits",
    "optimizer.batch_size=10",
    "scheduler.warmup_epochs=0",
    "checkpoint.keep_prev=True",
    "hydra.sweep.dir=sweep",
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, solo_home):
    """Digits as a folder: 20 images of 16 pixels to train on, 20 for validation."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("solo")
    images, labels = load_digits(return_X_y=True)
    for label in range(10):
        for number, row in enumerate((labels == label).nonzero()[0][:4]):
            place = folder / "data" / ("train" if number < 2 else "val") / str(label)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray((images[row].reshape(8, 8) * 15).astype("uint8")).resize((16, 16)).save(
                place / f"{number}.png"
            )
    return folder


def run(folder, *command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_DISABLE_JIT": "1"}
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


def script(name):
    return Path(os.environ["SOLO_LEARN_HOME"]) / name


def pretrain(folder, *settings):
    return run(folder, script("main_pretrain.py"), "-m", "--config-name", "dystress_custom", *PRETRAIN, *settings)


def checkpoints(folder, method, seed):
    return sorted((folder / "trained_models" / method).glob(f"*/{method}-custom-seed{seed}-*.ckpt"))


def scalars(folder):
    """The last value of everything that was logged and its step, for every run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = []
    for version in sorted((folder / "lightning_logs").iterdir(), key=lambda path: int(path.name.split("_")[1])):
        events = EventAccumulator(str(version)).Reload()
        last = {tag: events.Scalars(tag)[-1] for tag in events.Tags()["scalars"]}
        runs.append(({tag: event.value for tag, event in last.items()}, max(event.step for event in last.values())))
    return runs


def test_every_method_pretrains_and_tells_what_the_temperature_did(workplace):
    methods = [name for name in METHODS if name != "simclr"]
    folder = workplace / "every"
    folder.mkdir()
    (folder / "data").symlink_to(workplace / "data")
    pretrain(folder, f"method={','.join(methods)}", "max_epochs=1", "checkpoint.enabled=False")
    runs = scalars(folder)
    assert len(runs) == len(methods)
    for method, (values, step) in zip(methods, runs, strict=True):
        assert step == 1, method  # the second
        assert math.isfinite(values["train_nce_loss_epoch"]), method
        assert {"alignment", "uniformity", "tau_positive_mean"} <= set(values)
        assert values["tau_negative_min"] - 1e-6 <= values["tau_negative_mean"] <= values["tau_negative_max"] + 1e-6
        assert values["val_knn_acc1"] > 0
        if method.startswith("dystress"):
            low, high = (0.01, 0.04) if method == "dystress_clip" else (0.1, 0.2)
            assert low <= values["tau_negative_min"] <= values["tau_positive_max"] <= high
        if method.startswith("macl"):
            assert values["tau_positive_mean"] == pytest.approx(0.1 * (1 + 0.5 * values["alignment"]), rel=1e-3)


TWICE = ("isogclr", "macl_moco")  # those with something to remember


@pytest.fixture(scope="module")
def one_process(workplace):
    pretrain(workplace, f"method={','.join(TWICE)}", "max_epochs=2")
    return workplace


def test_what_a_run_leaves(one_process):
    for method in TWICE:
        assert [path.stem[-4:] for path in checkpoints(one_process, method, seed=5)] == ["ep=0", "ep=1"]
    arguments = json.loads(next(one_process.glob("trained_models/macl_moco/*/args.json")).read_text())
    assert arguments["backbone"]["name"] == "resnet18_small"
    assert arguments["method_kwargs"]["alpha"] == 0.5
    assert arguments["method_kwargs"]["queue_size"] == 65536
    assert arguments["momentum"] == {"base_tau": 0.99, "final_tau": 1.0, "classifier": False}
    assert arguments["name"] == "macl_moco-custom-seed5"


@pytest.fixture(scope="module")
def two_processes(one_process):
    """Each method twice: seed 5 goes on where the run of one process stopped, seed 6 begins."""
    for method in TWICE:
        checkpoints(one_process, method, seed=5)[1].unlink()
    settings = ["max_epochs=2", "seed=5,6", "devices='2'", "strategy=ddp"]
    return one_process, pretrain(one_process, f"method={','.join(TWICE)}", *settings)


def state(folder, method, seed, epoch):
    (path,) = (path for path in checkpoints(folder, method, seed) if path.stem.endswith(f"ep={epoch}"))
    return torch.load(path, weights_only=True)["state_dict"]


def test_two_processes_pretrain_and_resume(two_processes):
    folder, output = two_processes
    resumed = {line.rsplit("/", 1)[-1] for line in output.splitlines() if "Resuming from previous" in line}
    assert len(resumed) == len(TWICE)
    assert all("seed5" in name and "ep=0" in name for name in resumed)
    for method in TWICE:
        assert [path.stem[-4:] for path in checkpoints(folder, method, seed=6)] == ["ep=0", "ep=1"]
    for seed in (5, 6):
        visited = state(folder, "isogclr", seed, epoch=1)["contrastive.temperature.visited"]
        assert visited.shape == (20,)
        assert visited.all()


@pytest.mark.parametrize("queue", ["contrastive.queue", "swapped.queue"])
def test_queues_take_in_the_keys_of_all_processes_and_are_resumed(two_processes, queue):
    folder, _ = two_processes
    for seed in (5, 6):  # seed 5 was one process in epoch 0
        before, after = (state(folder, "macl_moco", seed, epoch) for epoch in (0, 1))
        assert [int(each[f"{queue}.position"]) for each in (before, after)] == [20, 40]
        same = (before[f"{queue}.keys"] == after[f"{queue}.keys"]).all(dim=1)
        assert (~same).nonzero().flatten().tolist() == list(range(20, 40))


def test_linear_evaluation_reads_the_checkpoint(two_processes):
    folder, _ = two_processes
    checkpoint = checkpoints(folder, "macl_moco", seed=6)[-1].relative_to(folder)
    settings = [f"pretrained_feature_extractor='{checkpoint}'", *DATA, "optimizer.batch_size=10", "max_epochs=1"]
    run(
        folder,
        Path(os.environ["SOLO_LEARN_HOME"]) / "main_linear.py",
        "--config-name",
        "dystress_linear_custom",
        *settings,
    )
    arguments = json.loads(next(folder.glob("trained_models/linear/*/args.json")).read_text())
    assert arguments["name"] == "macl_moco-custom-linear"
    assert arguments["backbone"]["name"] == "resnet18_small"
    assert "val_acc1" in scalars(folder)[-1][0]


def evaluation(folder, method):
    place = checkpoints(folder, method, seed=5)[-1].parent
    data = ["--dataset", "custom", "--train_data_path", "data/train", "--val_data_path", "data/val"]
    return [*data, "--batch_size", "10", "--num_workers", "0", "--pretrained_checkpoint_dir", place]


def test_knn_on_the_cpu(one_process):
    output = run(one_process, "-m", LAUNCHER, "knn", "--cpu", "--k", "1", "5", *evaluation(one_process, "isogclr"))
    results = [line for line in output.splitlines() if line.startswith("Result: acc@1=")]
    assert len(results) == 2
    assert all(float(line.split("=")[1].split(",")[0]) > 10 for line in results)  # chance


def test_umap_on_the_cpu(one_process):
    shown = run(one_process, "-m", LAUNCHER, "umap", "--cpu", *evaluation(one_process, "macl_moco"))
    for split in ("train", "val"):
        assert f"figure: {one_process / f'im100_{split}_umap.pdf'}" in str(shown)
    assert (one_process / "im100_val_umap.pdf").stat().st_size > 0
