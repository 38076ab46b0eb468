"""Classes for solo-learn's METHODS, one for every recipe of the table.

Importing this module needs solo-learn; `registration.register` does it when one of its scripts starts.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dystress_plugin import ContrastiveLoss, diagnostics, training
from dystress_plugin.chunks import Encoder, check_chunks, embed_in_chunks
from dystress_plugin.errors import to_install
from dystress_plugin.frameworks.solo import fixes
from dystress_plugin.frameworks.solo.locate import ADVICE
from dystress_plugin.frameworks.solo.settings import CHUNK, DIAGNOSTICS, TEMPERATURE_LR, complete, loss_settings
from dystress_plugin.recipes import Recipe
from dystress_plugin.temperature import Temperature

try:
    import solo
    from solo.methods import MoCoV2Plus, SimCLR
    from solo.methods.base import BaseMethod, BaseMomentumMethod
except ImportError as error:
    advice = ADVICE if error.name == "solo" else f"Install what it needs: {to_install('solo', error)}"
    raise ImportError(f"solo-learn cannot be imported ({error}).\n{advice}", name=error.name) from error


def say(line: str) -> None:
    """Prints a line on rank 0: Hydra, as solo-learn's configs set it up, leaves no logger that would be heard."""
    if rank_zero_only.rank == 0:
        print(line, file=sys.stderr)


