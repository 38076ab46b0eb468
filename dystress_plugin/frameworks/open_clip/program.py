"""open_clip's own training program with another loss: which of its functions are replaced, in 3.3 and in 4."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dystress_plugin import distributed
from dystress_plugin.chunks import Encoder, check_chunks, embed_in_chunks
from dystress_plugin.errors import needing
from dystress_plugin.frameworks.open_clip.loss import MAX_SCALE, ContrastiveClipLoss
from dystress_plugin.metrics import temperature_summary
from dystress_plugin.recipes import Recipe
from dystress_plugin.training import warn_of_concerns

with needing("open-clip"):
    import open_clip
    from open_clip_train import main as program
    from open_clip_train.params import parse_args

    from dystress_plugin.frameworks.open_clip import numbers

# What a model's forward pass calls, in 3.3 and in 4; those that it has.
ENCODERS = [f"{start}encode_{side}" for start in ("", "_") for side in ("image", "audio", "text")]
TASKS = ("CLIPTask", "CLAPTask")
STATE = "contrastive_loss"  # of the loss, in a checkpoint
LR = 3e-5  # TempNet's, 2024, https://arxiv.org/abs/2404.04575
UNSIZED = 1  # a table's length before that of the data is known
LOGGED = ("tau_positive_mean", "tau_negative_mean", "alignment", "uniformity")
_logger = logging.getLogger(__name__)


def build(
    method: Recipe, settings: Mapping[str, Any], arguments: Sequence[str], chunk_size: int | None = None
) -> ContrastiveClipLoss:
    """A method's loss for a training with open_clip's arguments.

    Args:
        method: the method.
        settings: its parameters; the lengths of tables and of embeddings may be left out.
        arguments: open_clip's.
        chunk_size: pairs that will be embedded at a time; None is all.

    Raises:
        ValueError: before anything is loaded, for arguments or settings that do not go with each other.
    """
    args = parse_args(list(arguments))
    model = open_clip.get_model_config(args.model) or {}
    lengths = [UNSIZED, *([model["embed_dim"]] if "embed_dim" in model else [])]
    loss = ContrastiveClipLoss(method.name, **method.sized(settings, *lengths))
    _check(args, loss)
    if chunk_size is not None:
        _check_chunks(args, chunk_size)
    return loss


def train(loss: ContrastiveClipLoss, arguments: Sequence[str], lr: float = LR, chunk_size: int | None = None) -> None:
    """Runs `open_clip_train.main` with the arguments given, and the loss in the place of ClipLoss.

    Args:
        loss: as `build` makes it.
        arguments: open_clip's.
        lr: learning rate of what the temperature learns beside the model's scale, by Adam.
        chunk_size: pairs that are embedded at a time, see `dystress_plugin.embed_in_chunks`; None is all.

    Raises:
        ValueError: for data, or a checkpoint, that do not go with the loss.
    """
    with ExitStack() as replaced:
        replacements = _Training(loss, lr).replacements
        if chunk_size is not None:
            create = program.create_model_and_transforms
            replacements["create_model_and_transforms"] = functools.partial(_create_in_chunks, create, chunk_size)
        for name, function in replacements.items():
            replaced.enter_context(mock.patch.object(program, name, function))
        program.main(list(arguments))


def _check(args: Any, loss: ContrastiveClipLoss) -> None:
    """A ValueError for what open_clip would do with another loss than ours, or to it."""
    other = {"siglip": "--siglip", "distill": "--distill", "distill_model": "--distill-model", "genlip": "--genlip"}
    for name, option in other.items():
        if getattr(args, name, None):
            raise ValueError(f"{option} trains with a loss of its own: leave it out, or train without method=...")
    if "coca" in args.model.lower():
        raise ValueError(f"--model {args.model} has a loss for captions besides: choose a model of CLIP.")
    if _has_state(loss) and args.accum_freq > 1:
        raise ValueError(
            f"--accum-freq {args.accum_freq} computes the loss of a batch {args.accum_freq} times, and this method "
            "keeps state that moves each time: use --chunk-size, which saves as much memory and keeps all negatives."
        )
    if _has_state(loss) and getattr(args, "fsdp", False) and getattr(args, "fsdp_checkpoint", "full") == "sharded":
        raise ValueError("--fsdp-checkpoint sharded has no place for the state of this method: choose full.")
    if args.local_loss or args.gather_with_grad:
        _logger.warning("--local-loss and --gather-with-grad change nothing: the loss gathers itself, with gradient.")


def _check_chunks(args: Any, chunk_size: int) -> None:
    """A ValueError for what has no place for encoders that are called in parts, and again in the backward pass."""
    for name in ("torchcompile", "torchscript", "trace", "fsdp"):
        if getattr(args, name, False):
            raise ValueError(
                f"--{name} takes a model as it is, and --chunk-size {chunk_size} changes it: leave one out."
            )


def _create_in_chunks(create: Callable[..., Any], chunk_size: int, *given: Any, **named: Any) -> Any:
    """open_clip's model, whose encoders embed in chunks, and its transforms."""
    model, *transforms = create(*given, **named)
    check_chunks(chunk_size, model, name="--chunk-size")
    for name in filter(lambda name: hasattr(model, name), ENCODERS):
        setattr(model, name, functools.partial(_encode, model, getattr(model, name), chunk_size))
    return model, *transforms


