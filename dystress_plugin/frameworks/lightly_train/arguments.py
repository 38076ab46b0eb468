"""`method_args`: a pydantic model for every recipe of the table, checked as LightlyTrain checks its own."""

from __future__ import annotations

import typing
from typing import Any, ClassVar, Literal

from lightly_train._methods.method_args import MethodArgs
from lightly_train._methods.simclr.simclr import SimCLRArgs
from pydantic import Field, create_model, model_validator

from dystress_plugin.contrastive import ContrastiveLoss
from dystress_plugin.recipes import Recipe, class_name

LARGEST_QUEUE = 65536  # MoCo's own, for ImageNet

# The projector's settings as LightlyTrain's SimCLR has them; its temperature is none of a recipe's parameters.
_HEAD: dict[str, Any] = {
    name: (field.annotation, field.default)
    for name, field in SimCLRArgs.model_fields.items()
    if name not in MethodArgs.model_fields and name != "temperature"
}


class ViewsArgs(create_model("HeadArgs", __base__=MethodArgs, **_HEAD)):  # type: ignore[misc]
    """Settings of a method that compares the views of a batch; a subclass of each recipe adds its parameters.

    Attributes:
        hidden_dim, output_dim, num_layers, batch_norm: the projector, with the defaults of LightlyTrain's SimCLR.
        diagnostics_every_n_steps: how often to write `diagnostics.csv`, see `dystress_plugin.diagnostics`; None never.
        chunk_size: images that the model embeds at a time, see `dystress_plugin.embed_in_chunks`; None is all.
        temperature_lr: learning rate of what a temperature learns; None is a tenth of the network's.
    """

    recipe: ClassVar[Recipe]
    diagnostics_every_n_steps: int | None = Field(default=None, ge=1)
    chunk_size: int | None = Field(default=None, ge=1)
    temperature_lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    def criterion(self, **more: Any) -> ContrastiveLoss:
        """The loss with these settings, over all ranks; with an empty table where the method keeps one.

        Raises:
            ValueError: for a parameter out of its range.
        """
        own = {name: getattr(self, name) for name in self.recipe.choices}
        settings = self.recipe.sized(own, dim=self.output_dim)
        return ContrastiveLoss(self.recipe.name, gather_distributed=True, **settings, **more)

    @property
    def temperature(self) -> float:
        """What the constructor of LightlyTrain's SimCLR reads for a criterion that ours replaces."""
        return 1.0

    @model_validator(mode="after")
    def _check_ranges(self) -> ViewsArgs:
        ViewsArgs.criterion(self, queue_size=(1, 1) if self.recipe.queue else None)
        return self


class QueueArgs(ViewsArgs):
    """Settings of a method with a momentum encoder and a queue of its keys; the projector is MoCo v2's.

    Attributes:
        queue_size: number of keys; "auto" is half of the data set, at most 65,536.
        momentum_start: share of the key encoder that a step keeps, in [0, 1], at the beginning.
        momentum_end: the same at the end, reached on half a cosine.
    """

    batch_norm: bool = False
    queue_size: int | Literal["auto"] = "auto"
    momentum_start: float = Field(default=0.999, ge=0, le=1)
    momentum_end: float = Field(default=0.999, ge=0, le=1)

    def resolve_auto(self, scaling_info: Any, **others: Any) -> None:
        """Sets `queue_size` where it is "auto"; the arguments are LightlyTrain's."""
        super().resolve_auto(scaling_info=scaling_info, **others)
        if self.queue_size == "auto":
            self.queue_size = min(LARGEST_QUEUE, max(1, scaling_info.dataset_size // 2))

    def criterion(self, **more: Any) -> ContrastiveLoss:
        return super().criterion(queue_size=(self.queue_size, self.output_dim), **more)


# By whether a recipe has a queue.
BASES: dict[bool, type[ViewsArgs]] = {False: ViewsArgs, True: QueueArgs}


def args_class(recipe: Recipe) -> type[ViewsArgs]:
    """The model for a recipe: what its layout has, and each parameter with its type and default."""
    types = typing.get_type_hints(recipe.temperature.__init__)
    fields = {
        key: (types.get(key, float), Field(default=default, **_strictly(types.get(key, float))))
        for key, default in recipe.choices.items()  # the length of a table comes with the data
    }
    name = f"{class_name(recipe)}Args"
    model: type[ViewsArgs] = create_model(name, __base__=BASES[recipe.queue], __module__=__name__, **fields)  # type: ignore[call-overload]
    model.recipe = recipe
    return model


def _strictly(kind: Any) -> dict[str, Any]:
    """How a field of this type is checked: lists, as a command line has them, may stand for tuples; Any is anything."""
    return {} if kind is Any else {"strict": "tuple" not in str(kind)}
