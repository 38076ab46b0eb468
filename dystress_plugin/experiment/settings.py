"""The keys of the command, with their defaults and help: one typed structure per subcommand."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dystress_plugin.checks import unknown_name
from dystress_plugin.experiment import places
from dystress_plugin.experiment.keys import option

PROTOCOLS = ["weighted_knn", "knn_1", "knn_10", "linear", "few_shot_1pct", "few_shot_10pct"]

KNN = r"knn_([1-9]\d{0,8})"

FEW_SHOT = r"few_shot_([1-9]\d{0,8}|[1-9]\d?pct|100pct)"

KNOWN_PROTOCOLS = (
    "weighted_knn, knn_K, linear, few_shot_N (images of each class) and few_shot_Npct, with K and N at least 1"
)

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")

SHARDING = ("fsdp", "deepspeed")  # strategies that gather a network's weights for its own passes alone

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true", "32", "16", "bf16", "64")

NOTHING_TO_INSPECT = "methods=[] and constants=[] leave nothing to inspect."

SEED = f"[0, {2**32 - 1}]"  # NumPy's, and so Lightning's


def spare_cores() -> int:
    """All cores but one that this process may use, at most eight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores - 1)


@dataclass
class PretrainSettings:
    """Keys of `dystress pretrain`, as typed; `spec.RunSpec` is the same with nothing left open."""

    method: str = option("dystress", "a method of `dystress methods`")
    method_kwargs: dict[str, Any] = option({}, "parameters of its temperature, such as method_kwargs.tau_max=0.3")
    data: str = option(
        "digits",
        "digits (no download) | cifar10 | cifar100 | a folder of images, in class folders or not, or [several]",
    )
    labels: bool | None = option(None, "whether class folders are labels; null: where there are two or more of them")
    val: str | None = option(None, "other data, with labels, for the accuracies; null: a part of data that is held out")
    out: str | None = option(
        None, "folder of the results, where the same command resumes; null: runs/METHOD-DATA-SEED", free=True
    )
    epochs: int = option(20, "passes over the training images", "[1, 1_000_000]")
    seed: int = option(0, "number that weights, data order, augmentation and the long tail are drawn from", SEED)

    data_root: str = option("datasets", "where cifar10 and cifar100 are", free=True)
    download: bool = option(False, "fetch cifar10 or cifar100 from the internet if they are not there", free=True)
    long_tail: float | None = option(None, "keep fewer of each class: last class / first class, such as 0.01", "(0, 1]")
    long_tail_profile: str = option(
        "exponential", "how the classes' sizes fall; step: the second half is rare", words=("exponential", "step")
    )
    indices: str | None = option(None, "file of the training images to keep, .npy, .json or text; before long_tail")
    image_size: int | None = option(None, "pixels of a view; null: digits 8, CIFAR 32, folders 224", "[1, 4096]")
    batch_size: int = option(256, "images per step and device; the rest of an epoch is dropped", "[2, 1_000_000]")
    chunk_size: int | None = option(
        None,
        "images that the backbone embeds at a time, for large batches in little memory; null: all of a step",
        "[1, 1_000_000]",
    )
    num_workers: int = option(
        0,
        "processes that load images, a number or auto; 0 loads in the training process",
        "[0, 1024]",
        free=True,
        auto=spare_cores,
    )

    backbone: str | None = option(
        None, "small_resnet, or a name in torchvision or timm; null: resnet10t for digits, else resnet18"
    )
    hidden_dim: int = option(512, "hidden width of the projection head", "[1, 65_536]")
    projection_dim: int = option(128, "numbers per embedding", "[1, 65_536]")
    queue_size: int | None = option(None, "negatives in the queue of a *_moco method; null: 4096", "[1, 10_000_000]")
    momentum_encoder: float | None = option(
        None,
        "share of the past in the keys' encoder of a *_moco method, at the start; rises to 1; null: 0.99",
        "[0, 1]",
    )

    optimizer: str = option("lars", "what the weights are trained with", words=("lars", "sgd"))
    lr: float | None = option(
        None,
        "learning rate; null: 0.075*sqrt(batch) for lars, 0.06*batch/256 for sgd, batch over all devices",
        "(0, 1_000_000]",
    )
    temperature_lr: float | None = option(
        None, "learning rate of what clip, fastclip and tempnet learn of a temperature; null: lr/10", "(0, 1_000_000]"
    )
    momentum: float = option(0.9, "of the optimizer, the share of the past", "[0, 1)")
    weight_decay: float | None = option(
        None, "of the optimizer; null: 1e-6 for lars, 5e-4 for sgd; none on norms and biases", "[0, 1000]"
    )
    warmup_epochs: float | None = option(
        None, "epochs of linear warm-up, at most all; null: a tenth, at most 10; then a cosine", "[0, 1_000_000]"
    )

    augment: str = option(
        "loader",
        "where views are made: image by image in the loader, or a batch at a time on the device, of images of one size",
        words=("loader", "batch"),
    )
    min_scale: float | None = option(
        None, "smallest crop, a share of the image; null: 0.5 for digits, else 0.2", "(0, 1]"
    )
    jitter: float | None = option(None, "strength of colour jitter; null: 0.5, 1.0 above 64 px", "[0, 2.5]")
    grayscale: float | None = option(None, "probability of a grey view; null: 0 for digits, else 0.2", "[0, 1]")
    blur: float | None = option(None, "probability of Gaussian blur; null: 0, 0.5 above 64 px", "[0, 1]")
    flip: float | None = option(None, "probability of a horizontal flip; null: 0 for digits, else 0.5", "[0, 1]")
    rotate: float | None = option(None, "degrees of random rotation; null: 15 for digits, else 0", "[0, 180]")

    on_bad_image: str = option(
        "stop", "what to do before training about files in a folder that cannot be used", words=("stop", "skip")
    )
    nan_guard: bool = option(
        True, "stop at the first loss or gradient that is not finite, and say what was there", free=True
    )

    knn_k: int = option(200, "neighbours of the weighted kNN; all images where there are fewer", "[1, 1_000_000_000]")
    knn_t: float = option(0.1, "temperature of the weighted kNN", "[0.02, 1_000_000]")
    protocols: list[str] = option(
        [],
        "how the trained backbone is scored as well, into protocols.csv; as for `dystress report`",
        once=True,
        free=True,
    )
    map: bool = option(False, "also a t-SNE map of the test images, into map.csv", free=True)
    arm: str | None = option(
        None, "its name in a report; null: the method, and what differs from its defaults", free=True
    )
    family: str | None = option(
        None,
        "the method whose fixed temperatures a report compares it with; null: simclr with its underscore's word",
        free=True,
    )
    gather_distributed: bool = option(True, "compare with the batches of all devices")

    accelerator: str = option("auto", "what it runs on", words=ACCELERATORS)
    devices: str = option("1", "number of devices, auto, -1 for all GPUs, or a list of GPUs such as '0,1'")
    num_nodes: int = option(1, "machines; several need a launcher such as srun or torchrun", "[1, 10_000]")
    strategy: str = option("auto", "Lightning's strategy, such as ddp")
    precision: str = option("32-true", "Lightning's precision; 16-mixed needs a GPU", words=PRECISIONS)
    progress: bool = option(True, "show a progress bar; a line an epoch where the output is no terminal", free=True)
    check_every_n_epochs: int = option(
        1, "epochs between two checkpoints, each with a weighted kNN or effective rank", "[1, 1_000_000]", free=True
    )
    log_every_n_steps: int = option(
        1,
        "steps between two samples of temperatures, alignment and uniformity, for their means of an epoch in "
        "metrics.csv; the first of an epoch is always one",
        "[1, 1_000_000_000]",
        free=True,
    )
    diagnostics_every_n_steps: int | None = option(
        None,
        "steps between two samples of similarities and temperatures, into diagnostics.csv; null: 40 samples; 0: none",
        "[0, 1_000_000_000]",
        free=True,
    )
    wandb: str = option("off", "logging to wandb", words=("off", "offline", "online"), free=True)
    wandb_project: str = option("dystress", "project in wandb", free=True)
    tensorboard: bool = option(False, "write TensorBoard events to `out`", free=True)

    def check_together(self) -> None:
        """A ValueError for values that do not go together."""
        if (self.warmup_epochs or 0) > self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs:g} must lie between 0 and epochs={self.epochs}.")
        if self.chunk_size is not None and self.strategy.startswith(SHARDING):
            raise ValueError(
                f"chunk_size={self.chunk_size} embeds twice, for which strategy={self.strategy} does not have the "
                "weights: choose ddp, or leave chunk_size out."
            )
        if self.long_tail is not None and self.labels is False:
            raise ValueError(f"long_tail={self.long_tail} is of classes, which labels=false leaves out.")
        check_protocols(self.protocols)

    def check_names(self) -> None:
        """A ValueError for methods, parameters and backbones that there are not."""
        from dystress_plugin.experiment import arms  # which imports torch

        arms.check([self.method], {self.method: self.method_kwargs})
        if self.family is not None:
            arms.check_family(self.family)
        _check_backbone(self.backbone)


