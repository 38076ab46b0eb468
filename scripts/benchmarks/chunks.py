#!/usr/bin/env python
"""Peak memory and time of a training step that embeds in chunks, beside one that embeds the batch as a whole.

    python scripts/benchmarks/chunks.py                                      # the README's numbers; about 5 minutes
    python scripts/benchmarks/chunks.py --device cuda --network resnet50 --image-size 224 --batch 2048 --timed 256

A step is two views, forward and backward pass, and DySTreSS' loss. Memory is the peak of one step above the network
and the images, in a process of its own: of a whole batch as large as a chunk, and of the large batch in chunks. Time is
of a batch that fits without chunks too, both in turn, medians. Prints a Markdown table, and the two ratios; with
--strict it exits with 1 where memory is above 1.5 or time above 1.4.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

import torch
from loss import measured, seconds
from torch import Tensor, nn
from torchvision import models

from dystress_plugin import ContrastiveLoss, embed_in_chunks

MOST_MEMORY, MOST_TIME = 1.5, 1.4
DIM = 128


class Training:
    """A network and a loss, and steps of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.encoder = models.get_model(options.network, weights=None, num_classes=DIM)
        if options.image_size <= 64:  # the usual stem for small images, as in `dystress pretrain`
            self.encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            self.encoder.maxpool = nn.Identity()
        self.encoder.to(options.device)
        self.loss = ContrastiveLoss("dystress").to(options.device)
        self.options = options

    def images(self, batch: int) -> Tensor:
        """(2, batch, 3, height, width)"""
        size = self.options.image_size
        return torch.randn(2, batch, 3, size, size, device=self.options.device)

    def step(self, images: Tensor, chunk: int) -> None:
        """One without an optimizer; `chunk` of at least the batch is the whole."""
        self.encoder.zero_grad()
        with torch.autocast(self.options.device, torch.bfloat16, enabled=self.options.bf16):
            z = [embed_in_chunks(self.encoder, view, chunk) for view in images]
        self.loss(*z).backward()


def peak_bytes(training: Training, batch: int, chunk: int) -> float:
    """Of one step, above the network and the images."""
    training.step(training.images(8), chunk)  # libraries, thread pools and their buffers
    training.encoder.zero_grad()
    images = training.images(batch)
    return measured(lambda: training.step(images, chunk), training.options.device)["peak_bytes"]


def alone(batch: int, given: list[str]) -> float:
    """`peak_bytes` in a process of its own."""
    command = [sys.executable, __file__, *given, "--measure", str(batch)]
    # What is freed goes back at once, or glibc's heap, with holes between what is held, would be counted as well.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return float(json.loads(done.stdout.splitlines()[-1]))


def median_seconds(training: Training, batch: int, chunks: tuple[int, ...], repeats: int) -> list[float]:
    """Of a step for every size of chunk, in turn after one to warm up."""
    images = training.images(batch)
    turns = [
        [seconds(lambda c=chunk: training.step(images, c), training.options.device) for chunk in chunks]  # type: ignore[misc]
        for _ in range(repeats + 1)
    ]
    return [statistics.median(own) for own in zip(*turns[1:], strict=True)]


def main(given: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--network", default="resnet18", help="a ResNet of torchvision (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=32, help="pixels (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=64, help="images of a chunk (default: %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=4096, help="images whose memory is measured (default: %(default)s)"
    )
    parser.add_argument("--timed", type=int, default=256, help="images whose time is (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of the timed step (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="under autocast to bfloat16")
    parser.add_argument("--strict", action="store_true", help="fail where a ratio is too large")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    training = Training(options)
    if options.measure:
        print(json.dumps(peak_bytes(training, options.measure, options.chunk)))
        return 0

    whole, chunked = median_seconds(training, options.timed, (options.timed, options.chunk), options.repeats)
    small, large = (alone(batch, given) for batch in (options.chunk, options.batch))
    print(f"{options.network}, {options.image_size} px, {options.device}, chunks of {options.chunk}\n")
    print("| images | embedded | peak memory (MiB) | time (s) |\n|---|---|---|---|")
    print(f"| {options.chunk} | whole | {small / 2**20:.0f} | |")
    print(f"| {options.batch} | in chunks | {large / 2**20:.0f} | |")
    print(f"| {options.timed} | whole | | {whole:.3f} |")
    print(f"| {options.timed} | in chunks | | {chunked:.3f} |\n")
    memory, time = large / small, chunked / whole
    print(f"memory {memory:.2f} (at most {MOST_MEMORY}), time {time:.2f} (at most {MOST_TIME})")
    return int(options.strict and (memory > MOST_MEMORY or time > MOST_TIME))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
