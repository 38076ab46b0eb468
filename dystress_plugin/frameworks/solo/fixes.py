"""What solo-learn gets wrong for our users, one function each.

Every function takes what it changes, does nothing where solo-learn is right, and may be called again. None acts on a
run of solo-learn's own methods: `for_training` is called when one of our classes is built, `follow_checkpoint` acts
on checkpoints that one of ours wrote; only our `knn` launcher fixes the metric for everybody's. Tested with
solo-learn 9187ea3.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

SMALL = 64  # pixels; up to here an ImageNet stem would throw away fifteen sixteenths of the image at once
_SUFFIX = "_small"


def for_training(cfg: DictConfig) -> None:
    """All fixes for a run of one of our methods, before its model exists."""
    import solo.data.classification_dataloader
    from solo.methods.base import BaseMethod
    from solo.utils.auto_resumer import AutoResumer
    from solo.utils.knn import WeightedKNNClassifier

    knn_metric(WeightedKNNClassifier)
    auto_resume(AutoResumer)
    add_small_backbones(BaseMethod._BACKBONES)
    choose_stem(cfg, BaseMethod._BACKBONES)
    if cfg.data.dataset == "custom" and cfg.get("augmentations"):
        custom_pipeline(solo.data.classification_dataloader, **_crop(cfg.augmentations[0]))


def knn_metric(metric: Any) -> None:
    """The kNN metric asks torchmetrics for `compute_on_step=False`, which torchmetrics 0.12 no longer knows.

    Its `forward` would then compute, and by that reset, after every batch. The class in between takes the argument
    and makes `forward` collect only.
    """
    try:
        metric()
    except (TypeError, ValueError) as error:
        if "compute_on_step" not in str(error):
            raise
    else:
        return
    (base,) = metric.__bases__

    class CollectOnly(base):  # type: ignore[misc, valid-type]
        def __init__(self, compute_on_step: bool = False, **kwargs: Any) -> None:
            super().__init__(**kwargs)

        def forward(self, *args: Any, **kwargs: Any) -> None:
            self.update(*args, **kwargs)

    metric.__bases__ = (CollectOnly,)


def auto_resume(resumer: Any) -> None:
    """auto_resume compares neither the method's settings nor the seed, the augmentations or the folder.

    A second run with another temperature would silently go on with the first one's weights.
    """
    needed = ("method_kwargs", "seed", "augmentations", "data.train_path", "data.fraction", "scheduler", "momentum")
    resumer.SHOULD_MATCH.extend(key for key in needed if key not in resumer.SHOULD_MATCH)


def add_small_backbones(backbones: dict[str, Callable[..., Any]]) -> None:
    """Adds `resnet18_small` and `resnet50_small`: with the stem that solo-learn gives to CIFAR alone."""
    for name in ("resnet18", "resnet50"):
        backbones.setdefault(name + _SUFFIX, _with_small_stem(backbones[name]))


def _with_small_stem(build: Callable[..., Any]) -> Callable[..., Any]:
    def small(*args: Any, **kwargs: Any) -> Any:
        from torch import nn

        net = build(*args, **kwargs)
        # The padding of 2 is solo-learn's; with it a checkpoint from CIFAR fits images of a folder and back.
        net.conv1 = nn.Conv2d(3, net.conv1.out_channels, kernel_size=3, stride=1, padding=2, bias=False)
        net.maxpool = nn.Identity()
        return net

    return small


def choose_stem(cfg: DictConfig, backbones: Collection[str]) -> None:
    """A folder of images up to 64 px gets the small stem; `backbone.small_stem=True|False` decides otherwise.

    The backbone's name says so from then on, also in args.json, so that whatever reads the checkpoint builds the same.
    """
    wanted = cfg.backbone.get("small_stem")
    if wanted is None:
        crops = cfg.get("augmentations")
        wanted = cfg.data.dataset == "custom" and bool(crops) and crops[0].crop_size <= SMALL
    if wanted and cfg.backbone.name + _SUFFIX in backbones:
        cfg.backbone.name += _SUFFIX


def custom_pipeline(
    dataloaders: Any, crop_size: int, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None
) -> None:
    """solo-learn shows folders at 224 px to the validation, linear and kNN evaluation, whatever size it trains at.

    A `build_custom_pipeline` that the user has rewritten, as its docstring invites to, is left alone.

    Args:
        dataloaders: the module `solo.data.classification_dataloader`.
        crop_size: pixels that the method is trained at.
        mean: of the training's normalisation; None is ImageNet's, solo-learn's default.
        std: likewise.
    """
    default = dataloaders.build_custom_pipeline()
    if (crop_size == 224 and mean is None and std is None) or not _is_stock(default):
        return
    from torchvision import transforms

    stock = default["T_val"].transforms[-1]
    finish = [transforms.ToTensor(), transforms.Normalize(mean or stock.mean, std or stock.std)]
    # Large images keep ImageNet's margin of an eighth around the crop, small ones are shown whole.
    shorter = crop_size if crop_size <= SMALL else round(crop_size * 256 / 224)
    train = [transforms.RandomResizedCrop(crop_size, scale=(0.08, 1.0)), transforms.RandomHorizontalFlip()]
    shown = [transforms.Resize(shorter), transforms.CenterCrop(crop_size)]

    def build_custom_pipeline() -> dict[str, Any]:
        return {"T_train": transforms.Compose([*train, *finish]), "T_val": transforms.Compose([*shown, *finish])}

    dataloaders.build_custom_pipeline = build_custom_pipeline


def _is_stock(pipeline: dict[str, Any]) -> bool:
    steps = getattr(pipeline["T_val"], "transforms", [])
    names = [type(step).__name__ for step in steps]
    return names == ["Resize", "CenterCrop", "ToTensor", "Normalize"] and tuple(steps[1].size) == (224, 224)


def _crop(augmentation: DictConfig) -> dict[str, Any]:
    mean, std = augmentation.get("mean"), augmentation.get("std")
    return {
        "crop_size": augmentation.crop_size,
        "mean": tuple(mean) if mean is not None else None,
        "std": tuple(std) if std is not None else None,
    }


def follow_checkpoint(linear_args: Any, ours: Collection[str]) -> None:
    """main_linear.py builds its backbone and its data from its own config alone.

    Where the checkpoint is of one of our methods, the args.json beside it says what the backbone is and which crops
    it has seen. `data.augmentations.crop_size` given by the user is kept.

    Args:
        linear_args: the module `solo.args.linear`.
        ours: names of our methods.
    """
    original = linear_args.add_and_assert_dataset_cfg
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def add_and_assert_dataset_cfg(cfg: DictConfig) -> DictConfig:
        cfg = original(cfg)
        trained = arguments_beside(cfg.get("pretrained_feature_extractor"))
        if trained is not None and trained.get("method") in ours:
            _evaluate_like(trained, cfg)
            OmegaConf.resolve(cfg)  # args.json is written unresolved
        return cfg

    linear_args.add_and_assert_dataset_cfg = add_and_assert_dataset_cfg


def arguments_beside(checkpoint: str | None) -> DictConfig | None:
    """The args.json that solo-learn writes beside a checkpoint, or None where there is none."""
    if checkpoint is None:
        return None
    path = Path(checkpoint).parent / "args.json"
    if not path.is_file():
        return None
    arguments = OmegaConf.create(json.loads(path.read_text()))
    return arguments if isinstance(arguments, DictConfig) else None


def _evaluate_like(trained: DictConfig, cfg: DictConfig) -> None:
    import solo.data.classification_dataloader
    from solo.methods.base import BaseMethod
    from solo.utils.auto_resumer import AutoResumer

    auto_resume(AutoResumer)
    add_small_backbones(BaseMethod._BACKBONES)
    cfg.pretrain_method = trained.method
    cfg.backbone = trained.backbone
    # solo-learn gives the small stem to whatever is called CIFAR; the checkpoint may not be.
    if trained.data.dataset in ("cifar10", "cifar100"):
        cfg.backbone.small_stem = True
        choose_stem(cfg, BaseMethod._BACKBONES)
    if cfg.data.dataset == "custom":
        crop = _crop(trained.augmentations[0])
        crop["crop_size"] = OmegaConf.select(cfg, "data.augmentations.crop_size") or crop["crop_size"]
        custom_pipeline(solo.data.classification_dataloader, **crop)
