"""Diagnostics of a training loop of one's own, and the CSV that all of them write."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dystress_plugin import distributed
from dystress_plugin.checks import check_count
from dystress_plugin.contrastive import ContrastiveLoss
from dystress_plugin.diagnostics.summary import BINS, MAX_IMAGES, Summary, summaries

EVERY_N_STEPS = 50
COLUMNS = (
    *("step", "epoch", "loss_name", "pairs", "quantity", "count", "mean", "min", "max", "bin_low", "bin_high"),
    *(f"bin_{number}" for number in range(BINS)),
)


class Recorder:
    """Writes diagnostics in a training loop of one's own.

    Under torch.distributed rank 0 alone writes, of its own batch. A loss that is inside of a `torch.compile`d module is
    not seen; compile the model without it. With classes it shows pairs of images all the same: as positives the views
    of one, as negatives those of all others.

    Args:
        module: a `ContrastiveLoss`, or any module with one or more among its parts.
        path: the CSV; its folder is made. Anew from step 0, else rows before `first_step` stay.
        every_n_steps: steps between two samples; the first is at step 0. A sample takes a few milliseconds, which
            over 50 steps of the demo is far below 1 % (`scripts/benchmarks/diagnostics.py`).
        max_images: how many images to sample.
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
        self.every_n_steps = check_count("every_n_steps", every_n_steps)
        self.max_images = check_count("max_images", max_images)
        self.losses = {name: part for name, part in module.named_modules() if isinstance(part, ContrastiveLoss)}
        if not self.losses:
            raise ValueError(f"{type(module).__name__} has no ContrastiveLoss among its parts: nothing to sample.")
        self.path = Path(path)
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
            add_histograms(self.writer, found, self._step)
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
            self._handles[name] = loss.register_forward_pre_hook(partial(self._sample, name), with_kwargs=True)

    def take(self, step: int, epoch: int) -> list[Summary]:
        """What the losses of the step showed, after adding it to the CSV."""
        if self._handles:
            self.close()
        found, self._found = self._found, []
        if found:
            # In one piece, and closed: a checkpoint that is saved next never knows of rows that are not on the disk.
            with self.path.open("a", newline="") as file:
                file.write(_lines(_cells(summary, step, epoch) for summary in found))
        return found

    def close(self) -> None:
        """Leaves the losses alone; it may be called again."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}

    def _sample(self, name: str, loss: ContrastiveLoss, views: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        self._handles.pop(name).remove()
        kwargs = {key: value for key, value in kwargs.items() if key != "labels"}  # pairs are those of images
        self._found += summaries(loss, *views, **kwargs, max_images=self.max_images, name=name)


def add_histograms(writer: Any, found: Sequence[Summary], step: int) -> None:
    """To a TensorBoard `SummaryWriter`."""
    for summary in found:
        writer.add_histogram(summary.tag, summary.values, step, bins=summary.edges)


def _cells(summary: Summary, step: int, epoch: int) -> list[object]:
    """One row of the CSV, in the order of `COLUMNS`."""
    numbers = (*summary.statistics.values(), summary.low, summary.high)
    place = (step, epoch, summary.loss, summary.pairs, summary.quantity, len(summary.values))
    return [*place, *(f"{number:.8g}" for number in numbers), *summary.counts]


def _lines(rows: Iterable[Iterable[object]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _start_table(path: Path, step: int, earlier: Path | None) -> None:
    """Writes the heading, and below it the rows before `step` of the table that is there."""
    source = next((table for table in (path, earlier) if table is not None and table.exists()), None)
    kept = _rows_before(step, source) if source is not None and step else []
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(_lines([COLUMNS, *kept]))
    part.replace(path)


def _rows_before(step: int, table: Path) -> list[list[str]]:
    # A line without its end was being written when the power went.
    text = table.read_text(errors="replace")
    lines = [line for line in text.splitlines(keepends=True)[1:] if line.endswith("\n")]
    try:
        return [row for row in csv.reader(lines) if int(row[0]) < step]
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"{table} is damaged: {error}. Delete it, or put back a copy: its rows are lost, and nothing else."
        ) from None
