"""Losses for SentenceTransformerTrainer, in the place of MultipleNegativesRankingLoss."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.losses.adaptive_layer import TransformerDecorator
from sentence_transformers.sentence_transformer.losses.matryoshka import CachedLossDecorator, ForwardDecorator
from torch import Tensor, nn

from dystress_plugin.checks import check_count
from dystress_plugin.frameworks.sentence_transformers.criterion import SentenceCriterion, columns
from dystress_plugin.temperature import Temperature

try:
    from sentence_transformers.base.losses.merged_forward import embed_columns
except ImportError:  # before 6

    def embed_columns(model: nn.Module, features_list: Iterable[dict[str, Any]]) -> Any:  # type: ignore[misc]
        """The embeddings of each column; the library's own has those of all candidates in one forward pass."""
        return [model(features)["sentence_embedding"] for features in features_list]


TOKENS = "mini_batch_num_tokens"

#: What the DySTreSS paper's code gives SimCSE, by method: ContrastiveSentenceLoss(model, "macl", **SETTINGS["macl"]).
SETTINGS: dict[str, dict[str, Any]] = {
    "simclr": {"tau": 0.05},
    "dystress": {"tau_min": 0.04, "tau_max": 0.05, "profile": "shifted"},
    "macl": {"tau": 0.05, "alpha": 2.0, "threshold": 0.8},
}


class ContrastiveSentenceLoss(nn.Module):
    """mean_i -log( exp(a(s_ip)) / sum_c exp(a(s_ic)) ), a(s) = s / tau, the temperature given by a method.

    i runs over the first column of the data set, p is the same row of the second, c all rows of the second column and
    of any further ones, which hold hard negatives. A data set of one column is embedded twice, and dropout makes the
    positives: unsupervised SimCSE. With `Constant(tau)` it is MultipleNegativesRankingLoss(scale=1 / tau). A batch of
    one sentence without negatives has the value 0.

    Temperatures that depend on the epoch, tables in checkpoints, and logs need
    `trainer.add_callback(ContrastiveCallback(trainer))`; a table of samples needs a column `label` with the numbers of
    the rows, and `num_samples=len(train_dataset)`. With the layout "both_ways" each column has a table, as of questions
    and answers: where they are numbered apart, a label is a pair of numbers, and so is `num_samples`. "tempnet" needs
    `dim`, the length of embeddings.

    Inside of MatryoshkaLoss, AdaptiveLayerLoss or Matryoshka2dLoss, which compute it for several embeddings of a batch,
    it can have neither a queue nor a table.

    Args:
        model: the encoder.
        temperature: a method's name, from `dystress_plugin.recipes.METHODS`, or an instance of a class in
            `dystress_plugin.temperature`. A name has its own defaults, which are those of images; `SETTINGS` has those
            of sentences.
        layout: "one_way" as above (SimCSE); "both_ways" adds the way from the second column to the first, without hard
            negatives, and halves the sum; "views" makes both columns anchors, compared with both (SimCLR). None is
            "one_way", with a queue "views", which it needs.
        gather_across_devices: compare with the batches of all devices, with gradient.
        **settings: `objective`, `queue_size`, `engine`, and parameters of a temperature given by name, such as
            `tau_max=0.05`; as for `dystress_plugin.ContrastiveLoss`.

    Raises:
        ValueError: for an unknown name (with the nearest valid one) or a parameter out of its range.
        TypeError: for a temperature that is neither a name nor a `Temperature`, or its settings beside an instance.

    Examples:
        >>> loss = ContrastiveSentenceLoss(model, "dystress", **SETTINGS["dystress"])
        >>> trainer = SentenceTransformerTrainer(model, train_dataset=sentences, loss=loss)
        >>> trainer.add_callback(ContrastiveCallback(trainer))
        >>> trainer.train()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        temperature: str | Temperature = "dystress",
        *,
        layout: str | None = None,
        gather_across_devices: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.model = model
        self.criterion = SentenceCriterion(
            temperature, layout=layout, gather_across_devices=gather_across_devices, **settings
        )

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch: tokenised columns, and the numbers of the rows where the temperature keeps a table."""
        if _is_decorated(self.model, (TransformerDecorator, ForwardDecorator)):
            self.criterion.check_without_state()
        value: Tensor = self.criterion(embed_columns(self.model, columns(sentence_features)), labels)
        return value

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return self.criterion.settings()


