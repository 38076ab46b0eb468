"""Pictures to tensors: lightly's SimCLR views for training, a plain resize for evaluation."""

from __future__ import annotations

from typing import Any

import torch
from lightly.transforms import SimCLRTransform
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import functional as F

from dystress_plugin.experiment.backbone import SMALL_IMAGE
from dystress_plugin.experiment.data.datasets import Data
from dystress_plugin.experiment.settings import PretrainSettings
from dystress_plugin.experiment.spec import AugmentationSpec


def augmentation(settings: PretrainSettings, data: Data, image_size: int) -> dict[str, float]:
    """What the settings say, else the data's own values, else those for its size; by the settings' names."""
    small = image_size <= SMALL_IMAGE
    values: dict[str, Any] = {
        "min_scale": 0.2,
        "jitter": 0.5 if small else 1.0,
        "grayscale": 0.2,
        "blur": 0.0 if small else 0.5,
        "flip": 0.5,
        "rotate": 0.0,
        **data.augmentation,
    }
    return values | {name: getattr(settings, name) for name in values if getattr(settings, name) is not None}


def view_transform(spec: AugmentationSpec, image_size: int, normalize: dict[str, list[float]]) -> SimCLRTransform:
    """Two random views of a picture."""
    return SimCLRTransform(
        input_size=image_size,
        min_scale=spec.min_scale,
        cj_strength=spec.jitter,
        random_gray_scale=spec.grayscale,
        gaussian_blur=spec.blur,
        hf_prob=spec.flip,
        rr_prob=1.0 if spec.rotate else 0.0,
        rr_degrees=spec.rotate or None,
        normalize=normalize,
    )


def plain_transform(image_size: int, normalize: dict[str, list[float]]) -> T.Compose:
    """The picture itself, as `plain_view` shows it, as a normalised tensor."""
    return T.Compose([plain_view(image_size), T.ToTensor(), T.Normalize(normalize["mean"], normalize["std"])])


def plain_view(image_size: int) -> T.Compose:
    """The picture itself: shorter side to the size (8/7 of it above 64 pixels, as for ImageNet), and its centre."""
    resized = image_size if image_size <= SMALL_IMAGE else image_size * 8 // 7
    return T.Compose([T.Resize(resized), T.CenterCrop(image_size)])


def plain_tensor(pixels: Tensor, normalize: dict[str, list[float]]) -> Tensor:
    """What `plain_transform` makes of pictures with these pixels, (batch, 3, height, width) uint8."""
    shown: Tensor = F.normalize(pixels.to(torch.float32) / 255, normalize["mean"], normalize["std"])
    return shown
