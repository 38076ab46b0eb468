# This example requires the following dependencies to be installed:
# In a clone of dystress_plugin: pip install -e '.[lightly]' scikit-learn

# It is lightly's own example with another criterion. As there, model and settings do not follow a paper: they are
# chosen such that it runs quickly. "--data cifar10 --epochs 10" downloads and trains what lightly's example does.

import argparse
from pathlib import Path

import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms.simclr_transform import SimCLRTransform
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from dystress_plugin.frameworks.lightly import DySTreSSLoss

parser = argparse.ArgumentParser()
parser.add_argument("--data", choices=["digits", "cifar10"], default="digits")
parser.add_argument("--epochs", type=int, default=3)
args = parser.parse_args()


class SimCLR(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.projection_head = SimCLRProjectionHead(512, 512, 128)

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(start_dim=1))


resnet = torchvision.models.resnet18()
model = SimCLR(nn.Sequential(*list(resnet.children())[:-1]))
device = "cuda" if torch.cuda.is_available() else "cpu"
model.to(device)

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

criterion = DySTreSSLoss(tau_min=0.1, tau_max=0.2)  # in place of NTXentLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9)

print("Starting Training")
for epoch in range(args.epochs):
    total_loss = 0
    for batch in dataloader:
        x0, x1 = batch[0]
        z0 = model(x0.to(device))
        z1 = model(x1.to(device))
        loss = criterion(z0, z1)
        total_loss += loss.detach()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch: {epoch:>02}, loss: {total_loss / len(dataloader):.5f}")
