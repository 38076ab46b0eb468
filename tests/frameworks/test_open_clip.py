"""open_clip's unmodified training program with methods of ours: the installed release, and its next version."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dystress_plugin import ContrastiveLoss, recipes
from dystress_plugin.frameworks.open_clip.__main__ import main
from dystress_plugin.temperature import Constant, Individual, Learnable, LogitMaps, Scaled, Temperature, WarmUp

open_clip = pytest.importorskip(
    "open_clip_train.main", reason='OPEN_CLIP IS NOT TESTED: pip install -e ".[open-clip]"', exc_type=ImportError
)
import webdataset  # noqa: E402
from open_clip.loss import ClipLoss  # noqa: E402

from dystress_plugin.frameworks.open_clip import ContrastiveClipLoss  # noqa: E402
from dystress_plugin.frameworks.open_clip.numbers import NUMBER, KeyedWebdataset  # noqa: E402

PROGRAM = Path(__file__).with_name("open_clip_program.py")
SOURCE = os.environ.get("OPEN_CLIP_HOME")
VERSIONS = [
    "installed",
    pytest.param(
        "source",
        marks=pytest.mark.skipif(
            SOURCE is None, reason="OPEN_CLIP 4 IS NOT TESTED: set OPEN_CLIP_HOME to a clone of open_clip"
        ),
    ),
]
SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 8, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
IMAGES = 24


def features(batch=6, dim=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, batch, dim, generator=generator, dtype=torch.float64)


# The loss


def both(loss, reference, log_scale):
    """Value and gradients of a loss and of open_clip's."""
    found = []
    for each in (loss, reference):
        made = features().requires_grad_()
        image, text = torch.nn.functional.normalize(made, dim=-1)  # as models do
        scale = torch.tensor(log_scale, dtype=torch.float64, requires_grad=True)
        value = each(image_features=image, text_features=text, logit_scale=scale.exp(), output_dict=True)
        value["contrastive_loss"].backward()
        found.append((value["contrastive_loss"].detach(), made.grad, scale.grad))
    return found


def test_with_the_models_scale_it_is_open_clips_loss_and_trains_the_scale():
    for log_scale in (1.0, 3.0):
        for mine, its in zip(*both(ContrastiveClipLoss(Learnable()), ClipLoss(), log_scale), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-9)


def test_with_a_constant_it_is_open_clips_loss_and_leaves_the_scale():
    mine, its = both(ContrastiveClipLoss("simclr", tau=0.2), ClipLoss(), float(np.log(5)))
    for left, right in zip(mine[:2], its[:2], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-9)
    assert mine[2] == 0  # DistributedDataParallel waits for a gradient


def test_called_by_position_it_returns_the_value():
    image, text = features()
    assert ContrastiveClipLoss("simclr")(image, text).dim() == 0


def test_index_and_epoch_come_with_the_call_or_before_it():
    loss = ContrastiveClipLoss("isogclr", num_samples=(6, 9), rho=1.0)
    image, text = features()
    index = (torch.arange(6), torch.arange(3, 9))
    by_call = loss(image, text, index=index)
    other = ContrastiveClipLoss("isogclr", num_samples=(6, 9), rho=1.0)
    other.index = index
    assert other(image, text) == by_call
    scheduled = ContrastiveClipLoss("ts")
    scheduled.epoch = 7.0
    expected = ContrastiveLoss("ts", layout="both_ways")(image, text, epoch=7.0)
    assert scheduled(image, text) == expected


def test_what_does_not_fit_is_said():
    image, text = features()
    with pytest.raises(ValueError, match="SigLIP"):
        ContrastiveClipLoss("simclr")(image, text, torch.tensor(10.0), torch.tensor(-10.0))
    with pytest.raises(ValueError, match="give logit_scale"):
        ContrastiveClipLoss(Learnable())(image, text)
    with pytest.raises(ValueError, match="needs the sample numbers"):
        ContrastiveClipLoss("isogclr", num_samples=6)(image, text)
    with pytest.raises(ValueError, match="takes no queue"):
        ContrastiveClipLoss("simclr_moco", queue_size=(8, 5))


