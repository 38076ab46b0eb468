#!/usr/bin/env python
"""Whether a step of a loss waits for the GPU, and whether it fits into a CUDA graph: methods x layouts x engines.

    python scripts/checks/gpu_steps.py [--images 64 3000] [--out steps.csv]

A step is the loss and its backward pass, in training, after three of them. "waits" is what
`torch.cuda.set_sync_debug_mode("error")` says in one. "graph" is whether a captured step, played, gives the value, the
gradients and the state of one that is not, to 1e-4 of the largest entry. Times are medians in milliseconds. With
`--device cpu` steps are only done. The exit status is 1 where any waits, or fits into no graph.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import gpu_tables
import torch
from torch import Tensor

from dystress_plugin import ContrastiveLoss, recipes
from dystress_plugin.engine import ENGINES

DIM, SAMPLES, EPOCH = 128, 100_000, 3.0
Step = Callable[[], list[Tensor]]


def cells(variants: bool) -> Iterator[tuple[str, str]]:
    """Every method in the layouts that it has, with its variants of another objective or without."""
    for name, recipe in recipes.METHODS.items():
        if variants or not name.endswith(("_dcl", "_dclw")):
            yield from ((name, layout) for layout in (["queue"] if recipe.queue else ["views", "one_way", "both_ways"]))


def loss_of(name: str, layout: str, engine: str, device: str) -> ContrastiveLoss:
    own = {"queue_size": (16384 if device == "cuda" else 4096, DIM)} if layout == "queue" else {"layout": layout}
    loss = ContrastiveLoss(name, engine=engine, **recipes.METHODS[name].sized(own, SAMPLES, DIM)).to(device)
    for temperature in loss.temperatures:
        temperature.eval()  # without dropout, which draws other masks in a graph
    return loss


def step_of(loss: ContrastiveLoss, views: Tensor, index: Tensor) -> Step:
    """The step as a function, of the value and the gradients."""

    def step() -> list[Tensor]:
        value = loss(*views, index=index, epoch=EPOCH)
        inputs = [views, *(parameter for parameter in loss.parameters() if parameter.requires_grad)]
        return [value.detach(), *torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)]

    return step


def waits(step: Step) -> str:
    """What a step waits for, or nothing."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return where(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def where(error: BaseException) -> str:
    """The first line of an error, and of the one that led to it; and the innermost line of ours that it comes from."""
    line, trace = "", error.__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        line = f" ({Path(path).name}:{trace.tb_lineno})" if "dystress_plugin" in path else line
        trace = trace.tb_next
    text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}{line}"
    return f"{text}, after {where(error.__context__)}" if error.__context__ else text


def graph_of(step: Step) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):  # a thread of autograd's may still hold nodes of the last step
        results = step()
    return graph, results


def differs(found: list[Tensor], expected: list[Tensor]) -> str:
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        size = max(other.abs().max().item(), 1e-30) if other.numel() else 1.0
        off = (one.double() - other.double()).abs().max().item() / size if other.numel() else 0.0
        if not off <= 1e-4:
            return f"tensor {number} is off by {off:.1g}"
    return ""


def captured(loss: ContrastiveLoss, views: Tensor, index: Tensor) -> tuple[str, float | None]:
    """What is wrong with a graph of a step, or nothing; and how long it takes."""
    try:
        graph, results = graph_of(step_of(loss, views, index))
        plain = copy.deepcopy(loss)
        graph.replay()
        expected = step_of(plain, views, index)()
    except Exception as error:  # of CUDA or of Python
        return where(error), None
    wrong = differs([*results, *loss.buffers()], [*expected, *plain.buffers()])
    return wrong, milliseconds(graph.replay, "cuda")


def milliseconds(call: Callable[[], object], device: str, repeats: int = 7) -> float:
    taken = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return 1e3 * statistics.median(taken)


def check(name: str, layout: str, engine: str, images: int, device: str) -> dict[str, object]:
    torch.manual_seed(0)
    loss = loss_of(name, layout, engine, device)
    views = torch.randn(2, images, DIM).to(device)
    views[1] = views[0] + 0.5 * views[1]
    views.requires_grad_()
    index = torch.randperm(SAMPLES)[:images].to(device)
    step = step_of(loss, views, index)
    row: dict[str, object] = {"method": name, "layout": layout, "engine": engine, "images": images}
    try:
        for _ in range(3):
            results = step()
        if not all(bool(result.isfinite().all()) for result in results):
            raise ArithmeticError("a value or gradient is not finite")
        row["ms"] = f"{milliseconds(step, device, 7 if device == 'cuda' else 1):.3f}"
    except Exception as error:
        return row | {"step": where(error)}
    row["step"] = "done"
    if device == "cuda":
        wrong = waits(step)
        row["waits"] = wrong or "no"
        graph, taken = captured(loss, views, index) if not wrong else ("not tried, as it waits", None)
        row |= {"graph": graph or "yes", **({"graph_ms": f"{taken:.3f}"} if taken else {})}
    return row


def summary(rows: gpu_tables.Rows) -> gpu_tables.Rows:
    """By size and engine: how many steps there are, of what kind, and medians of their times."""
    found = []
    for images, engine in dict.fromkeys((row["images"], row["engine"]) for row in rows):
        own = [row for row in rows if (row["images"], row["engine"]) == (images, engine)]
        ms, graph_ms = ([float(str(row[key])) for row in own if key in row] for key in ("ms", "graph_ms"))
        one: dict[str, object] = {"images": images, "engine": engine, "steps": len(own)}
        one |= {"done": sum(row["step"] == "done" for row in own)}
        one |= {"without waiting": sum(row.get("waits") == "no" for row in own)}
        one |= {"in a graph": sum(row.get("graph") == "yes" for row in own)}
        one |= {"median ms": f"{statistics.median(ms):.3f}" if ms else "–"}
        found.append(one | {"in a graph, ms": f"{statistics.median(graph_ms):.3f}" if graph_ms else "–"})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--images", type=int, nargs="+", default=[64, 3000])
    parser.add_argument("--few", action="store_true", help="without the methods that differ in the objective alone")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of a temperature that sinks, and of graphs
    gc.freeze()  # each capture collects garbage, and would look through all that was imported
    rows: gpu_tables.Rows = []
    for images in args.images:
        for engine in ENGINES:
            for name, layout in cells(not args.few):
                row = check(name, layout, engine, images, args.device)
                if args.device == "cuda":
                    torch.cuda.empty_cache()  # of the graph, and what may be missing to other processes
                rows.append(row)
                bad = {row.get("step", "done"), row.get("waits", "no"), row.get("graph", "yes")} - {"done", "no", "yes"}
                if bad:
                    print(f"{name}, {layout}, {engine}, {images} images: {'; '.join(map(str, bad))}", flush=True)
            gpu_tables.write(rows, args.out)
    print(f"\n{gpu_tables.markdown(summary(rows))}")
    if args.device == "cuda":
        print(f"At the end {torch.cuda.memory_allocated() / 2**20:.0f} MiB are held.")
    done = sum(row["step"] == "done" for row in rows)
    text = f"{done} of {len(rows)} steps were done"
    if args.device == "cuda":
        still, graphs = (sum(row.get(key) == yes for row in rows) for key, yes in (("waits", "no"), ("graph", "yes")))
        text += f", {still} without waiting for the GPU, {graphs} in a CUDA graph as without one"
        done = min(done, still, graphs)
    print(f"{text}.")
    return int(done < len(rows))


if __name__ == "__main__":
    sys.exit(main())
