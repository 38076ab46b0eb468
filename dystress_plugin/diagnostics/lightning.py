"""Diagnostics of any LightningModule, as a callback for its Trainer."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from dystress_plugin.checks import check_count
from dystress_plugin.diagnostics.recorder import EVERY_N_STEPS, Recorder, add_histograms
from dystress_plugin.diagnostics.summary import MAX_IMAGES, Summary

HOSTS = ("lightning.pytorch", "pytorch_lightning")  # the same Lightning under two names, with classes of their own


def callback(
    path: str | Path | None = None, *, every_n_steps: int = EVERY_N_STEPS, max_images: int = MAX_IMAGES
) -> Any:
    """A Lightning callback that writes diagnostics of every `ContrastiveLoss` in a LightningModule.

    It writes a CSV, scalars to all of the Trainer's loggers, and histograms to TensorBoard and wandb. Rank 0 alone
    samples, from its own batch, without a collective. After an interruption the CSV has every row exactly once:
    resuming keeps the rows before the checkpoint, from the CSV of the earlier run where Lightning has chosen another
    folder.

    It is a callback of those of `lightning.pytorch` and `pytorch_lightning` that are imported when it is made; if
    neither is, of the one that is installed.

    Args:
        path: the CSV. None: `diagnostics.csv` beside the checkpoints, or in the Trainer's root without checkpoints.
        every_n_steps: optimizer steps between two samples; the first is at step 0.
        max_images: how many images to sample.

    Raises:
        ValueError: for a number that is not positive; when training starts, for a module without `ContrastiveLoss`.
        ImportError: if there is no Lightning.
    """
    check_count("every_n_steps", every_n_steps)
    check_count("max_images", max_images)
    loaded = [name for name in HOSTS if name in sys.modules]
    made: Any = _callback_class(*(loaded or _installed_host()))(path, every_n_steps, max_images)
    return made


def callbacks(every_n_steps: int | None) -> list[Any]:
    """For `LightningModule.configure_callbacks`: the callback, or nothing for None and 0."""
    return [callback(every_n_steps=every_n_steps)] if every_n_steps else []


class _Hooks:
    """The callback without its base class."""

    def __init__(self, path: str | Path | None, every_n_steps: int, max_images: int) -> None:
        self.path = path
        self.every_n_steps = every_n_steps
        self.max_images = max_images
        self._recorder: Recorder | None = None
        self._step = 0
        self._earlier: str | None = None

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        if not trainer.is_global_zero:
            return
        self._recorder = Recorder(
            pl_module,
            self.path or _folder(trainer) / "diagnostics.csv",
            every_n_steps=self.every_n_steps,
            max_images=self.max_images,
            first_step=trainer.global_step,
            earlier=self._earlier,
        )

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        if self._recorder is not None:
            self._step = trainer.global_step
            self._recorder.await_step(self._step)

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, *batch: Any) -> None:
        if self._recorder is not None and (found := self._recorder.take(self._step, trainer.current_epoch)):
            for logger in trainer.loggers:
                _log(logger, found, self._step)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        if self._recorder is not None:
            self._recorder.close()

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"path": str(self._recorder.path.resolve())} if self._recorder is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier = state_dict.get("path")

    def __reduce__(self) -> Any:
        # Strategies that spawn processes pickle it, and the class below has no name in this module.
        return partial(callback, every_n_steps=self.every_n_steps, max_images=self.max_images), (self.path,)


@cache
def _callback_class(*hosts: str) -> type:
    # Lightning asks for its own base class, and importing both libraries to be on the safe side would take seconds.
    return type("Diagnostics", (_Hooks, *(importlib.import_module(host).Callback for host in hosts)), {})


def _installed_host() -> tuple[str]:
    for name in HOSTS:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        return (name,)
    raise ImportError("The callback needs Lightning: pip install lightning. Without it there is Recorder.")


def _folder(trainer: Any) -> Path:
    """Where checkpoints go."""
    folders = [getattr(saver, "dirpath", None) for saver in trainer.checkpoint_callbacks]
    # solo-learn has a class of its own for it.
    folders += [getattr(other, "path", None) for other in trainer.callbacks if type(other).__name__ == "Checkpointer"]
    return Path(next((folder for folder in folders if folder), trainer.default_root_dir))


def _log(logger: Any, found: Sequence[Summary], step: int) -> None:
    """Scalars to any Lightning logger, histograms to those that can show them."""
    values: dict[str, Any] = {f"{s.tag}_{how}": value for s in found for how, value in s.statistics.items()}
    if hasattr(logger.experiment, "add_histogram"):
        add_histograms(logger.experiment, found, step)
    elif type(logger.experiment).__module__.startswith("wandb"):
        import wandb

        values |= {s.tag: wandb.Histogram(np_histogram=(s.counts, s.edges)) for s in found}
    logger.log_metrics(values, step)
