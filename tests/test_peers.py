"""Other people's losses, with a constant temperature, in the precision that they allow."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from grid import assert_close, embeddings
from lightly.loss import DCLLoss, DCLWLoss, MACLLoss, NTXentLoss
from torch.nn.functional import normalize

from dystress_plugin import ContrastiveLoss
from dystress_plugin.temperature import Constant, Learnable, ModelAware

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # from what they import
    from open_clip.loss import ClipLoss
    from pytorch_metric_learning.losses import NTXentLoss as MetricLearningNTXentLoss
    from pytorch_metric_learning.losses import SupConLoss

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmarks" / "peers.py"
either_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
every_shape = pytest.mark.parametrize(("images", "dim"), [(2, 3), (9, 16), (33, 64)])
every_tau = pytest.mark.parametrize("tau", [0.1, 0.5])


def value_and_gradients(loss, views):
    leaves = [view.clone().requires_grad_() for view in views]
    value = loss(*leaves)
    return value.detach(), torch.stack(torch.autograd.grad(value, leaves))


def assert_same(ours, theirs, views, dtype, exactly=1e-12):
    views = [view.to(dtype) for view in views]
    value, gradients = value_and_gradients(ours, views)
    their_value, their_gradients = value_and_gradients(theirs, views)
    assert value.dtype == their_value.dtype == dtype
    # Either library's float32 has no more digits than those of a logit, which are some units large.
    tolerance, terms = (1e-6, 1.0) if dtype == torch.float32 else (exactly, 0.0)
    assert_close(value, their_value, tolerance, terms=terms)
    assert_close(gradients, their_gradients, tolerance, terms=terms)


@either_precision
@every_shape
@every_tau
def test_constant_temperature_is_lightlys_ntxent(images, dim, tau, dtype):
    assert_same(ContrastiveLoss(Constant(tau)), NTXentLoss(tau), embeddings(images, dim), dtype)


@either_precision
@every_shape
@every_tau
def test_dcl_is_lightlys(images, dim, tau, dtype):
    assert_same(ContrastiveLoss(Constant(tau), objective="dcl"), DCLLoss(tau), embeddings(images, dim), dtype)


@either_precision
@every_shape
@every_tau
@pytest.mark.parametrize("sigma", [0.5, 0.2])
def test_dclw_is_lightlys(images, dim, tau, sigma, dtype):
    ours = ContrastiveLoss(Constant(tau), objective="dclw", sigma=sigma)
    with pytest.warns(UserWarning, match="copy construct from a tensor"):  # its way of detaching the weights
        assert_same(ours, DCLWLoss(tau, sigma), embeddings(images, dim), dtype)


@either_precision
@every_shape
@pytest.mark.parametrize(("tau", "alpha", "threshold"), [(0.1, 0.5, 0.0), (0.5, 1.0, 0.8)])
def test_model_aware_is_lightlys_macl(images, dim, tau, alpha, threshold, dtype):
    theirs = MACLLoss(tau, alpha, threshold)
    theirs.eps = 0.0  # it adds 1e-8 to a probability, which shows in float64
    assert_same(ContrastiveLoss(ModelAware(tau, alpha, threshold)), theirs, embeddings(images, dim), dtype)


@either_precision
@every_shape
@every_tau
def test_constant_temperature_is_metric_learnings_ntxent(images, dim, tau, dtype):
    theirs, labels = MetricLearningNTXentLoss(tau), torch.arange(images).repeat(2)
    views = embeddings(images, dim)
    assert_same(ContrastiveLoss(Constant(tau)), lambda *z: theirs(torch.cat(z), labels), views, dtype)


@either_precision
@every_shape
@every_tau
@pytest.mark.parametrize("views", [2, 3, 4])
def test_positives_one_by_one_are_metric_learnings_supcon(images, dim, views, tau, dtype):
    theirs, labels = SupConLoss(tau), torch.arange(images).repeat(views)
    ours = ContrastiveLoss(Constant(tau), positives="mean")
    assert_same(ours, lambda *z: theirs(torch.cat(z), labels), embeddings(images, dim, views=views), dtype)


@either_precision
@every_tau
@pytest.mark.parametrize("engine", ["dense", "blockwise"])
@pytest.mark.parametrize(("images", "dim", "classes"), [(4, 3, 2), (9, 16, 4), (33, 64, 5)])
def test_classes_are_metric_learnings_supcon(images, dim, classes, tau, engine, dtype):
    theirs, labels = SupConLoss(tau), torch.arange(images) ** 2 % classes
    ours = ContrastiveLoss(Constant(tau), positives="mean", engine=engine)
    views = embeddings(images, dim)
    with_labels = (lambda *z: ours(*z, labels=labels)), (lambda *z: theirs(torch.cat(z), labels.repeat(2)))
    assert_same(*with_labels, views, dtype)


@either_precision
@every_shape
@every_tau
def test_both_ways_is_open_clips_loss(images, dim, tau, dtype):
    ours, theirs = ContrastiveLoss(Constant(tau), layout="both_ways"), ClipLoss()
    views = embeddings(images, dim)
    assert_same(ours, lambda a, b: theirs(normalize(a), normalize(b), 1 / tau), views, dtype)


@every_shape
@every_tau
def test_learnable_temperature_is_the_inverse_of_open_clips_logit_scale(images, dim, tau):
    ours, theirs = ContrastiveLoss(Learnable(tau), layout="both_ways").double(), ClipLoss()
    views = embeddings(images, dim)
    log_scale = (-ours.temperature.log_tau).detach().requires_grad_()
    value, their_value = ours(*views), theirs(*map(normalize, views), log_scale.exp())
    assert_close(value.detach(), their_value.detach(), 1e-12)
    gradient, their_gradient = (
        torch.autograd.grad(value, ours.parameters()),
        torch.autograd.grad(their_value, log_scale),
    )
    assert_close(-gradient[0], their_gradient[0], 1e-12)


@either_precision
@every_tau
def test_queue_is_lightlys_memory_bank_while_batches_fit(tau, dtype):
    ours = ContrastiveLoss(Constant(tau), queue_size=(12, 8)).to(dtype)
    theirs = NTXentLoss(tau, memory_bank_size=(12, 8)).to(dtype)
    theirs.memory_bank.bank.copy_(ours.queue.keys)
    for seed in range(4):
        assert_same(ours, theirs, embeddings(4, 8, seed=seed), dtype)
    assert_close(ours.queue.keys, theirs.memory_bank.bank, 1e-6 if dtype == torch.float32 else 1e-12)


# The script


HIDE = "import sys; sys.modules['open_clip'] = None; sys.argv[1:] = ['--batches', '1']; "
RUN = f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"


def test_script_prints_a_row_for_every_peer_and_says_which_are_missing():
    output = subprocess.run([sys.executable, "-c", HIDE + RUN], capture_output=True, text=True, check=True).stdout
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines() if "|" in line][2:]
    assert [row[0].split()[0] for row in rows] == ["lightly"] * 6 + ["pytorch-metric-learning", "open_clip"]
    assert rows[-1][2:] == ["not installed", "-", "-", "-"]
    for name, _, *differences in rows[:-1]:
        exact = [float(number) for number in differences]
        assert max(exact[:2]) < (1e-6 if name == "lightly MACLLoss" else 1e-12)
        assert max(exact[2:]) < 1e-5
