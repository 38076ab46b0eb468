"""What the temperature does during training, looked at in some of the steps and of some of the pairs.

Every `every_n_steps` steps, for the positive and for the negative pairs of the first images of the batch: number, mean,
min, max and histogram of their cosine similarities and of their temperatures. `callback` is for a Trainer, of
`lightning.pytorch` or of `pytorch_lightning`, whatever the module; `Recorder` is for a loop of one's own. Both find
every `ContrastiveLoss` in a module by themselves, write a CSV, and change neither the module nor any random number.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dystress_plugin import distributed
from dystress_plugin.contrastive import ContrastiveLoss
from dystress_plugin.metrics import some_pairs

EVERY_N_STEPS = 50
MAX_IMAGES = 128  # 65 thousand pairs of two views
BINS = 40
HOSTS = ("lightning.pytorch", "pytorch_lightning")  # the same Lightning under two names, with classes of their own
COLUMNS = (
    *("step", "epoch", "loss", "pairs", "quantity", "count", "mean", "min", "max", "bin_low", "bin_high"),
    *(f"bin_{number}" for number in range(BINS)),
)


class Summary(NamedTuple):
    """One quantity of one kind of pairs: four of them describe a batch.

    Attributes:
        loss: where the loss is in its module, such as "criterion".
        pairs: "positive" or "negative".
        quantity: "similarity" or "temperature".
        values: (count,) on the CPU, without those that are not finite.
        low: lower end of the first bin: -1 for similarities, 0 for temperatures.
        high: upper end of the last bin: 1 for similarities, for temperatures the highest of the batch.
    """

    loss: str
    pairs: str
    quantity: str
    values: Tensor
    low: float
    high: float

    @property
    def statistics(self) -> dict[str, float]:
        """Mean, min and max."""
        values = self.values.double()  # or the mean of equal values may round to below their min
        return {how: float(getattr(values, how)()) for how in ("mean", "min", "max")}

    @property
    def counts(self) -> list[int]:
        """How many values are in each of `BINS` bins of equal width."""
        # A cosine may round to just above 1.
        inside = self.values.clamp(self.low, self.high)
        return [int(count) for count in torch.histc(inside, BINS, self.low, self.high).tolist()]

    @property
    def edges(self) -> list[float]:
        """The `BINS + 1` ends of the bins."""
        width = (self.high - self.low) / BINS
        return [self.low + width * number for number in range(BINS)] + [self.high]

    @property
    def tag(self) -> str:
        """Name of its histogram in TensorBoard and wandb; `_mean`, `_min` and `_max` are added for the scalars."""
        return "/".join(part for part in ("diagnostics", self.loss, f"{self.pairs}_{self.quantity}") if part)

    def row(self, step: int, epoch: int) -> str:
        """Its line of the CSV."""
        place = [step, epoch, self.loss, self.pairs, self.quantity, len(self.values)]
        numbers = [f"{number:.8g}" for number in (*self.statistics.values(), self.low, self.high)]
        return ",".join(map(str, [*place, *numbers, *self.counts])) + "\n"


def summaries(
    loss: ContrastiveLoss,
    *views: Tensor,
    index: Tensor | None = None,
    epoch: float | None = None,
    max_images: int = MAX_IMAGES,
    name: str = "",
) -> list[Summary]:
    """Describes the first images of a batch; to be called before the loss, whose state it reads and leaves alone.

    Args:
        loss: the loss.
        *views: as for the loss.
        index: as for the loss.
        epoch: as for the loss.
        max_images: how many images to look at.
        name: becomes `Summary.loss`.

    Returns:
        Similarities and temperatures of the positives, then of the negatives; nothing where there is nothing finite.
    """
    seen = some_pairs(loss, *views, index=index, epoch=epoch, max_images=max_images)
    # With mixed precision a step may overflow, and GradScaler leaves it out: that is no reason to stop here.
    finite = [values[torch.isfinite(values)].cpu() for values in seen]
    highest = max((float(tau.max()) for tau in (finite[1], finite[3]) if len(tau)), default=0.0)
    kinds = [(pairs, quantity) for pairs in ("positive", "negative") for quantity in ("similarity", "temperature")]
    return [
        Summary(name, *kind, values, *((-1.0, 1.0) if kind[1] == "similarity" else (0.0, highest)))
        for kind, values in zip(kinds, finite, strict=True)
        if len(values)
    ]


class Recorder:
    """Writes diagnostics in a training loop of one's own.

    Under torch.distributed rank 0 alone writes, of its own batch. A loss that is inside of a `torch.compile`d module is
    not seen; compile the model without it.

    Args:
        module: a `ContrastiveLoss`, or any module with one or more among its parts.
        path: the CSV; its folder is made. Anew from step 0, else rows before `first_step` stay.
        every_n_steps: steps between two looks; the first is at step 0. A look takes a few milliseconds, which over
            50 steps of the demo is far below 1 % (`scripts/benchmarks/diagnostics.py`).
        max_images: images to look at.
        writer: a `torch.utils.tensorboard.SummaryWriter` to write to as well.
        first_step: step the loop starts or resumes at.
        earlier: the CSV of the run that is resumed, read where `path` does not exist.

    Raises:
        ValueError: for a module without `ContrastiveLoss`, or a number that is not positive.

    Examples:
        >>> with Recorder(loss, "runs/x/diagnostics.csv") as recorder:
        ...     for z0, z1 in batches:
        ...         loss(z0, z1).backward()
        ...         recorder.step()
    """

    def __init__(
        self,
        module: nn.Module,
        path: str | Path,
        *,
        every_n_steps: int = EVERY_N_STEPS,
        max_images: int = MAX_IMAGES,
        writer: Any = None,
        first_step: int = 0,
        earlier: str | Path | None = None,
    ) -> None:
        _check_positive(every_n_steps=every_n_steps, max_images=max_images)
        self.losses = {name: part for name, part in module.named_modules() if isinstance(part, ContrastiveLoss)}
        if not self.losses:
            raise ValueError(f"{type(module).__name__} has no ContrastiveLoss among its parts: nothing to look at.")
        self.path = Path(path)
        self.every_n_steps = every_n_steps
        self.max_images = max_images
        self.writer = writer
        self._step = first_step
        self._last: int | None = None
        self._handles: dict[str, RemovableHandle] = {}
        self._found: list[Summary] = []
        self._writes = distributed.rank() == 0
        if self._writes:
            _start_table(self.path, first_step, Path(earlier) if earlier else None)

    def __enter__(self) -> Recorder:
        self.await_step(self._step)
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def step(self, epoch: int = 0) -> None:
        """To be called once a step, after the loss was: writes if this step was due."""
        found = self.take(self._step, epoch)
        if self.writer is not None:
            for summary in found:
                for how, value in summary.statistics.items():
                    self.writer.add_scalar(f"{summary.tag}_{how}", value, self._step)
            _add_histograms(self.writer, found, self._step)
        self._step += 1
        self.await_step(self._step)

    def await_step(self, step: int) -> None:
        """Makes ready for the losses of a step if that is due and was not seen yet; otherwise costs nothing."""
        if not self._writes or step % self.every_n_steps or step == self._last:
            return
        self._last = step
        for name, loss in self.losses.items():
            # Before the loss: it puts the batch's keys into its queue and updates its tables. Once: a module may
            # compute it several times in a step.
            self._handles[name] = loss.register_forward_pre_hook(partial(self._look, name), with_kwargs=True)

    def take(self, step: int, epoch: int) -> list[Summary]:
        """What the losses of the step showed, after adding it to the CSV."""
        if self._handles:
            self.close()
        found, self._found = self._found, []
        if found:
            # In one piece, and closed: a checkpoint that is saved next never knows of rows that are not on the disk.
            with self.path.open("a", newline="") as file:
                file.write("".join(summary.row(step, epoch) for summary in found))
        return found

    def close(self) -> None:
        """Leaves the losses alone; it may be called again."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}

    def _look(self, name: str, loss: ContrastiveLoss, views: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        self._handles.pop(name).remove()
        self._found += summaries(loss, *views, **kwargs, max_images=self.max_images, name=name)


def callback(
    path: str | Path | None = None, *, every_n_steps: int = EVERY_N_STEPS, max_images: int = MAX_IMAGES
) -> Any:
    """A Lightning callback that writes diagnostics of every `ContrastiveLoss` in a LightningModule.

    It writes a CSV, scalars to all of the Trainer's loggers, and histograms to TensorBoard and wandb. Rank 0 alone
    looks, at its own batch, without a collective. After an interruption the CSV has every row exactly once: resuming
    keeps the rows before the checkpoint, from the CSV of the earlier run where Lightning has chosen another folder.

    It is a callback of those of `lightning.pytorch` and `pytorch_lightning` that are imported when it is made; if
    neither is, of the one that is installed.

    Args:
        path: the CSV. None: `diagnostics.csv` beside the checkpoints, or in the Trainer's root without checkpoints.
        every_n_steps: optimizer steps between two looks; the first is at step 0.
        max_images: images to look at.

    Raises:
        ValueError: for a number that is not positive; when training starts, for a module without `ContrastiveLoss`.
        ImportError: if there is no Lightning.
    """
    _check_positive(every_n_steps=every_n_steps, max_images=max_images)
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


def _start_table(path: Path, step: int, earlier: Path | None) -> None:
    """Writes the heading, and below it the rows before `step` of the table that is there."""
    source = next((table for table in (path, earlier) if table is not None and table.exists()), None)
    lines = source.read_text().splitlines(keepends=True)[1:] if source is not None and step else []
    # A line without its end was being written when the power went.
    kept = [line for line in lines if line.endswith("\n") and int(line.split(",", 1)[0]) < step]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(",".join(COLUMNS) + "\n" + "".join(kept))
    part.replace(path)


def _log(logger: Any, found: Sequence[Summary], step: int) -> None:
    """Scalars to any Lightning logger, histograms to those that can show them."""
    values: dict[str, Any] = {f"{s.tag}_{how}": value for s in found for how, value in s.statistics.items()}
    if hasattr(logger.experiment, "add_histogram"):
        _add_histograms(logger.experiment, found, step)
    elif type(logger.experiment).__module__.startswith("wandb"):
        import wandb

        values |= {s.tag: wandb.Histogram(np_histogram=(s.counts, s.edges)) for s in found}
    logger.log_metrics(values, step)


def _add_histograms(writer: Any, found: Sequence[Summary], step: int) -> None:
    for summary in found:
        writer.add_histogram(summary.tag, summary.values, step, bins=summary.edges)


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}={number!r} must be an int of at least 1.")