def _encode(
    model: nn.Module, encode: Callable[..., Tensor], chunk_size: int, samples: Any, *given: Any, **named: Any
) -> Any:
    return embed_in_chunks(Encoder(lambda part: encode(part, *given, **named), model), samples, chunk_size)


def _has_state(loss: ContrastiveClipLoss) -> bool:
    return bool(list(loss.buffers()) or _trained(loss))


def _trained(loss: ContrastiveClipLoss) -> list[nn.Parameter]:
    return [parameter for parameter in loss.parameters() if parameter.requires_grad]


class _Training:
    """One run: what stands in the place of the program's functions, and what it remembers between them."""

    def __init__(self, loss: ContrastiveClipLoss, lr: float) -> None:
        self.loss = loss
        # open_clip builds its own before it knows the loss, and gives every group the same rate.
        self.optimizer = torch.optim.Adam(_trained(loss), lr=lr) if _trained(loss) else None
        self.has_tasks = hasattr(program, "create_task")  # 4; 3.3 takes the loss by itself
        names = ["get_data", "train_one_epoch"]
        names += ["create_task", "save_checkpoint", "load_checkpoint"] if self.has_tasks else ["create_loss"]
        self.original = {name: getattr(program, name) for name in names}
        self.replacements: dict[str, Callable[..., Any]] = {name: getattr(self, name) for name in names}
        self.resumed: dict[str, Any] | None = None  # the loss's state, until the length of its tables is known
        self.begun = False
        self.seen: tuple[Tensor, Tensor] | None = None  # the last batch
        loss.register_forward_hook(self._remember, with_kwargs=True)

    def _remember(self, loss: nn.Module, _: Any, features: dict[str, Any], value: Any) -> None:
        self.seen = (features["image_features"].detach(), features["text_features"].detach())

    def create_loss(self, args: Any) -> ContrastiveClipLoss:
        return self.loss.to(args.device)

    def create_task(self, args: Any, *given: Any, **named: Any) -> Any:
        task = self.original["create_task"](args, *given, **named)
        if type(task).__name__ not in TASKS:
            raise ValueError(f"--model {args.model} is trained as {type(task).__name__}, which has another loss.")
        task.loss = self.loss.to(args.device)
        return task

    def get_data(self, *given: Any, **named: Any) -> Any:
        with ExitStack() as replaced:
            for module in _loader_modules() if self._has_table else ():
                keyed = numbers.KeyedWebdataset(module.wds)
                replaced.enter_context(mock.patch.multiple(module, DataLoader=numbers.NumberedLoader, wds=keyed))
            data = self.original["get_data"](*given, **named)
        if "train" in data:
            loader = data["train"].dataloader
            sides = self._size_tables(loader) if self._has_table else None
            data["train"].dataloader = _Batches(loader, self.loss, sides, self.optimizer)
        return data

    @property
    def _has_table(self) -> bool:
        return any(temperature.num_samples is not None for temperature in self.loss.criterion.temperatures)

    def _size_tables(self, loader: Any) -> tuple[Tensor, Tensor] | None:
        """Gives tables without a length that of the data; returns what `numbers.of_sides` does."""
        sides = numbers.of_sides(loader)
        rows: int | None = getattr(loader, "rows", None)
        temperatures = self.loss.criterion.temperatures
        unsized = any(UNSIZED in temperature.table_lengths for temperature in temperatures)
        if rows is None:
            if unsized:
                raise ValueError("A webdataset hides its largest key: set method_kwargs.num_samples to one more.")
            return None
        found = [int(side.max()) + 1 for side in sides] if sides else [rows, rows]
        # A table for each side, of two temperatures or within one.
        of_each = [found] if len(temperatures) == 1 else [[length] for length in found]
        for temperature, wanted in zip(temperatures, of_each, strict=True):
            there, most = max(temperature.table_lengths), max(wanted)
            if unsized:
                temperature.resize(wanted if len(wanted) > 1 else most)  # type: ignore[arg-type]  # where it holds two
            elif there < most:
                raise ValueError(
                    f"method_kwargs.num_samples is {there}, and the data have {most} samples: leave it out."
                )
        return sides

    def train_one_epoch(self, *given: Any, **named: Any) -> Any:
        bound = inspect.signature(self.original["train_one_epoch"]).bind(*given, **named).arguments
        args, state, batches = bound["args"], bound.get("state"), bound["data"]["train"].dataloader
        batches.epoch = state.epoch if state else bound["epoch"]
        batches.scaler = state.scaler if state else bound["scaler"]
        if not self.begun:
            self._begin(args, batches.epoch)
        result = self.original["train_one_epoch"](*given, **named)
        model = state.task.trainable_module if state else bound["model"]
        self._end_epoch(model, args, batches.epoch, bound.get("tb_writer"))
        return result

    def _begin(self, args: Any, epoch: int) -> None:
        self.begun = True
        warn_of_concerns(self.loss.criterion.temperature, args.epochs, _logger.warning)
        if not (epoch and _has_state(self.loss)):
            return
        beside = _beside(Path(args.resume).parent, epoch)
        state = self.resumed
        if state is None and beside.exists():
            state = torch.load(beside, map_location="cpu", weights_only=True)
        if state is None:
            raise ValueError(
                f"--resume {args.resume} has no state of this method: it was trained without, or {beside.name} is "
                "missing beside it."
            )
        self.loss.load_state_dict(state["loss"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])

    def _state(self) -> dict[str, Any]:
        own = {} if self.optimizer is None else {"optimizer": self.optimizer.state_dict()}
        return {"loss": self.loss.state_dict(), **own}

    @torch.no_grad()
    def _end_epoch(self, model: nn.Module, args: Any, epoch: int, writer: Any) -> None:
        """Logs the temperatures, writes their mean into the model's scale, saves what 3.3's checkpoint cannot hold."""
        if self.seen is None:
            return
        loss, index = self.loss, self.loss.index
        found = temperature_summary(loss.criterion, *self.seen, index=index, epoch=loss.epoch)
        means = {name: float(distributed.mean_over_ranks(found[name].reshape(1))) for name in LOGGED}
        if program.is_master(args):
            _logger.info(f"Train Epoch: {epoch} " + " ".join(f"{name}: {value:.4g}" for name, value in means.items()))
            for name, value in means.items():
                if writer is not None:
                    writer.add_scalar(f"train/{name}", value, epoch)
            if args.wandb:
                program.wandb.log({f"train/{name}": value for name, value in means.items()}, commit=False)
        if not loss.trains_scale:
            tau = (means["tau_positive_mean"] + means["tau_negative_mean"]) / 2
            _scale_of(model).fill_(min(max(-math.log(tau), 0.0), MAX_SCALE))
        if _has_state(loss) and args.save_logs and not self.has_tasks:
            _save_beside(Path(args.checkpoint_path), epoch + 1, self._state())

    def save_checkpoint(self, *given: Any, **named: Any) -> Any:
        checkpoint = self.original["save_checkpoint"](*given, **named)
        return {**checkpoint, STATE: self._state()} if _has_state(self.loss) else checkpoint

    def load_checkpoint(self, task: Any, path: str, *given: Any, **named: Any) -> Any:
        from open_clip_train.file_utils import pt_load

        self.resumed = pt_load(path, map_location="cpu").get(STATE)
        return self.original["load_checkpoint"](task, path, *given, **named)


