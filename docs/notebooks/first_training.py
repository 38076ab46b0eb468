# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # A first training
#
# Scikit-learn's digits, two noisy copies of each as views, a small network, one CPU core and a few seconds. What
# changes between two methods is one word.

# %%
import os

import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

import dystress_plugin as dp

EPOCHS = int(os.environ.get("EPOCHS", "20"))
data = load_digits()
images = torch.tensor(data.data / 16, dtype=torch.float32)
classes = data.target
train, test = torch.arange(1347), torch.arange(1347, 1797)


# %% [markdown]
# ## The training
#
# The loop is the same for every method: what a method does not need, it leaves alone.


# %%
def pretrain(method, **settings):
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 128))
    head = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(128, 64))
    loss = dp.ContrastiveLoss(method, **settings)
    parameters = [*backbone.parameters(), *head.parameters(), *loss.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    for epoch in range(EPOCHS):
        for index in train[torch.randperm(len(train))].split(256):
            views = [images[index] + 0.2 * torch.randn(len(index), 64) for _ in range(2)]
            value = loss(*(head(backbone(view)) for view in views), index=index, epoch=epoch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return backbone


# %% [markdown]
# ## Is it any good?
#
# The frozen backbone is judged by the nearest neighbour of each held-out image among the training images.


# %%
def accuracy(backbone):
    with torch.no_grad():
        features = torch.nn.functional.normalize(backbone(images), dim=1)
    nearest = KNeighborsClassifier(n_neighbors=1).fit(features[train], classes[train])
    return 100 * nearest.score(features[test], classes[test])


backbone = pretrain("dystress")
print(f"trained: {accuracy(backbone):.1f} %")

# %% [markdown]
# ## Another method, and a constant
#
# One seed and a small network say nothing about which method is better; `dystress compare` does this with seeds,
# constants and intervals.

# %%
for method, settings in {"simclr": {"tau": 0.2}, "macl": {}, "isogclr": {"num_samples": len(images)}}.items():
    print(f"{method:>8}: {accuracy(pretrain(method, **settings)):.1f} %")
