"""From the embeddings of a batch's columns to the loss: what the loss and its cached form share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, final

from torch import Tensor, nn

from dystress_plugin.arguments import Index
from dystress_plugin.contrastive import ContrastiveLoss
from dystress_plugin.recipes import METHODS
from dystress_plugin.temperature import Temperature
from dystress_plugin.training import loss_or_zero


@final
class SentenceCriterion(nn.Module):
    """`ContrastiveLoss` of columns of embeddings: anchors, positives, then any hard negatives.

    Args:
        temperature: as for `ContrastiveLoss`.
        layout: "one_way", "both_ways" or "views"; None is "views" with a queue, else "one_way".
        queue_size: as for `ContrastiveLoss`.
        gather_across_devices: its `gather_distributed`, in the words of sentence-transformers.
        **settings: its other arguments.

    Attributes:
        loss: the `ContrastiveLoss` that computes.
        epoch: where training stands, set by `ContrastiveCallback`; None without it.
    """

    def __init__(
        self,
        temperature: str | Temperature,
        *,
        layout: str | None = None,
        queue_size: tuple[int, int] | int | None = None,
        gather_across_devices: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        queued = bool(queue_size) or (
            isinstance(temperature, str) and temperature in METHODS and METHODS[temperature].queue
        )
        self.loss = ContrastiveLoss(
            temperature,
            layout=layout or ("views" if queued else "one_way"),
            queue_size=queue_size,
            gather_distributed=gather_across_devices,
            **settings,
        )
        self.epoch: float | None = None

    def forward(self, embeddings: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: two or more (batch, dim) tensors, one per column.
            labels: (batch,) int64 sample numbers where the temperature keeps a table, or (batch, 2) where the sides of
                "both_ways" are numbered apart; else not looked at.

        Raises:
            ValueError: for hard negatives in a layout without them, or sample numbers or an epoch that are missing.
        """
        if len(embeddings) > 2 and self.loss.layout == "views" and self.loss.queue is None:
            raise ValueError(
                f"layout='views' has no hard negatives, but the data set has {len(embeddings)} columns: "
                "leave two, or use layout='one_way'."
            )
        return loss_or_zero(self.loss, *embeddings, index=self._index(labels), epoch=self._epoch())

    def check_without_state(self) -> None:
        """For a loss around this one that computes it for several embeddings of a batch.

        Raises:
            ValueError: if there is a queue or a table, which can hold those of one kind alone.
        """
        if any(True for _ in self.loss.buffers()):
            kept = "A queue" if self.loss.queue is not None else type(self.loss.temperature).__name__
            raise ValueError(
                f"{kept} keeps what it learns from one kind of embeddings, and this loss stands inside of one that "
                "computes it for several layers or dims (MatryoshkaLoss, AdaptiveLayerLoss, Matryoshka2dLoss): use a "
                "method without queue and table there, such as 'dystress'."
            )

    def _index(self, labels: Tensor | None) -> Index | None:
        temperature = self.loss.temperature
        if not temperature.needs_index:
            return None
        if labels is None:
            raise ValueError(
                f"{type(temperature).__name__} keeps a temperature for every sample and needs to know which is which: "
                "number the rows, train_dataset.add_column('label', range(len(train_dataset)))."
            )
        return (labels[:, 0], labels[:, 1]) if labels.dim() == 2 and labels.shape[1] == 2 else labels

    def _epoch(self) -> float | None:
        temperature = self.loss.temperature
        if self.epoch is None and temperature.needs_epoch:
            raise ValueError(
                f"{type(temperature).__name__} changes with the epoch, which the trainer does not tell its loss: call "
                "trainer.add_callback(ContrastiveCallback(trainer)) before training."
            )
        if self.epoch is None:
            return None
        return self.epoch if temperature.per_step else float(math.floor(self.epoch))

    def settings(self) -> dict[str, Any]:
        """For the model card."""
        return {
            "temperature": str(self.loss.temperature),
            "objective": self.loss.objective,
            **self.loss.objective_settings,
            "layout": self.loss.layout,
            "queue_size": tuple(self.loss.queue.keys.shape) if self.loss.queue is not None else None,
            "gather_across_devices": self.loss.gather_distributed,
        }


def columns(sentence_features: Iterable[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The columns, of which a single one stands twice: unsupervised SimCSE, where dropout makes the difference.

    A model writes what it computes into them, and a loss around ours, such as AdaptiveLayerLoss, reads it there when it
    calls ours again: they are the caller's own, and so is his list, which keeps the second one for him.
    """
    found = sentence_features if isinstance(sentence_features, list) else list(sentence_features)
    if len(found) == 1:
        found.append(found[0])
    for number, features in enumerate(found):
        if any(features is other for other in found[:number]):
            found[number] = dict(features)
    return found
