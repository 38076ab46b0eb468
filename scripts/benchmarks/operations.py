#!/usr/bin/env python
"""How many operations a step of the loss takes, forward and backward pass together, beside plain PyTorch.

    python scripts/benchmarks/operations.py          # 64 images, where operations cost more than their numbers

Counted are those that compute, each a kernel on a GPU, and those that only view a tensor in another way. Prints a
Markdown table.
"""

from __future__ import annotations

import argparse

from loss import Call, contenders, inputs, step
from torch.profiler import ProfilerActivity, profile

VIEWS = {"as_strided", "view", "_reshape_alias", "detach", "alias"}
# Ask for memory, or nothing at all of a tensor as it is here.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "resize_", "result_type", "resolve_conj", "real", "to"}


def operations(loss: Call, images: int, dim: int) -> tuple[int, int]:
    """Those that compute, and those that view, of the second step."""
    z = inputs(images, dim, "float32", "cpu")
    step(loss, z, "float32")
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step(loss, z, "float32")
    names = [
        event.name.removeprefix("aten::")
        for event in found.events()
        if event.name.startswith("aten::")
        # Else it is counted by what it calls.
        and {child.name.removeprefix("aten::") for child in event.cpu_children} <= FREE
    ]
    return sum(name not in VIEWS | FREE for name in names), sum(name in VIEWS for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[64])
    parser.add_argument("--dim", type=int, default=128)
    arguments = parser.parse_args()
    print("| images | implementation | operations | views |\n|---|---|---|---|")
    for images in arguments.batches:
        for name, loss in contenders("views", ["ours", "ours, dense", "ours, blockwise", "dense PyTorch"]).items():
            print(f"| {images} | {name} | {' | '.join(map(str, operations(loss, images, arguments.dim)))} |")


if __name__ == "__main__":
    main()
