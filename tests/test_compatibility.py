import copy
import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from grid import EPOCH, embeddings, trained_on

import dystress_plugin as dp
from dystress_plugin import ContrastiveLoss
from dystress_plugin.temperature import Learnable

STATES = Path(__file__).parent / "data" / "state_dicts.json"
EXTRA = {"learnable": lambda: ContrastiveLoss(Learnable(0.12))}  # has a parameter; no recipe does
every_method = pytest.mark.parametrize("name", [*dp.recipes.METHODS, *EXTRA])


def fresh(name, **settings):
    if name in EXTRA:
        return EXTRA[name]()
    needs = {"queue_size": (5, 4)} if name.endswith("_moco") else {}
    torch.manual_seed(0)  # for the queue's keys, and a network
    return ContrastiveLoss(name, **needs, **dp.recipes.METHODS[name].sized(settings, 8, 4))


def step(loss, seed):
    """The loss of a batch, whose gradient moves a parameter of the loss, if there is one."""
    torch.manual_seed(seed)  # for dropout
    value = loss(*trained_on(embeddings(4, 4, seed=seed)), index=(torch.arange(4) + seed) % 8, epoch=EPOCH)
    if list(loss.parameters()):
        for parameter, gradient in zip(
            loss.parameters(), torch.autograd.grad(value, [*loss.parameters()]), strict=True
        ):
            parameter.data -= 0.1 * gradient
    return value.detach()


def trained(name):
    loss = fresh(name)
    for seed in range(3):
        step(loss, seed)
    return loss


def pickled(loss):
    return pickle.loads(pickle.dumps(loss))


def saved(loss):
    buffer = io.BytesIO()
    torch.save(loss, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def reloaded(loss):
    """Into a fresh loss, from what torch.load takes without unpickling anything but tensors."""
    buffer = io.BytesIO()
    torch.save(loss.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(loss)
    for tensor in [*other.parameters(), *other.buffers()]:
        tensor.data.zero_()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


@every_method
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved, reloaded])
@pytest.mark.parametrize("before", [0, 2])
def test_a_copy_goes_on_as_the_original_and_apart_from_it(name, copied, before):
    loss = fresh(name)
    for seed in range(before):
        step(loss, seed)
    other = copied(loss)
    kept = copy.deepcopy(other.state_dict())
    values = [step(loss, seed) for seed in range(before, before + 3)]
    assert all(torch.equal(other.state_dict()[key], value) for key, value in kept.items())
    assert repr(other) == repr(copied(other))
    assert [step(other, seed) for seed in range(before, before + 3)] == values
    assert all(torch.equal(other.state_dict()[key], value) for key, value in loss.state_dict().items())


# State dicts of earlier versions


def packed(state):
    return {
        key: {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
        for key, value in state.items()
    }


def unpacked(state):
    return {key: torch.tensor(entry["values"], dtype=getattr(torch, entry["dtype"])) for key, entry in state.items()}


VERSIONS = json.loads(STATES.read_text()) if STATES.exists() else {}


@pytest.mark.parametrize(("version", "name"), [(v, name) for v, methods in VERSIONS.items() for name in methods])
def test_the_state_of_every_version_loads_and_goes_on(version, name):
    entry, loss = VERSIONS[version][name], fresh(name)
    state = unpacked(entry["state"])
    loss.load_state_dict(state, strict=True)
    assert {key: value.dtype for key, value in loss.state_dict().items()} == {k: v.dtype for k, v in state.items()}
    assert step(loss.eval(), 3).item() == pytest.approx(entry["value"], rel=1e-6)


def test_this_versions_state_is_on_file():
    """Otherwise run scripts/checks/make_state_dicts.py."""
    assert set(VERSIONS[dp.__version__]) == set(dp.recipes.METHODS)
    for name, entry in VERSIONS[dp.__version__].items():
        state = trained(name).state_dict()
        assert {key: list(value.shape) for key, value in state.items()} == {
            key: list(value.shape) for key, value in unpacked(entry["state"]).items()
        }


# torch.compile


class Training(torch.nn.Module):
    """A network and its loss, compiled as one."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        self.loss = fresh(name)

    def forward(self, z0, z1, index):
        return self.loss(self.model(z0), self.model(z1), index=index, epoch=EPOCH)


def three_steps(training, module):
    """Values of three steps of gradient descent of `module`, which is `training`, compiled or not."""
    optimizer = torch.optim.SGD(training.parameters(), lr=0.1)
    values = []
    for seed in range(3):
        optimizer.zero_grad()
        value = module(*[view.float() for view in embeddings(4, 4, seed=seed)], torch.arange(4) + seed)
        value.backward()
        optimizer.step()
        values.append(value.detach())
    return torch.stack(values)


def assert_compiled_is_the_same(name, backend):
    torch._dynamo.reset()
    plain, training = Training(name), Training(name)
    expected = three_steps(plain, plain)
    found = three_steps(training, torch.compile(training, backend=backend))
    assert torch.allclose(found, expected, rtol=1e-5)
    for key, value in plain.state_dict().items():
        assert torch.allclose(training.state_dict()[key], value, rtol=1e-4, atol=1e-6), key


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("name", ["dystress", "isogclr", "macl_moco", "learnable"])
def test_a_traced_training_module_is_the_module(name):
    assert_compiled_is_the_same(name, "eager")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_a_compiled_training_module_is_the_module():
    assert_compiled_is_the_same("dystress", "inductor")
