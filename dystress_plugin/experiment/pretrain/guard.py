"""Stops a training at the step where something is not finite, with what is needed to find out why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from dystress_plugin.diagnostics import summaries
from dystress_plugin.errors import RunStopped
from dystress_plugin.experiment.io import files
from dystress_plugin.experiment.pretrain.module import PretrainModule, Step

# With half precision GradScaler leaves a step out and halves its scale, 2^16 at first: after so many steps in a row
# the scale is 2^-9, and no scale helps.
SKIPPED_STEPS = 25

SHOWN = 16  # images in the message; the file has all

REPORT = "not_finite.json"


class NanGuard(Callback):
    """Raises RunStopped before weights are updated with, or a checkpoint is made of, what is NaN or infinite.

    A step costs one maximum over each gradient and one number to wait for. GradScaler's skipped steps are no fault,
    unless `SKIPPED_STEPS` follow each other.

    Args:
        out: where `not_finite.json` goes.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._skipped = 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        assert isinstance(pl_module, PretrainModule)  # narrows the type
        step = pl_module.last_step
        if step is None or step.loss is None:
            return
        # The largest entry, not the length: squares of finite entries may overflow.
        gradients = _gradients(pl_module).values()
        peaks = [torch.linalg.vector_norm(g, torch.inf, dtype=_wide(g.dtype)) for g in gradients]
        if bool(torch.isfinite(torch.stack([step.loss, *peaks])).all()):
            self._skipped = 0
            return
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            self._skipped += 1
            if self._skipped < SKIPPED_STEPS:
                return
        what = "the gradient" if bool(torch.isfinite(step.loss)) else f"the loss, {float(step.loss)},"
        self._stop(trainer, pl_module, what)

    def explain(self, trainer: Trainer, module: PretrainModule) -> None:
        """Raises RunStopped if the loss has refused embeddings since they are not finite, as it does on the CPU."""
        if module.last_step is not None and not all(bool(torch.isfinite(view).all()) for view in module.last_step.z):
            self._stop(trainer, module, "the embedding")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"].items()
        bad = [name for name, value in state if value.is_floating_point() and not bool(torch.isfinite(value).all())]
        if bad:
            assert isinstance(pl_module, PretrainModule)  # narrows the type
            self._stop(trainer, pl_module, f"'{bad[0]}', with {len(bad) - 1} other tensors of the model,")

    def _stop(self, trainer: Trainer, module: PretrainModule, what: str) -> None:
        step = module.last_step
        assert step is not None  # there was one
        statistics, gradients = _statistics(module, step), _gradients(module).items()
        report = {
            "what": what.strip(","),
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "images": step.images.tolist(),
            "rows_not_finite": [int((~torch.isfinite(view)).any(1).sum()) for view in step.z],
            "gradients_not_finite": [name for name, g in gradients if not bool(torch.isfinite(g).all())],
            "statistics": statistics,
        }
        # In every process, as each has images of its own; the first one's is kept.
        if trainer.is_global_zero:
            files.write_text(self.out / REPORT, json.dumps(report, indent=2) + "\n")
        images = ", ".join(map(str, step.images[:SHOWN].tolist())) + (", ..." if len(step.images) > SHOWN else "")
        lines = "".join(
            f"\n  {name}: mean {s['mean']:.4g}, min {s['min']:.4g}, max {s['max']:.4g}"
            for name, s in statistics.items()
        )
        finished = (self.out / "checkpoints" / "last.ckpt").exists()
        kept = "The checkpoint of the last finished epoch is as it was. " if finished else ""
        raise RunStopped(
            f"{what} is not finite: epoch {trainer.current_epoch}, step {trainer.global_step}, images {images}; all in "
            f"{self.out / REPORT}. What is finite of the batch:{lines or ' nothing'}\n"
            f"{kept}A smaller lr, a longer warmup_epochs or a larger temperature may help, in another out; "
            "nan_guard=false goes on all the same."
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where it is that, whose finite numbers may be infinite in float32."""
    return torch.promote_types(dtype, torch.float32)


def _gradients(module: PretrainModule) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def _statistics(module: PretrainModule, step: Step) -> dict[str, dict[str, float]]:
    """Mean, min and max of the lengths of the embeddings, and of similarities and temperatures of their pairs."""
    rows = torch.stack([torch.isfinite(view).all(1) for view in step.z]).all(0)
    z = [view[rows].to(_wide(view.dtype)) for view in step.z]
    if not len(z[0]):
        return {}
    length = torch.cat(z).norm(dim=1)
    found = {"length of an embedding": {how: float(getattr(length, how)()) for how in ("mean", "min", "max")}}
    if len(z[0]) > 1 or module.loss.queue is not None:
        for s in summaries(module.loss, *z, index=step.images[rows], epoch=step.epoch):
            found[f"{s.quantity} of {s.pairs} pairs"] = s.statistics
    return found
