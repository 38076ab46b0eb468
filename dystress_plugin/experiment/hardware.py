"""A step in the precision of a run, tried before training; and the end of its processes."""

from __future__ import annotations

import copy
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pytorch_lightning import Trainer
from torch import nn
from torch.multiprocessing.spawn import ProcessException

from dystress_plugin.errors import RunStopped, first_line

CHOOSE = "Choose 32-true, bf16-mixed, bf16-true or 64-true."


def check_step(backbone: nn.Module, trainer: Trainer, image_size: int) -> None:
    """Raises a ValueError where the backbone cannot do a forward and backward pass in the trainer's precision.

    It is tried with a copy on the trainer's device, except for float32.
    """
    if trainer.precision == "32-true":
        return
    plugin, device = trainer.precision_plugin, trainer.strategy.root_device
    try:
        network = plugin.convert_module(copy.deepcopy(backbone)).to(device)
        with torch.random.fork_rng(devices=[]):
            images = plugin.convert_input(torch.randn(2, 3, image_size, image_size)).to(device)
            with plugin.forward_context():
                features = network(images)
            features.sum().backward()
    except Exception as error:  # each layer and each device has its own way to say so
        raise ValueError(
            f"precision={trainer.precision} cannot train this backbone on {device}: {first_line(error)} {CHOOSE}"
        ) from None


@contextmanager
def processes(trainer: Trainer) -> Iterator[None]:
    """While inside, an error ends the other processes of a training as well, and theirs is raised here.

    Raises:
        RunStopped: for an error in a process that was spawned, with its text and without its traceback.
    """
    try:
        yield
    except BaseException as error:
        launcher = trainer.strategy.launcher
        if launcher is not None:
            # Or this process, told to end, would wait for those that it has started.
            launcher.kill(signal.SIGTERM)
        if isinstance(error, ProcessException):
            raise RunStopped(_told(error)) from None
        raise


def _told(error: ProcessException) -> str:
    """What a process has died of: in its traceback the first line below the last frame that is not indented, and on."""
    below = str(error).rpartition('\n  File "')[2].partition("\n")[2]
    found = re.search(r"^\S.*", below, re.MULTILINE | re.DOTALL)
    if found is None:
        return f"A process of this training has died: {first_line(error)}"
    told = found[0].strip()
    return told.partition(": ")[2] or told
