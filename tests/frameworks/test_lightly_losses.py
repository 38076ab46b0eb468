from functools import partial

import gloo
import numpy as np
import pytest
import torch
from lightly import loss as lightly_loss
from pytorch_metric_learning.losses import SupConLoss
from torch import nn
from torch.nn import functional as F

from dystress_plugin import ContrastiveLoss
from dystress_plugin.frameworks.lightly import (
    DySTreSSLoss,
    ISogCLRLoss,
    MACLLoss,
    TemperatureFreeLoss,
    TemperatureScheduleLoss,
)
from dystress_plugin.key_queue import KeyQueue
from dystress_plugin.metrics import alignment


def views(batch=6, dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, dim, generator=generator).requires_grad_() for _ in range(2)]


def assert_same(ours, theirs, z):
    """Same value and, for the embeddings, same gradient; to 1e-6, of the largest entry where that is above 1."""
    values = [loss(*z) for loss in (ours, theirs)]
    gradients = [torch.autograd.grad(value, z) for value in values]
    for a, b in (values, *zip(*gradients, strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("tau", [0.07, 0.5])
@pytest.mark.parametrize("batch", [2, 33])
def test_equal_bounds_are_lightlys_ntxent(tau, batch):
    assert_same(DySTreSSLoss(tau_min=tau, tau_max=tau), lightly_loss.NTXentLoss(tau), views(batch))


def test_equal_bounds_are_lightlys_ntxent_with_a_memory_bank():
    theirs = lightly_loss.NTXentLoss(0.2, memory_bank_size=(16, 5))
    ours = DySTreSSLoss(0.2, 0.2, memory_bank_size=(16, 5))
    with torch.no_grad():
        ours.loss.queue.keys.copy_(theirs.memory_bank.bank)
    assert_same(ours, theirs, views())
    # both banks took in the same keys
    torch.testing.assert_close(ours.loss.queue.keys, theirs.memory_bank.bank, rtol=0, atol=1e-6)
    assert_same(ours, theirs, views(seed=1))


@pytest.mark.parametrize(("alpha", "A_0"), [(0.0, 0.0), (0.5, 0.0), (1.0, 0.3)])
def test_macl_is_lightlys_macl(alpha, A_0):
    assert_same(MACLLoss(0.2, alpha, A_0), lightly_loss.MACLLoss(0.2, alpha, A_0), views(9))


@pytest.mark.parametrize("batch", [3, 17])
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning:lightly")
def test_objectives_are_lightlys(batch):
    constant = [
        lambda **objective: DySTreSSLoss(0.2, 0.2, **objective),
        lambda **objective: MACLLoss(0.2, alpha=0, **objective),
        lambda **objective: TemperatureScheduleLoss(0.2, 0.2, **objective),
    ]
    for build in constant:
        call = partial(epoch_of, build)
        assert_same(call(objective="ntxent"), lightly_loss.NTXentLoss(0.2), views(batch))
        assert_same(call(objective="dcl"), lightly_loss.DCLLoss(0.2), views(batch))
        assert_same(call(objective="dclw"), lightly_loss.DCLWLoss(0.2), views(batch))
        assert_same(call(objective="dclw", sigma=0.3), lightly_loss.DCLWLoss(0.2, sigma=0.3), views(batch))
    for loss in (TemperatureFreeLoss(objective="dcl"), ISogCLRLoss(20, objective="dclw")):
        index = {"index": torch.arange(batch)} if isinstance(loss, ISogCLRLoss) else {}
        assert torch.isfinite(loss(*views(batch), **index))


def epoch_of(build, **objective):
    """The criterion as a function of the embeddings, at epoch 0 where it takes one."""
    loss = build(**objective)
    return partial(loss, epoch=0) if isinstance(loss, TemperatureScheduleLoss) else loss


def test_macl_takes_the_papers_setting_for_sentences():
    z0, z1 = views()
    z1 = (z0 + 0.1 * z1).detach().requires_grad_()  # well aligned, or the temperature would be negative
    tau = 0.2 * (1 + 2 * (alignment(z0, z1).item() - 0.8))  # lightly's own takes no alpha above 1
    assert_same(MACLLoss(0.2, alpha=2, A_0=0.8), lightly_loss.MACLLoss(tau, alpha=0), [z0, z1])


@pytest.mark.parametrize("profile", ["cosine", "shifted", "cosine_constant", "exponential", "linear"])
def test_every_profile_by_keyword(profile):
    z0, z1 = views()
    loss = DySTreSSLoss(0.1, 0.15, profile=profile, detach=True, negative_range=(0.1, 0.12))
    assert torch.isfinite(loss(z0=z0, z1=z1))


def test_schedule_and_temperature_free():
    z0, z1 = views()
    schedule = TemperatureScheduleLoss(tau_min=0.1, tau_max=0.5, period=10)
    expected = lightly_loss.NTXentLoss(0.1)(z0, z1)
    torch.testing.assert_close(schedule(z0, z1, epoch=5), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="needs the epoch"):
        schedule(z0, z1)
    assert torch.isfinite(TemperatureFreeLoss()(z0, z1))


def test_schedule_per_step():
    steps = [TemperatureScheduleLoss(per_step=per_step).clock(3, 5, 10) for per_step in (False, True)]
    assert steps == [3.0, 3.5]


def test_stabilised_dystress_ends_as_a_constant():
    loss, z = DySTreSSLoss(0.1, 0.2, stabilise=10), views()
    assert_same(lambda *z: loss(*z, epoch=10), lightly_loss.NTXentLoss(0.2), z)
    assert_same(lambda *z: loss(*z, epoch=0), DySTreSSLoss(0.1, 0.2), z)
    with pytest.raises(ValueError, match="needs the epoch"):
        loss(*z)


def test_isogclr_learns_from_what_it_trains_on_alone():
    loss = ISogCLRLoss(num_samples=20)
    index = torch.arange(6) + 10
    with torch.no_grad():
        z0, z1 = (torch.randn(6, 5) for _ in range(2))
    loss(z0, z1, index=index)
    assert not loss.loss.temperature.visited.any()
    loss(*views(), index=index)
    assert loss.loss.temperature.visited.nonzero().flatten().tolist() == index.tolist()
    fresh = ISogCLRLoss(num_samples=20)
    fresh.load_state_dict(loss.state_dict())
    assert torch.equal(fresh.loss.temperature.tau, loss.loss.temperature.tau)
    with pytest.raises(ValueError, match="needs the sample numbers"):
        loss(*views())


def test_a_batch_without_gradient_does_not_enter_the_memory_bank():
    loss = DySTreSSLoss(memory_bank_size=(16, 5))
    before = loss.loss.queue.keys.clone()
    loss(*(z.detach() for z in views()))
    assert torch.equal(loss.loss.queue.keys, before)
    loss(*views())
    assert not torch.equal(loss.loss.queue.keys, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("build", "context"),
    [
        (DySTreSSLoss, {}),
        (lambda: DySTreSSLoss(stabilise=5, objective="dclw"), {"epoch": 2}),
        (lambda: MACLLoss(objective="dcl"), {}),
        (MACLLoss, {}),
        (TemperatureScheduleLoss, {"epoch": 1.5}),
        (TemperatureFreeLoss, {}),
        (lambda: ISogCLRLoss(5), {"index": torch.tensor([3])}),
    ],
)
def test_a_batch_of_one_image_is_0_as_lightlys(build, context, dtype):
    z = [view.detach().to(dtype).requires_grad_() for view in views(1)]
    loss = build()
    before = {name: entry.clone() for name, entry in loss.state_dict().items()}
    value = loss(*z, **context)
    assert value == lightly_loss.NTXentLoss(0.2)(*(view.float() for view in z)) == 0
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not any(gradient.any() for gradient in torch.autograd.grad(value, z))
    assert all(torch.equal(entry, before[name]) for name, entry in loss.state_dict().items())
    with pytest.raises(ValueError, match="one image has no negatives"):
        loss.loss(*z, **context)


@pytest.mark.parametrize("other", [torch.zeros(2, 5), torch.zeros(1, 4), torch.zeros(1, 5).int(), [[0.0] * 5]])
def test_a_batch_of_one_image_is_checked_as_any_other(other):
    with pytest.raises((ValueError, TypeError), match="View 1 "):
        DySTreSSLoss()(torch.zeros(1, 5), other)


def test_a_batch_of_one_image_has_negatives_in_a_memory_bank():
    assert MACLLoss(memory_bank_size=(16, 5))(*views(1)) > 0


BANKED = [DySTreSSLoss, MACLLoss, TemperatureFreeLoss, partial(TemperatureScheduleLoss, 0.2, 0.2)]


@pytest.mark.parametrize("build", BANKED)
@pytest.mark.parametrize("size", [16, (16,), np.int64(16), torch.Size([16])])
def test_a_memory_bank_without_dim_is_that_of_the_first_batch(build, size):
    context = {"epoch": 0} if isinstance(build, partial) else {}
    told, untold = build(memory_bank_size=(16, 5)), build(memory_bank_size=size)
    assert untold.state_dict().keys() == build().state_dict().keys()  # none yet
    torch.manual_seed(3)
    told.loss.queue = KeyQueue(16, 5)
    torch.manual_seed(3)
    for seed in range(4):  # the last batch goes round
        assert_same(partial(untold, **context), partial(told, **context), views(seed=seed))
    assert torch.equal(untold.loss.queue.keys, told.loss.queue.keys)
    with pytest.raises(ValueError, match="Embeddings have 4 dims, the queue 5"):
        untold(*views(dim=4), **context)


@pytest.mark.parametrize("batches", [0, 1, 3])
@pytest.mark.parametrize("later", [0, 2])
def test_a_memory_bank_without_dim_is_resumed(batches, later):
    """From a state before or after the first batch, into a criterion that has or has not seen one."""
    loss, resumed = (nn.ModuleDict({"criterion": MACLLoss(memory_bank_size=16)}) for _ in range(2))
    for seed in range(batches):
        loss["criterion"](*views(seed=seed))
    for seed in range(later):
        resumed["criterion"](*views(dim=7, seed=seed))  # of another model
    state = {name: entry.clone() for name, entry in loss.state_dict().items()}
    assert bool(state) == bool(batches)
    resumed.load_state_dict(state)
    assert resumed.state_dict().keys() == state.keys()
    values = []
    for module in (loss, resumed):
        torch.manual_seed(7)  # for a bank that there is none of yet
        values += [[module["criterion"](*views(seed=10 + step)).item() for step in range(3)]]
    assert values[0] == values[1]
    told = MACLLoss(memory_bank_size=(16, 5))
    told.load_state_dict(loss["criterion"].state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        MACLLoss(memory_bank_size=8).load_state_dict(told.state_dict())


def test_a_bad_first_batch_says_so_before_there_is_a_memory_bank():
    loss = MACLLoss(memory_bank_size=16)
    with pytest.raises(ValueError, match=r"View 0 has shape \(5,\)"):
        loss(*(z[0] for z in views()))
    assert loss.loss.queue is None


def two_ranks_with_a_bank(rank):
    torch.manual_seed(rank)  # as data loading wants it
    loss, known = MACLLoss(memory_bank_size=16), []
    for batches in range(2):
        for seed in range(1 + batches):
            loss(*views(batch=3 + rank, seed=2 * seed + rank))
        known += [loss.loss.queue.keys.clone()]
        loss.load_state_dict({})  # a state from before the first batch
    return known


def test_ranks_have_the_same_memory_bank(tmp_path):
    ours, others = gloo.run(two_ranks_with_a_bank, 2, tmp_path)
    assert all(torch.equal(own, other) for own, other in zip(ours, others, strict=True))
    sent = [F.normalize(views(batch=3 + rank, seed=rank)[1], dim=1) for rank in range(2)]
    torch.testing.assert_close(ours[0][:7], torch.cat(sent).detach())


@pytest.mark.parametrize("size", [0, (0, 128), [0]])
def test_memory_bank_of_no_keys_is_none(size):
    assert DySTreSSLoss(memory_bank_size=size).loss.queue is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DySTreSSLoss(memory_bank_size=-1), r"memory_bank_size=-1 must be the pair \(num_features, dim\)"),
        (lambda: DySTreSSLoss(memory_bank_size=True), "memory_bank_size=True must be"),
        (lambda: DySTreSSLoss(memory_bank_size=4096.0), "memory_bank_size=4096.0 must be"),
        (lambda: DySTreSSLoss(memory_bank_size="4096"), "memory_bank_size='4096' must be"),
        (lambda: DySTreSSLoss(memory_bank_size=()), r"memory_bank_size=\(\) must be"),
        (lambda: DySTreSSLoss(memory_bank_size=(4, 0)), r"\(4, 0\)"),
        (lambda: MACLLoss(memory_bank_size=(1, 2, 3)), r"memory_bank_size=\(1, 2, 3\) must be the pair"),
        (lambda: TemperatureFreeLoss(memory_bank_size=(-4, 8)), r"\(-4, 8\)"),
        (lambda: DySTreSSLoss(tau_min=0.3), "tau_min=0.3 is above tau_max=0.2"),
        (lambda: DySTreSSLoss(profile="cosin"), "Did you mean 'cosine'"),
        (lambda: MACLLoss(temperature=0.0), "temperature=0.0 must be above 0"),
        (lambda: MACLLoss(A_0=1.5), r"A_0=1.5 must lie in \[-1, 1\]"),
        (lambda: ISogCLRLoss(num_samples=0), "num_samples=0"),
        (lambda: DySTreSSLoss(objective="dlc"), "Did you mean 'dcl'"),
        (lambda: DySTreSSLoss(objective="dclw", sigma=0.0), "sigma=0.0"),
        (lambda: DySTreSSLoss(sigma=0.5), "'sigma'"),
    ],
)
def test_bad_values_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


