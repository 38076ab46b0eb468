"""Runs a function in real processes that share a gloo group: nothing of a collective is imitated."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing


def _process(rank: int, function: Callable[..., Any], world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1000 * int(os.environ.get("TEST_SEED", "0")) + rank)  # as the test's own process is seeded
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    torch.save(function(rank), f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the group, and abort an interpreter that ends before them


def run(function: Callable[[int], Any], world_size: int, folder: Path) -> list[Any]:
    """What `function(rank)`, a function of an importable module, returns in every process."""
    multiprocessing.spawn(_process, (function, world_size, str(folder)), nprocs=world_size)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]
