"""A batch embedded in chunks: its gradients, its random numbers, its batch norm, and what it holds."""

import copy
import itertools

import gloo
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm

import dystress_plugin as dp
from dystress_plugin import ContrastiveLoss, chunks, embed_in_chunks

BATCH = 64


def network(*middle):
    """The same at every call; `middle` are functions that make layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), *(layer() for layer in middle), nn.Linear(16, 5)).double()


def images(views=2):
    return torch.randn(views, BATCH, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss_of(layout, **settings):
    if layout == "queue":
        torch.manual_seed(2)
        return ContrastiveLoss("dystress_moco", queue_size=(96, 5), **settings).double()
    return ContrastiveLoss("dystress", layout=layout, **settings)


def gradients(encoder, embed, layout="views"):
    """The value and gradients of every parameter."""
    loss = loss_of(layout)
    value = loss(*(embed(encoder, view) for view in images()))
    value.backward()
    return [value.detach(), *(parameter.grad for parameter in encoder.parameters())]


def assert_same(found, expected, tolerance=1e-12):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("layout", ["views", "queue", "both_ways"])
@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
def test_gradients_are_those_of_the_whole_batch(chunk_size, layout):
    expected = gradients(network(), lambda encoder, view: encoder(view), layout)
    assert_same(gradients(network(), lambda e, view: embed_in_chunks(e, view, chunk_size), layout), expected)


def loop(encoder, view, chunk_size):
    """What the chunks are, as a plain loop that holds all activations."""
    return torch.cat([encoder(part) for part in view.tensor_split(-(-len(view) // chunk_size))])


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Dropout(0.5),
        lambda: nn.BatchNorm1d(16),
        lambda: nn.BatchNorm1d(16, momentum=None),
        lambda: nn.Sequential(nn.Unflatten(1, (4, 4)), nn.InstanceNorm1d(4, track_running_stats=True), nn.Flatten()),
        lambda: spectral_norm(nn.Linear(16, 16)),
    ],
    ids=["dropout", "batch norm", "batch norm, cumulative", "instance norm", "spectral norm"],
)
@pytest.mark.parametrize("chunk_size", [7, 20])
def test_random_numbers_and_buffers_are_those_of_a_plain_loop(layer, chunk_size):
    encoders = [network(layer) for _ in range(2)]
    found = []
    for encoder, embed in zip(encoders, (embed_in_chunks, loop), strict=True):
        torch.manual_seed(3)
        found.append(gradients(encoder, lambda e, view, embed=embed: embed(e, view, chunk_size)))
    assert_same(*found)
    for a, b in zip(*(encoder.buffers() for encoder in encoders), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_autocast_is_that_of_the_first_pass():
    encoders = [network(nn.Dropout).float() for _ in range(2)]
    found = []
    for encoder, embed in zip(encoders, (embed_in_chunks, loop), strict=True):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            z = embed(encoder, images()[0].float(), 16)
        assert z.dtype == torch.bfloat16
        z.float().square().sum().backward()  # outside of autocast
        found.append([parameter.grad for parameter in encoder.parameters()])
    assert_same(*found, tolerance=0)


class Pair(nn.Module):
    """Takes and gives structures."""

    def __init__(self):
        super().__init__()
        self.layer = network()

    def forward(self, batch):
        return {"z": self.layer(batch["image"] + batch["more"][0]), "twice": (2 * batch["image"],)}


def test_structures_go_in_and_come_out():
    first, second = images()
    batch = {"image": first, "more": [second]}
    model = Pair()
    found, expected = embed_in_chunks(model, batch, 10), model(batch)
    torch.testing.assert_close(found["z"], expected["z"])
    assert torch.equal(found["twice"][0], expected["twice"][0])


class Counting(nn.Module):
    """Counts forward passes and remembers the largest."""

    def __init__(self):
        super().__init__()
        self.layer, self.sizes = network(), []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.layer(x)


def test_every_part_is_embedded_twice_with_gradient_and_once_without():
    model = Counting()
    embed_in_chunks(model, images()[0], 30).sum().backward()
    assert model.sizes == [22, 21, 21] * 2 or sorted(model.sizes) == [21, 21, 21, 21, 22, 22]
    model.sizes.clear()
    with torch.no_grad():
        embed_in_chunks(model, images()[0], 30)
    assert model.sizes == [22, 21, 21]


def test_only_one_part_is_held_at_a_time():
    """What autograd saves between the passes does not grow with the layers."""
    held = []
    model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(6, 6), nn.ReLU()))).double()

    def saved(embed):
        held.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):
            embed(model, images()[0])
        return sum(held)

    whole = saved(lambda e, view: e(view))
    assert saved(lambda e, view: embed_in_chunks(e, view, 8)) <= 0.25 * whole


LAYOUTS = ("views", "queue", "both_ways")
RANK_CHUNKS = (1, 7, BATCH // 2)


def on_a_rank(rank):
    """Gradients of two ranks that chunk their halves, with each layout and size of chunk."""
    found = {}
    for layout, chunk_size in itertools.product(LAYOUTS, RANK_CHUNKS):
        encoder = DistributedDataParallel(network())
        loss = loss_of(layout, gather_distributed=True)
        own = images().chunk(2, dim=1)[rank]
        loss(*(embed_in_chunks(encoder, view, chunk_size) for view in own)).backward()
        found[layout, chunk_size] = [parameter.grad for parameter in encoder.parameters()]
    return found


def test_two_ranks_with_distributed_data_parallel_equal_one_process(tmp_path):
    ranks = gloo.run(on_a_rank, 2, tmp_path)
    for layout in LAYOUTS:
        expected = gradients(network(), lambda encoder, view: encoder(view), layout)[1:]
        for found, chunk_size in itertools.product(ranks, RANK_CHUNKS):
            assert_same(found[layout, chunk_size], expected)


class Masked(nn.Module):
    """With buffers that it reads, one that it writes, and one that it replaces."""

    def __init__(self):
        super().__init__()
        self.layer = network()
        self.register_buffer("mask", torch.ones(6))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(6))

    def forward(self, x):
        self.seen += len(x)
        self.last = x[-1] + self.last
        return self.layer(x * self.mask + self.seen / 100 + self.last)


def test_buffers_are_read_written_and_replaced_as_by_a_plain_loop():
    encoders = [Masked().double() for _ in range(2)]
    found = [
        gradients(encoder, lambda e, x, embed=embed: embed(e, x, 7))
        for encoder, embed in zip(encoders, (embed_in_chunks, loop), strict=True)
    ]
    assert_same(*found)
    for a, b in zip(*(encoder.buffers() for encoder in encoders), strict=True):
        assert torch.equal(a, b)


def test_a_part_keeps_no_copy_of_buffers_that_are_only_read(monkeypatch):
    kept = []
    whole = chunks._Repeating.keep_what_changed
    monkeypatch.setattr(
        chunks._Repeating, "keep_what_changed", lambda self: (whole(self), kept.append([n for _, n, _ in self._places]))
    )
    embed_in_chunks(Masked().double(), images()[0], 32).sum().backward()
    assert kept == [["seen", "last"]] * 2


def test_a_compiled_encoder_has_the_gradients_of_a_plain_one():
    torch._dynamo.reset()
    encoders = [network(lambda: nn.BatchNorm1d(16)) for _ in range(2)]
    compiled = torch.compile(encoders[0], backend="aot_eager")
    found = [
        gradients(encoder, lambda e, x, embed=embed: embed(e, x, 20))
        for encoder, embed in zip((compiled, encoders[1]), (embed_in_chunks, loop), strict=True)
    ]
    assert_same(*found)
    for a, b in zip(*(encoder.buffers() for encoder in encoders), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("given", "message"),
    [(0, "size=0 must be an int"), (2.0, "size=2.0 must"), (True, "size=True must"), (1, "size=1 leaves batch norm")],
)
def test_the_size_of_chunks_as_a_setting(given, message):
    with pytest.raises(ValueError, match=message):
        chunks.check_chunks(given, network(lambda: nn.BatchNorm1d(16)), name="size")
    assert chunks.check_chunks(None, network()) is None
    assert chunks.check_chunks(1, network()) == 1


def test_none_is_the_whole_batch():
    model = Counting()
    embed_in_chunks(model, images()[0], None)
    assert model.sizes == [BATCH]


def test_a_frozen_encoder_and_a_second_backward_pass():
    encoder = network(lambda: nn.BatchNorm1d(16))
    z = embed_in_chunks(encoder, images()[0], 20)
    state = copy.deepcopy(encoder.state_dict())
    first = torch.autograd.grad(z.sum(), list(encoder.parameters()), retain_graph=True)
    second = torch.autograd.grad(z.sum(), list(encoder.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(entry, encoder.state_dict()[name]) for name, entry in state.items())
    encoder.requires_grad_(False)
    assert not embed_in_chunks(encoder, images()[0], 20).requires_grad


@pytest.mark.parametrize(
    ("given", "size", "error", "message"),
    [
        (torch.ones(4, 6), 0, ValueError, "chunk_size=0"),
        (torch.ones(4, 6), 2.5, ValueError, "chunk_size=2.5"),
        ([], 2, TypeError, "takes a tensor"),
        ("images", 2, TypeError, "takes a tensor"),
        ([torch.ones(4, 6), torch.ones(3, 6)], 2, ValueError, r"different batches, \[3, 4\]"),
    ],
)
def test_what_cannot_be_cut_is_said(given, size, error, message):
    with pytest.raises(error, match=message):
        embed_in_chunks(network(), given, size)


def test_it_is_public():
    assert dp.embed_in_chunks is embed_in_chunks
