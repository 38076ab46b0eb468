"""Classes for LightlyTrain's methods, one for every recipe of the table; model, transform, optimizer are its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightly.utils.scheduler import cosine_schedule
from lightly_train._methods.densecl.densecl import DenseCL
from lightly_train._methods.method import TrainingStepResult
from lightly_train._methods.simclr import simclr as host
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from dystress_plugin import diagnostics, training
from dystress_plugin.chunks import check_chunks, embed_in_chunks
from dystress_plugin.frameworks.lightly_train.arguments import ViewsArgs, args_class
from dystress_plugin.recipes import Recipe


class ViewsMethod(host.SimCLR):
    """LightlyTrain's SimCLR with our loss in the place of its criterion.

    Beside `train_loss` it logs, in the steps that the Trainer logs, what the temperature does to the batch
    (`dystress_plugin.metrics.temperature_summary`).

    A method with a table of samples (iSogCLR) tells images apart by the filenames of LightlyTrain's data set.
    """

    recipe: ClassVar[Recipe]
    args: ClassVar[type[ViewsArgs]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_chunks(self.method_args.chunk_size, self.embedding_model)
        self.criterion = self.method_args.criterion()
        self._sample_numbers: dict[str, int] = {}

    @classmethod
    def method_args_cls(cls) -> type[ViewsArgs]:
        return cls.args

    def embed(self, views: Sequence[Tensor]) -> Sequence[Tensor]:
        """From the views of a batch, each (batch, channels, height, width), to what the loss compares."""
        z = self._project(self.embedding_model, self.projection_head, torch.cat(list(views)))
        return z.chunk(len(views))

    def _project(self, model: nn.Module, head: nn.Module, images: Tensor) -> Tensor:
        z: Tensor = head(self.flatten(embed_in_chunks(model, images, self.method_args.chunk_size)))
        return z

    def training_step_impl(self, batch: Mapping[str, Any], batch_idx: int) -> TrainingStepResult:
        z = self.embed(batch["views"])
        index = self._index(batch["filename"]) if self.criterion.temperature.needs_index else None
        epoch = training.clock(self, self.criterion.temperature, batch_idx)
        loss = training.contrast(self, self.criterion, z, batch_idx, index=index, epoch=epoch)
        return TrainingStepResult(loss=loss)

    def configure_optimizers(self) -> Any:
        """Adds what the temperature trains, to LightlyTrain's optimizer and its schedule."""
        [optimizer], [scheduled] = super().configure_optimizers()
        theirs = scheduled["scheduler"]
        for group in training.own_group(self.criterion, theirs.base_lrs[0], self.method_args.temperature_lr):
            optimizer.add_param_group(group)
            scheduled["scheduler"] = type(theirs)(optimizer, theirs.warmup_epochs, theirs.max_epochs)
        return [optimizer], [scheduled]

    def configure_callbacks(self) -> list[Any]:
        return diagnostics.callbacks(self.method_args.diagnostics_every_n_steps)

    def setup(self, stage: str) -> None:
        """Gives a table of samples its length; also on resuming, before the checkpoint is read."""
        super().setup(stage)
        if stage != "fit":
            return
        training.check_has_steps(self.trainer, "batch_size / devices")
        temperature = self.criterion.temperature
        if temperature.needs_index:
            self._sample_numbers = sample_numbers(self.trainer.train_dataloader.dataset)
            training.size_table(temperature, len(self._sample_numbers))

    def on_fit_start(self) -> None:
        """Warns of a schedule that the training is too short for."""
        super().on_fit_start()
        training.warn_of_concerns(self.criterion.temperature, self.trainer.max_epochs, rank_zero_warn)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """With LightlyTrain's `checkpoint=` the weights alone: another run's queue or table says nothing here."""
        if self._trainer is None:
            own = {name: value for name, value in self.state_dict().items() if _of_criterion(name)}
            state_dict = {name: value for name, value in state_dict.items() if not _of_criterion(name)} | own
        known = len(self._sample_numbers) or None
        training.make_room(self.criterion.temperature, state_dict, "criterion.temperature.", known)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _index(self, filenames: Sequence[str]) -> Tensor:
        return torch.tensor([self._sample_numbers[name] for name in filenames])


class QueueMethod(ViewsMethod):
    """MoCo v2: keys from a momentum encoder, in batches shuffled over all devices, and a queue of them.

    Transform and optimizer are those of LightlyTrain's DenseCL, which is MoCo v2 with a second, local loss.
    """

    # Static methods of a class that is no base of this one.
    transform_cls = staticmethod(DenseCL.transform_cls)
    optimizer_args_cls = staticmethod(DenseCL.optimizer_args_cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        copies = training.momentum_copies(self.embedding_model, self.projection_head)
        self.key_embedding_model, self.key_projection_head = copies

    def embed(self, views: Sequence[Tensor]) -> Sequence[Tensor]:
        query_images, key_images = views
        queries = self._project(self.embedding_model, self.projection_head, query_images)
        momentum = cosine_schedule(
            step=self.trainer.global_step,
            max_steps=self.trainer.estimated_stepping_batches,
            start_value=self.method_args.momentum_start,
            end_value=self.method_args.momentum_end,
        )
        pairs = ((self.embedding_model, self.key_embedding_model), (self.projection_head, self.key_projection_head))
        training.update_momentum(pairs, momentum)
        keys = training.shuffled_keys(self._encode_keys, key_images, distributed=self.trainer.world_size > 1)
        return queries, keys

    def _encode_keys(self, images: Tensor) -> Tensor:
        return self._project(self.key_embedding_model, self.key_projection_head, images)


# By whether a recipe has a queue.
BASES: dict[bool, type[ViewsMethod]] = {False: ViewsMethod, True: QueueMethod}


def sample_numbers(dataset: Any) -> dict[str, int]:
    """From filename to sample number, the same in every process and on resuming; a file listed twice has one.

    Raises:
        ValueError: for a data set that does not list filenames.
    """
    names = getattr(dataset, "image_filenames", None)
    if names is None:
        raise ValueError(
            f"Temperatures of single images need to know which image is which, and {type(dataset).__name__} does not "
            "list its image_filenames: give LightlyTrain a folder, or a list of folders and files."
        )
    unique = {name["filenames"] if isinstance(name, Mapping) else name for name in names}
    return {name: number for number, name in enumerate(sorted(unique))}


def _of_criterion(name: str) -> bool:
    return name.startswith("criterion.")


CLASSES: dict[str, type[ViewsMethod]] = training.method_classes(
    BASES, __name__, lambda recipe: {"recipe": recipe, "args": args_class(recipe)}
)
