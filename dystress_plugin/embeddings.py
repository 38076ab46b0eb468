"""Embeddings as they come: checked, and brought to length 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dystress_plugin import tracing


def normalize(z: Tensor, least: float = 0.0) -> Tensor:
    """z / |z| for every row; a zero row stays zero and gets no gradient, and so does one without an entry of `least`.

    Tiny and huge rows come out right as well, as long as 1/|z| is within the dtype's range.
    """
    return by_peak(z, _unless_zero(_peak(z), least))


def by_peak(z: Tensor, peak: Tensor, ordinary: bool = False) -> Tensor:
    """z / |z|, where `ordinary` with a peak above zero in every row."""
    if not tracing.transformed(z):
        units: Tensor = _Normalize.apply(z, peak, ordinary)[0]  # type: ignore[no-untyped-call]
        return units
    scaled = z / peak
    length: Tensor = scaled.square().sum(dim=-1, keepdim=True).masked_fill(peak.isinf(), 1.0).sqrt()
    return scaled / length


def _peak(z: Tensor) -> Tensor:
    """The largest entry of every row."""
    return z.detach().abs().amax(dim=-1, keepdim=True)  # ten times as fast as the norm of that name


def _least_peak(z: Tensor) -> float:
    """Up to here a row counts as zero: the gradient 1/|z| itself would leave the dtype's range."""
    return 1e8 * torch.finfo(z.dtype).tiny


def _unless_zero(peak: Tensor, least: float) -> Tensor:
    """The largest entry of every row, infinite where the row counts as zero."""
    nothing = peak <= _least_peak(peak)
    return peak.masked_fill(nothing | (peak < least) if least else nothing, math.inf)


class _Normalize(torch.autograd.Function):
    """u = z / |z| and |z|. Autograd by itself would save three copies of z, this saves u.

    |z| is a result as well, for the second derivative: what a gradient is made of has to be one.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, peak: Tensor, ordinary: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        units, length = lengths_of(z, peak, ordinary)
        ctx.save_for_backward(units, length)
        return units, length

    @staticmethod
    def backward(ctx: Any, grad_units: Tensor | None, grad_length: Tensor | None) -> tuple[Tensor | None, None, None]:
        units, length = ctx.saved_tensors
        grad = None if grad_units is None else gradient_of_rows(units, length, grad_units)
        if grad_length is not None:
            along = units * grad_length
            grad = along if grad is None else grad + along
        return grad, None, None


def lengths_of(z: Tensor, peak: Tensor, ordinary: bool) -> tuple[Tensor, Tensor]:
    """z / |z| and |z|, the latter infinite where the row counts as zero; without autograd."""
    # Over the largest entry first: the squares of tiny and huge rows would leave the range.
    units = z / peak
    length = torch.linalg.vector_norm(units, dim=-1, keepdim=True)
    # As long as its largest entry, which is 1, unless the row is zero.
    units.div_(length if ordinary else length.clamp_min(1.0))
    length = length * peak
    return units, length if ordinary else length.nan_to_num_(math.inf, math.inf)


def gradient_of_rows(units: Tensor, length: Tensor, grad: Tensor) -> Tensor:
    """The gradient by z from that by z / |z|."""
    along = (units * grad).sum(-1, keepdim=True)
    if torch.is_grad_enabled():
        return (grad - units * along) / length
    return (units * along).neg_().add_(grad).div_(length)  # new memory takes the system longer than the arithmetic


def check_view(number: int, view: Tensor, first: Tensor) -> None:
    """A TypeError or ValueError unless a view is (batch, dim) of floats, of the shape and on the device of view 0."""
    if not isinstance(view, Tensor):
        raise TypeError(f"View {number} must be a tensor, not {type(view).__name__}.")
    if not view.is_floating_point():
        raise TypeError(f"View {number} is {view.dtype}; embeddings must be of a float dtype: call .float().")
    if view.dim() != 2:
        raise ValueError(f"View {number} has shape {tuple(view.shape)}, needs (batch, dim): flatten it.")
    if view.shape != first.shape:
        raise ValueError(f"View {number} has shape {tuple(view.shape)}, view 0 {tuple(first.shape)}; they must agree.")
    if view.device != first.device:
        raise ValueError(f"View {number} is on {view.device}, view 0 on {first.device}; move them together.")
    if view.numel() == 0:
        raise ValueError(f"View {number} is empty, shape {tuple(view.shape)}.")


def _not_finite(views: Sequence[Tensor]) -> str:
    """What to say of views that hold NaN or infinity."""
    bad = [int((~torch.isfinite(view)).any(dim=1).sum()) for view in views]
    number = next(v for v, rows in enumerate(bad) if rows)
    return f"View {number} has {bad[number]} of {len(views[0])} rows with NaN or infinity: the model diverged."


def stacked(views: Sequence[Tensor]) -> tuple[Tensor, Tensor, bool]:
    """(views, batch, dim) in the dtype of the computation, its peaks as `normalize` wants them, and whether ordinary.

    The dtype is float64 if that of any view is, else float32.

    Raises:
        ValueError: on the CPU in eager code, for embeddings that are not finite.
    """
    dtype = torch.float64 if any(view.dtype == torch.float64 for view in views) else torch.float32
    # Nothing here is an operation that autocast would take to a half precision.
    together = torch.stack([view.to(dtype) for view in views])
    # A half precision's subnormal rows have few digits left, and gradients beyond its range.
    least = torch.finfo(torch.float16).tiny if views[0].dtype == torch.float16 else 0.0
    peak = _peak(together)
    ordinary = False
    if together.device.type == "cpu" and tracing.eager(together):
        lowest, highest = (end.item() for end in peak.aminmax())
        if not math.isfinite(highest):
            raise ValueError(_not_finite(views))
        ordinary = lowest > max(least, _least_peak(peak))
    return together, peak if ordinary else _unless_zero(peak, least), ordinary


def units_of(views: Sequence[Tensor]) -> Tensor:
    """(views, batch, dim) of length 1; the dtype and the errors are those of `stacked`."""
    return by_peak(*stacked(views))
