"""`dystress long-tail`: the chosen images as folders and as an index file."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dystress_plugin.experiment import places
from dystress_plugin.experiment.data.datasets import Images, load
from dystress_plugin.experiment.data.selection import file_numbers, read_numbers, select
from dystress_plugin.experiment.io import files
from dystress_plugin.experiment.io.lock import alone
from dystress_plugin.experiment.keys import checked
from dystress_plugin.experiment.settings import LongTailSettings


def write_long_tail(settings: LongTailSettings) -> dict[str, Any]:
    """`dystress long-tail`: the chosen images as folders and as an index file; returns what `long_tail.json` holds.

    `out` gets train/CLASS/POSITION.png and val/CLASS/POSITION.png, as torchvision's ImageFolder, solo-learn's
    dataset "custom" and lightly read them, and indices.npy, positions among the training images: CIFAR's official
    order, or for a folder that of torchvision's ImageFolder, sorted by class and name.

    Raises:
        ValueError: for an `out` that is not empty, cannot be written or lies in the data, settings that do not fit the
            data, or none that choose a part.
    """
    settings = checked(settings)
    out = Path(settings.out)
    places.check_apart(out, data=settings.data)
    files.check_place(out)
    if settings.long_tail is None and settings.indices is None:
        raise ValueError("Give long_tail=RATIO, such as 0.01, or indices=FILE: else all images would stay.")
    if settings.indices is not None:
        read_numbers(settings.indices)  # before the images, of which there may be many
    # Beside the folder, which is put in its place at once.
    with alone(out, file=out.absolute().with_name(f".{out.name}.lock")):
        return _write(settings, out)


def _write(settings: LongTailSettings, out: Path) -> dict[str, Any]:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={out} exists and is not empty; nothing is ever overwritten. Choose another out.")
    data = load(settings.data, root=settings.data_root, download=settings.download, long_tail=None, seed=settings.seed)
    if not data.classes:
        raise ValueError(f"data={settings.data} has no class folders, but a long tail is of classes.")
    positions = select(
        data.train.labels,
        indices=settings.indices,
        long_tail=settings.long_tail,
        seed=settings.seed,
        numbers=file_numbers(data.train) if settings.indices_by == "number" else None,
        profile=settings.long_tail_profile,
        shuffle_classes=settings.shuffle_classes,
    )
    assert positions is not None  # one of the two is given; narrows the type
    sizes = np.bincount(data.train.labels[positions], minlength=data.num_classes).tolist()
    record = {
        "settings": asdict(settings),
        "images": len(positions),
        "class_sizes": dict(zip(data.classes, sizes, strict=True)),
    }
    # Whole or not at all: a killed command leaves a folder of another name.
    part = Path(tempfile.mkdtemp(prefix=f"{out.name}.part-", dir=out.parent))
    try:
        part.chmod(0o755)
        np.save(part / "indices.npy", positions)
        (part / "long_tail.json").write_text(json.dumps(record, indent=2) + "\n")
        if settings.images:
            _write_images(part / "train", data.train, positions, data.classes)
            _write_images(part / "val", data.test, np.arange(len(data.test.labels)), data.classes)
        part.replace(out)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise ValueError(f"out={out} cannot be written: {error}. Nothing was left there.") from None
        raise
    return record


def _write_images(folder: Path, images: Images, positions: np.ndarray, classes: Sequence[str]) -> None:
    for name in classes:
        (folder / name).mkdir(parents=True)
    for i in tqdm(positions.tolist(), desc=folder.name, unit="image", disable=None):
        images.load(i).save(folder / classes[images.labels[i]] / f"{i:05d}.png")