class AdaptiveTemperature(LightningModule):
    """What every layout shares: the settings, the loss, and a table that knows its size only from the data set.

    Stands before a method of solo-learn among the bases of a class.
    """

    recipe: ClassVar[Recipe]

    def __init__(self, cfg: DictConfig) -> None:
        fixes.for_training(cfg)
        super().__init__(cfg)
        settings = loss_settings(self.recipe, OmegaConf.to_container(cfg.method_kwargs))
        self._num_samples = self.recipe.table_length(settings)
        # A table has one entry until setup() or a checkpoint knows better.
        settings = self.recipe.sized(settings, dim=cfg.method_kwargs.proj_output_dim)
        self.contrastive = ContrastiveLoss(
            self.recipe.name, queue_size=_queue_size(cfg), gather_distributed=True, **settings
        )
        _warn_if_too_short(cfg, self.contrastive.temperature)
        check_chunks(self._chunk_size, self.backbone, name=f"method_kwargs.{CHUNK}")

    @classmethod
    def add_and_assert_specific_cfg(cls, cfg: DictConfig) -> DictConfig:
        """Fills the method's parameters into `cfg.method_kwargs`, then what solo-learn's own class adds."""
        given = cfg.get("method_kwargs") or {}
        if isinstance(given, DictConfig):
            given = OmegaConf.to_container(given, resolve=True, throw_on_missing=True)
        cfg.method_kwargs, notes = complete(cls.recipe, given, keys_of_others)
        for note in notes:
            say(note)
        # args.json is written unresolved; a name that is spelled out can be read there, and by older code.
        OmegaConf.resolve(cfg)
        return super().add_and_assert_specific_cfg(cfg)

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """Adds what the temperature trains."""
        groups: list[dict[str, Any]] = super().learnable_params
        return groups + training.own_group(self.contrastive, self.lr, self.cfg.method_kwargs.get(TEMPERATURE_LR))

    def configure_callbacks(self) -> list[Any]:
        """Adds ours, and the diagnostics where `method_kwargs` asks for them: main_pretrain.py takes no callbacks."""
        return [HowToResume(), *diagnostics.callbacks(self.cfg.method_kwargs.get(DIAGNOSTICS))]

    def contrast(self, index: Tensor, batch_idx: int, *sides: tuple[ContrastiveLoss, Sequence[Tensor]]) -> Tensor:
        """The mean of some losses, logged as solo-learn's methods do, and what the temperature does to the first.

        Args:
            index: (batch,) sample numbers, `batch[0]` of solo-learn's data sets.
            batch_idx: number of the batch within the epoch.
            *sides: losses that share the method's temperature, each with what it is called with.
        """
        temperature = self.contrastive.temperature
        numbers = index if temperature.needs_index else None
        epoch = training.clock(self, temperature, batch_idx)
        (first, views), *others = sides
        values = [training.contrast(self, first, views, batch_idx, index=numbers, epoch=epoch, on_epoch=True)]
        values += [loss(*views, index=numbers, epoch=epoch) for loss, views in others]
        mean: Tensor = sum(values[1:], values[0]) / len(values)
        self.log("train_nce_loss", mean, on_epoch=True, sync_dist=True)
        return mean

    @property
    def _chunk_size(self) -> int | None:
        size: int | None = self.cfg.method_kwargs.get(CHUNK)
        return size

    def forward(self, X: Tensor) -> Any:
        """solo-learn's, in chunks where `method_kwargs` asks for them."""
        encoder = Encoder(super().forward, self.backbone, self.projector, self.classifier)
        return embed_in_chunks(encoder, X, self._chunk_size)

    def multicrop_forward(self, X: Tensor) -> Any:
        """Likewise, of small crops."""
        encoder = Encoder(super().multicrop_forward, self.backbone, self.projector)
        return embed_in_chunks(encoder, X, self._chunk_size)

    def setup(self, stage: str) -> None:
        """Gives a table of samples its length, from `method_kwargs.num_samples` or the data set itself."""
        super().setup(stage)
        if stage != "fit":
            return
        training.check_has_steps(self.trainer, "optimizer.batch_size")
        temperature = self.contrastive.temperature
        if not temperature.needs_index:
            return
        size = self._training_samples()
        if self._num_samples is None:
            training.size_table(temperature, size)
            self._num_samples = size
        elif self._num_samples < size:
            raise ValueError(f"method_kwargs.num_samples={self._num_samples}, but there are {size} training images.")

    def _training_samples(self) -> int:
        if self.cfg.data.format == "dali" and not OmegaConf.select(self.cfg, "dali.encode_indexes_into_labels"):
            raise ValueError(
                f"Method '{self.recipe.name}' needs the number of every image, and dali hides it: set "
                "dali.encode_indexes_into_labels=True, or data.format=image_folder."
            )
        dataset = getattr(self.trainer.train_dataloader, "dataset", None)
        if dataset is not None:
            return len(dataset)
        if self._num_samples is None:
            raise ValueError(
                f"Method '{self.recipe.name}' needs method_kwargs.num_samples: data.format={self.cfg.data.format} does "
                "not tell the number of training images."
            )
        return self._num_samples

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes room for the table of a checkpoint where this object does not know the data set."""
        super().on_load_checkpoint(checkpoint)
        temperature, state = self.contrastive.temperature, checkpoint["state_dict"]
        training.make_room(temperature, state, "contrastive.temperature.", self._num_samples)


class HowToResume(Callback):
    """Says after Ctrl-C how the training goes on."""

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, KeyboardInterrupt):
            return
        saved = next(filter(None, (getattr(callback, "last_ckpt", None) for callback in trainer.callbacks)), None)
        if saved is None:
            how = "there is no checkpoint yet, and the same command starts anew (checkpoint.enabled, .frequency)"
        elif OmegaConf.select(module.cfg, "auto_resume.enabled"):
            how = f"the same command goes on from {saved}"
        else:
            how = f"add '+resume_from_checkpoint=\"{saved}\"' to the command to go on"
        say(f"Interrupted in epoch {trainer.current_epoch}: {how}.")


class TwoViews(AdaptiveTemperature, SimCLR):
    """All crops of a batch, the small ones too, are views of their images, as in solo-learn's SimCLR."""

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        # BaseMethod's: SimCLR's own would compute its loss as well.
        out = BaseMethod.training_step(self, batch, batch_idx)
        loss: Tensor = self.contrast(batch[0], batch_idx, (self.contrastive, out["z"])) + out["loss"]
        return loss


