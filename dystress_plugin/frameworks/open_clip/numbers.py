"""The numbers of a batch's samples, which open_clip's loaders do not tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

NUMBER = "sample_number"  # beside a sample's image and text


class Numbered(NamedTuple):
    """A batch of open_clip's, and the rows of the data that it holds."""

    batch: Any
    rows: Tensor


class NumberedLoader(DataLoader[Any]):
    """A DataLoader whose batches come with the numbers of their rows: for CSV files and synthetic data."""

    def __init__(self, dataset: Any, *, collate_fn: Callable[..., Any] | None = None, **settings: Any) -> None:
        super().__init__(_Rows(dataset), collate_fn=_Collate(collate_fn or default_collate), **settings)
        self.rows = len(dataset)


class _Rows(Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return self.dataset[row], row


class _Collate:
    def __init__(self, collate: Callable[..., Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[tuple[Any, int]]) -> Numbered:
        return Numbered(self.collate([sample for sample, _ in samples]), torch.tensor([row for _, row in samples]))


class KeyedWebdataset:
    """The module webdataset, with samples that keep the number which is their key, as img2dataset names them."""

    def __init__(self, webdataset: Any) -> None:
        self._webdataset = webdataset

    def __getattr__(self, name: str) -> Any:
        return getattr(self._webdataset, name)

    def rename(self, *args: Any, **kwargs: Any) -> Any:
        """Here open_clip drops the keys."""
        return _Renamed(self._webdataset.rename(*args, **kwargs))

    def to_tuple(self, *names: str) -> Any:
        """As 3.3 has its samples."""
        return self._webdataset.to_tuple(*names, NUMBER)


class _Renamed:
    def __init__(self, rename: Callable[..., Any]) -> None:
        self.rename = rename

    def __call__(self, samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for sample in samples:
            for renamed in self.rename([sample]):
                yield {**renamed, NUMBER: _number(sample["__key__"])}


def _number(key: str) -> int:
    name = key.rpartition("/")[2]
    if not name.isdigit():
        raise ValueError(
            f"The sample '{key}' has no number: a temperature per image and text needs keys that count, as those of "
            "img2dataset do, '000000123'."
        )
    return int(name)


def split(batch: Any) -> tuple[Any, Tensor | None]:
    """A batch as open_clip knows it, and the numbers that came with it."""
    if isinstance(batch, Numbered):
        return batch.batch, batch.rows
    if isinstance(batch, dict) and NUMBER in batch:
        return {name: value for name, value in batch.items() if name != NUMBER}, torch.as_tensor(batch[NUMBER])
    if isinstance(batch, (tuple, list)) and len(batch) == 3:
        return tuple(batch[:2]), torch.as_tensor(batch[2])
    return batch, None


def of_sides(loader: Any) -> tuple[Tensor, Tensor] | None:
    """From rows of a CSV file to the numbers of its images and its texts; None where the number of a row is both.

    An image that several rows name is one image.
    """
    rows = getattr(loader, "dataset", None)
    if not isinstance(rows, _Rows) or not hasattr(rows.dataset, "images"):
        return None
    images, different = pd.factorize(pd.Series(rows.dataset.images))
    return None if len(different) == len(images) else (torch.from_numpy(images), torch.arange(len(images)))
