import pytest
import torch
from grid import assert_close, embeddings
from lightly.loss import MACLLoss, NTXentLoss

from dystress_plugin import ContrastiveLoss
from dystress_plugin.temperature import Constant, ModelAware

either_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
SHAPES = [(2, 3), (9, 16), (33, 64)]


def value_and_gradients(loss, views):
    leaves = [view.clone().requires_grad_() for view in views]
    value = loss(*leaves)
    return value.detach(), torch.stack(torch.autograd.grad(value, leaves))


def assert_same(ours, theirs, views, dtype, exactly=1e-12):
    views = [view.to(dtype) for view in views]
    value, gradients = value_and_gradients(ours, views)
    their_value, their_gradients = value_and_gradients(theirs, views)
    # Either library's float32 has no more digits than those of a logit, which are some units large.
    tolerance, terms = (1e-6, 1.0) if dtype == torch.float32 else (exactly, 0.0)
    assert_close(value, their_value, tolerance, terms=terms)
    assert_close(gradients, their_gradients, tolerance, terms=terms)


@either_precision
@pytest.mark.parametrize(("images", "dim"), SHAPES)
@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_constant_temperature_is_lightlys_ntxent(images, dim, tau, dtype):
    assert_same(ContrastiveLoss(Constant(tau)), NTXentLoss(tau), embeddings(images, dim), dtype)


@either_precision
@pytest.mark.parametrize(("images", "dim"), SHAPES)
@pytest.mark.parametrize(("tau", "alpha", "threshold"), [(0.1, 0.5, 0.0), (0.5, 1.0, 0.8)])
def test_model_aware_is_lightlys_macl(images, dim, tau, alpha, threshold, dtype):
    ours = ContrastiveLoss(ModelAware(tau, alpha, threshold))
    # lightly adds 1e-8 to a probability
    assert_same(ours, MACLLoss(tau, alpha, threshold), embeddings(images, dim), dtype, exactly=1e-6)


@either_precision
@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_queue_is_lightlys_memory_bank_while_batches_fit(tau, dtype):
    ours = ContrastiveLoss(Constant(tau), queue_size=(12, 8)).to(dtype)
    theirs = NTXentLoss(tau, memory_bank_size=(12, 8)).to(dtype)
    theirs.memory_bank.bank.copy_(ours.queue.keys)
    for seed in range(4):
        assert_same(ours, theirs, embeddings(4, 8, seed=seed), dtype)
    assert_close(ours.queue.keys, theirs.memory_bank.bank, 1e-6 if dtype == torch.float32 else 1e-12)
