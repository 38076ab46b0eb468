"""What the diagnostics cost: steps of the demo with and without a sample, in turn in one process.

Every other step of `dystress pretrain method=dystress data=digits` is sampled, and the time of a step is taken around
all of its callbacks, the data loading left out. With a and b the medians of the steps with and without a sample, one
every n steps makes the mean step (n - 1 + a/b) / n times as long. On a busy machine that difference drowns in noise, so
the time inside of the diagnostics' own functions is printed as well. Keys are those of `dystress pretrain`.

    python scripts/benchmarks/diagnostics.py                      # CSV alone, as the demo has it
    python scripts/benchmarks/diagnostics.py method=dystress_moco tensorboard=true wandb=offline epochs=20
"""

import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

from pytorch_lightning import Callback

from dystress_plugin import diagnostics
from dystress_plugin.diagnostics import EVERY_N_STEPS
from dystress_plugin.experiment.data import datasets as data_module
from dystress_plugin.experiment.keys import parse
from dystress_plugin.experiment.pretrain import resolve
from dystress_plugin.experiment.pretrain.trainer import EpochTable, make_loaders, make_trainer
from dystress_plugin.experiment.settings import PretrainSettings


class Start(Callback):
    """First among the callbacks, so that the others' time counts."""

    def __init__(self):
        self.inside = []  # seconds in the diagnostics, a step each

    def on_train_batch_start(self, *_):
        self.inside.append(0.0)
        self.time = time.perf_counter()


class Stop(Callback):
    """Last among them."""

    def __init__(self, start):
        self.start = start
        self.seconds = []

    def on_train_batch_end(self, *_):
        self.seconds.append(time.perf_counter() - self.start.time)


def timed(owner, name, seconds):
    """Adds the time of every call of a function to the last of `seconds`."""
    function = getattr(owner, name)

    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[-1] += time.perf_counter() - start

    setattr(owner, name, wrapper)


def main(tokens):
    if {"-h", "--help"} & set(tokens):
        print(__doc__)
        return
    fixed = ["progress=false", "diagnostics_every_n_steps=2"]
    with tempfile.TemporaryDirectory() as folder:
        settings = parse(PretrainSettings, ["epochs=12", *tokens, f"out={folder}", *fixed])
        data = data_module.load(
            settings.data, root=settings.data_root, download=settings.download, long_tail=None, seed=settings.seed
        )
        spec = resolve.resolve(settings, data, 1)
        module = resolve.build_module(spec, data)
        trainer = make_trainer(settings, Path(folder))
        start = Start()
        stop = Stop(start)
        # Its table needs the kNN of a validation, which would only take time here.
        others = [callback for callback in trainer.callbacks if not isinstance(callback, EpochTable)]
        trainer.callbacks = [start, *others, stop]
        ours = next(type(callback) for callback in others if hasattr(callback, "every_n_steps"))
        for owner, name in (
            (ours, "on_train_batch_start"),
            (diagnostics.Recorder, "_sample"),
            (ours, "on_train_batch_end"),
        ):
            timed(owner, name, start.inside)
        train, _ = make_loaders(spec, data, trainer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, train)
    warm = 4  # the first steps allocate
    sampled, plain = (statistics.median(stop.seconds[first::2]) for first in (warm, warm + 1))
    ratio = (EVERY_N_STEPS - 1 + sampled / plain) / EVERY_N_STEPS
    alone, idle = (statistics.median(start.inside[first::2]) for first in (warm, warm + 1))
    cost = (alone + (EVERY_N_STEPS - 1) * idle) / EVERY_N_STEPS
    print(f"{settings.method}, {len(stop.seconds) - warm} steps of {settings.batch_size} images")
    longer = f"{sampled / plain:.4f} times as long"
    print(f"median step: {1000 * plain:.2f} ms; with a sample: {1000 * sampled:.2f} ms, {longer}")
    print(f"a sample every {EVERY_N_STEPS} steps (the default): {ratio:.5f}, overhead {100 * (ratio - 1):.3f} %")
    print(
        f"timed alone: {1000 * alone:.2f} ms in a step with a sample, {1e6 * idle:.0f} us in the others: "
        f"{100 * cost / plain:.3f} %"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
