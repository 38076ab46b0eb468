"""What is run: `PretrainSettings` with a value for every key that may be left open, in parts for who needs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from dystress_plugin.experiment import places
from dystress_plugin.experiment.settings import PretrainSettings, output_folder

T = TypeVar("T")

# A field has the name of its key, unless its metadata say another one.


@dataclass(frozen=True)
class DataSpec:
    """Which images, and how they are loaded.

    Attributes:
        labels: None: class folders are labels where there are two or more.
        val: None: accuracies are measured on a part of the data, or not at all without labels.
        long_tail: None: no long tail was cut.
        indices: None: no training images were chosen.
    """

    name: str = field(metadata={"key": "data"})
    labels: bool | None
    val: str | None
    data_root: str
    download: bool
    long_tail: float | None
    long_tail_profile: str
    indices: str | None
    on_bad_image: str
    batch_size: int
    num_workers: int

    @property
    def cut(self) -> bool:
        """Whether only a part of the training images is used."""
        return self.long_tail is not None or self.indices is not None

    def on(
        self,
        data: str | None,
        data_root: str | None,
        download: bool,
        labels: bool | None = None,
    ) -> DataSpec:
        """The same without `val`, or other data, whose tail nobody cut; None: its own."""
        own = data is None or places.same(data, self.name)
        return replace(
            self,
            name=data or self.name,
            data_root=data_root or self.data_root,
            download=download,
            labels=self.labels if own and labels is None else labels,
            val=None,
            long_tail=self.long_tail if own else None,
            indices=self.indices if own else None,
        )


@dataclass(frozen=True)
class ModelSpec:
    """Backbone, for images of one size, and projection head.

    Attributes:
        chunk_size: images that the backbone embeds at a time; None: all.
    """

    backbone: str
    image_size: int
    chunk_size: int | None
    hidden_dim: int
    projection_dim: int


@dataclass(frozen=True)
class QueueSpec:
    """Of a method with a queue: its length, and the share of the past in the keys' encoder."""

    size: int = field(metadata={"key": "queue_size"})
    momentum: float = field(metadata={"key": "momentum_encoder"})


@dataclass(frozen=True)
class OptimizerSpec:
    """What the weights are trained with."""

    name: str = field(metadata={"key": "optimizer"})
    lr: float
    temperature_lr: float
    momentum: float
    weight_decay: float
    warmup_epochs: float


@dataclass(frozen=True)
class AugmentationSpec:
    """How a view differs from its picture, and where it is made: image by image in the loader, or a batch at a time."""

    augment: str
    min_scale: float
    jitter: float
    grayscale: float
    blur: float
    flip: float
    rotate: float


@dataclass(frozen=True)
class HardwareSpec:
    """What it runs on, as asked for: `auto` is what a machine has."""

    accelerator: str
    devices: str
    num_nodes: int
    strategy: str
    precision: str
    gather_distributed: bool


@dataclass(frozen=True)
class EvaluationSpec:
    """The weighted kNN, and by what else the trained backbone is scored."""

    knn_k: int
    knn_t: float
    protocols: list[str]
    map: bool


@dataclass(frozen=True)
class LoggingSpec:
    """What is shown, kept and watched over while it trains."""

    progress: bool
    check_every_n_epochs: int
    log_every_n_steps: int
    diagnostics_every_n_steps: int
    wandb: str
    wandb_project: str
    tensorboard: bool
    nan_guard: bool


@dataclass(frozen=True)
class RunSpec:
    """A run, complete.

    Attributes:
        method_kwargs: every parameter of the method's temperature; None where that itself means something.
        out: the folder of the results.
        queue: None for a method without one.
        arm: its name in a comparison; None outside of one.
        family: the method of the constants it is compared to; None outside of a comparison.
    """

    method: str
    method_kwargs: Mapping[str, Any]
    seed: int
    epochs: int
    out: str
    data: DataSpec
    model: ModelSpec
    queue: QueueSpec | None
    optimizer: OptimizerSpec
    augmentation: AugmentationSpec
    hardware: HardwareSpec
    evaluation: EvaluationSpec
    logging: LoggingSpec
    arm: str | None = None
    family: str | None = None

    @classmethod
    def of(cls, settings: PretrainSettings) -> RunSpec:
        """From settings that leave nothing open.

        Raises:
            ValueError: for a key without a value.
        """
        return part(cls, replace(settings, out=str(output_folder(settings))))

    def flat(self) -> dict[str, Any]:
        """Every key of `PretrainSettings`, in its order, as plain values: what `of` makes the same spec from."""
        values = _flat(self) | {"method_kwargs": dict(self.method_kwargs)}
        return {f.name: values.get(f.name) for f in fields(PretrainSettings)}


def part(kind: type[T], settings: PretrainSettings) -> T:
    """A `RunSpec` or a part of one, whatever is open in other parts.

    Raises:
        ValueError: for a key without a value that the part needs.
    """
    hints = get_type_hints(kind)
    return kind(**{f.name: _value(f, hints[f.name], settings) for f in fields(kind)})  # type: ignore[arg-type]


def _value(f: Field[Any], hint: Any, settings: PretrainSettings) -> Any:
    """Of a field: a part, or that of its key."""
    kind, *others = get_args(hint) or (hint,)
    if hasattr(kind, "__dataclass_fields__"):
        open_ = NoneType in others and all(getattr(settings, _key(its)) is None for its in fields(kind))
        return None if open_ else part(kind, settings)
    value = getattr(settings, _key(f))
    if value is None and NoneType not in others:
        raise ValueError(f"{_key(f)}=null must have a value.")
    return value


def _key(f: Field[Any]) -> str:
    return str(f.metadata.get("key", f.name))


def _flat(its: Any) -> dict[str, Any]:
    """The values of all keys that it has, its parts' among them."""
    values: dict[str, Any] = {}
    for f in fields(its):
        value = getattr(its, f.name)
        values |= _flat(value) if hasattr(value, "__dataclass_fields__") else {_key(f): value}
    return values
