"""Which training images stay: a long tail drawn from a seed, or an index file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import OmegaConf

from dystress_plugin.checks import unknown_name

if TYPE_CHECKING:
    from dystress_plugin.experiment.data.datasets import Images

DIGEST = "indices_sha256"  # in config.yaml

# From the rank of a class among C and the ratio to its share of the largest class.
TAIL_PROFILES: dict[str, Callable[[int, int, float], float]] = {
    "exponential": lambda rank, classes, ratio: ratio ** (rank / max(1, classes - 1)),
    "step": lambda rank, classes, ratio: 1.0 if rank < (classes + 1) // 2 else ratio,
}


def class_sizes(largest: int, classes: int, ratio: float, profile: str = "exponential") -> list[int]:
    """Images of every class, from the most to the least frequent, at least one each.

    exponential   int(largest * ratio^(rank / (classes - 1)))
    step          largest for the first half of the classes (rounded up), int(largest * ratio) for the others

    With ratio 0.01 the first gives the long-tailed CIFARs of the papers: 12,406 and 10,847 images from classes of
    5,000 and 500 (DySTreSS, iSogCLR), 11,165 and 9,754 from classes of 4,500 and 450 (Temperature Schedules).

    Args:
        largest: images of the most frequent class.
        classes: number of classes.
        ratio: size of the last class over that of the first, in (0, 1]; else a ValueError.
        profile: "exponential" or "step"; else a ValueError.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"long_tail={ratio} must lie in (0, 1]: the last class's share of the first's size.")
    if profile not in TAIL_PROFILES:
        raise ValueError(unknown_name("long_tail_profile", profile, TAIL_PROFILES))
    return [max(1, int(largest * TAIL_PROFILES[profile](rank, classes, ratio))) for rank in range(classes)]


def draw(
    labels: np.ndarray, ratio: float, *, profile: str = "exponential", seed: int = 0, shuffle_classes: bool = False
) -> np.ndarray:
    """Positions of the images that stay, ascending; which of a class they are is drawn with the seed.

    A class that has fewer images than its place in the tail allows keeps them all.

    Args:
        labels: (images,) classes from 0.
        ratio: size of the last class over that of the first, in (0, 1]; the first is the largest there is.
        profile: "exponential" or "step".
        seed: of the draw.
        shuffle_classes: whether the seed also draws which class has which rank; else class 0 is the most frequent.
    """
    counts = np.bincount(labels)
    sizes = class_sizes(int(counts.max()), len(counts), ratio, profile)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    ranked = generator.permutation(len(counts)) if shuffle_classes else np.arange(len(counts))
    kept = [order[labels[order] == c][:size] for c, size in zip(ranked, sizes, strict=True)]
    return np.sort(np.concatenate(kept))


def read_indices(path: str | Path, images: int, numbers: np.ndarray | None = None) -> np.ndarray:
    """Positions among `images` training images from an index file, in the file's order.

    Args:
        path: .npy with a vector of integers, as the splits of SDCLR and Temperature Schedules are; .json with a list;
            any other name: text with numbers between white space.
        images: how many images there are to choose from.
        numbers: (images,) what the file means by its integers, where that is not the positions.
    """
    positions = read_numbers(path)
    if numbers is not None:
        positions = _positions_of(positions, numbers, Path(path))
    if positions.min() < 0 or positions.max() >= images:
        wrong = int(positions.min()) if positions.min() < 0 else int(positions.max())
        raise ValueError(f"indices={path} has {wrong}, but positions run from 0 to {images - 1}: is it for other data?")
    return positions


def read_numbers(path: str | Path) -> np.ndarray:
    """What an index file holds, whatever the images: different integers, int64, in the file's order."""
    path = Path(path)
    try:
        if path.suffix == ".npy":
            found = np.load(path, allow_pickle=False)
        else:
            text = path.read_text()
            found = np.asarray(json.loads(text) if path.suffix == ".json" else [int(word) for word in text.split()])
    except (OSError, ValueError) as error:
        raise ValueError(f"indices={path} cannot be read: {error}") from None
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer) or not len(found):
        raise ValueError(
            f"indices={path} holds {found.dtype} of shape {found.shape}; needs a list of integers, positions among "
            "the training images from 0."
        )
    integers: np.ndarray = found.astype(np.int64)
    values, counts = np.unique(integers, return_counts=True)
    if len(values) < len(integers):
        raise ValueError(f"indices={path} lists {values[counts > 1][0]} more than once.")
    return integers


def digest(path: str | Path) -> str:
    """Of the content of an index file, by which a run knows it again."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"indices={path} cannot be read: {error}") from None


def check_unchanged(run: Path, indices: str) -> None:
    """Raises a ValueError where an index file is not the one that a run began with.

    Runs of version 0.1.0 have kept nothing to tell.
    """
    kept = OmegaConf.load(run / "config.yaml").get(DIGEST)
    if kept is not None and kept != digest(indices):
        raise ValueError(
            f"indices={indices} has changed since the run in {run} began. Put it back as it was, or choose another out."
        )


def _positions_of(wanted: np.ndarray, numbers: np.ndarray, path: Path) -> np.ndarray:
    order = np.argsort(numbers)
    place = np.searchsorted(numbers, wanted, sorter=order).clip(max=len(numbers) - 1)
    positions: np.ndarray = order[place]
    if (missing := wanted[numbers[positions] != wanted]).size:
        raise ValueError(f"indices={path} has {missing[0]}, but no image has this number in its file's name.")
    return positions


def file_numbers(images: Images) -> np.ndarray:
    """The numbers in the names of the images' files, such as 17 of 00017.png, in the order of the images."""
    names = [Path(file).stem for file in (images.files if images.files is not None else ())]
    if not names or not all(name.isdecimal() for name in names) or len(set(map(int, names))) < len(names):
        raise ValueError("indices_by=number needs a folder whose files are all named by different numbers, 00017.png.")
    return np.asarray([int(name) for name in names])


def select(
    labels: np.ndarray,
    *,
    indices: str | Path | None,
    long_tail: float | None,
    seed: int,
    numbers: np.ndarray | None = None,
    **tail: Any,
) -> np.ndarray | None:
    """The images of the index file, and a tail of these where both are given; None for all images.

    With the 45,000 images that SDCLR trains on as `indices`, `long_tail=0.01` gives splits of its sizes.

    Args:
        labels: (images,) classes of the training images from 0.
        indices: index file, or None.
        long_tail: as `ratio` of `draw`, or None.
        seed: as for `draw`.
        numbers: as for `read_indices`.
        **tail: `profile` and `shuffle_classes`, as for `draw`.
    """
    chosen = None if indices is None else read_indices(indices, len(labels), numbers)
    if long_tail is None:
        return chosen
    if chosen is None:
        chosen = np.arange(len(labels))
    part: np.ndarray = chosen[draw(labels[chosen], long_tail, seed=seed, **tail)]
    return part