class _Batches:
    """The training data, which tells the loss the number of every sample, and the epoch.

    What the temperature learns is moved after each batch.
    """

    def __init__(
        self,
        loader: Any,
        loss: ContrastiveClipLoss,
        sides: tuple[Tensor, Tensor] | None,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self._loader = loader
        self._loss = loss
        self._sides = sides
        self._optimizer = optimizer
        self.epoch = 0
        self.scaler: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        loss = self._loss
        for step, batch in enumerate(self._loader):
            batch, rows = numbers.split(batch)
            loss.index = rows if rows is None or self._sides is None else (self._sides[0][rows], self._sides[1][rows])
            loss.epoch = loss.criterion.temperature.clock(self.epoch, step, self._loader.num_batches)
            if self._optimizer is None:
                yield batch
            else:
                scale = self.scaler.get_scale() if self.scaler else 1.0  # which changes with the step
                yield batch
                _step(self._optimizer, scale)


def _loader_modules() -> list[Any]:
    """Those that make loaders: of images, and in 4 of sounds."""
    names = [f"open_clip_train.{name}" for name in ("data", "audio_data")]
    return [importlib.import_module(name) for name in names if importlib.util.find_spec(name)]


def _step(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """A step with gradients that are `scale` times too large; none where they have overflowed."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for gradient in gradients:
        gradient /= scale
    if all(bool(gradient.isfinite().all()) for gradient in gradients):
        optimizer.step()
    optimizer.zero_grad()


def _scale_of(model: nn.Module) -> Tensor:
    return next(p for name, p in model.named_parameters() if name.rpartition(".")[2] == "logit_scale")


def _beside(folder: Path, epoch: int) -> Path:
    # Not .pt: `--resume latest` takes the last of those.
    return folder / f"loss_epoch_{epoch}.pth"


def _save_beside(folder: Path, epoch: int, state: dict[str, Any]) -> None:
    """Writes the loss's state for the checkpoint of an epoch, and removes those whose checkpoint is gone.

    The last two stay in any case: this one's checkpoint is written after it, and a run may end in between.
    """
    path = _beside(folder, epoch)
    torch.save(state, partial := path.with_suffix(".tmp"))
    partial.replace(path)
    for old in folder.glob("loss_epoch_*.pth"):
        number = int(old.stem.rpartition("_")[2])
        if number < epoch - 1 and not (folder / f"epoch_{number}.pt").exists():
            old.unlink()
