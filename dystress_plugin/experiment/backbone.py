"""Backbones by name, from torchvision or timm, without their classifier."""

from __future__ import annotations

import torch
from torch import nn

from dystress_plugin.errors import unknown_name

SMALL_IMAGE = 64  # pixels, up to which a ResNet keeps the resolution of its input in the first layers


def backbone_name(name: str | None, data: str) -> str:
    """The name as set, or a network of the data's size."""
    return name or ("resnet10t" if data == "digits" else "resnet18")


def build_backbone(name: str, image_size: int) -> tuple[nn.Module, int]:
    """A randomly initialised backbone that maps images to (batch, features), and how many features.

    ResNets for images of up to 64 pixels get the usual CIFAR stem: a 3x3 convolution of stride 1 and no pooling.

    Raises:
        ValueError: for a name that neither library knows, or a network that cannot take images of this size.
    """
    import timm
    from torchvision import models

    if name in models.list_models(module=models):
        backbone = models.get_model(name, weights=None)
        for head in ("fc", "classifier", "head", "heads"):
            if hasattr(backbone, head):
                setattr(backbone, head, nn.Identity())
    elif timm.is_model(name):
        backbone = timm.create_model(name, num_classes=0)
    else:
        known = [*models.list_models(module=models), *timm.list_models()]
        raise ValueError(unknown_name("backbone", name, known, choices="the models of torchvision and of timm"))
    if image_size <= SMALL_IMAGE and hasattr(backbone, "conv1") and hasattr(backbone, "maxpool"):
        width = backbone.bn1.num_features
        backbone.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
    try:
        with torch.no_grad():
            features = backbone.eval()(torch.zeros(2, 3, image_size, image_size)).flatten(1).shape[1]
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"backbone={name} cannot take images of {image_size} pixels: {error}") from None
    return backbone.train(), features