def test_a_pair_of_temperatures_is_one_a_side():
    loss = ContrastiveClipLoss((Individual(6), Individual(9)))
    assert [temperature.num_samples for temperature in loss.criterion.temperatures] == [6, 9]


class PerRow(Temperature):
    """A learned temperature of somebody else's, which is no single number though it is called alike."""

    def __init__(self):
        super().__init__()
        self.log_tau = torch.nn.Parameter(torch.zeros(6))

    def prepare(self, batch):
        maps = Scaled(self.log_tau.exp().repeat(batch.views)[:, None].double())
        return LogitMaps(maps, maps)


def test_only_a_single_learned_number_is_the_models_scale():
    assert not ContrastiveClipLoss(PerRow()).trains_scale
    assert [p.shape for p in ContrastiveClipLoss(PerRow()).parameters() if p.requires_grad] == [(6,)]
    assert ContrastiveClipLoss(WarmUp(Learnable())).trains_scale
    assert ContrastiveClipLoss((Learnable(), Constant(0.1))).trains_scale


def test_the_scale_is_not_given_to_an_optimizer_twice():
    assert not [p for p in ContrastiveClipLoss(Learnable()).parameters() if p.requires_grad]
    assert ContrastiveClipLoss(Learnable()).trains_scale
    assert not ContrastiveClipLoss(Constant(0.1)).trains_scale


# The program


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and images of which every third has two captions: as a CSV file and as a webdataset."""
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "models").mkdir()
    (folder / "models" / "small.json").write_text(json.dumps(SMALL))
    generator = np.random.default_rng(0)
    rows = []
    with tarfile.open(folder / "data.tar", "w") as tar:
        for i in range(IMAGES):
            path = folder / f"{i}.png"
            Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)
            captions = [f"image {i}", f"number {i}"][: 2 if i % 3 == 0 else 1]
            rows += [(path, caption) for caption in captions]
            for suffix, content in (("png", path.read_bytes()), ("txt", captions[0].encode())):
                member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with (folder / "data.csv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("filepath", "title"), *rows])
    return folder


def arguments(folder, version, name, keys, *options, data="data.csv"):
    common = ["--model", "small", "--train-data", folder / data, "--batch-size", 4, "--workers", 0, "--lr", 1e-2]
    common += ["--warmup", 1, "--logs", folder / version, "--name", name, "--device", "cpu", "--save-frequency", 1]
    # Whole images: open_clip draws crops from a stream that does not go on where a run has ended.
    common += ["--aug-cfg", "scale=(1.0,1.0)", "ratio=(1.0,1.0)"]
    return [*keys, "--", *common, *options]


def command(folder, version, *words, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
    path = os.pathsep.join([*([f"{SOURCE}/src"] if version == "source" else []), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return [sys.executable, *map(str, [*launcher, PROGRAM, folder, *words])], env


def train(folder, version, *given, status=0, processes=1, **more):
    """Trains as a user does; returns what it printed."""
    return run(folder, version, *arguments(folder, version, *given, **more), status=status, processes=processes)


def run(folder, version, *words, status=0, processes=1):
    words, env = command(folder, version, *words, processes=processes)
    done = subprocess.run(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == status, done.stdout
    return done.stdout


def checkpoint(folder, version, name, epoch):
    """The model's weights, and the state of the loss from the checkpoint or beside it."""
    there = folder / version / name / "checkpoints"
    saved = torch.load(there / f"epoch_{epoch}.pt", weights_only=False)
    beside = there / f"loss_epoch_{epoch}.pth"
    weights = {key.removeprefix("module."): value for key, value in saved["state_dict"].items()}
    state = torch.load(beside, weights_only=True) if beside.exists() else saved.get("contrastive_loss", {})
    return weights, state.get("loss")