CRITERIA = {
    "dystress": (DySTreSSLoss, {}),
    "macl": (MACLLoss, {}),
    "ts": (TemperatureScheduleLoss, {"epoch": 3}),
    "tempfree": (TemperatureFreeLoss, {}),
    "isogclr": (partial(ISogCLRLoss, 20), {"index": torch.arange(6)}),
}


@pytest.mark.parametrize("positives", ["sum", "mean"])
@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_takes_classes(name, positives):
    build, more = CRITERIA[name]
    labels = torch.tensor([0, 1, 0, 2, 2, 0])
    table = {"num_samples": 20, "gradient": "cosine"} if name == "isogclr" else {}
    ours = partial(build(positives=positives), labels=labels, **more)
    expected = partial(ContrastiveLoss(name, positives=positives, **table), labels=labels, **more)
    assert_same(ours, expected, views())


def test_a_memory_bank_takes_no_classes():
    with pytest.raises(ValueError, match="this loss has a queue: leave them out"):
        DySTreSSLoss(memory_bank_size=(8, 5))(*views(), labels=torch.arange(6))


def test_classes_with_an_offset_for_every_image_and_of_equal_bounds_are_supcon():
    z, labels, index = views(), torch.tensor([0, 1, 0, 2, 2, 0]), torch.arange(6)
    with_counts = TemperatureScheduleLoss(0.2, 0.2, offset=[3, 1, 3, 2, 2, 3], amplitude=0.1, positives="mean")
    ours = partial(with_counts, labels=labels, index=index, epoch=1)
    assert_same(ours, lambda *both: SupConLoss(0.2)(torch.cat(both), labels.repeat(2)), z)
