"""Kills `dystress pretrain` at random moments and starts it again, until nothing is left to doubt.

Runs of several methods on a few of scikit-learn's digits are killed, with SIGKILL and SIGTERM in turn, at moments drawn
evenly from the time that a whole run takes, and started again with the same command. After every kill the files that
are there must be whole and the table without a lost or doubled row; every run that got to its end must equal one that
nobody disturbed: every number in the checkpoint (weights, queue, tables, optimizer, schedule, progress), `backbone.pt`,
`metrics.csv`, `diagnostics.csv`, and `summary.json` but its seconds.

Each start is a process of its own, forked from one that has imported everything and done nothing else: what is killed
is a whole `dystress` command, without the seconds that its imports take and, unless --figures is given, without the
figures at its end, which would take most of the time and nothing reads again.

    python scripts/checks/kill_and_resume.py --rounds 200
"""

import argparse
import csv
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torchvision.io import write_png
from tqdm import tqdm

from dystress_plugin.cli import main as dystress
from dystress_plugin.experiment.io.files import load
from dystress_plugin.experiment.pretrain import command as pretrain

EPOCHS = 4
METHODS = ("dystress", "isogclr", "macl_moco", "ts")
SIGNALS = (signal.SIGKILL, signal.SIGTERM)


def images(folder, per_class=4, classes=5):
    """A few digits of each class as PNGs."""
    pixels, labels = load_digits(return_X_y=True)
    for label in range(classes):
        (folder / str(label)).mkdir(parents=True)
        for number, image in enumerate(pixels[labels == label][:per_class]):
            gray = torch.from_numpy(np.rint(image.reshape(1, 8, 8) * (255 / 16)).astype(np.uint8))
            write_png(gray, str(folder / str(label) / f"{number}.png"))
    return folder


def command(method, data, out):
    settings = {
        "method": method,
        "data": data,
        "out": out,
        "epochs": EPOCHS,
        "image_size": 8,
        "batch_size": 4,
        "backbone": "test_resnet",
        "hidden_dim": 16,
        "projection_dim": 8,
        "diagnostics_every_n_steps": 2,
        "accelerator": "cpu",
        "progress": "false",
    }
    if method == "ts":
        settings["method_kwargs.period"] = 2
    if method.endswith("_moco"):
        settings["queue_size"] = 10
    return ["pretrain", *(f"{key}={value}" for key, value in settings.items())]


def start(arguments, log, figures=False):
    """Runs the command in a process of its own; its id."""
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        if not figures:
            pretrain.figures.curves = pretrain.figures.profile = lambda *_: None
        warnings.simplefilter("ignore")
        status = dystress(arguments)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(child, seconds):
    """Exit status of a process as a shell has it, None if it still runs after so many seconds."""
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.001)


def epochs_in(path):
    """The epochs in a table's rows; a row that is cut off is an error."""
    if not path.exists():
        return []
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert all(None not in row and None not in row.values() for row in rows), f"{path} has a row that is cut off"
    return [int(row["epoch"]) for row in rows]


def check_whole(out):
    """What an interruption leaves must be whole; how many epochs it has."""
    epochs = epochs_in(out / "metrics.csv")
    assert epochs == list(range(len(epochs))), f"{out}: metrics.csv has the epochs {epochs}"
    last = out / "checkpoints" / "last.ckpt"
    if last.exists():
        saved = load(last, "a checkpoint", "")["epoch"] + 1
        # The row is written just before the checkpoint that has it too.
        assert len(epochs) in (saved, saved + 1), f"{out}: {len(epochs)} rows, a checkpoint after {saved} epochs"
    return len(epochs)


def results(out):
    """Everything that must be equal, by a name."""
    found = {name: (out / name).read_text() for name in ("metrics.csv", "diagnostics.csv")}
    summary = json.loads((out / "summary.json").read_text())
    times = ("seconds", "images_per_second")
    found |= {f"summary {key}": value for key, value in summary.items() if key not in times}
    checkpoint = load(out / "checkpoints" / "last.ckpt", "a checkpoint", "")
    found |= flat(checkpoint, "checkpoint") | flat(load(out / "backbone.pt", "weights", ""), "backbone")
    return {name: value for name, value in found.items() if str(out) not in str(value)}


def flat(value, name):
    """The leaves of nested dictionaries and lists, by their path."""
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, (list, tuple)):
        children = enumerate(value)
    else:
        return {name: value}
    return {path: leaf for key, child in children for path, leaf in flat(child, f"{name}.{key}").items()}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def check_equal(out, expected):
    """Raises for the first number that an undisturbed run has otherwise."""
    found = results(out)
    different = [name for name in found.keys() | expected.keys() if not same(found.get(name), expected.get(name))]
    assert not different, f"{out} differs from an undisturbed run: {sorted(different)[:5]}"
    return len(found)


def kill(child, number, place):
    """Sends a signal; the exit status, which is that of the signal, or 0 where the process had just ended."""
    os.kill(child, number)
    status = wait(child, 60)
    allowed = {signal.SIGKILL: (-signal.SIGKILL,), signal.SIGTERM: (143, -signal.SIGTERM)}[number]
    assert status in (*allowed, 0), f"status {status} after {number.name}\n{log_of(place)}"
    return status


def disturb(rounds, draw, place, figures=False, progress=False):
    """Kills that many times; says what happened, a line each. An AssertionError for the first thing that is wrong."""
    data = images(place / "images")
    expected, seconds = {}, {}
    for method in METHODS[: max(1, rounds // 5)]:
        begin = time.monotonic()
        status = wait(start(command(method, data, place / method), place / "log", figures), 600)
        assert status == 0, f"status {status}\n{log_of(place)}"
        expected[method], seconds[method] = results(place / method), time.monotonic() - begin
    methods = list(expected)
    kills, counts, finished, compared = 0, Counter(), 0, 0
    begun = True
    bar = tqdm(total=rounds, unit="kill", disable=not progress)
    while kills < rounds or begun:
        method = methods[finished % len(methods)]
        out = place / f"{finished}-{method}"
        child = start(command(method, data, out), place / "log", figures)
        begun = True
        status = wait(child, draw.uniform(0, seconds[method]) if kills < rounds else 600)
        if status is None:
            number = SIGNALS[kills % len(SIGNALS)]
            status = kill(child, number, place)
            kills += 1
            bar.update()
            counts[f"{number.name} after {check_whole(out)} epochs"] += 1
        else:
            assert status == 0, f"status {status}\n{log_of(place)}"
        if status == 0:
            compared += check_equal(out, expected[method])
            finished += 1
            begun = False
    bar.close()
    return [
        f"{kills} kills over {finished} runs of {EPOCHS} epochs:",
        *(f"{count:6d}  {name}" for name, count in sorted(counts.items())),
        f"No row lost or doubled; all {compared} values equal those of undisturbed runs bit for bit.",
    ]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200, help="kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--figures", action="store_true", help="draw the figures as well")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        said = disturb(options.rounds, random.Random(options.seed), Path(folder), options.figures, progress=True)
    print("\n".join([*said, f"{time.monotonic() - started:.0f} s"]))


def log_of(place):
    return (place / "log").read_text()[-3000:]


if __name__ == "__main__":
    main()
