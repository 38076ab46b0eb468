"""What a training or an evaluation runs on: a ValueError in one line for what is not there."""

from __future__ import annotations

import copy
import os
import platform
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import StrategyRegistry
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.multiprocessing.spawn import ProcessException

from dystress_plugin.checks import unknown_name
from dystress_plugin.errors import RunStopped, first_line
from dystress_plugin.experiment.spec import HardwareSpec

STRATEGIES = ("ddp", "fsdp", "deepspeed", "single_device")  # the beginnings of the names of those for CPU and GPU
FORKING = ("fork", "notebook")  # after a computation on several threads a forked process may wait for them forever
# Lightning trains in bf16-mixed instead, and in float16 a step on a CPU takes thirty times as long as in float32.
HALF = ("16", "16-mixed", "16-true")
CHOOSE = "Choose 32-true, bf16-mixed, bf16-true or 64-true."
PROCESSES_PER_CORE = 8  # beyond, they would only wait for each other, and take all memory


def torch_device(accelerator: str) -> str:
    """The device for one that evaluates: the first GPU, where there is one and it may be."""
    there = _accelerators()
    _check_accelerator(accelerator, there)
    if accelerator != "cpu" and there["cuda"]:
        return "cuda"
    return "mps" if accelerator in ("gpu", "mps") else "cpu"


def device_name(device: torch.device) -> str:
    """What a device is, such as NVIDIA H100 80GB HBM3, or x86_64 CPU with 2 threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{platform.machine()} {device.type.upper()}"
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU with {threads} thread{'s' if threads > 1 else ''}"


def build_trainer(hardware: HardwareSpec, **options: Any) -> Trainer:
    """Lightning's Trainer on the devices that are asked for, with further options; writes nothing.

    Raises:
        ValueError: for an accelerator, a number of devices or nodes, a strategy or a precision that cannot be had, or
            that Lightning would replace by another.
    """
    there = _accelerators()
    _check_accelerator(hardware.accelerator, there)
    cpu = hardware.accelerator == "cpu" or not there["gpu"]
    devices = _devices(hardware.devices, cpu)
    known = ["auto", *filter(_usable, StrategyRegistry.available_strategies())]
    if hardware.strategy not in known:
        raise ValueError(unknown_name("strategy", hardware.strategy, known, choices="auto, ddp, or Lightning's others"))
    if cpu and hardware.precision in HALF:
        raise ValueError(f"precision={hardware.precision} needs a GPU; on the CPU it is bf16-mixed or bf16-true.")
    keys = ("accelerator", "devices", "num_nodes", "strategy", "precision")
    chosen = " ".join(f"{key}={getattr(hardware, key)}" for key in keys)
    try:
        trainer = Trainer(
            accelerator=hardware.accelerator,
            devices=devices,
            num_nodes=hardware.num_nodes,
            strategy=hardware.strategy,
            precision=hardware.precision,  # type: ignore[arg-type]
            **options,
        )
    except (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ValueError(f"{chosen}: {' '.join(str(error).split())}") from None
    processes = hardware.num_nodes * (devices if isinstance(devices, int) and devices > 0 else trainer.num_devices)
    if trainer.world_size != processes:
        raise ValueError(f"{chosen}: this strategy trains in {trainer.world_size} process, not in {processes}.")
    if hardware.num_nodes > 1:
        _check_nodes(hardware.num_nodes, getattr(trainer.strategy, "cluster_environment", None))
    return trainer


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


def _usable(strategy: str) -> bool:
    return strategy.startswith(STRATEGIES) and not any(word in strategy for word in FORKING)


def _accelerators() -> dict[str, bool]:
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    return {"auto": True, "cpu": True, "gpu": cuda or mps, "cuda": cuda, "mps": mps}


def _check_accelerator(name: str, there: dict[str, bool]) -> None:
    if not there[name]:
        names = ", ".join(other for other, yes in there.items() if yes)
        raise ValueError(f"accelerator={name} is not there: PyTorch finds no such device. Choose from: {names}.")


def _devices(text: str, cpu: bool) -> str | int:
    """As Lightning takes it: a number, `auto`, or a list of GPUs."""
    text = text.replace(" ", "")
    limit = PROCESSES_PER_CORE * (os.cpu_count() or 1)
    if re.fullmatch(r"\d{1,9}", text) and 0 < int(text) <= (limit if cpu else 10**9):
        return int(text)
    if text == "auto" or (not cpu and re.fullmatch(r"-1|\d+,(\d+(,\d+)*,?)?", text)):
        return -1 if text == "-1" else text
    forms = (
        f"auto, or 1 to {limit} processes on the CPU" if cpu else "auto, -1, a number of GPUs, or a list such as '0,1'"
    )
    raise ValueError(f"devices={text} must be {forms}.")


def _check_nodes(num_nodes: int, environment: Any) -> None:
    """Without a launcher each machine waits for the others, on a port that only it knows."""
    if not isinstance(environment, LightningEnvironment):
        return
    needed = ["MASTER_PORT", "NODE_RANK", *(["MASTER_ADDR"] if environment.node_rank() else [])]
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise ValueError(
            f"num_nodes={num_nodes} needs a launcher on every machine, srun or torchrun, or the variables "
            f"MASTER_ADDR, MASTER_PORT and NODE_RANK; {', '.join(missing)} is not set."
        )


def _told(error: ProcessException) -> str:
    """What a process has died of: in its traceback the first line below the last frame that is not indented, and on."""
    below = str(error).rpartition('\n  File "')[2].partition("\n")[2]
    found = re.search(r"^\S.*", below, re.MULTILINE | re.DOTALL)
    if found is None:
        return f"A process of this training has died: {first_line(error)}"
    told = found[0].strip()
    return told.partition(": ")[2] or told
