"""What a loss is given, checked: temperatures, an objective, a queue, sample numbers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dystress_plugin import hardware
from dystress_plugin.checks import plain, unknown_name
from dystress_plugin.key_queue import KeyQueue
from dystress_plugin.objectives import OBJECTIVES, Objective
from dystress_plugin.temperature import Temperature
from dystress_plugin.temperature.base import given_index

Index: TypeAlias = "Tensor | tuple[Tensor, Tensor]"
Indices: TypeAlias = tuple[Tensor, ...]  # none, one for all views, or one a side


def instances(temperature: Any, layout: str) -> tuple[Temperature, ...]:
    """The temperature of every side that has one of its own, from what was given in place of a name."""
    given = tuple(temperature) if isinstance(temperature, (tuple, list)) else (temperature,)
    for own in given:
        if not isinstance(own, Temperature):
            raise TypeError(
                f"temperature={own!r} must be a method's name, such as 'dystress', or an instance of a class "
                f"in dystress_plugin.temperature, such as Constant(0.1), not {type(own).__name__}."
            )
    if isinstance(temperature, (tuple, list)):
        if len(given) != 2 or layout != "both_ways":
            raise ValueError(
                f"{len(given)} temperatures with layout='{layout}': a pair of them is for the two sides of 'both_ways'."
            )
        if given[0] is given[1]:
            raise ValueError("The two sides have the same temperature: give one instance, or two.")
    elif layout == "both_ways" and temperature.per_side:
        given = temperature, copy.deepcopy(temperature)
    return given


def objective_of(objective: str | Objective) -> Objective:
    """An objective from its name, or as it is given."""
    if isinstance(objective, Objective):
        return objective
    if not isinstance(objective, str):
        raise TypeError(
            f"objective={objective!r} must be a name, such as 'dcl', or an instance of "
            f"dystress_plugin.objectives.Objective, not {type(objective).__name__}."
        )
    if objective not in OBJECTIVES:
        raise ValueError(unknown_name("objective", objective, OBJECTIVES))
    return OBJECTIVES[objective]


def queue_of(queue_size: tuple[int, int] | int | None) -> KeyQueue | None:
    """The queue of (keys, dim); none for None and 0."""
    queue_size = plain(queue_size)
    if queue_size is None or (isinstance(queue_size, int) and queue_size == 0):
        return None
    try:
        size, dim = queue_size  # type: ignore[misc]
    except (TypeError, ValueError):
        raise ValueError(
            f"queue_size={queue_size!r} must be (keys, dim), such as (65536, 128), or 0 for none."
        ) from None
    return KeyQueue(size, dim)


def labels_of(labels: Tensor, view: Tensor) -> Tensor:
    """Classes, on the view's device."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be an int64 tensor of classes, not {got}.")
    if labels.shape != view.shape[:1]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, the batch needs ({len(view)},).")
    return hardware.moved(labels, view.device)


def indices_of(index: Index | None, view: Tensor, temperatures: Sequence[Temperature], layout: str) -> Indices:
    """Sample numbers for both sides in one tensor or each in its own, on the view's device; none without."""
    for temperature in temperatures:
        if temperature.needs_index:
            given_index(index, type(temperature).__name__)
    if index is None:
        return ()
    pair = isinstance(index, (tuple, list)) and any(isinstance(own, Tensor) for own in index)
    if pair and (layout != "both_ways" or len(index) != 2):
        raise ValueError(
            f"index is a {type(index).__name__} of {len(index)}: a pair of tensors is for the two sides of "
            f"layout='both_ways', and this loss has '{layout}'."
        )
    lengths = [length for temperature in temperatures for length in temperature.table_lengths]
    if not pair and layout == "both_ways" and len(set(lengths)) > 1:
        raise ValueError(
            f"The sides have tables of {lengths[0]} and {lengths[1]} samples, so each needs sample numbers of its "
            "own: call loss(z0, z1, index=(index_0, index_1))."
        )
    for own in (indices := tuple(index) if pair else (index,)):
        if not isinstance(own, Tensor) or own.dtype != torch.int64:
            got = own.dtype if isinstance(own, Tensor) else type(own).__name__
            raise TypeError(f"index must be an int64 tensor of sample numbers, not {got}.")
        if own.shape != view.shape[:1]:
            raise ValueError(f"index has shape {tuple(own.shape)}, the batch needs ({len(view)},).")
    return tuple(hardware.moved(own, view.device) for own in indices)
