"""A temperature of somebody else's, with a table of samples and a schedule: one file, and a line in pyproject.toml."""

import torch

from dystress_plugin import RowStats, distributed
from dystress_plugin.recipes import Recipe
from dystress_plugin.temperature import Batch, LogitMaps, Scaled, Temperature


class Familiar(Temperature):
    """a(s) = s / tau_i, tau_i = tau (1 + min(1, e / epochs) m_i / 2), e the epoch, m_i a mean cosine of i's positives.

    Images whose views are alike already get a higher temperature, more so as the training goes on.

    Args:
        num_samples: size of the data set.
        tau: temperature of an image whose views are not alike.
        epochs: how long it takes until m counts in full.
        share: share of the new batch in m.
    """

    needs_index = needs_epoch = True

    def __init__(self, num_samples: int, tau: float = 0.2, epochs: float = 20.0, share: float = 0.5) -> None:
        super().__init__()
        self.tau, self.epochs, self.share = tau, epochs, share
        self.resize(num_samples)

    @property
    def num_samples(self) -> int:
        return len(self.alike)

    @property
    def has_learned(self) -> bool:
        return bool(self.alike.any())

    def resize(self, num_samples: int) -> None:
        self.register_buffer("alike", torch.zeros(num_samples, dtype=torch.float64))

    def concerns(self, epochs: float) -> list[str]:
        if epochs >= self.epochs:
            return []
        return [f"The table never counts in full in {epochs:g} epochs: epochs={self.epochs:g} of the method is longer."]

    def prepare(self, batch: Batch) -> LogitMaps:
        counts = min(1.0, batch.epoch / self.epochs)
        tau = self.tau * (1 + counts * self.alike[batch.index, None] / 2)
        map_ = Scaled(tau, least=self.tau / 2)
        return LogitMaps(map_, map_)

    @torch.no_grad()
    def update(self, stats: RowStats, batch: Batch) -> None:
        index, cosine = distributed.all_rows(batch.index, stats.positive_cosine.to(self.alike))
        number, total = torch.zeros_like(self.alike), torch.zeros_like(self.alike)
        number.index_add_(0, index, torch.ones_like(cosine))
        total.index_add_(0, index, cosine)
        mean = total / number.clamp(min=1)
        self.alike[number > 0] = torch.lerp(self.alike, mean, self.share)[number > 0]


RECIPE = Recipe("theirs", "Theirs", Familiar, "ntxent", "Nobody, 2026", "https://example.org/familiar")
