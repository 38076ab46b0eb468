"""MACL as a criterion: one temperature per batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor

from dystress_plugin.checks import check_number, check_positive
from dystress_plugin.frameworks.lightly.losses.base import Criterion


@final
class MACLLoss(Criterion):
    """mean_i -sg[1 / (1 - p_i)] log p_i, p_i = exp(s_ip / tau_a) / (exp(s_ip / tau_a) + sum_n exp(s_in / tau_a)).

    The temperature is one per batch, tau_a = temperature * (1 + alpha * (A - A_0)), with A the mean cosine similarity
    s_ip of the positives, without gradient. What lightly's own MACLLoss does not have: a memory bank, gathered
    negatives (A is then the mean over all GPUs), any alpha >= 0, and exact values and gradients where p_i rounds to 1,
    for which lightly adds 1e-8 to the divisor.

    - [0] Model-Aware Contrastive Learning, 2023, https://arxiv.org/abs/2207.07874

    Attributes:
        temperature:
            Base temperature. Range: (0, inf)
        alpha:
            How strongly the alignment acts. Range: [0, inf). The paper has 0.5 for images, 2 for sentences.
        A_0:
            Alignment at which the temperature is the base temperature. Range: [-1, 1]. 0 for images, 0.8 for
            sentences.
        memory_bank_size:
            Size of the memory bank as (num_features, dim) tuple, or 0 for none.
        gather_distributed:
            If True then negatives from all GPUs are gathered before the loss calculation.
        objective:
            "ntxent", "macl", "sogclr", "dcl" or "dclw"; see `dystress_plugin.objectives`.
        sigma:
            For "dclw". Range: [0.01, inf). None takes 0.5.

    Raises:
        ValueError:
            If a value is out of its range, or for a memory bank without dimension.

    Examples:
        >>> # initialize the loss function
        >>> loss_fn = MACLLoss(temperature=0.1, alpha=0.5)
        >>>
        >>> # feed two views through SimCLR or MoCo model
        >>> z0, z1 = model(t0), model(t1)
        >>>
        >>> # calculate loss
        >>> loss = loss_fn(z0, z1)
    """

    def __init__(
        self,
        temperature: float = 0.1,
        alpha: float = 0.5,
        A_0: float = 0.0,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        objective: str = "macl",
        sigma: float | None = None,
    ) -> None:
        # The temperature checks both under its own names, tau and threshold, which nobody typed here.
        check_positive("temperature", temperature)
        if not -1 <= check_number("A_0", A_0) <= 1:
            raise ValueError(f"A_0={A_0} must lie in [-1, 1]: it is compared with a mean cosine.")
        super().__init__(
            "macl",
            memory_bank_size,
            gather_distributed,
            objective=objective,
            sigma=sigma,
            tau=temperature,
            alpha=alpha,
            threshold=A_0,
        )

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            z0: first view embeddings, (batch_size, embedding_size), not normalised.
            z1: second view embeddings, of the same shape.
        """
        return self._value(z0, z1)
