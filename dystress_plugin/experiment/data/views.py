"""Views of a whole batch at a time, on the training device: as lightly's SimCLR transform makes them of pictures."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from kornia import enhance
from kornia.color import rgb_to_grayscale
from kornia.filters import gaussian_blur2d
from kornia.geometry.transform import rotate
from torch import Tensor

from dystress_plugin.experiment.spec import AugmentationSpec

# What torchvision's RandomResizedCrop and lightly's SimCLR transform do unless told otherwise.
RATIO = (3 / 4, 4 / 3)
TRIES = 10
JITTER = (0.8, 0.8, 0.8, 0.2)  # of brightness, contrast, saturation and hue, at strength 1
JITTERED = 0.8
SIGMAS = (0.1, 2.0)

VIEWS = 2


@dataclass(frozen=True)
class BatchViews:
    """Two random views of every image of a batch, with the random numbers of (seed, epoch, batch) alone.

    Every view is distributed as the loader's: cropped, flipped, rotated, jittered, grey, blurred. Three things are not
    the same: the four jitters come in one random order for the whole batch, values are not rounded to 8 bits between
    two of these steps, and a blur is a Gaussian and not Pillow's approximation by boxes.

    Random numbers are drawn on the CPU, so that they do not depend on the device, and go there in one piece: nothing
    waits for it.

    Args:
        spec: how a view differs from its picture.
        image_size: pixels of a view.
        normalize: `mean` and `std` of the colour channels.
    """

    spec: AugmentationSpec
    image_size: int
    normalize: dict[str, list[float]]

    @torch.no_grad()
    def __call__(self, pixels: Tensor, *words: int) -> list[Tensor]:
        """The views, float32, (batch, 3, image_size, image_size) each.

        Args:
            pixels: (batch, 3, height, width) uint8.
            *words: non-negative numbers that the random ones are drawn from.
        """
        # The same in every precision of the training, which may be Lightning's default dtype or autocast here.
        with torch.autocast(pixels.device.type, enabled=False):
            return self._views(pixels, words)

    def _views(self, pixels: Tensor, words: Sequence[int]) -> list[Tensor]:
        draws = Draws.of(self.spec, VIEWS * len(pixels), pixels.shape[2], pixels.shape[3], words)
        on = draws.on(pixels.device)
        whole = pixels.to(torch.float32) / 255
        vertical = resampling(on["top"], on["height"], pixels.shape[2], self.image_size)
        horizontal = resampling(on["left"], on["width"], pixels.shape[3], self.image_size)
        horizontal = torch.where(on["flip"][:, None, None] > 0, horizontal.flip(1), horizontal)
        by_view = (VIEWS, len(pixels), 1, self.image_size, -1)
        views = vertical.view(by_view) @ whole @ horizontal.view(by_view).transpose(-1, -2)
        views = self._coloured(views.flatten(0, 1), on, draws)
        mean, std = (_constant(tuple(self.normalize[name]), pixels.device) for name in ("mean", "std"))
        return list(enhance.normalize(views, mean, std).chunk(VIEWS))

    def _coloured(self, views: Tensor, on: dict[str, Tensor], draws: Draws) -> Tensor:
        jitters = (
            (enhance.adjust_brightness_accumulative, on["brightness"]),
            (enhance.adjust_contrast_with_mean_subtraction, on["contrast"]),
            (enhance.adjust_saturation_with_gray_subtraction, on["saturation"]),
            (enhance.adjust_hue, on["hue"] * (2 * math.pi)),
        )
        if self.spec.rotate:
            views = rotate(views, on["angle"], mode="nearest")
        for number in draws.order if self.spec.jitter else ():
            jitter, factor = jitters[number]
            views = jitter(views, factor)
        if self.spec.grayscale:
            views = torch.where(_rows(on["grey"]) > 0, rgb_to_grayscale(views), views)
        if self.spec.blur:
            size = 2 * math.ceil(3 * SIGMAS[1]) + 1
            blurred = gaussian_blur2d(views, size, draws.sigma[:, None].expand(-1, 2), border_type="replicate")
            views = torch.where(_rows(on["blur"]) > 0, blurred, views)
        return views


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch's views, on the CPU.

    Attributes:
        columns: (views,) by name: of the crop `top`, `left`, `height` and `width` in pixels; whether it is `flip`ped,
            `grey` or has a `blur`; the `angle` in degrees; factors of `brightness`, `contrast` and `saturation`, and
            the turn of the `hue`, which change nothing where a view is not jittered.
        sigma: (views,) of the blurs.
        order: of the jitters.
    """

    columns: dict[str, Tensor]
    sigma: Tensor
    order: list[int]

    @classmethod
    def of(cls, spec: AugmentationSpec, views: int, height: int, width: int, words: Sequence[int]) -> Draws:
        """Those of so many views of images of one size, drawn from `words`."""
        (seed,) = np.random.SeedSequence(words).generate_state(1, np.uint64).tolist()
        generator = torch.Generator().manual_seed(seed % 2**63)

        def uniform(low: float = 0.0, high: float = 1.0) -> Tensor:
            return _uniform((views,), generator) * (high - low) + low

        columns = _crops(spec.min_scale, views, height, width, generator)
        columns |= {"flip": (uniform() < spec.flip), "grey": uniform() < spec.grayscale, "blur": uniform() < spec.blur}
        columns["angle"] = uniform(-spec.rotate, spec.rotate)
        jittered = uniform() < JITTERED
        for name, most in zip(("brightness", "contrast", "saturation"), JITTER, strict=False):
            factor = uniform(max(0.0, 1 - spec.jitter * most), 1 + spec.jitter * most)
            columns[name] = torch.where(jittered, factor, 1.0)
        hue = spec.jitter * JITTER[3]
        columns["hue"] = torch.where(jittered, uniform(-hue, hue), 0.0)
        return cls(columns, uniform(*SIGMAS), torch.randperm(len(JITTER), generator=generator).tolist())

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The columns as float32 on a device."""
        together = torch.stack([column.to(torch.float32) for column in self.columns.values()])
        if device.type == "cuda":
            together = together.pin_memory()
        return dict(zip(self.columns, together.to(device, non_blocking=True), strict=True))


def _crops(min_scale: float, views: int, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random parts of an image as torchvision's RandomResizedCrop draws them: the first of ten tries that fits."""
    shape = (views, TRIES)
    area = height * width * (_uniform(shape, generator) * (1 - min_scale) + min_scale)
    low, high = map(math.log, RATIO)
    ratio = torch.exp(_uniform(shape, generator) * (high - low) + low)
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    w, h, fits = (tries.gather(1, first)[:, 0] for tries in (w, h, fits))
    top = (_uniform((views,), generator) * (height - h + 1)).floor()
    left = (_uniform((views,), generator) * (width - w + 1)).floor()
    # Else the middle, as much of it as the ratios allow.
    middle_w, middle_h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return {
        "top": torch.where(fits, top, float((height - middle_h) // 2)),
        "left": torch.where(fits, left, float((width - middle_w) // 2)),
        "height": torch.where(fits, h, float(middle_h)),
        "width": torch.where(fits, w, float(middle_w)),
    }


def resampling(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """(views, size, pixels) weights by which `size` pixels are made of `length` of them from `start` on, (views,) each.

    Pillow's bilinear resize, which a crop of any length has to share with no other: a triangle as wide as the pixels
    that become one, and at least two. No library does so with a crop for every image.
    """
    scale = (length / size)[:, None, None]
    centre = (torch.arange(size, device=start.device, dtype=start.dtype)[:, None] + 0.5) * scale + start[:, None, None]
    place = torch.arange(pixels, device=start.device, dtype=start.dtype) + 0.5
    weights = (1 - (place - centre).abs() / scale.clamp(min=1.0)).clamp(min=0.0)
    end = start + length
    weights = weights * ((place > start[:, None, None]) & (place < end[:, None, None]))
    return weights / weights.sum(2, keepdim=True)


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A tensor that goes to the device once, as the copy of what is no tensor there waits for all before it."""
    return torch.tensor(values, device=device, dtype=torch.float32)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float32)


def _rows(column: Tensor) -> Tensor:
    return column[:, None, None, None]