@dataclass
class EvaluateSettings:
    """Keys of `dystress evaluate`."""

    checkpoint: str = option("???", "folder that `dystress pretrain` wrote")
    data: str | None = option(None, "other data than it was trained on; null: the same")
    val: str | None = option(
        None, "other data, with labels, for the accuracies; null: as in training, or a part of other data"
    )
    labels: bool | None = option(None, "whether class folders are labels; null: as in training, or where there are two")
    data_root: str | None = option(None, "where cifar10 and cifar100 are; null: as in training")
    download: bool = option(False, "fetch cifar10 or cifar100 from the internet if they are not there")
    batch_size: int = option(512, "images per step", "[1, 1_000_000]")
    num_workers: int = option(0, "processes that load images, a number or auto", "[0, 1024]", auto=spare_cores)
    knn_k: int = option(200, "neighbours of the weighted kNN; all images where there are fewer", "[1, 1_000_000_000]")
    knn_t: float = option(0.1, "temperature of the weighted kNN", "[0.02, 1_000_000]")
    accelerator: str = option("auto", "what it runs on", words=ACCELERATORS)

    def check_together(self) -> None:
        """A ValueError for values that do not go together."""
        if self.val is None:
            return
        if self.data is not None:
            raise ValueError(
                f"data={self.data} is not read with val={self.val}, which accuracies are of. Leave one out."
            )
        if self.labels is False:
            raise ValueError(f"labels=false is of data, which is not read with val={self.val}. Leave one out.")


