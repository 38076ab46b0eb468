"""A training step never makes the host wait for the device: shown without one, on tensors that have no numbers."""

import copy
from functools import partial

import pytest
import torch
from grid import EPOCH, KINDS, OBJECTIVES, build
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dystress_plugin import ContrastiveLoss, recipes, tracing
from dystress_plugin.engine import ENGINES, blockwise
from dystress_plugin.metrics import temperature_summary
from dystress_plugin.temperature import Constant, Hardness

DIM, IMAGES, SAMPLES = 4, 5, 50
LAYOUTS = {
    "two-views": {},
    "three-views": {},
    "queue": {"queue_size": (11, DIM)},
    "one-way": {"layout": "one_way"},
    "both-ways": {"layout": "both_ways"},
}
# They hand a number to the host, or the shape of their result depends on numbers.
READING = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "unique_consecutive"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class NoWaiting(TorchDispatchMode):
    """Fails at what would make the host wait for a device, and at any operation between devices."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        name = function._schema.name.removeprefix("aten::")
        tensors = [x for x in tree_leaves((arguments, keywords, result)) if isinstance(x, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        by_mask = name in INDEXING and any(x is not None and x.dtype == torch.bool for x in arguments[1])
        # CUDA makes a tensor of the number on the CPU.
        with_number = name.startswith("index_put") and arguments[2].dim() == 0
        if len(devices) > 1 or ("meta" in devices and (name in READING or by_mask or with_number)):
            raise AssertionError(f"{function}: {[(tuple(x.shape), x.dtype, x.device.type) for x in tensors]}")
        return result


@pytest.fixture
def eager(monkeypatch):
    """A mode counts as a compiler; here it must not, since eager code may look at numbers where a compiler cannot."""
    monkeypatch.setattr(tracing, "eager", lambda *tensors: True)
    monkeypatch.setattr(blockwise, "in_tiles", lambda *given: True)
    monkeypatch.setitem(ENGINES, "in-tiles", partial(blockwise.negative_stats, tile=6, keep_bytes=0))


def batch_of(layout, device):
    torch.manual_seed(0)
    views = torch.randn(3 if layout == "three-views" else 2, IMAGES, DIM, device=device).requires_grad_()
    return views, {"index": torch.arange(IMAGES, device=device), "epoch": EPOCH}


def check(loss, layout="two-views"):
    views, more = batch_of(layout, "meta")
    loss.to("meta")
    with NoWaiting():
        temperature_summary(loss, *views, **more)
        loss(*views, **more).backward()
    assert views.grad.shape == views.shape


@pytest.mark.parametrize("engine", ["dense", "in-tiles"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", KINDS)
def test_a_step_of_any_temperature_waits_for_nothing(name, layout, engine, eager):
    temperature = build(name)
    check(ContrastiveLoss(temperature, engine=engine, **LAYOUTS[layout]), layout)


@pytest.mark.parametrize("engine", ["auto", "in-tiles"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_of_any_objective_waits_for_nothing(objective, layout, engine, eager):
    check(ContrastiveLoss(build("isogclr"), objective=objective, engine=engine, **LAYOUTS[layout]), layout)


@pytest.mark.parametrize("engine", ["auto", "blockwise"])
@pytest.mark.parametrize("name", recipes.METHODS)
def test_a_step_of_any_method_waits_for_nothing(name, engine, eager):
    own = {"queue_size": (11, DIM)} if recipes.METHODS[name].queue else {}
    check(ContrastiveLoss(name, engine=engine, **recipes.METHODS[name].sized(own, SAMPLES, DIM)))


def test_positives_one_by_one_hard_negatives_and_a_watched_floor_wait_for_nothing(eager):
    check(ContrastiveLoss("dystress", positives="mean"), "three-views")
    check(ContrastiveLoss(Hardness(Constant(0.1), negatives="hard"), layout="one_way"), "three-views")
    check(ContrastiveLoss("macl", alpha=2.0))


@pytest.mark.parametrize("engine", ["dense", "in-tiles"])
@pytest.mark.parametrize("positives", ["sum", "mean"])
def test_positives_by_class_wait_for_nothing(positives, engine, eager):
    loss = ContrastiveLoss(build("isogclr"), positives=positives, engine=engine).to("meta")
    views, more = batch_of("two-views", "meta")
    with NoWaiting():
        loss(*views, labels=torch.zeros(IMAGES, dtype=torch.int64, device="meta"), **more).backward()
    assert views.grad.shape == views.shape


def waits():
    torch.zeros((), device="meta").item()


def moves():
    torch.arange(3).to("meta")


def masks():
    x = torch.ones(3, device="meta")
    x[x > 0] = 1


def writes_a_number():
    x = torch.ones(3, device="meta")
    x[torch.zeros(2, dtype=torch.int64, device="meta")] = 1


@pytest.mark.parametrize("fault", [waits, moves, masks, writes_a_number])
def test_what_waits_is_noticed(fault):
    with pytest.raises((AssertionError, RuntimeError)), NoWaiting():
        fault()


# With a device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("engine", ["dense", "in-tiles"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", KINDS)
def test_a_step_on_cuda_is_captured_and_replayed(name, layout, engine, monkeypatch):
    """CUDA refuses to capture what waits."""
    monkeypatch.setitem(ENGINES, "in-tiles", partial(blockwise.negative_stats, tile=4, keep_bytes=0))
    loss = ContrastiveLoss(build(name), engine=engine, **LAYOUTS[layout]).cuda()
    views, more = batch_of(layout, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            loss(*views, **more).backward()
    torch.cuda.current_stream().wait_stream(stream)
    plain = copy.deepcopy(loss)
    views.grad.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # where the gradients have accumulated so far
        value = loss(*views, **more)
        value.backward()
    graph.replay()  # capturing alone computes nothing
    again = views.detach().clone().requires_grad_()
    expected = plain(*again, **more)
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(views.grad, again.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dict(loss.state_dict()), dict(plain.state_dict()))
