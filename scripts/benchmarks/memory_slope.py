"""Memory of the process over thousands of training steps: does it grow?

Two loops, one after the other: the loss alone with its gradient, for every method, and a tiny training module with its
optimizer on a `Recorder`'s table. After a tenth of the time, in which allocators and caches fill, the resident memory
is noted 200 times; the slope is that of a least-squares line, with a 95 % confidence interval from the residuals.

    python scripts/benchmarks/memory_slope.py --minutes 5
"""

import argparse
import itertools
import tempfile
import time
import warnings
from pathlib import Path

import psutil
import torch
from scipy.stats import linregress, t
from torch import nn

from dystress_plugin import ContrastiveLoss
from dystress_plugin.diagnostics import Recorder
from dystress_plugin.recipes import METHODS

BATCH, DIM, IMAGES = 64, 32, 1024
NOTES = 200


def losses():
    for name in METHODS:
        queue = {"queue_size": (256, DIM)} if name.endswith("_moco") else {}
        table = {"num_samples": IMAGES} if name == "isogclr" else {}
        yield ContrastiveLoss(name, **queue, **table)


def arguments(loss, step):
    wanted = {"index": torch.randperm(IMAGES)[:BATCH]} if loss.temperature.needs_index else {}
    return wanted | ({"epoch": step / 1000} if loss.temperature.needs_epoch else {})


def loss_alone(_folder):
    """A step: one method, in turn."""
    for step, loss in enumerate(itertools.cycle(list(losses()))):
        views = [torch.randn(BATCH, DIM, requires_grad=True) for _ in range(2)]
        loss(*views, **arguments(loss, step)).backward()
        yield


def training(folder):
    """A step: views of a batch through a small network, loss, optimizer, diagnostics."""
    network = nn.Sequential(nn.Linear(DIM, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, DIM))
    loss = ContrastiveLoss("isogclr", num_samples=IMAGES)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    with Recorder(loss, folder / "diagnostics.csv") as recorder:
        for step in itertools.count():
            optimizer.zero_grad()
            views = [network(torch.randn(BATCH, DIM)) for _ in range(2)]
            loss(*views, **arguments(loss, step)).backward()
            optimizer.step()
            recorder.step()
            yield


def measure(name, steps, seconds):
    """Runs a loop for so long and prints its memory now and then, and its slope."""
    process = psutil.Process()
    notes = []
    started = time.monotonic()
    for step in itertools.count():
        next(steps)
        taken = time.monotonic() - started
        # The k-th note is due at its share of the time, counted from a tenth on.
        if taken >= seconds * (0.1 + 0.9 * len(notes) / NOTES):
            notes.append((step / 1000, process.memory_info().rss / 1024))
            if len(notes) % (NOTES // 5) == 1:
                print(f"{name:>12} {step:>9} steps {notes[-1][1] / 1024:>8.1f} MiB", flush=True)
        if len(notes) == NOTES:
            break
    line = linregress(*zip(*notes, strict=True))
    width = line.stderr * t.ppf(0.975, len(notes) - 2)
    print(
        f"{name:>12} {step:>9} steps in {taken:.0f} s: {line.slope:+.2f} ± {width:.2f} KiB per 1000 steps, "
        f"{notes[-1][1] - notes[0][1]:+.0f} KiB from the first note to the last",
        flush=True,
    )


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5, help="of both loops together (default: %(default)s)")
    options = parser.parse_args(given)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # a batch is small for some settings, which is of no matter here
    loops = {"loss": loss_alone, "training": training}
    with tempfile.TemporaryDirectory() as folder:
        for name, loop in loops.items():
            steps = loop(Path(folder))
            measure(name, steps, 60 * options.minutes / len(loops))
            steps.close()


if __name__ == "__main__":
    main()
