"""What goes wrong when one writes a temperature, a class each."""

import dataclasses

import torch
from third_party import Familiar

from dystress_plugin.temperature import LogitMap, LogitMaps, Scaled


class WrongSlope(Familiar):
    @dataclasses.dataclass(frozen=True)
    class Map(LogitMap):
        """s^3 / tau, differentiated by heart."""

        tau: float
        bound = property(lambda self: 1 / self.tau)

        def logit(self, cosine):
            return cosine**3 / self.tau

        def slope(self, cosine):
            return 2 * cosine**2 / self.tau

    def prepare(self, batch):
        return LogitMaps(self.Map(self.tau), self.Map(self.tau))


class NoCut(Familiar):
    class Map(Scaled):
        def rows(self, rows):
            return self

    def prepare(self, batch):
        map_ = super().prepare(batch).positive
        return LogitMaps(self.Map(map_.tau, map_.least), self.Map(map_.tau, map_.least))


class OwnRankOnly(Familiar):
    @torch.no_grad()
    def update(self, stats, batch):
        self.alike[batch.index] = stats.positive_cosine.to(self.alike)


class NoPickle(Familiar):
    def __init__(self, num_samples):
        super().__init__(num_samples)
        self.weigh = lambda counts: counts


class OutsideOfState(Familiar):
    """Moves a number that no checkpoint keeps."""

    def __init__(self, num_samples):
        super().__init__(num_samples)
        self.steps = 0

    def prepare(self, batch):
        map_ = Scaled(self.tau * (1 + self.steps / 100))
        return LogitMaps(map_, map_)

    def update(self, stats, batch):
        self.steps += 1


class LearnsInPrepare(Familiar):
    def prepare(self, batch):
        self.alike[batch.index] = batch.positive_cosine.mean(1).to(self.alike)
        return super().prepare(batch)


class KeepsGraph(Familiar):
    update = Familiar.update.__wrapped__  # without no_grad


class LowBound(Familiar):
    def prepare(self, batch):
        map_ = super().prepare(batch).positive
        map_ = Scaled(map_.tau, least=1.0)
        return LogitMaps(map_, map_)


class Undeclared(Familiar):
    needs_epoch = False


class ByPlace(Familiar):
    """Takes a place in the batch for the number of a sample."""

    def prepare(self, batch):
        tau = self.tau * (1 + self.alike[: len(batch.index), None] / 2)
        map_ = Scaled(tau, least=self.tau / 2)
        return LogitMaps(map_, map_)


class SaysRowless(Familiar):
    class Map(Scaled):
        rowless = True

        def rows(self, rows):
            return SaysRowless.Map(self.tau[rows], self.least)

    def prepare(self, batch):
        map_ = super().prepare(batch).positive
        return LogitMaps(self.Map(map_.tau, map_.least), self.Map(map_.tau, map_.least))


class InheritsParts(Familiar):
    """A subclass of a map that comes apart, and is put together again as what it is made of."""

    class Map(Scaled):
        gain = 1.0
        logit_and_slope = LogitMap.logit_and_slope

        def logit(self, cosine):
            return super().logit(cosine) + 0.5

    def prepare(self, batch):
        return LogitMaps(self.Map(0.5, 0.25), self.Map(0.5, 0.25))


class UntrainedParameter(Familiar):
    """A parameter within a map of its own, which the tiles of the blockwise engine know nothing of."""

    @dataclasses.dataclass(frozen=True)
    class Map(LogitMap):
        tau: torch.Tensor
        bound = 10.0

        def logit(self, cosine):
            return cosine / self.tau.to(cosine.dtype)

    def __init__(self, num_samples):
        super().__init__(num_samples)
        self.log_tau = torch.nn.Parameter(torch.zeros(()))

    def prepare(self, batch):
        map_ = self.Map(self.log_tau.exp())
        return LogitMaps(map_, map_)
