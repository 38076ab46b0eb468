import copy
import threading

import pytest
import torch
from grid import DEVICE

from dystress_plugin import ContrastiveLoss, temperature
from dystress_plugin.engine import blockwise, dense
from dystress_plugin.layout import LAYOUTS
from dystress_plugin.temperature.base import Batch

TEMPERATURES = {
    "constant": lambda: temperature.Constant(0.1),
    "constant-0.01": lambda: temperature.Constant(0.01),  # beyond the bound up to which exp needs no shift
    "dystress": lambda: temperature.DySTreSS(),
    "shifted-live": lambda: temperature.DySTreSS(profile="shifted", detach=False),
    "isogclr": lambda: temperature.Individual(200),
    "tempfree": lambda: temperature.TemperatureFree(),
}


def views(images, dim=16, dtype=torch.float32, seed=0, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(2, images, dim, dtype=torch.float64, generator=generator)
    z[1] = z[0] + 0.5 * z[1]
    return z.to(device, dtype).requires_grad_()


def value_and_gradient(loss, z):
    index = torch.arange(z.shape[1], device=z.device)
    value = loss(*z, index=index, epoch=0.0)
    return value.detach().double(), torch.autograd.grad(value, z)[0].double()


def losses(name, objective, layout):
    build = {
        engine: ContrastiveLoss(TEMPERATURES[name](), objective=objective, layout=layout, engine=engine)
        for engine in ("dense", "blockwise")
    }
    return build["dense"].to(DEVICE).eval(), build["blockwise"].to(DEVICE).eval()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("objective", ["ntxent", "macl", "sogclr", "dcl", "dclw"])
@pytest.mark.parametrize("name", TEMPERATURES)
def test_float32_error_is_at_most_that_of_the_dense_engine_and_some_rounding(name, objective, layout):
    # 130 images: more entries than `auto` leaves to the dense engine, and a remainder of the rows of any tile
    reference, engine = losses(name, objective, layout)
    z = views(130)
    truth = value_and_gradient(copy.deepcopy(reference), z.detach().double().requires_grad_())
    for exact, plain, ours in zip(truth, value_and_gradient(reference, z), value_and_gradient(engine, z), strict=True):
        scale = exact.abs().max().clamp(min=1.0 if exact.dim() == 0 else 0.0)
        assert (ours - exact).abs().max() <= (plain - exact).abs().max() + 16 * torch.finfo(torch.float32).eps * scale


# Where a temperature is detached, as "dystress" is, a numerical derivative sees more than the gradient holds.
@pytest.mark.parametrize("name", sorted(TEMPERATURES.keys() - {"dystress"}))
@pytest.mark.parametrize("keep_bytes", [0, 2**30])
def test_gradcheck(name, keep_bytes):
    temperature_ = TEMPERATURES[name]().to(DEVICE)
    z = views(7, 3, torch.float64)

    def statistics(z):
        units = torch.nn.functional.normalize(z, dim=2)
        (block,) = LAYOUTS["views"](units, gather=False)
        batch = Batch(block.positive_cosine.detach(), torch.arange(7, device=DEVICE).repeat(2), 0.0, 2, torch.mean)
        map_ = temperature_.prepare(batch).negative
        return tuple(
            blockwise.negative_stats(
                block.anchors, None, block.excluded, map_, want_cosine=True, tile=4, keep_bytes=keep_bytes
            )
        )[:1]

    assert torch.autograd.gradcheck(statistics, (z,), atol=1e-6)


def saved_bytes(images, keep_bytes):
    """What autograd holds between forward and backward pass; on a CPU, as the size of a tile is the device's."""
    units = torch.nn.functional.normalize(views(images, device="cpu"), dim=2)
    (block,) = LAYOUTS["views"](units, gather=False)
    map_ = temperature.DySTreSS()._map(0.1, 0.2, None)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        blockwise.negative_stats(block.anchors, None, block.excluded, map_, want_cosine=False, keep_bytes=keep_bytes)
    return sum(saved)


def test_what_is_saved_is_linear_in_the_batch():
    few, many = saved_bytes(512, 0), saved_bytes(4096, 0)
    assert 0 < many <= 8 * few
    # per row: the embedding of 16 floats and a sum in double
    assert many <= 2 * 4096 * (16 * 4 + 8) + 64


@pytest.mark.parametrize(("threads", "blocks"), [(1, 8), (2, 6), (3, 4), (16, 4)])
def test_tiles_are_kept_where_all_fit_into_the_budget(threads, blocks, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    # 4096 rows in blocks of whole cache lines, of which the last may be smaller; tiles on and above the diagonal
    side = -(-4096 // (blocks * 16)) * 16
    last = 4096 - (blocks - 1) * side
    tiles = (4096**2 + (blocks - 1) * side**2 + last**2) // 2 * 4
    kept = [saved_bytes(2048, budget) - saved_bytes(2048, 0) for budget in (tiles - 1, tiles)]
    assert kept == [0, tiles]


def test_tiles_are_kept_in_the_memory_of_the_last_call_once_that_is_free():
    loss, z = ContrastiveLoss("dystress", engine="blockwise"), views(1024, device="cpu")

    def kept():
        """Where the tiles of a forward pass are, and its value."""
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
            value = loss(*z)
        return saved, value

    expected = value_and_gradient(loss, z)[1]
    first, value = kept()
    second, other = kept()
    assert not set(first) & set(second) - {z.data_ptr()}
    for each in (value, other, value):
        assert torch.equal(torch.autograd.grad(each, z, retain_graph=True)[0].double(), expected)
    del value, other, each
    third, _ = kept()
    assert set(second) & set(third)


def test_losses_that_interleave_do_not_disturb_each_other():
    a, b = views(150, seed=1), views(170, seed=2)
    loss = ContrastiveLoss("dystress", engine="blockwise")
    expected = [value_and_gradient(loss, z)[1] for z in (a, b)]
    first, second = loss(*a), loss(*b)
    assert torch.equal(torch.autograd.grad(first, a)[0].double(), expected[0])
    assert torch.equal(torch.autograd.grad(second, b)[0].double(), expected[1])


def test_threads_do_not_disturb_each_other():
    loss = ContrastiveLoss("dystress", engine="blockwise")
    inputs = [views(150 + i, seed=i) for i in range(4)]
    expected = [value_and_gradient(loss, z)[1] for z in inputs]
    found = [None] * 4

    def run(i):
        for _ in range(5):
            found[i] = value_and_gradient(loss, inputs[i])[1]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("keep_bytes", [0, 2**30])
@pytest.mark.parametrize("tile", [5, 64, None])
def test_tiles_and_what_is_kept_of_them_change_nothing(tile, keep_bytes):
    units = torch.nn.functional.normalize(views(41, dtype=torch.float64), dim=2)
    (block,) = LAYOUTS["views"](units, gather=False)
    map_ = temperature.DySTreSS()._map(0.1, 0.2, None)
    plain = dense.negative_stats(block.anchors, None, block.excluded, map_, want_cosine=True, ratio=3.0)
    tiled = blockwise.negative_stats(
        block.anchors, None, block.excluded, map_, want_cosine=True, ratio=3.0, tile=tile, keep_bytes=keep_bytes
    )
    for one, other in zip(plain, tiled, strict=True):
        assert torch.allclose(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_compiled_step_is_the_step():
    model, loss = torch.nn.Linear(16, 8).to(DEVICE), ContrastiveLoss("dystress", engine="blockwise")
    z = views(150)

    def step(a, b):
        return loss(model(a), model(b))

    expected = torch.autograd.grad(step(*z), model.weight)[0]
    compiled = torch.compile(step, backend="eager")
    found = torch.autograd.grad(compiled(*z), model.weight)[0]
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
