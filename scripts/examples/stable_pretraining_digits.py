# This example requires the following dependencies to be installed:
# In a clone of dystress_plugin: pip install -e '.[stable-pretraining]' scikit-learn

# It is stable-pretraining's own SimCLR example with another loss, on the digits that come with scikit-learn; its
# callbacks measure a linear probe and nearest neighbours while it trains.

import argparse

import lightning as pl
import stable_pretraining as spt
import torch
import torchmetrics
from sklearn.datasets import load_digits
from stable_pretraining.data import transforms
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

import dystress_plugin as dp
from dystress_plugin.frameworks.stable_pretraining import TemperatureCallback, contrastive

parser = argparse.ArgumentParser()
parser.add_argument("--method", default="dystress")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--steps", type=int, default=-1, help="of training at most; -1 for all (default: %(default)s)")
parser.add_argument("--out", default="runs/stable-pretraining")
args = parser.parse_args()

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None].div(16).repeat(1, 3, 1, 1)
images = nn.functional.interpolate(images, size=32)
labels = torch.tensor(digits.target)
view = transforms.Compose(
    transforms.RandomResizedCrop((32, 32), scale=(0.5, 1.0)),
    transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.1, hue=0.1, p=0.8),
    transforms.ToImage(scale=False),
)


def loader(part, transform, **more):
    data = TensorDataset(images[part], labels[part])
    return DataLoader(spt.data.FromTorchDataset(data, names=["image", "label"], transform=transform), 128, **more)


train = loader(slice(0, 1297), transforms.MultiViewTransform([view, view]), shuffle=True, drop_last=True)
val = loader(slice(1297, None), transforms.ToImage(scale=False))

backbone = resnet18()
backbone.fc = nn.Identity()
module = spt.Module(
    forward=contrastive,  # in place of spt.forward.simclr
    backbone=backbone,
    projector=nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128)),
    contrastive_loss=dp.ContrastiveLoss(
        args.method, gather_distributed=True, **dp.recipes.METHODS[args.method].sized({}, dim=128)
    ),
    optim={"optimizer": {"type": "SGD", "lr": 0.06, "momentum": 0.9}},
)
callbacks = [
    TemperatureCallback(),
    spt.callbacks.OnlineProbe(
        module, "probe", "embedding", "label", probe=nn.Linear(512, 10), loss=nn.CrossEntropyLoss(),
        metrics={"top1": torchmetrics.classification.MulticlassAccuracy(10)},
    ),
    spt.callbacks.OnlineKNN(
        "knn", "embedding", "label", queue_length=1280, input_dim=512, num_classes=10, k=10,
        metrics={"top1": torchmetrics.classification.MulticlassAccuracy(10)},
    ),
]  # fmt: skip
trainer = pl.Trainer(
    max_epochs=args.epochs,
    max_steps=args.steps,
    devices=1,
    callbacks=callbacks,
    log_every_n_steps=1,
    num_sanity_val_steps=0,
    logger=False,
    enable_checkpointing=False,
    default_root_dir=args.out,
)
trainer.fit(module, train, val)
for name, value in sorted(trainer.callback_metrics.items()):
    print(f"{name}: {float(value):.4f}")