@pytest.mark.parametrize("version", VERSIONS)
def test_two_processes_train_tables_of_images_and_captions_and_resume_after_a_kill(folder, version):
    keys, options = ["method=isogclr", "method_kwargs.rho=1.5"], ["--epochs", 3]
    train(folder, version, "whole", keys, *options, processes=2)
    weights, tables = checkpoint(folder, version, "whole", 3)
    lengths = {len(table) for table in tables.values() if table.dim()}
    assert lengths == {IMAGES, IMAGES + IMAGES // 3}

    words, env = command(folder, version, *arguments(folder, version, "killed", keys, *options), processes=2)
    there = folder / version / "killed" / "checkpoints"
    killed = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0)
    deadline = time.monotonic() + 200
    while not (there / "epoch_1.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    done = len(list(there.glob("epoch_[0-9].pt")))
    assert done >= 1
    if done < 3:
        train(folder, version, "killed", keys, *options, "--resume", "latest", processes=2)
    again, tables_again = checkpoint(folder, version, "killed", 3)
    for mine, its in ((weights, again), (tables, tables_again)):
        assert all(torch.equal(mine[key], its[key]) for key in mine)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_numbers_of_a_webdataset_are_its_keys(folder, version):
    options = ["--epochs", 1, "--train-num-samples", IMAGES, "--dataset-type", "webdataset"]
    keys = ["method=isogclr", "method_kwargs.rho=1.5"]
    printed = train(folder, version, "unsized", keys, *options, data="data.tar", status=1)
    assert "ValueError: A webdataset hides its largest key: set method_kwargs.num_samples to one more" in printed
    train(folder, version, "keys", [*keys, f"method_kwargs.num_samples={IMAGES + 5}"], *options, data="data.tar")
    _, tables = checkpoint(folder, version, "keys", 1)
    moved = [table for name, table in tables.items() if name.endswith("tau") and table.dim()]
    assert len(moved) == 2
    for table in moved:
        assert len(table) == IMAGES + 5
        assert (table[IMAGES:] == table[-1]).all()  # which no sample has
        assert (table[:IMAGES] != table[-1]).any()


METHODS = {
    "clip": [],
    "simclr": [],
    "dystress": [],
    "macl": [],
    "ts": [],
    "tempfree": [],
    "temo": [],
    "simco": [],
    "dystress_clip": [],
    "isogclr": ["method_kwargs.rho=1"],
    "fastclip": ["method_kwargs.rho=1", "method_kwargs.gamma=0.5"],
    "tempnet": ["method_kwargs.rho=1", "temperature_lr=0.01"],
}


def test_every_method_without_a_queue_is_tried():
    ours = [m for m in recipes.METHODS.values() if m.temperature.__module__.startswith("dystress_plugin.")]
    assert {m.name for m in ours if not m.queue and not m.name.endswith(("_dcl", "_dclw", "_dual"))} == set(METHODS)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_method_trains(folder, version):
    runs = [arguments(folder, version, m, [f"method={m}", *keys], "--epochs", 1) for m, keys in METHODS.items()]
    printed = run(folder, version, *[word for words in runs for word in ("+", *words)][1:])
    assert "Train Epoch: 0 tau_positive_mean: 0.1 tau_negative_mean: 0.1 " in printed
    assert checkpoint(folder, version, "simclr", 1)[1] is None
    scales = {method: float(checkpoint(folder, version, method, 1)[0]["logit_scale"]) for method in METHODS}
    for learned in ("clip", "fastclip"):
        assert scales[learned] != pytest.approx(np.log(1 / 0.07), abs=1e-4)
    # Of all others the mean temperature.
    assert scales["ts"] == pytest.approx(0.0, abs=1e-6)
    assert scales["simclr"] == pytest.approx(np.log(1 / 0.1), rel=1e-5)
    assert scales["dystress"] == pytest.approx(np.log(1 / 0.1), rel=0.5)


@pytest.mark.parametrize("method", ["clip", "tempnet"])
def test_what_is_learned_is_learned_in_two_processes(folder, method):
    train(folder, "installed", f"{method}2", [f"method={method}", *METHODS[method]], "--epochs", 1, processes=2)
    weights, state = checkpoint(folder, "installed", f"{method}2", 1)
    if method == "clip":
        assert float(weights["logit_scale"]) != pytest.approx(np.log(1 / 0.07), abs=1e-4)
    else:
        heads = [state[f"criterion.temperature{side}.head.weight"] for side in ("", "_back")]
        assert all((head != 1).any() for head in heads)  # as it began


@pytest.mark.parametrize("version", VERSIONS)
def test_in_chunks_it_trains_alike(folder, version):
    runs = {"all": [], "parts": ["--chunk-size", 3], "twice": ["--chunk-size", 3, "--grad-checkpointing"]}
    options = ["--epochs", 1, "--eps", 1, "--lr", 1e-4]  # or training would make much of rounding
    commands = [arguments(folder, version, name, ["method=dystress"], *options, *more) for name, more in runs.items()]
    printed = run(folder, version, *[word for words in commands for word in ("+", *words)][1:])
    most = [line.rpartition(" ")[2] for line in printed.splitlines() if line.startswith("images at once")]
    assert most == ["4", "2", "2"]  # parts of equal size
    whole, *others = (checkpoint(folder, version, name, 1)[0] for name in runs)
    for other in others:
        for name, value in whole.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


# What is wrong


def refused(capsys, *words):
    assert main(list(map(str, words))) == 2
    return capsys.readouterr().err


def test_what_open_clip_would_do_to_the_loss_is_refused_before_it_begins(capsys):
    data = ["--", "--train-data", "x.csv"]
    assert "--accum-freq 2" in refused(capsys, "method=isogclr", *data, "--accum-freq", 2)
    assert "use --chunk-size" in refused(capsys, "method=isogclr", *data, "--accum-freq", 2)
    for option in ("--torchcompile", "--torchscript"):
        said = refused(capsys, "method=dystress", "--chunk-size", 64, *data, option)
        assert f"{option} takes a model as it is, and --chunk-size 64 changes it" in said
    for size in (0, 2.5, -3, "all"):
        said = refused(capsys, "method=dystress", *data, "--chunk-size", size)
        assert f"--chunk-size={size!r} must be" in said or f"--chunk-size='{size}' must be" in said
        assert said.count("\n") == 1
    assert "--siglip" in refused(capsys, "method=dystress", *data, "--siglip")
    assert "coca" in refused(capsys, "method=dystress", *data, "--model", "coca_ViT-B-32")


def test_keys_are_told_from_each_other(capsys):
    assert "Did you mean 'dystress'" in refused(capsys, "method=distress", "--")
    assert "Did you mean 'tau_max'" in refused(capsys, "method=dystress", "method_kwargs.tau_mx=1", "--")
    assert "Did you mean 'method'" in refused(capsys, "metod=dystress", "--")
    assert "is no key=value" in refused(capsys, "dystress", "--")
    assert "No method is given" in refused(capsys, "--", "--model", "RN50")
    assert "keeps a queue" in refused(capsys, "method=dystress_moco", "--")
    assert main([]) == 0
    assert "usage: python -m" in capsys.readouterr().out


def test_samples_whose_keys_are_no_numbers_are_named():
    renamed = KeyedWebdataset(webdataset).rename(image="png", text="txt")
    samples = [{"__key__": f"shard/{key}", "png": b"", "txt": b""} for key in ("000000007", "cat")]
    assert next(renamed(samples[:1]))[NUMBER] == 7
    with pytest.raises(ValueError, match="'shard/cat' has no number"):
        list(renamed(samples))


def test_data_that_have_more_samples_than_the_table_are_refused(folder, capsys):
    keys = ["method=isogclr", "method_kwargs.num_samples=5"]
    printed = train(folder, "installed", "short", keys, "--epochs", 1, status=1)
    assert f"num_samples is 5, and the data have {IMAGES} samples" in printed
