"""Images a second in training: views from the loader and a batch at a time, of a larger network and of the small one.

    python scripts/benchmarks/augmentation.py DATA [KEY=VALUE ...]

One process trains all four in turn, a few steps of each and so on, so that what else the machine does falls on all.
KEY=VALUE are those of `dystress pretrain`, `accelerator` and `num_workers` among them. A step is all that one has:
images, views, both passes and the optimizer; of a GPU it is waited for after the steps of a turn.
"""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from dystress_plugin.experiment.data.datasets import load_for
from dystress_plugin.experiment.evaluate.scores import scoring_device
from dystress_plugin.experiment.keys import parse
from dystress_plugin.experiment.pretrain.resolve import build_module, resolve
from dystress_plugin.experiment.pretrain.trainer import make_loaders, make_trainer
from dystress_plugin.experiment.settings import PretrainSettings
from dystress_plugin.experiment.spec import DataSpec, part

ARMS = tuple(itertools.product(("test_resnet", "small_resnet"), ("loader", "batch")))
STEPS, TURNS = 4, 5  # the first turn warms up


class Training:
    """A network that is trained on some steps at a time."""

    def __init__(self, settings, data):
        spec = resolve(settings, data, 1)
        self.device = torch.device(scoring_device(spec))
        self.module = build_module(spec, data).to(self.device)
        self.loader = make_loaders(spec, data, make_trainer(settings, Path(settings.out or "runs/none")))[0]
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.01, momentum=0.9)
        self.batches, self.epoch = iter(()), -1

    def turn(self):
        """Images a second over some steps."""
        started, images = time.perf_counter(), 0
        for step in range(STEPS):
            pixels, _, index = self._batch()
            pixels = [view.to(self.device) for view in pixels] if isinstance(pixels, list) else pixels.to(self.device)
            z = self.module.embed(self.module.views(pixels, self.epoch, step))
            self.optimizer.zero_grad()
            self.module.loss(*z, index=index.to(self.device), epoch=0.0).backward()
            self.optimizer.step()
            images += len(index)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return images / (time.perf_counter() - started)

    def _batch(self):
        batch = next(self.batches, None)
        if batch is None:
            self.epoch += 1
            self.loader.sampler.set_epoch(self.epoch)
            self.batches = iter(self.loader)
            batch = next(self.batches)
        return batch


def main(tokens):
    if not tokens or {"-h", "--help"} & set(tokens):
        print(__doc__)
        return
    given = ["image_size=16", "batch_size=256", "progress=false", "nan_guard=false", *tokens[1:]]
    settings = parse(PretrainSettings, [f"data={tokens[0]}", *given])
    data = load_for(part(DataSpec, settings), settings.seed)
    arms = {arm: Training(replace(settings, backbone=arm[0], augment=arm[1]), data) for arm in ARMS}
    speeds = {arm: [] for arm in arms}
    for turn, (arm, training) in itertools.product(range(TURNS), arms.items()):
        speed = training.turn()
        if turn:
            speeds[arm].append(speed)
    first = median(speeds[ARMS[0]])
    device = next(iter(arms.values())).device
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU with {torch.get_num_threads()} threads"
    print(f"{settings.data}, {settings.image_size} pixels, batches of {settings.batch_size}, {machine}")
    for (backbone, augment), found in speeds.items():
        speed = median(found)
        print(f"{backbone:<14}augment={augment:<8}{speed:>10,.0f} images/s {speed / first:>8.1f} times")


if __name__ == "__main__":
    main(sys.argv[1:])
