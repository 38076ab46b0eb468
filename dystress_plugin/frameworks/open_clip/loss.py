"""A loss in the place of open_clip's ClipLoss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dystress_plugin.contrastive import ContrastiveLoss
from dystress_plugin.temperature import Temperature
from dystress_plugin.training import loss_or_zero

MAX_SCALE = math.log(100)  # where open_clip holds logit_scale


class ContrastiveClipLoss(nn.Module):
    """mean over both ways of -log( exp(a(s_ii)) / sum_j exp(a(s_ij)) ), a(s) = s / tau, the temperature by a method.

    i runs over the images and then over the texts, j over the other side. With a constant temperature, or the model's
    own, it is open_clip's ClipLoss. Several processes compare with the batches of all of them, with gradient, whatever
    `--local-loss` and `--gather-with-grad` say; their mean is the loss.

    A method that learns one temperature takes the model's `logit_scale`, and trains it: tau = 1 / logit_scale. For all
    others `logit_scale` gets a gradient of 0, so that DistributedDataParallel does not wait for it.

    CLIP, 2021, https://arxiv.org/abs/2103.00020 (0.07 at the start, learned).

    Args:
        temperature: a method's name, from `dystress_plugin.recipes.METHODS`, an instance of a class in
            `dystress_plugin.temperature`, or a pair of them, for images and texts.
        **settings: `objective`, `engine`, and parameters of a temperature given by name, such as `tau_max=0.05` or, for
            tables of images and texts, `num_samples=N` or `num_samples=(images, texts)`.

    Raises:
        ValueError: for an unknown name (with the nearest valid one), a parameter out of its range, or a queue.
        TypeError: for a temperature that is neither a name nor a `Temperature`, or its settings beside an instance.

    Attributes:
        index: sample numbers of the next batch, and
        epoch: its epoch, for loops such as open_clip's that hand over the features alone.

    Examples:
        >>> loss = ContrastiveClipLoss("dystress", tau_min=0.01, tau_max=0.04)
        >>> losses = loss(**model(images, texts), output_dict=True)
        >>> losses["contrastive_loss"].backward()
    """

    def __init__(self, temperature: str | Temperature | Sequence[Temperature] = "dystress", **settings: Any) -> None:
        super().__init__()
        self.criterion = ContrastiveLoss(temperature, layout="both_ways", gather_distributed=True, **settings)
        self.index: Tensor | tuple[Tensor, Tensor] | None = None
        self.epoch: float | None = None
        # The model's own takes its place, and a host's optimizer has that.
        for parameter in self._scales().values():
            parameter.requires_grad_(False)

    @property
    def trains_scale(self) -> bool:
        """Whether the method learns one temperature, which is then the model's `logit_scale`."""
        return bool(self._scales())

    def _scales(self) -> dict[str, nn.Parameter]:
        """The parameters that the model's scale takes the place of, by their names in the loss."""
        sides = zip(("temperature", "temperature_back"), self.criterion.temperatures, strict=False)
        names = [f"{side}.{temperature.scalar}" for side, temperature in sides if temperature.scalar]
        return {name: self.criterion.get_parameter(name) for name in names}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # index and epoch change with every batch
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | None = None,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        *,
        index: Tensor | tuple[Tensor, Tensor] | None = None,
        epoch: float | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch, called as open_clip calls its own.

        Args:
            image_features: (batch, dim), any scale.
            text_features: (batch, dim), row i of each a pair.
            logit_scale: the model's, already exponentiated.
            logit_bias: of SigLIP's models; must be None.
            output_dict: return {"contrastive_loss": value} instead of the value.
            index: (batch,) int64 sample numbers, or a pair of them for images and texts, where the temperature keeps
                tables; None is the attribute.
            epoch: the current epoch, 0 first, where the temperature is scheduled; None is the attribute.

        Raises:
            ValueError: for a model with a bias, a learned temperature without the model's scale, or what
                `dystress_plugin.ContrastiveLoss` refuses.
        """
        if logit_bias is not None:
            raise ValueError("logit_bias is given: a model with a bias, as SigLIP's, has another loss than CLIP's.")
        index = self.index if index is None else index
        epoch = self.epoch if epoch is None else epoch
        compute = _Computed(self.criterion)
        if self.trains_scale:
            if logit_scale is None:
                raise ValueError("This method learns the model's own temperature: give logit_scale, as the model does.")
            own = -logit_scale.float().log().reshape(())
            with torch.no_grad():  # for logs, which ask the loss
                for parameter in self._scales().values():
                    parameter.copy_(own)
            swapped = {f"criterion.{name}": own for name in self._scales()}
            value = functional_call(compute, swapped, (image_features, text_features), {"index": index, "epoch": epoch})
        else:
            value = compute(image_features, text_features, index=index, epoch=epoch)
            if logit_scale is not None:
                value = value + 0.0 * logit_scale.sum()
        return {"contrastive_loss": value} if output_dict else value


class _Computed(nn.Module):
    """`loss_or_zero` as a module, whose parameters `functional_call` can replace."""

    def __init__(self, criterion: ContrastiveLoss) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, *features: Tensor, **given: Any) -> Tensor:
        return loss_or_zero(self.criterion, *features, **given)
