"""The head that SimCSE trains with and throws away."""

from __future__ import annotations

from sentence_transformers.sentence_transformer.modules import Dense
from torch import Tensor


class TrainingHead(Dense):
    """tanh(W z + b) while training, z itself otherwise: SimCSE's MLP, which unsupervised models are evaluated without.

    SimCSE, 2021, https://arxiv.org/abs/2104.08821. Put it last among the modules of a SentenceTransformer,
    `TrainingHead(dim, dim)`; the model without it embeds alike once training is over. Arguments are those of the
    library's `Dense`.
    """

    def forward(self, features: dict[str, Tensor], **kwargs: object) -> dict[str, Tensor]:
        if not self.training:
            return features
        found: dict[str, Tensor] = super().forward(features)
        return found
