"""Measures of an embedding. `temperature_summary`, which is of a loss, is found here too."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dystress_plugin.embeddings import normalize

if TYPE_CHECKING:
    from dystress_plugin.diagnostics.summary import some_pairs, temperature_summary

__all__ = [
    "alignment",
    "effective_rank",
    "inter_class_uniformity",
    "some_pairs",
    "temperature_summary",
    "tolerance",
    "uniformity",
]


def __getattr__(name: str) -> Any:
    # They need the loss and stand above this module, so they are imported when they are asked for.
    if name in ("some_pairs", "temperature_summary"):
        return getattr(importlib.import_module("dystress_plugin.diagnostics.summary"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def alignment(z0: Tensor, z1: Tensor) -> Tensor:
    """mean_i z0_i . z1_i of the normalised views: MACL's A, in [-1, 1], 1 where all pairs coincide.

    Args:
        z0: (batch, dim), one view of each image, any scale.
        z1: (batch, dim), the other.
    """
    _check(z0, 1)
    if z0.shape != z1.shape:
        raise ValueError(f"z0 has shape {tuple(z0.shape)}, z1 {tuple(z1.shape)}; they must agree.")
    return (_unit(z0) * _unit(z1)).sum(1).mean()


def uniformity(z: Tensor, *, include_self: bool = False) -> Tensor:
    """log mean_{i != j} exp(-2 |z_i - z_j|^2) of the normalised rows, in [-8, 0]; lower is more uniform.

    Wang and Isola, 2020, https://arxiv.org/abs/2005.10242. The released DySTreSS code includes i = j.

    Args:
        z: (rows, dim), at least two rows, any scale.
        include_self: average over all pairs, i = j among them.
    """
    _check(z, 2)
    z = _unit(z)
    # |a - b|^2 = 2 - 2 a.b on the sphere
    exponent = 4 * (z @ z.T) - 4
    if not include_self:
        exponent.fill_diagonal_(-math.inf)
    pairs = len(z) ** 2 if include_self else len(z) * (len(z) - 1)
    return torch.logsumexp(exponent.flatten(), 0) - math.log(pairs)


def effective_rank(z: Tensor) -> Tensor:
    """exp(-sum_k p_k log p_k), p_k = sigma_k / sum sigma, of the singular values of z; in [1, min(rows, dim)].

    RankMe: Garrido et al., 2023, https://arxiv.org/abs/2210.02885; rows are not normalised. Higher means that less of
    the space has collapsed, and goes with better accuracies, without labels. As many rows as dimensions are too few.

    Args:
        z: (rows, dim), any scale.
    """
    _check(z, 1)
    sigma = torch.linalg.svdvals(z if z.dtype == torch.float64 else z.float())
    entropy: Tensor = torch.special.entr(sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny)).sum()
    return entropy.exp()


def tolerance(z: Tensor, y: Tensor) -> Tensor:
    """Mean of z_i . z_j over ordered pairs i != j of one class, normalised rows; in [-1, 1].

    Wang and Liu, 2021, https://arxiv.org/abs/2012.09740. Every pair counts once, whatever the class sizes (the
    released DySTreSS code divides by n^2/10, which is right for ten balanced classes only).

    Args:
        z: (rows, dim), any scale.
        y: (rows,) integer labels; at least one class has two rows.
    """
    sums, counts = _class_sums(z, y)
    pairs = (counts * (counts - 1)).sum()
    if pairs == 0:
        raise ValueError("Every class has a single row, so there is no pair of one class.")
    # sum over pairs of a class = |sum|^2 - rows (each row has length 1, zero rows 0)
    return (sums.square().sum() - _unit(z).square().sum()) / pairs


def inter_class_uniformity(z: Tensor, y: Tensor) -> Tensor:
    """log mean_{a != b} exp(-2 |m_a - m_b|^2), m_a the normalised centroid of class a; lower is more spread.

    The DySTreSS paper describes such a measure; this exact form (normalised centroids, ordered pairs, every class
    with the same weight) is our definition.

    Args:
        z: (rows, dim), any scale.
        y: (rows,) integer labels of at least two classes.
    """
    sums, _ = _class_sums(z, y)
    if len(sums) < 2:
        raise ValueError("All labels are the same; inter-class uniformity needs at least two classes.")
    return uniformity(sums)


def _class_sums(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    _check(z, 2)
    if y.shape != z.shape[:1] or y.is_floating_point():
        raise ValueError(f"y has shape {tuple(y.shape)} and dtype {y.dtype}; needs integer labels, ({len(z)},).")
    unit = _unit(z)
    classes, member, counts = torch.unique(y, return_inverse=True, return_counts=True)
    return unit.new_zeros(len(classes), unit.shape[1]).index_add_(0, member, unit), counts


def _check(z: Tensor, least: int) -> None:
    if not z.is_floating_point():
        raise TypeError(f"Embeddings are {z.dtype}; they must be of a float dtype: call .float().")
    if z.dim() != 2 or len(z) < least:
        raise ValueError(f"Embeddings have shape {tuple(z.shape)}, need (rows, dim) with at least {least} rows.")


def _unit(z: Tensor) -> Tensor:
    return normalize(z if z.dtype == torch.float64 else z.float())