@dataclass
class EmbedSettings:
    """Keys of `dystress embed`."""

    checkpoint: str = option("???", "folder that `dystress pretrain` wrote")
    out: str = option(
        "???", "new file, such as e.npz: arrays embeddings and files; labels and classes where there are any"
    )
    data: str | None = option(None, "as for `dystress pretrain`; all of it is embedded; null: what it was trained on")
    labels: bool | None = option(None, "whether class folders are labels; null: where there are two or more of them")
    data_root: str | None = option(None, "where cifar10 and cifar100 are; null: as in training")
    download: bool = option(False, "fetch cifar10 or cifar100 from the internet if they are not there")
    on_bad_image: str = option("stop", "what to do about files in a folder that cannot be used", words=("stop", "skip"))
    batch_size: int = option(512, "images per step", "[1, 1_000_000]")
    num_workers: int = option(0, "processes that load images, a number or auto", "[0, 1024]", auto=spare_cores)
    accelerator: str = option("auto", "what it runs on", words=ACCELERATORS)
    progress: bool = option(True, "show a progress bar")


@dataclass
class ExportSettings:
    """Keys of `dystress export`."""

    checkpoint: str = option("???", "folder that `dystress pretrain` wrote")
    out: str = option("???", "new file, such as backbone.pt; beside it goes load_NAME.py, which loads it")
    to: str | None = option(
        None, "what loads it; null: the library that the backbone is from", words=("torchvision", "timm", "safetensors")
    )


