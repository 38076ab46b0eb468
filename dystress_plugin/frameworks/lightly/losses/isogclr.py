"""iSogCLR as a criterion: a temperature for every image."""

from __future__ import annotations

from typing import final

from torch import Tensor

from dystress_plugin.frameworks.lightly.losses.base import Criterion


@final
class ISogCLRLoss(Criterion):
    """mean_i sum_v ( sum_n w_vn s_vn - s_vp ), w_vn = sg[ exp(s_vn / tau_i) / (N * running mean of the same) ].

    v runs over the two views of image i, n over its N negatives. Every image of the data set has its own temperature
    tau_i, which is learned from how similar its negatives are. The tables are part of the state dict: save the
    criterion with the model, and resume with it. They change only in train mode and for embeddings with gradient.

    - [0] iSogCLR, 2023, https://arxiv.org/abs/2305.11965

    Attributes:
        num_samples:
            Number of images in the data set; `index` runs from 0 to num_samples - 1.
        tau_init:
            Temperature of every image at the start. Range: [tau_min, tau_max]
        tau_min:
            Lowest temperature. Range: (0, inf)
        tau_max:
            Highest temperature. Range: [tau_min, inf)
        rho:
            How far from uniform the weights of the negatives shall be, as a Kullback-Leibler distance; larger means
            smaller temperatures. Range: (0, log(number of negatives))
        gamma:
            Share of the batch in the running mean. Range: (0, 1]
        beta:
            Share of the batch in the temperature's averaged gradient. Range: (0, 1]
        eta:
            Step size of the temperatures. Range: [0, inf)
        clip:
            Bound of a temperature's gradient. Range: (0, inf)
        gather_distributed:
            If True then negatives from all GPUs are gathered before the loss calculation.
        gradient:
            "cosine" or "difference", see `dystress_plugin.temperature.Individual`.
        objective:
            "sogclr", "ntxent", "macl", "dcl" or "dclw"; see `dystress_plugin.objectives`.
        sigma:
            For "dclw". Range: [0.01, inf). None takes 0.5.

    Raises:
        ValueError:
            If a value is out of its range.

    Examples:
        >>> # initialize the loss function
        >>> loss_fn = ISogCLRLoss(num_samples=len(dataset))
        >>>
        >>> # the dataset returns its index with the two views of an image
        >>> for t0, t1, index in dataloader:
        >>>     z0, z1 = model(t0), model(t1)
        >>>     loss = loss_fn(z0, z1, index=index)
    """

    def __init__(
        self,
        num_samples: int,
        tau_init: float = 0.1,
        tau_min: float = 0.05,
        tau_max: float = 1.0,
        rho: float = 0.4,
        gamma: float = 0.8,
        beta: float = 0.5,
        eta: float = 0.03,
        clip: float = 3.0,
        gather_distributed: bool = False,
        *,
        gradient: str = "cosine",
        objective: str = "sogclr",
        sigma: float | None = None,
    ) -> None:
        super().__init__(
            "isogclr",
            0,
            gather_distributed,
            objective=objective,
            sigma=sigma,
            num_samples=num_samples,
            tau_init=tau_init,
            tau_min=tau_min,
            tau_max=tau_max,
            rho=rho,
            gamma=gamma,
            beta=beta,
            eta=eta,
            clip=clip,
            gradient=gradient,
        )

    def forward(self, z0: Tensor, z1: Tensor, index: Tensor | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            z0: first view embeddings, (batch_size, embedding_size), not normalised.
            z1: second view embeddings, of the same shape.
            index: (batch_size,) int64, number of each image in the data set.

        Raises:
            ValueError: without an index, or at one outside of the tables.
        """
        return self._value(z0, z1, index=index)
