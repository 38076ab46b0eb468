# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Your own temperature
#
# One class with one method. This one divides pairs that are opposite, orthogonal or equal by numbers of your choice,
# with straight lines between them.

# %%
import dataclasses

import torch

import dystress_plugin as dp
from dystress_plugin.temperature import Batch, LogitMap, LogitMaps, Temperature
from dystress_plugin.testing import check_temperature

# %% [markdown]
# ## A map
#
# A map says how a cosine becomes a logit. `logit` and `bound`, a number that no logit exceeds, are all it needs: the
# slope is found by autograd. (Where a temperature is one number, or one a row, the package's `Scaled` is the map.)


# %%
@dataclasses.dataclass(frozen=True)
class Corner(LogitMap):
    """a(s) = s / tau(s), tau a straight line from `opposite` at -1 to `apart` at 0 to `equal` at 1; tau is detached."""

    opposite: float
    apart: float
    equal: float

    def logit(self, cosine):
        return cosine / self.temperature(cosine)

    def temperature(self, cosine):
        s = cosine.detach()
        return self.apart + s.clamp(min=0) * (self.equal - self.apart) - s.clamp(max=0) * (self.opposite - self.apart)

    @property
    def bound(self):
        return 1 / min(self.opposite, self.apart, self.equal)


# %% [markdown]
# ## The temperature
#
# It is asked once a batch. Settings are checked in the constructor.


# %%
class ThreePoints(Temperature):
    def __init__(self, opposite: float = 0.2, apart: float = 0.1, equal: float = 0.2) -> None:
        super().__init__()
        if min(opposite, apart, equal) <= 0:
            raise ValueError(f"opposite, apart and equal must be above 0, not {opposite}, {apart} and {equal}.")
        self.map = Corner(opposite, apart, equal)

    def prepare(self, batch: Batch) -> LogitMaps:
        return LogitMaps(self.map, self.map)


# %% [markdown]
# ## Checked, and at once everywhere
#
# `check_temperature` is what a test of yours calls. Then the temperature goes with every objective, layout and engine.

# %%
check_temperature(ThreePoints())

torch.manual_seed(0)
views = torch.randn(2, 64, 16, requires_grad=True)
for objective in ("ntxent", "dcl", "macl"):
    for engine in ("dense", "blockwise"):
        value = dp.ContrastiveLoss(ThreePoints(equal=0.3), objective=objective, engine=engine)(*views)
        print(f"{objective:>6} {engine:>9}: {value.item():.6f}")

# %% [markdown]
# DySTreSS' own linear profile is the special case of equal ends:

# %%
ours = dp.ContrastiveLoss(ThreePoints(0.2, 0.1, 0.2))(*views)
theirs = dp.ContrastiveLoss("dystress", profile="linear", tau_min=0.1, tau_max=0.2)(*views)
print(f"{ours.item():.6f} {theirs.item():.6f}")
assert torch.isclose(ours, theirs)

# %% [markdown]
# `recipes.register` makes it a method of every host in this process, an entry point of your package in all.