@dataclass
class LongTailSettings:
    """Keys of `dystress long-tail`."""

    data: str = option("???", "digits (no download) | cifar10 | cifar100 | a folder of images in class folders")
    out: str = option("???", "new folder for train/CLASS/*.png, val/CLASS/*.png, indices.npy and long_tail.json")
    long_tail: float | None = option(None, "keep fewer of each class: last class / first class, such as 0.01", "(0, 1]")
    long_tail_profile: str = option(
        "exponential", "how the classes' sizes fall; step: the second half is rare", words=("exponential", "step")
    )
    shuffle_classes: bool = option(False, "draw which classes are frequent; else the first ones are")
    indices: str | None = option(None, "file of the training images to keep, .npy, .json or text; before long_tail")
    indices_by: str = option("position", "what indices mean; number: in the file's name", words=("position", "number"))
    seed: int = option(0, "number that the images are drawn from", SEED)
    images: bool = option(True, "write the images; false writes the index file alone")
    data_root: str = option("datasets", "where cifar10 and cifar100 are")
    download: bool = option(False, "fetch cifar10 or cifar100 from the internet if they are not there")


@dataclass
class CompareSettings:
    """Keys of `dystress compare` beside those of `dystress pretrain`."""

    methods: list[str] = option(
        "???",
        "what is compared, such as [simclr,dystress,macl]; NAME-WORD is method NAME with settings of its own",
        some=True,
        once=True,
    )
    seeds: list[int] = option([0, 1, 2], "each method is trained once with each", SEED, some=True, once=True)
    out: str = option("runs/compare", "folder of the runs, results.csv and report.html, where the same command resumes")
    method_kwargs: dict[str, Any] = option({}, "of one of the methods, such as method_kwargs.dystress.tau_max=0.3")
    constants: list[float] | None = option(
        None,
        "fixed temperatures to train as well; null: tau_min, midpoint and tau_max of each method; []: none",
        "(0, 1_000_000]",
    )
    protocols: list[str] = option(
        PROTOCOLS,
        "how backbones are scored; also knn_K and few_shot_N (images per class) with other numbers",
        some=True,
        once=True,
    )
    jobs: int = option(1, "runs at once, each a process of its own; several GPUs are dealt out", "[1, 1024]")
    progress: bool = option(True, "show a progress bar over all runs; a line a run where the output is no terminal")
    plan: bool = option(False, "train nothing; print a shell line for each run, and a last one for the report")

    def check_together(self) -> None:
        """A ValueError for values that do not go together."""
        _check_arms(self.methods, self.method_kwargs, self.constants or [])
        check_protocols(self.protocols)
        for name in self.methods:
            if Path(name).name != name:
                raise ValueError(f"methods={self.methods}: the folders of {name}'s runs are named by it; no slashes.")

    def check_names(self) -> None:
        """A ValueError for methods and parameters that there are not."""
        from dystress_plugin.experiment import arms  # which imports torch

        arms.check(self.methods, self.method_kwargs)


@dataclass
class ReportSettings:
    """Keys of `dystress report` beside the folders."""

    runs: list[str] = option([], "folders of finished runs, or that hold them; the same as naming them without a key")
    out: str | None = option(None, "for results.csv and report.html; null: beside the runs, or where compare put it")
    protocols: list[str] = option(
        PROTOCOLS,
        "how backbones are scored; what a run's protocols.csv has already is not computed again",
        some=True,
        once=True,
    )
    cost: bool = option(False, "measure what a training step of each method costs, into cost.csv beside the report")

    def check_together(self) -> None:
        """A ValueError for values that do not go together."""
        check_protocols(self.protocols)


