"""The keys of the command, with their defaults and help: one typed structure per subcommand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dystress_plugin.errors import unknown_name
from dystress_plugin.experiment import folders

T = TypeVar("T")
PROTOCOLS = ["weighted_knn", "knn_1", "knn_10", "linear", "few_shot_1pct", "few_shot_10pct"]
PATHS = ("data", "indices", "data_root", "out", "checkpoint")


# RUF009: dataclasses.field behind a shorter name, and each call makes its own.
def _key(default: Any, help_: str) -> Any:
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: default.copy(), metadata={"help": help_})
    return field(default=default, metadata={"help": help_})


@dataclass
class PretrainSettings:
    """Keys of `dystress pretrain`."""

    method: str = _key("dystress", "a method of `dystress methods`")
    method_kwargs: dict[str, Any] = _key({}, "parameters of its temperature, such as method_kwargs.tau_max=0.3")
    data: str = _key("digits", "digits (no download) | cifar10 | cifar100 | a folder of images in class folders")
    out: str | None = _key(None, "folder of the results, where the same command resumes; null: runs/METHOD-DATA-SEED")
    epochs: int = _key(20, "passes over the training images")
    seed: int = _key(0, "of weights, data order, augmentation and the long tail")

    data_root: str = _key("datasets", "where cifar10 and cifar100 are")
    download: bool = _key(False, "fetch cifar10 or cifar100 from the internet if they are not there")
    long_tail: float | None = _key(None, "keep fewer images of each class: last class / first class, such as 0.01")
    long_tail_profile: str = _key("exponential", "exponential | step: the second half of the classes is rare")
    indices: str | None = _key(None, "file of the training images to keep, .npy, .json or text; before long_tail")
    image_size: int | None = _key(None, "pixels of a view; null: 8 for digits, 32 for CIFAR, 224 for folders")
    batch_size: int = _key(256, "images per step and device; the rest of an epoch is dropped")
    num_workers: int = _key(0, "processes that load images; 0 loads in the training process")

    backbone: str | None = _key(None, "name in torchvision or timm; null: resnet10t for digits, else resnet18")
    hidden_dim: int = _key(512, "hidden width of the projection head")
    projection_dim: int = _key(128, "numbers per embedding")
    queue_size: int | None = _key(None, "negatives in the queue of a *_moco method; null: 4096")
    momentum_encoder: float | None = _key(None, "of a *_moco method, at the start; rises to 1; null: 0.99")

    optimizer: str = _key("lars", "lars | sgd")
    lr: float | None = _key(None, "null: 0.075*sqrt(batch) for lars, 0.06*batch/256 for sgd, batch over all devices")
    momentum: float = _key(0.9, "of the optimizer")
    weight_decay: float | None = _key(None, "null: 1e-6 for lars, 5e-4 for sgd; none on norms and biases")
    warmup_epochs: float | None = _key(None, "linear warm-up; null: a tenth of the epochs, at most 10; then a cosine")

    min_scale: float | None = _key(None, "smallest crop as a share of the image; null: 0.5 for digits, else 0.2")
    jitter: float | None = _key(None, "strength of colour jitter; null: 0.5, 1.0 above 64 px")
    grayscale: float | None = _key(None, "probability of a grey view; null: 0 for digits, else 0.2")
    blur: float | None = _key(None, "probability of Gaussian blur; null: 0, 0.5 above 64 px")
    flip: float | None = _key(None, "probability of a horizontal flip; null: 0 for digits, else 0.5")
    rotate: float | None = _key(None, "degrees of random rotation; null: 15 for digits, else 0")

    on_bad_image: str = _key("stop", "stop | skip, before training, for files in a folder that cannot be used")
    nan_guard: bool = _key(True, "stop at the first loss or gradient that is not finite, and say what was there")

    knn_k: int = _key(200, "neighbours of the weighted kNN; all images where there are fewer")
    knn_t: float = _key(0.1, "temperature of the weighted kNN")
    gather_distributed: bool = _key(True, "compare with the batches of all devices")

    accelerator: str = _key("auto", "auto | cpu | gpu | mps")
    devices: str = _key("1", "number of devices, auto, or a list such as '0,1'")
    num_nodes: int = _key(1, "machines")
    strategy: str = _key("auto", "Lightning's strategy, such as ddp")
    precision: str = _key("32-true", "Lightning's precision, such as 16-mixed or bf16-mixed")
    progress: bool = _key(True, "show a progress bar")
    diagnostics_every_n_steps: int = _key(
        50, "steps between two looks at similarities and temperatures, into diagnostics.csv; 0: none"
    )
    wandb: str = _key("off", "off | offline | online")
    wandb_project: str = _key("dystress", "project in wandb")
    tensorboard: bool = _key(False, "write TensorBoard events to `out`")

    def on(self, data: str | None, data_root: str | None, download: bool) -> PretrainSettings:
        """The same with other data, whose tail nobody cut; None: its own."""
        own = data is None or folders.same(data, self.data)
        return replace(
            self,
            data=data or self.data,
            data_root=data_root or self.data_root,
            download=download,
            long_tail=self.long_tail if own else None,
            indices=self.indices if own else None,
        )


@dataclass
class EvaluateSettings:
    """Keys of `dystress evaluate`."""

    checkpoint: str = _key("???", "folder that `dystress pretrain` wrote")
    data: str | None = _key(None, "other data than it was trained on; null: the same")
    data_root: str | None = _key(None, "where cifar10 and cifar100 are; null: as in training")
    download: bool = _key(False, "fetch cifar10 or cifar100 from the internet if they are not there")
    batch_size: int = _key(512, "images per step")
    num_workers: int = _key(0, "processes that load images")
    knn_k: int = _key(200, "neighbours of the weighted kNN; all images where there are fewer")
    knn_t: float = _key(0.1, "temperature of the weighted kNN")
    accelerator: str = _key("auto", "auto | cpu | gpu | mps")


@dataclass
class LongTailSettings:
    """Keys of `dystress long-tail`."""

    data: str = _key("???", "digits (no download) | cifar10 | cifar100 | a folder of images in class folders")
    out: str = _key("???", "new folder for train/CLASS/*.png, val/CLASS/*.png, indices.npy and long_tail.json")
    long_tail: float | None = _key(None, "keep fewer images of each class: last class / first class, such as 0.01")
    long_tail_profile: str = _key("exponential", "exponential | step: the second half of the classes is rare")
    shuffle_classes: bool = _key(False, "draw which classes are frequent; else the first ones are")
    indices: str | None = _key(None, "file of the training images to keep, .npy, .json or text; before long_tail")
    indices_by: str = _key("position", "position | number: what indices mean, the number being that in the file's name")
    seed: int = _key(0, "of the draw")
    images: bool = _key(True, "write the images; false writes the index file alone")
    data_root: str = _key("datasets", "where cifar10 and cifar100 are")
    download: bool = _key(False, "fetch cifar10 or cifar100 from the internet if they are not there")


@dataclass
class CompareSettings:
    """Keys of `dystress compare` beside those of `dystress pretrain`."""

    methods: list[str] = _key(
        "???", "such as [simclr,dystress,macl]; NAME-WORD is method NAME with settings of its own"
    )
    seeds: list[int] = _key([0, 1, 2], "each method is trained once with each")
    out: str = _key("runs/compare", "folder of the runs, results.csv and report.html, where the same command resumes")
    method_kwargs: dict[str, Any] = _key({}, "of one of the methods, such as method_kwargs.dystress.tau_max=0.3")
    constants: list[float] | None = _key(
        None, "fixed temperatures to train as well; null: tau_min, midpoint and tau_max of each method; []: none"
    )
    protocols: list[str] = _key(
        PROTOCOLS, "how backbones are scored; also knn_K and few_shot_N (images per class) with other numbers"
    )
    jobs: int = _key(1, "runs at once, each a process of its own; several GPUs are dealt out")
    diagnostics_every_n_steps: int | None = _key(
        None, "steps between two looks at similarities and temperatures; null: forty looks in a run; 0: none"
    )
    progress: bool = _key(True, "show a progress bar over all runs")


@dataclass
class ReportSettings:
    """Keys of `dystress report` beside the folders."""

    runs: list[str] = _key([], "folders of finished runs, or that hold them; the same as naming them without a key")
    out: str | None = _key(None, "where results.csv and report.html go; null: beside the runs, or where compare put it")
    protocols: list[str] = _key(
        PROTOCOLS, "how backbones are scored; what a run's protocols.csv has already is not computed again"
    )


@dataclass
class InspectSettings:
    """Keys of `dystress inspect`."""

    checkpoint: str | None = _key(None, "folder that `dystress pretrain` wrote; null: an untrained network")
    data: str | None = _key(None, "as for `dystress pretrain`; null: the run's, or digits")
    methods: list[str] = _key(["dystress", "macl", "ts", "isogclr", "tempfree"], "as for `dystress compare`")
    method_kwargs: dict[str, Any] = _key({}, "parameters of a method, such as method_kwargs.dystress.tau_max=0.3")
    constants: list[float] = _key([0.05, 0.1, 0.2, 0.5], "fixed temperatures to compare with")
    out: str | None = _key(None, "folder of the results; null: CHECKPOINT/inspect, or runs/inspect-DATA")
    untrained: bool = _key(False, "the run's network as it was before training")
    epoch: float | None = _key(None, "for scheduled temperatures, 0 first; null: the run's last, or 0")
    images: int | None = _key(None, "in the batch that is looked at; null: the run's batch_size, at most 512")
    seed: int = _key(0, "of the choice of images, of their views and of an untrained network")
    backbone: str | None = _key(None, "of an untrained network, as for `dystress pretrain`")
    image_size: int | None = _key(None, "of an untrained network, as for `dystress pretrain`")
    data_root: str | None = _key(None, "where cifar10 and cifar100 are; null: as in training")
    download: bool = _key(False, "fetch cifar10 or cifar100 from the internet if they are not there")
    num_workers: int = _key(0, "processes that load images")


def parse(structure: type[T], tokens: Sequence[str]) -> T:
    """`key=value` tokens merged into a typed structure.

    Raises:
        ValueError: for a token without `=`, an unknown key (with the nearest one), a value of the wrong type, or a
            key without default that is missing.
    """
    known = [f.name for f in fields(structure)]  # type: ignore[arg-type]
    texts = [name for name, hint in get_type_hints(structure).items() if hint in (str, str | None)]
    for token in tokens:
        key, equals, _ = token.partition("=")
        if not equals:
            raise ValueError(f"'{token}' is no setting; write key=value. {unknown_name('key', key.lstrip('-'), known)}")
        if key.split(".")[0] not in known:
            raise ValueError(unknown_name("key", key, known))
    try:
        config = OmegaConf.merge(OmegaConf.structured(structure), *(_parsed(token, texts) for token in tokens))
        missing = OmegaConf.missing_keys(config)
        if missing:
            raise ValueError(f"{', '.join(f'{key}=...' for key in sorted(missing))} must be given.")
        OmegaConf.resolve(config)
        settings: T = OmegaConf.to_object(config)
        return settings
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "setting"
        raise ValueError(f"{key}: {str(error).splitlines()[0]}") from None


def _parsed(token: str, texts: Sequence[str]) -> Any:
    """One `key=value` as a config: a text as it stands, anything else as YAML."""
    key, _, value = token.partition("=")
    # A folder may have a name such as 'a #1' or 'a: b', which means something else in YAML.
    if key in texts and value != "null":
        # bash expands the ~ of key=~/x, other shells do not.
        return OmegaConf.create({key: os.path.expanduser(value) if key in PATHS else value})
    try:
        return OmegaConf.from_dotlist([token])
    except YAMLError as error:
        raise ValueError(f"{token} is no key=value in YAML: {str(error).splitlines()[0]}; quote it.") from None


def output_folder(settings: PretrainSettings) -> Path:
    """Where a run leaves its results."""
    return Path(settings.out or f"runs/{settings.method}-{folders.name_of(settings.data)}-{settings.seed}")


def comparable(settings: PretrainSettings) -> dict[str, Any]:
    """What makes two runs the same: every setting as a plain value, paths in their one spelling; not where results go,
    nor where CIFAR, which is the same everywhere, comes from.
    """
    values = asdict(settings)
    for key in ("out", "data_root", "download"):
        del values[key]
    indices = None if settings.indices is None else folders.place(settings.indices)
    return values | {"data": folders.place(settings.data), "indices": indices}


def recorded(settings: PretrainSettings) -> dict[str, Any]:
    """Every setting as a plain value, as a run keeps them: paths hold from every working directory."""
    values = asdict(settings) | {"out": str(output_folder(settings))}
    # Links stay in them: a disk may be exchanged under its name.
    absolute = {key: os.path.join(os.getcwd(), path) for key, path in _paths(values).items()}
    return values | absolute


def located(settings: PretrainSettings, run: Path, given: PretrainSettings | None = None) -> PretrainSettings:
    """Settings as recorded with the paths of here and now: where they were, else at the same place beside the run.

    The second is for a run and its data that were moved together, and for version 0.1.0, which kept relative paths.

    Args:
        settings: as recorded.
        run: the folder they are from.
        given: settings whose choice it is where both places are there, as in a copy of run and data.
    """
    out = str(output_folder(settings))
    found: dict[str, Any] = {}
    for key, path in _paths(asdict(settings)).items():
        here = os.path.join(os.getcwd(), path)
        tried = [here]
        if os.path.isabs(path) == os.path.isabs(out):
            tried.append(os.path.normpath(run.resolve() / _way(out, path)))
        if not os.path.isabs(path):
            tried.reverse()
        if given is not None and (wanted := getattr(given, key)) is not None:
            tried.sort(key=lambda path: not folders.same(path, wanted))
        found[key] = next(filter(os.path.exists, tried), here)
    return replace(settings, **found | {"out": str(run.absolute())})


def recorded_settings(values: dict[str, Any], run: Path, given: PretrainSettings) -> PretrainSettings:
    """Settings from what a checkpoint keeps of them, `located`, with its default for a key that is newer."""
    known = {f.name for f in fields(PretrainSettings)}
    return located(PretrainSettings(**{key: value for key, value in values.items() if key in known}), run, given)


def _way(start: str, path: str) -> str:
    """The relative path between two places; as it is where there is none, such as to another drive."""
    try:
        return os.path.relpath(path, start)
    except ValueError:
        return path


def _paths(values: dict[str, Any]) -> dict[str, str]:
    """The settings that are paths."""
    return {key: values[key] for key in PATHS if values.get(key) is not None and values[key] not in folders.NAMED}


def read_config(path: Path, given: PretrainSettings | None = None) -> PretrainSettings:
    """The `settings` of a run's `config.yaml`, `located`, with its default for a key that is newer than the file.

    Raises:
        ValueError: for a file that is damaged or another program's.
    """
    remedy = "Put the right one there, or choose another folder."
    try:
        config = OmegaConf.load(path)
        settings = config.get("settings") if isinstance(config, DictConfig) else None
        if not isinstance(settings, DictConfig):
            raise ValueError(f"{path} is no config.yaml of `dystress pretrain`: it has no settings. {remedy}")
        found: PretrainSettings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PretrainSettings), settings))
        return located(found, path.parent, given)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is no config.yaml of `dystress pretrain`, or is damaged: {reason} {remedy}") from None


def describe(structure: type) -> str:
    """A line per key: name, default, help."""
    lines = []
    for f in fields(structure):
        default = f.default if f.default is not MISSING else f.default_factory()  # type: ignore[operator,misc]
        shown = {None: "null", "???": "(required)", True: "true", False: "false"}.get(
            default if isinstance(default, (str, bool, type(None))) else "", default
        )
        lines.append(f"  {f.name}={shown}".ljust(32) + f"  {f.metadata['help']}")
    return "\n".join(lines)
