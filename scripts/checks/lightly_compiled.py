#!/usr/bin/env python
"""lightly's own examples/pytorch/moco.py, with our criterion under torch.compile, trains as it does without.

    LIGHTLY_HOME=~/lightly python scripts/checks/lightly_compiled.py                          # a minute
    LIGHTLY_HOME=~/lightly python scripts/checks/lightly_compiled.py --backends eager

Of a copy of the example the data set is replaced by random images, and the number of epochs; network and criterion are
compiled as a whole. Prints the loss of every epoch; exits with 1 where a backend's is not that of the run without.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch

EXAMPLE = Path("examples", "pytorch", "moco.py")
TOLERANCE = 1e-3  # of a loss after some steps in float32
IMAGES = """torchvision.datasets.FakeData(
    2 * 16, (3, 32, 32), transform=transform
)"""
COMPILED = """criterion = torch.compile(DySTreSSLoss(memory_bank_size=(4096, 128)), backend={backend!r}, fullgraph=True)
model.forward = torch.compile(model.forward, backend={backend!r})"""
PLAIN = "criterion = DySTreSSLoss(memory_bank_size=(4096, 128))"


def edited(text: str, backend: str | None) -> str:
    """The example with our criterion and small data; a ValueError where it is not as we know it."""
    edits = {
        "from lightly.loss import NTXentLoss\n": "from dystress_plugin.frameworks.lightly import DySTreSSLoss\n",
        'torchvision.datasets.CIFAR10(\n    "datasets/cifar10", download=True, transform=transform\n)': IMAGES,
        "criterion = NTXentLoss(memory_bank_size=(4096, 128))": COMPILED.format(backend=backend) if backend else PLAIN,
        "batch_size=256": "batch_size=16",
        "num_workers=8": "num_workers=0",
        "epochs = 10\n": "epochs = 2\n",
        "    avg_loss = ": "    losses.append(float(total_loss))\n    avg_loss = ",
        'print("Starting Training")': "losses = []",
    }
    for theirs, ours in edits.items():
        if text.count(theirs) != 1:
            raise ValueError(f"{EXAMPLE} is not as it was when this was written: '{theirs}' is there not once.")
        text = text.replace(theirs, ours)
    return text


def losses(text: str, backend: str | None) -> list[float]:
    """Of every epoch of the example."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):  # augmentations draw from all
        seed(0)
    torch._dynamo.reset()
    running: dict[str, list[float]] = {}
    exec(compile(edited(text, backend), str(EXAMPLE), "exec"), running)
    return running["losses"]


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["eager", "inductor"], help="(default: eager inductor)")
    options = parser.parse_args(given)
    text = Path(os.environ["LIGHTLY_HOME"], EXAMPLE).read_text()
    expected = losses(text, None)
    print("not compiled", expected)
    failed = 0
    for backend in options.backends:
        found = losses(text, backend)
        same = all(abs(a - b) <= TOLERANCE * abs(b) for a, b in zip(found, expected, strict=True))
        print(backend, found, "" if same else "DIFFERENT", flush=True)
        failed += not same
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