class CachedContrastiveSentenceLoss(CachedMultipleNegativesRankingLoss):
    """`ContrastiveSentenceLoss` in the memory of a small batch: the same numbers, at about one more forward pass.

    As CachedMultipleNegativesRankingLoss, whose machinery it is (GradCache, 2021, https://arxiv.org/abs/2101.06983), it
    embeds in parts without gradient, differentiates the loss in the embeddings, and embeds every part again with the
    same dropout. The matrix of similarities is tiled by the "blockwise" engine where the batch is large.

    Args:
        model: the encoder.
        temperature: as for `ContrastiveSentenceLoss`.
        mini_batch_size: sentences that are embedded at a time.
        mini_batch_num_tokens: tokens without padding that are embedded at a time, in the place of `mini_batch_size`;
            needs sentence-transformers 6.
        show_progress_bar: over the parts of a batch.
        **settings: as for `ContrastiveSentenceLoss`.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        temperature: str | Temperature = "dystress",
        *,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(
            model,
            mini_batch_size=mini_batch_size,
            show_progress_bar=show_progress_bar,
            **_tokens(mini_batch_num_tokens),
        )
        self.criterion = SentenceCriterion(temperature, **settings)
        self._labels: Tensor | None = None
        self._own: list[tuple[nn.Parameter, Tensor]] = []

    @property
    def temperature(self) -> Temperature:  # type: ignore[override]
        """The temperature; in the class it is derived from, 1 / scale."""
        return self.criterion.loss.temperature

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        if _is_decorated(self.model, TransformerDecorator):
            raise ValueError(
                "AdaptiveLayerLoss and Matryoshka2dLoss take no loss with cached gradients: use "
                "ContrastiveSentenceLoss inside of them."
            )
        if isinstance(self.calculate_loss, CachedLossDecorator):
            self.criterion.check_without_state()
        self._labels, self._own = labels, []
        value: Tensor = super().forward(columns(sentence_features), labels)  # type: ignore[arg-type]
        for parameter, gradient in self._own:
            value.register_hook(lambda outer, p=parameter, g=gradient: _accumulate(p, outer * g))
        self._labels, self._own = None, []
        return value

    def calculate_loss(self, reps: list[list[Tensor]], *labels: Any, with_backward: bool = False) -> Tensor:
        """The loss of embeddings that lie in parts, a list of parts per column; `with_backward` fills their `grad`."""
        value: Tensor = self.criterion([torch.cat(parts) for parts in reps], self._labels)
        if not with_backward:
            return value
        leaves = [part for parts in reps for part in parts]
        own = [parameter for parameter in self.criterion.parameters() if parameter.requires_grad]
        # Not value.backward(): the temperature's own gradient has to wait for the trainer's scale of the loss.
        gradients = torch.autograd.grad(value, [*leaves, *own], allow_unused=True, materialize_grads=True)
        for leaf, gradient in zip(leaves, gradients, strict=False):
            leaf.grad = gradient
        weight = self._weight(leaves[0].shape[1])
        self._own += [(parameter, weight * g) for parameter, g in zip(own, gradients[len(leaves) :], strict=True)]
        return value.detach()

    def _weight(self, dim: int) -> float:
        """What MatryoshkaLoss weighs embeddings of this length with; it does so to those gradients that it knows of."""
        outer = self.calculate_loss
        if not isinstance(outer, CachedLossDecorator):
            return 1.0
        return float(outer.matryoshka_weights[outer.matryoshka_dims.index(dim)])

    def get_config_dict(self) -> dict[str, Any]:
        sizes = {name: getattr(self, name) for name in ("mini_batch_size", TOKENS) if hasattr(self, name)}
        return self.criterion.settings() | sizes


def _tokens(number: int | None) -> dict[str, int]:
    """The library's argument, where it is given; a ValueError for less than one token, or a library without it."""
    if number is None:
        return {}
    if TOKENS not in inspect.signature(CachedMultipleNegativesRankingLoss).parameters:
        raise ValueError(f"{TOKENS}={number} needs sentence-transformers 6: update it, or set mini_batch_size.")
    return {TOKENS: check_count(TOKENS, number)}


def _is_decorated(model: nn.Module, decorators: type | tuple[type, ...]) -> bool:
    """Whether one of the library's losses around ours has put such a thing in the place of a `forward`."""
    return any(isinstance(vars(part).get("forward"), decorators) for part in model.modules())


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    gradient = gradient.to(parameter.dtype)  # the trainer's scale may be wider
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
