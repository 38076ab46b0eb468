"""A step leaves nothing behind, whether or not a gradient passes through all that it has computed."""

import gc

import pytest
import torch

from dystress_plugin import ContrastiveLoss, recipes

DIM, IMAGES, SAMPLES = 4, 6, 20


def step(loss, differentiated):
    views = torch.randn(2, IMAGES, DIM, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = loss(*views, index=torch.arange(IMAGES), epoch=0.0)
    if differentiated:
        value.backward()


def tensors():
    return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())


@pytest.mark.filterwarnings("ignore")  # of temperatures that sink, with so few images
@pytest.mark.parametrize("differentiated", [True, False])
@pytest.mark.parametrize("engine", ["auto", "dense", "blockwise"])
@pytest.mark.parametrize("name", recipes.METHODS)
def test_no_tensor_outlives_its_step(name, engine, differentiated):
    recipe = recipes.METHODS[name]
    own = {"queue_size": (8, DIM)} if recipe.queue else {}
    loss = ContrastiveLoss(name, engine=engine, **recipe.sized(own, SAMPLES, DIM))
    gc.freeze()  # what there is already, which would have to be gone through
    gc.disable()  # what only the collector finds is held until it comes, which on a GPU is too late
    try:
        step(loss, True)
        before = tensors()
        for _ in range(3):
            step(loss, differentiated)
        assert tensors() == before
    finally:
        gc.enable()
        gc.unfreeze()
