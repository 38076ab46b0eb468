"""Precision and processes of a run: what its device cannot do is refused before training, in one line."""

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
from dystress_plugin.experiment.settings import PretrainSettings

CHOOSE = "Choose 32-true, bf16-mixed, bf16-true or 64-true."
# Lightning trains in bf16-mixed instead, and in float16 a step takes thirty times as long as in float32.
NOT_ON_A_CPU = ("16-mixed", "16", "16-true")


def check(settings: PretrainSettings) -> None:
    """Raises a ValueError for processes that are forked, and a precision that no run, or none on a CPU, can have."""
    precision, strategy = settings.precision, settings.strategy
    if "fork" in strategy or "notebook" in strategy:
        raise ValueError(
            f"strategy={strategy} forks a process that has computed on several threads, and may wait for them forever. "
            "Choose ddp, or ddp_spawn."
        )
    if precision.startswith("transformer-engine"):
        raise ValueError(
            f"precision={precision} puts layers of another library into the network, whose weights neither torchvision "
            f"nor timm could read. {CHOOSE}"
        )
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if precision in NOT_ON_A_CPU and (settings.accelerator == "cpu" or (settings.accelerator == "auto" and not gpu)):
        raise ValueError(f"precision={precision} needs a GPU: a CPU does not train in float16. {CHOOSE}")


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
