# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # What a temperature does
#
# The gradient of a negative is its softmax weight. A temperature decides how that weight falls from the most similar
# negative to the least. Here is the weight over the cosine for several of them, on embeddings of an untrained network;
# `dystress inspect` does the same for yours.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import dystress_plugin as dp

torch.manual_seed(0)
images = torch.tensor(load_digits().data[:256] / 16, dtype=torch.float32)
network = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
with torch.no_grad():
    views = [network(images + 0.2 * torch.randn_like(images)) for _ in range(2)]
z = torch.nn.functional.normalize(torch.cat(views), dim=1)

# %% [markdown]
# ## The weight of a negative
#
# `loss.pairs` walks through a batch without learning from it, and returns the cosine and the temperature of every pair.

# %%
methods = {
    "constant 0.1": dp.ContrastiveLoss("simclr", tau=0.1),
    "constant 0.2": dp.ContrastiveLoss("simclr", tau=0.2),
    "DySTreSS": dp.ContrastiveLoss("dystress"),
    "DySTreSS, shifted": dp.ContrastiveLoss("dystress", profile="shifted"),
    "temperature-free": dp.ContrastiveLoss("tempfree"),
}
figure, axes = plt.subplots(figsize=(7, 4))
for name, loss in methods.items():
    pairs = loss.pairs(*views)
    cosine, tau = pairs.negative_cosine, pairs.negative_tau
    print(f"{name:>18}: temperature of negatives {tau.min():.3f} to {tau.max():.3f}, mean {tau.mean():.3f}")
    order = cosine.argsort()
    weight = torch.softmax(cosine / tau, dim=0) * len(tau)
    axes.plot(cosine[order], weight[order], label=name)
axes.set(xlabel="cosine of a negative", ylabel="weight, 1 on average", yscale="log")
axes.legend()
plt.show()

# %% [markdown]
# ## The gradient it leaves
#
# The norm of the gradient at each anchor, and the loss itself, which is no measure across temperatures: a higher one
# makes the softmax flatter.

# %%
for name, loss in methods.items():
    leaf = [view.clone().requires_grad_() for view in views]
    value = loss(*leaf)
    value.backward()
    print(f"{name:>18}: loss {value.item():6.3f}, norm of the gradient {leaf[0].grad.norm():.4f}")
