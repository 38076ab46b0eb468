"""Backbones by name, from torchvision or timm, without their classifier, and a small one of our own."""

from __future__ import annotations

from collections.abc import Callable
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
TORCHVISION_SIZES: dict[str, Callable[[int], dict[str, Any]]] = {
    "vit_": lambda size: {"image_size": size},
    "maxvit_": lambda size: {"input_size": (size, size)},
}

# Our own: timm's of another name, with other settings. One basic block a stage, for images of 16 to 32 pixels.
SMALL_RESNET = "small_resnet"
OF_TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    SMALL_RESNET: ("resnet10t", {"layers": (1, 1, 1), "channels": (16, 32, 64), "stem_width": 8, "avg_down": False})
}

HEADS = ("fc", "classifier", "head", "heads")  # what torchvision calls its classifiers
STEM = ("conv1", "maxpool")  # of ResNets


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
    chosen = library(name)
    try:
        backbone = build(name, image_size, chosen)
        features = _features(backbone, image_size)
    except Exception as error:  # both libraries raise whatever they like
        raise ValueError(
            f"backbone={name} cannot train on images of {image_size} pixels: {first_line(error)} "
            "Choose another image_size, or another backbone, such as resnet18."
        ) from None
    return backbone.train(), features


def library(name: str) -> str:
    """Which library a backbone is from: torchvision, if it has the name, or timm; a ValueError if neither has."""
    import timm
    from torchvision import models

    if name in models.list_models(module=models):
        return "torchvision"
    if name in OF_TIMM or timm.is_model(name):
        return "timm"
    if name in models.list_models():
        kind = models.get_model_builder(name).__module__.split(".")[2].replace("_", " ")
        raise ValueError(
            f"backbone={name} is one of torchvision's models for {kind}; choose one that classifies images, such as "
            "resnet18."
        )
    known = [*OF_TIMM, *models.list_models(module=models), *timm.list_models()]
    choices = f"{', '.join(OF_TIMM)}, the models of torchvision and of timm"
    raise ValueError(unknown_name("backbone", name, known, choices=choices))


def build(name: str, image_size: int, of: str) -> nn.Module:
    """The network of this name in a library, for a size of images, without its classifier."""
    backbone = _whole(name, image_size, of)
    for part, layer in _replaced(name, backbone, image_size, of).items():
        setattr(backbone, part, layer)
    # Convolutions of so few channels are bound by memory, which this layout needs less of.
    return backbone.to(memory_format=torch.channels_last) if name in OF_TIMM else backbone  # type: ignore[call-overload]


def code(name: str, image_size: int, of: str, load: str) -> list[str]:
    """Lines of Python that make the same network without this package; `load` gives its state dict."""
    settings = ", ".join(f"{key}={value!r}" for key, value in _settings(name, image_size, of).items())
    known = OF_TIMM[name][0] if name in OF_TIMM else name
    made = f"models.{name}({settings})" if of == "torchvision" else f'create_model("{known}", {settings})'
    lines = ["import torch", f"import {of}", f"model = {of}.{made}"]
    replaced = _replaced(name, _whole(name, image_size, of), image_size, of)
    if stem := [part for part in replaced if part in STEM]:
        why = f"up to {SMALL_IMAGE} pixels a ResNet shrinks no image in its stem"
        lines.append(f"# {' and '.join(stem)} are not {of}'s own: {why}")
    lines += [f"model.{part} = {_source(layer)}" for part, layer in replaced.items()]
    return [*lines, f"model.load_state_dict({load})", "model.eval()"]


def _whole(name: str, image_size: int, of: str) -> nn.Module:
    import timm
    from torchvision import models

    make = models.get_model if of == "torchvision" else timm.create_model
    known = OF_TIMM[name][0] if name in OF_TIMM else name
    whole: nn.Module = make(known, **_settings(name, image_size, of))
    return whole


def _settings(name: str, image_size: int, of: str) -> dict[str, Any]:
    """What the library is told beside the name."""
    import timm

    if of == "torchvision":
        sizes = (make(image_size) for start, make in TORCHVISION_SIZES.items() if name.startswith(start))
        return {"weights": None} | TORCHVISION_SETTINGS.get(name, {}) | next(sizes, {})
    if name in OF_TIMM:
        return {"num_classes": 0} | OF_TIMM[name][1]
    cfg = timm.models.get_pretrained_cfg(name)
    # The ways that timm's other networks take any size are not the same; those of one size all have this setting.
    return {"num_classes": 0} | ({"img_size": image_size} if cfg is not None and cfg.fixed_input_size else {})


def _replaced(name: str, whole: nn.Module, image_size: int, of: str) -> dict[str, nn.Module]:
    """The layers that stand for others: of a ResNet's stem for small images, for torchvision's classifiers, and for
    the stage that our own network lacks.

    A ResNet may be of either library and of any make. Of a classifier is left what is pooled in it.
    """
    found: dict[str, nn.Module] = {}
    width = getattr(getattr(whole, "bn1", None), "num_features", None)
    if image_size <= SMALL_IMAGE and width is not None and all(hasattr(whole, part) for part in STEM):
        stem = (nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False), nn.Identity())
        found |= dict(zip(STEM, stem, strict=True))
    if name in OF_TIMM:
        found["layer4"] = nn.Identity()
    for head in HEADS if of == "torchvision" else ():
        if hasattr(whole, head):
            pools = [part for part in getattr(whole, head).modules() if isinstance(part, nn.AdaptiveAvgPool2d)]
            found[head] = nn.Sequential(*pools, nn.Flatten()) if pools else nn.Identity()
    return found


def _source(layer: nn.Module) -> str:
    """What makes a layer of a stem or a head; its text, which names its settings, in one line."""
    if isinstance(layer, nn.Sequential):
        return f"torch.nn.Sequential({', '.join(map(_source, layer))})"
    return f"torch.nn.{type(layer).__name__}({layer.extra_repr() if not isinstance(layer, nn.Flatten) else ''})"


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
