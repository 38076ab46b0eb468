# This example requires the following dependencies to be installed:
# In a clone of dystress_plugin: pip install -e . scikit-learn

# A plain training loop on any number of processes, on CPUs (gloo) or GPUs (nccl):
#
#     torchrun --nproc-per-node 2 scripts/examples/torchrun.py
#     torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 scripts/examples/torchrun.py
#
# The batch is that of all processes together, so any number of them trains the same model.

import argparse
import os

import torch
from sklearn.datasets import load_digits
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from dystress_plugin import ContrastiveLoss

parser = argparse.ArgumentParser()
parser.add_argument("--method", default="dystress")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--batch-size", type=int, default=256)
parser.add_argument("--out", help="where rank 0 saves the model")
args = parser.parse_args()

cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)

images = torch.tensor(load_digits().data / 16)
dataset = [(i, image) for i, image in enumerate(images)]
sampler = DistributedSampler(dataset, seed=0, drop_last=True)
loader = DataLoader(dataset, batch_size=args.batch_size // dist.get_world_size(), sampler=sampler, drop_last=True)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).double().to(device)
model = DistributedDataParallel(model)
# gather_distributed: compare with the images of all processes.
needs = {"num_samples": len(dataset)} if args.method == "isogclr" else {}
loss = ContrastiveLoss(args.method, gather_distributed=True, **needs).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

for epoch in range(args.epochs):
    sampler.set_epoch(epoch)  # another order in every epoch
    noise = torch.randn(2, *images.shape, generator=torch.Generator().manual_seed(epoch), dtype=images.dtype)
    total = torch.zeros((), dtype=images.dtype, device=device)
    for index, batch in loader:
        view_0, view_1 = ((batch + 0.1 * noise[view, index]).to(device) for view in (0, 1))
        value = loss(model(view_0), model(view_1), index=index, epoch=epoch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        total += value.detach()
    # Kept until the end: a work that gloo's thread frees while the interpreter ends aborts the process.
    work = dist.all_reduce(total, async_op=True)
    work.wait()  # the mean over ranks is the loss of the whole batch
    if dist.get_rank() == 0:
        print(f"epoch: {epoch:>02}, loss: {total / dist.get_world_size() / len(loader):.5f}")
if args.out and dist.get_rank() == 0:
    torch.save(model.module.state_dict(), args.out)
dist.destroy_process_group()