@dataclass
class InspectSettings:
    """Keys of `dystress inspect`."""

    checkpoint: str | None = option(None, "folder that `dystress pretrain` wrote; null: an untrained network")
    data: str | None = option(None, "as for `dystress pretrain`; null: the run's, or digits")
    labels: bool | None = option(None, "whether class folders are labels; null: where there are two or more of them")
    methods: list[str] = option(
        ["dystress", "macl", "ts", "isogclr", "tempfree"], "as for `dystress compare`", once=True
    )
    method_kwargs: dict[str, Any] = option({}, "parameters of a method, such as method_kwargs.dystress.tau_max=0.3")
    constants: list[float] = option([0.05, 0.1, 0.2, 0.5], "fixed temperatures to compare with", "(0, 1_000_000]")
    out: str | None = option(None, "folder of the results; null: CHECKPOINT/inspect, or runs/inspect-DATA")
    untrained: bool = option(False, "the run's network as it was before training")
    epoch: float | None = option(
        None, "what scheduled temperatures are shown at, 0 first; null: the run's last, or 0", "[0, 1_000_000]"
    )
    images: int | None = option(
        None,
        "images that are compared with each other, all where there are fewer; null: the run's batch_size, at most 512",
        "[2, 4096]",
    )
    seed: int = option(0, "number that images, their views and an untrained network are drawn from", SEED)
    backbone: str | None = option(None, "of an untrained network, as for `dystress pretrain`")
    image_size: int | None = option(
        None, "pixels of an untrained network's view, as for `dystress pretrain`", "[1, 4096]"
    )
    data_root: str | None = option(None, "where cifar10 and cifar100 are; null: as in training")
    download: bool = option(False, "fetch cifar10 or cifar100 from the internet if they are not there")
    num_workers: int = option(0, "processes that load images, a number or auto", "[0, 1024]", auto=spare_cores)
    accelerator: str = option("auto", "what the network runs on", words=ACCELERATORS)

    def check_together(self) -> None:
        """A ValueError for values that do not go together."""
        _check_arms(self.methods, self.method_kwargs, self.constants)
        for key in ("backbone", "image_size"):
            if self.checkpoint is not None and (value := getattr(self, key)) is not None:
                raise ValueError(
                    f"{key}={value} is for an untrained network; the run in checkpoint={self.checkpoint} has its own."
                )
        if self.checkpoint is None and not (self.methods or self.constants):
            raise ValueError(NOTHING_TO_INSPECT)

    def check_names(self) -> None:
        """A ValueError for methods, parameters and backbones that there are not."""
        from dystress_plugin.experiment import arms  # which imports torch

        arms.check(self.methods, self.method_kwargs)
        _check_backbone(self.backbone)


def check_protocols(names: Sequence[str]) -> None:
    """A ValueError for what is no name of a protocol, with those that exist."""
    for name in names:
        if not re.fullmatch(f"weighted_knn|linear|{KNN}|{FEW_SHOT}", name):
            raise ValueError(unknown_name("protocol", name, PROTOCOLS, choices=KNOWN_PROTOCOLS))


def _check_backbone(name: str | None) -> None:
    if name is not None:
        from dystress_plugin.experiment.backbone import library  # which imports torch

        library(name)


def _check_arms(methods: Sequence[str], method_kwargs: Mapping[str, Any], constants: Sequence[float]) -> None:
    for name, parameters in method_kwargs.items():
        named = isinstance(parameters, dict)
        if name in methods and not named:
            raise ValueError(f"method_kwargs.{name}={parameters} must name a parameter: method_kwargs.{name}.NAME=...")
        if not named:
            some = (*methods, "METHOD")[0]
            raise ValueError(f"method_kwargs.{name}: say whose, such as method_kwargs.{some}.{name}=...")
        if name not in methods:
            raise ValueError(unknown_name("method in method_kwargs", name, methods))
    if len({f"{tau:g}" for tau in constants}) < len(constants):
        raise ValueError(f"constants={constants} must be different in six digits, by which they are named.")


def output_folder(settings: PretrainSettings) -> Path:
    """Where a run leaves its results."""
    return Path(settings.out or f"runs/{settings.method}-{places.name_of(settings.data)}-{settings.seed}")
