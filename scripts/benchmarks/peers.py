"""Prints a Markdown table: how far our losses are from other people's, on random batches with a constant temperature.

    python scripts/benchmarks/peers.py [--batches 20]

Differences are relative to the largest entry (of the gradient with respect to both views; of the value, if above 1),
the largest over all batches, sizes and temperatures. Peers that are not installed are listed as such.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dystress_plugin import ContrastiveLoss
from dystress_plugin.temperature import Constant, ModelAware

SIZES = [(8, 4), (33, 16), (64, 128)]  # images, dim
TAUS = [0.1, 0.5]
DTYPES = [torch.float64, torch.float32]
Loss = Callable[[Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """What a loss is built for."""

    tau: float
    images: int
    dim: int
    dtype: torch.dtype

    @property
    def queue_size(self) -> tuple[int, int]:
        """Keys and dim of a queue that batches fill without a rest, which lightly's would lose."""
        return 4 * self.images, self.dim


@dataclass(frozen=True)
class Peer:
    """Another library's loss beside our setting."""

    name: str
    setting: str
    ours: Callable[[Case], ContrastiveLoss]
    theirs: Callable[[Case], Any]


def constant(**settings: Any) -> Callable[[Case], ContrastiveLoss]:
    return lambda case: ContrastiveLoss(Constant(case.tau), **settings)


def queue(case: Case) -> ContrastiveLoss:
    return ContrastiveLoss(Constant(case.tau), queue_size=case.queue_size).to(case.dtype)


def macl(case: Case) -> ContrastiveLoss:
    return ContrastiveLoss(ModelAware(case.tau, 0.5, 0.0))


def lightly(name: str, **attributes: Any) -> Callable[[Case], Loss]:
    def build(case: Case) -> Loss:
        from lightly import loss

        built: Any = getattr(loss, name)(temperature=case.tau)
        for attribute, value in attributes.items():
            setattr(built, attribute, value)
        return built  # type: ignore[no-any-return]

    return build


def lightly_bank(case: Case) -> Loss:
    from lightly.loss import NTXentLoss

    return NTXentLoss(case.tau, memory_bank_size=case.queue_size).to(case.dtype)  # type: ignore[no-any-return]


def metric_learning(case: Case) -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss

    loss, labels = NTXentLoss(temperature=case.tau), torch.arange(case.images).repeat(2)
    return lambda z0, z1: loss(torch.cat([z0, z1]), labels)


def open_clip(case: Case) -> Loss:
    from open_clip.loss import ClipLoss

    loss, normalize = ClipLoss(), torch.nn.functional.normalize
    return lambda z0, z1: loss(normalize(z0), normalize(z1), 1 / case.tau)


PEERS = [
    Peer("lightly NTXentLoss", "Constant", constant(), lightly("NTXentLoss")),
    Peer("lightly NTXentLoss, memory bank", "Constant, queue", queue, lightly_bank),
    Peer("lightly DCLLoss", "Constant, dcl", constant(objective="dcl"), lightly("DCLLoss")),
    Peer("lightly DCLWLoss", "Constant, dclw", constant(objective="dclw"), lightly("DCLWLoss")),
    Peer("lightly MACLLoss", "ModelAware, macl", macl, lightly("MACLLoss")),
    Peer("lightly MACLLoss, its eps of 1e-8 set to 0", "ModelAware, macl", macl, lightly("MACLLoss", eps=0.0)),
    Peer("pytorch-metric-learning NTXentLoss", "Constant", constant(), metric_learning),
    Peer("open_clip ClipLoss", "Constant, both_ways", constant(layout="both_ways"), open_clip),
]


def batch(images: int, dim: int, generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    """Two views with a common direction, so that positives are the more similar ones."""
    shared = torch.randn(images, dim, generator=generator, dtype=torch.float64)
    return [(shared + 0.7 * torch.randn(shared.shape, generator=generator).double()).to(dtype) for _ in range(2)]


def value_and_gradient(loss: Loss, views: list[Tensor]) -> tuple[Tensor, Tensor]:
    leaves = [view.clone().requires_grad_() for view in views]
    value = loss(*leaves)
    return value.detach().double(), torch.stack(torch.autograd.grad(value, leaves)).double()


def difference(peer: Peer, dtype: torch.dtype, batches: int) -> tuple[float, float]:
    """Largest difference in value and in gradient."""
    largest, generator = [0.0, 0.0], torch.Generator().manual_seed(0)
    for images, dim in SIZES:
        for tau in TAUS:
            case = Case(tau, images, dim, dtype)
            ours, theirs = peer.ours(case), peer.theirs(case)
            if ours.queue is not None:
                theirs.memory_bank.bank.copy_(ours.queue.keys)
            for _ in range(batches):
                views = batch(images, dim, generator, dtype)
                for which, (a, b) in enumerate(
                    zip(value_and_gradient(ours, views), value_and_gradient(theirs, views), strict=True)
                ):
                    scale = max(float(b.abs().max()), 1.0 if which == 0 else 0.0)
                    largest[which] = max(largest[which], float((a - b).abs().max()) / scale)
    return largest[0], largest[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=20, help="random batches of every size and temperature")
    batches = parser.parse_args().batches
    warnings.simplefilter("ignore")  # theirs, at import and in lightly's DCLWLoss
    sizes = ", ".join(f"{images} x {dim}" for images, dim in SIZES)
    print(f"Largest difference over {batches} random batches of each size ({sizes}) and tau {TAUS}.\n")
    print("| peer | our setting | float64 value | float64 gradient | float32 value | float32 gradient |")
    print("|---|---|---|---|---|---|")
    for peer in PEERS:
        try:
            numbers = [f"{x:.1e}" for dtype in DTYPES for x in difference(peer, dtype, batches)]
        except ImportError:
            numbers = ["not installed"] + ["-"] * 3
        print("|", " | ".join([peer.name, peer.setting, *numbers]), "|")


if __name__ == "__main__":
    main()
