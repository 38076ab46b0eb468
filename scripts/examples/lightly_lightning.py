# This example requires the following dependencies to be installed:
# In a clone of dystress_plugin: pip install -e '.[lightly]' scikit-learn

# It is lightly's own Lightning example with another criterion. As there, model and settings do not follow a paper: they
# are chosen such that it runs quickly. "--data cifar10 --epochs 10" downloads and trains what lightly's example does.

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms.simclr_transform import SimCLRTransform
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from dystress_plugin.frameworks.lightly import MACLLoss

parser = argparse.ArgumentParser()
parser.add_argument("--data", choices=["digits", "cifar10"], default="digits")
parser.add_argument("--epochs", type=int, default=3)
args = parser.parse_args()


class SimCLR(pl.LightningModule):
    def __init__(self):
        super().__init__()
        resnet = torchvision.models.resnet18()
        self.backbone = nn.Sequential(*list(resnet.children())[:-1])
        self.projection_head = SimCLRProjectionHead(512, 512, 128)
        self.criterion = MACLLoss(temperature=0.1, alpha=0.5)  # in place of NTXentLoss()

    def forward(self, x):
        x = self.backbone(x).flatten(start_dim=1)
        return self.projection_head(x)

    def training_step(self, batch, batch_index):
        x0, x1 = batch[0]
        loss = self.criterion(self(x0), self(x1))
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(x0))
        return loss

    def on_train_epoch_end(self):
        print(f"epoch: {self.current_epoch:>02}, loss: {self.trainer.callback_metrics['loss']:.5f}")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.06, momentum=0.9)


if args.data == "cifar10":
    transform = SimCLRTransform(input_size=32, gaussian_blur=0.0)
    dataset = torchvision.datasets.CIFAR10("datasets/cifar10", download=True, transform=transform)
else:  # a folder containing images; here the 1,797 that come with scikit-learn
    folder = Path("datasets/digits")
    if not folder.exists():
        folder.mkdir(parents=True)
        for number, pixels in enumerate(load_digits().images):
            Image.fromarray((15.9 * pixels).astype("uint8")).save(folder / f"{number:04}.png")
    # Of so few pixels a smaller crop shows nothing.
    transform = SimCLRTransform(input_size=16, min_scale=0.5, gaussian_blur=0.0)
    dataset = LightlyDataset(str(folder), transform=transform)
dataloader = torch.utils.data.DataLoader(dataset, batch_size=128, shuffle=True, drop_last=True, num_workers=2)

trainer = pl.Trainer(max_epochs=args.epochs, devices=1, accelerator="auto", log_every_n_steps=1)
trainer.fit(model=SimCLR(), train_dataloaders=dataloader)
