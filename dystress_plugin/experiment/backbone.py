"""Backbones by name, from torchvision or timm, without their classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dystress_plugin.checks import unknown_name
from dystress_plugin.errors import first_line

SMALL_IMAGE = 64  # pixels, up to which a ResNet keeps the resolution of its input in the first layers

# What torchvision's builders are to be told, by how the name begins; timm's fixed sizes tell themselves.
NO_SECOND_HEAD = {"aux_logits": False, "init_weights": True}
TORCHVISION_SETTINGS = {"googlenet": NO_SECOND_HEAD, "inception_v3": NO_SECOND_HEAD}
TORCHVISION_SIZES = {"vit_": "image_size", "maxvit_": "input_size"}


def backbone_name(name: str | None, data: str) -> str:
    """The name as set, or a network of the data's size."""
    return name or ("resnet10t" if data == "digits" else "resnet18")


def build_backbone(name: str, image_size: int) -> tuple[nn.Module, int]:
    """A randomly initialised backbone that maps images to (batch, features), and how many features.

    ResNets for images of up to 64 pixels get the usual CIFAR stem: a 3x3 convolution of stride 1 and no pooling.
    Networks that are made for one size of image are made for this one.

    Raises:
        ValueError: for a name that neither library knows, or a network that cannot train on images of this size.
    """
    create = _creator(name)
    try:
        backbone = create(name, image_size)
        if image_size <= SMALL_IMAGE:
            _keep_resolution(backbone)
        features = _features(backbone, image_size)
    except Exception as error:  # both libraries raise whatever they like
        raise ValueError(
            f"backbone={name} cannot train on images of {image_size} pixels: {first_line(error)} "
            "Choose another image_size, or another backbone, such as resnet18."
        ) from None
    return backbone.train(), features


def _creator(name: str) -> Any:
    """The function that makes the network of this name for a size of images."""
    import timm
    from torchvision import models

    if name in models.list_models(module=models):
        return _of_torchvision
    if timm.is_model(name):
        return _of_timm
    if name in models.list_models():
        kind = models.get_model_builder(name).__module__.split(".")[2].replace("_", " ")
        raise ValueError(
            f"backbone={name} is one of torchvision's models for {kind}; choose one that classifies images, such as "
            "resnet18."
        )
    known = [*models.list_models(module=models), *timm.list_models()]
    raise ValueError(unknown_name("backbone", name, known, choices="the models of torchvision and of timm"))


def _of_torchvision(name: str, image_size: int) -> nn.Module:
    from torchvision import models

    settings: dict[str, Any] = dict(TORCHVISION_SETTINGS.get(name, {}))
    for start, key in TORCHVISION_SIZES.items():
        if name.startswith(start):
            settings[key] = image_size if key == "image_size" else (image_size, image_size)
    backbone: nn.Module = models.get_model(name, weights=None, **settings)
    for head in ("fc", "classifier", "head", "heads"):
        if hasattr(backbone, head):
            pools = [part for part in getattr(backbone, head).modules() if isinstance(part, nn.AdaptiveAvgPool2d)]
            setattr(backbone, head, nn.Sequential(*pools, nn.Flatten()) if pools else nn.Identity())
    return backbone


def _of_timm(name: str, image_size: int) -> nn.Module:
    import timm

    cfg = timm.models.get_pretrained_cfg(name)
    # The ways that timm's other networks take any size are not the same; those of one size all have this setting.
    size = {"img_size": image_size} if cfg is not None and cfg.fixed_input_size else {}
    backbone: nn.Module = timm.create_model(name, num_classes=0, **size)
    return backbone


def _keep_resolution(backbone: nn.Module) -> None:
    """Gives a ResNet, of either library and of any make, the stem for small images; leaves others alone."""
    width = getattr(getattr(backbone, "bn1", None), "num_features", None)
    if width is not None and hasattr(backbone, "conv1") and hasattr(backbone, "maxpool"):
        backbone.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
        backbone.maxpool = nn.Identity()


@torch.no_grad()
def _features(backbone: nn.Module, image_size: int) -> int:
    """How many features there are; a ValueError unless they are as many, and finite, in training and in evaluation.

    Leaves no trace: what batch norm counts goes into copies, and random numbers are given back.
    """
    widths = {}
    with torch.random.fork_rng(devices=[]):
        images = torch.randn(2, 3, image_size, image_size)
        for mode in (True, False):
            buffers = {buffer: value.clone() for buffer, value in backbone.named_buffers()}
            out = functional_call(backbone.train(mode), buffers, (images,))
            if not isinstance(out, Tensor):
                raise ValueError(f"it returns a {type(out).__name__} and no features.")
            if not bool(torch.isfinite(out).all()):
                raise ValueError("its features are not finite.")
            widths[mode] = out.flatten(1).shape[1]
    if widths[True] != widths[False]:
        raise ValueError(f"it has {widths[True]} features in training and {widths[False]} in evaluation.")
    return widths[True]