class TwoQueues(AdaptiveTemperature, MoCoV2Plus):
    """Each view's queries against the other's momentum keys and a queue of these, as in solo-learn's MoCoV2Plus.

    Its networks, their momentum update and its settings are MoCoV2Plus's; loss and queues are ours, so that a batch
    need not divide the queue. `contrastive` keeps the keys of view 1, `swapped` those of view 0.
    """

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        del self.queue, self.queue_ptr
        settings: dict[str, Any] = self.contrastive.objective_settings
        self.swapped = ContrastiveLoss(
            self.contrastive.temperature,
            objective=self.contrastive.objective,
            queue_size=_queue_size(cfg),
            gather_distributed=True,
            **settings,
        )

    @classmethod
    def add_and_assert_specific_cfg(cls, cfg: DictConfig) -> DictConfig:
        """As for the other layouts; a config of a method without momentum encoder gets solo-learn's defaults for it."""
        cfg.momentum = cfg.get("momentum") or {}  # solo-learn fills it, but only where there is one
        cfg = super().add_and_assert_specific_cfg(cfg)
        if small := cfg.data.num_small_crops:
            raise ValueError(
                f"Method '{cls.recipe.name}' compares two crops with a queue and has no use for the {small} small ones "
                "of these augmentations: take them out."
            )
        return cfg

    def momentum_forward(self, X: Tensor) -> Any:
        """MoCoV2Plus's, in chunks likewise; it has no gradient."""
        return embed_in_chunks(Encoder(super().momentum_forward), X, self._chunk_size)

    def training_step(self, batch: Sequence[Any], batch_idx: int) -> Tensor:
        # BaseMomentumMethod's: MoCoV2Plus's own would compute its loss as well.
        out = BaseMomentumMethod.training_step(self, batch, batch_idx)
        (query_0, query_1), (key_0, key_1) = out["z"], out["momentum_z"]
        sides = (self.contrastive, (query_0, key_1)), (self.swapped, (query_1, key_0))
        loss: Tensor = self.contrast(batch[0], batch_idx, *sides) + out["loss"]
        return loss


# By whether a recipe has a queue.
BASES: dict[bool, type[AdaptiveTemperature]] = {False: TwoViews, True: TwoQueues}


CLASSES: dict[str, type[AdaptiveTemperature]] = training.method_classes(
    BASES, __name__, lambda recipe: {"recipe": recipe}
)


@functools.cache
def keys_of_others() -> dict[str, str]:
    """Keys in `method_kwargs` that solo-learn's own methods read or its templates set, with a method that has each."""
    found: dict[str, str] = {}
    for path in sorted((Path(solo.__file__).parents[1] / "scripts" / "pretrain").rglob("*.yaml")):
        template = OmegaConf.load(path)
        if isinstance(template, DictConfig):  # lists of augmentations are beside them
            found |= dict.fromkeys(template.get("method_kwargs") or {}, path.stem)
    for name, cls in solo.methods.METHODS.items():
        if cls.__module__.startswith("solo."):
            found |= dict.fromkeys(re.findall(r"method_kwargs\.(\w+)", inspect.getsource(cls)), name)
    return found


def _queue_size(cfg: DictConfig) -> tuple[int, int] | None:
    keys = cfg.method_kwargs.get("queue_size")
    return None if keys is None else (keys, cfg.method_kwargs.proj_output_dim)


def _warn_if_too_short(cfg: DictConfig, temperature: Temperature) -> None:
    epochs = cfg.max_epochs
    training.warn_of_concerns(temperature, epochs, rank_zero_warn)
    if cfg.scheduler.name == "warmup_cosine" and epochs <= cfg.scheduler.warmup_epochs:
        rank_zero_warn(
            f"max_epochs={epochs} ends within scheduler.warmup_epochs={cfg.scheduler.warmup_epochs}: the learning "
            "rate never reaches optimizer.lr."
        )
