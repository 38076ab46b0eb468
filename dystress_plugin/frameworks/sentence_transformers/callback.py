"""What the trainer does not tell its loss, and what the loss has to tell."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from dystress_plugin.diagnostics import EVERY_N_STEPS, Recorder
from dystress_plugin.frameworks.sentence_transformers.criterion import SentenceCriterion
from dystress_plugin.training import warn_of_concerns

STATE = "contrastive_loss.pt"


class ContrastiveCallback(TrainerCallback):
    """Gives the epoch to scheduled temperatures, saves tables and queues with checkpoints, and logs diagnostics.

    Diagnostics are those of `dystress_plugin.diagnostics`: into `diagnostics.csv` in the trainer's output folder, and
    mean, min and max into its logs and so to all that it reports to. It warns of a training that is too short for the
    temperature. A resumed training takes the loss's state from
    the checkpoint in the trainer's output folder.

    Args:
        trainer: a SentenceTransformerTrainer with one or more of our losses, also inside of others'.
        diagnostics_every_n_steps: steps between two samples; 0 for none.

    Raises:
        ValueError: if the trainer has none of our losses.

    Examples:
        >>> trainer.add_callback(ContrastiveCallback(trainer))
    """

    def __init__(self, trainer: Any, diagnostics_every_n_steps: int = EVERY_N_STEPS) -> None:
        loss = nn.ModuleDict(trainer.loss) if isinstance(trainer.loss, dict) else trainer.loss
        criteria = {name: part for name, part in loss.named_modules() if isinstance(part, SentenceCriterion)}
        if not criteria:
            raise ValueError(
                f"The trainer's loss is {type(trainer.loss).__name__}, which has no ContrastiveSentenceLoss inside: "
                "this callback has nothing to do."
            )
        self.trainer = trainer
        self.every_n_steps = diagnostics_every_n_steps
        # A path may hold dots, which a ModuleDict's name may not. One criterion needs no name at all.
        named = {name.removesuffix(".criterion").replace(".", "/"): part for name, part in criteria.items()}
        self.criteria = named if len(named) > 1 else {"": next(iter(named.values()))}
        self._recorder: Recorder | None = None
        for criterion in self.criteria.values():
            criterion.epoch = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell(state)
        if state.is_world_process_zero:
            epochs = args.num_train_epochs if args.max_steps <= 0 else state.num_train_epochs
            for criterion in self.criteria.values():
                warn_of_concerns(criterion.loss.temperature, epochs, warnings.warn)
        if state.global_step:
            self._load(_file(args, state))
        if self.every_n_steps:
            losses = {name: criterion.loss for name, criterion in self.criteria.items()}
            self._recorder = Recorder(
                nn.ModuleDict(losses) if len(losses) > 1 else losses[""],
                Path(args.output_dir) / "diagnostics.csv",
                every_n_steps=self.every_n_steps,
                first_step=state.global_step,
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell(state)
        if self._recorder is not None:
            self._recorder.await_step(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The step is over and counted; in the table it has the number that it began with, and the logs' is the count.
        if self._recorder is not None and (found := self._recorder.take(state.global_step - 1, self._epoch)):
            self.trainer.log({f"{s.tag}_{how}": value for s in found for how, value in s.statistics.items()})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._recorder is not None:
            self._recorder.close()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = self._state()
        if found and state.is_world_process_zero:  # tables and queues are the same on every rank
            torch.save(found, _file(args, state))

    @property
    def _epoch(self) -> int:
        return int(next(iter(self.criteria.values())).epoch or 0)

    def _tell(self, state: Any) -> None:
        for criterion in self.criteria.values():
            criterion.epoch = float(state.epoch or 0)

    def _state(self) -> dict[str, Any]:
        return {name: kept for name, criterion in self.criteria.items() if (kept := criterion.state_dict())}

    def _load(self, file: Path) -> None:
        if not self._state():
            return
        if not file.exists():
            warnings.warn(
                f"{file} is not there: the loss's own state (tables, queue, learned temperature) starts anew.",
                stacklevel=2,
            )
            return
        for name, kept in torch.load(file, map_location="cpu", weights_only=True).items():
            self.criteria[name].load_state_dict(kept)


def _file(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
