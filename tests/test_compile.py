"""torch.compile of the losses, each layout with each engine in a fresh process, so that nothing is warm.

A process is forked from one that has imported torch and the package, and has called neither.
"""

import copy
import multiprocessing
import shutil
import threading
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dystress_plugin import ContrastiveLoss, recipes, tracing
from dystress_plugin.temperature import Constant, DySTreSS, Learnable, ModelAware, StepSchedule, WarmUp

DIM, SAMPLES, KEYS = 8, 400, 4096
# More than 2^16 similarities: beyond the dense engine of "auto".
IMAGES = {"views": 150, "queue": 64, "one_way": 300, "both_ways": 300}
OTHERS = {  # what no recipe has
    "learnable": Learnable,
    "learnable-after-warm-up": lambda: WarmUp(Learnable()),
    "two-ranges-live": lambda: DySTreSS(profile="shifted", detach=False, negative_range=(0.1, 0.15)),
    "stabilised": lambda: DySTreSS(stabilise=30),
    "steps": StepSchedule,
    "shifted-by-the-maximum": lambda: Constant(0.01),
    "watched-floor": lambda: ModelAware(0.1, alpha=2.0),
}
OWN = [name for name in recipes.METHODS if not name.endswith(("_dcl", "_dclw", "_dual", "_moco"))]
VARIANTS = [name for name in recipes.METHODS if name.endswith(("_dcl", "_dclw"))] + ["dystress_dual"]
QUEUES = [name for name in recipes.METHODS if name.endswith("_moco")] + ["isogclr"]
CELLS = {
    ("views", "auto"): [*OWN, *VARIANTS, *OTHERS],
    ("queue", "auto"): [*QUEUES, *OTHERS],
    **{(layout, "auto"): [*OWN, "learnable"] for layout in ("one_way", "both_ways")},
    **{(layout, "blockwise"): ["dystress", "isogclr", "learnable"] for layout in IMAGES},
    ("views", "dense"): [*OWN, "learnable"],
    ("queue", "dense"): [*QUEUES, "learnable"],
    **{(layout, "dense"): ["macl", "isogclr"] for layout in ("one_way", "both_ways")},
}


needs_operations = pytest.mark.skipif(not tracing.HAS_OPERATIONS, reason="this release of torch leaves the graph")


def loss_of(name, layout, engine):
    torch.manual_seed(0)
    own = {"queue_size": (KEYS, DIM)} if layout == "queue" else {"layout": layout}
    if name in OTHERS:
        return ContrastiveLoss(OTHERS[name](), engine=engine, **own)
    loss = ContrastiveLoss(name, engine=engine, **recipes.METHODS[name].sized(own, SAMPLES, DIM))
    for temperature in loss.temperatures:
        temperature.eval()  # without dropout, which draws other masks in a graph
    return loss


class Training(torch.nn.Module):
    """A network and its loss, compiled as one."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(1)
        self.model, self.loss = torch.nn.Linear(DIM, DIM), loss

    def forward(self, z0, z1, index, epoch):
        return self.loss(self.model(z0), self.model(z1), index=index, epoch=epoch)


def steps(training, module, images, epochs):
    """Values and gradients of steps of `module`, which is `training`, compiled or not; and the state at the end."""
    found = []
    for seed, epoch in enumerate(epochs):
        random = torch.Generator().manual_seed(seed)
        z = torch.randn(2, images, DIM, generator=random)
        z[1] = z[0] + 0.5 * z[1]
        index = torch.randint(SAMPLES, (images,), generator=random)
        value = module(*z, index, epoch)
        gradients = torch.autograd.grad(value, [*training.parameters()], allow_unused=True, materialize_grads=True)
        found += [value.detach(), *gradients]
    return [*found, *(state.clone() for state in training.state_dict().values())]


def differences(names, layout, engine, backend, epochs):
    """What is wrong with each of the recipes, compiled on a thread of its own."""
    wrong = {}

    def compare(name):
        torch._dynamo.reset()
        training = Training(loss_of(name, layout, engine))
        plain = copy.deepcopy(training)
        try:
            compiled = torch.compile(training, backend=backend, fullgraph=tracing.HAS_OPERATIONS)
            found = steps(training, compiled, IMAGES[layout], epochs)
            expected = steps(plain, plain, IMAGES[layout], epochs)
            for one, other in zip(found, expected, strict=True):
                size = other.abs().max().item() if other.is_floating_point() else 0
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * size)
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"

    for name in names:
        thread = threading.Thread(target=compare, args=(name,))
        thread.start()
        thread.join()
    return wrong


def in_a_fresh_process(function, *arguments):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "dystress_plugin"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


@pytest.mark.parametrize(("layout", "engine"), CELLS)
def test_a_compiled_step_is_the_step(layout, engine):
    assert in_a_fresh_process(differences, CELLS[layout, engine], layout, engine, "eager", [0.0]) == {}


@needs_operations
def test_a_graph_serves_the_epochs_of_a_schedule():
    """More of them than a compiler makes graphs of one function."""
    epochs = [float(epoch) for epoch in range(10)]
    names = ["ts", "stabilised", "learnable-after-warm-up"]
    assert in_a_fresh_process(differences, names, "views", "auto", "aot_eager", epochs) == {}


@needs_operations
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_a_compiled_backward_pass_reads_the_state_as_the_forward_pass_found_it():
    assert in_a_fresh_process(differences, ["dystress_moco"], "queue", "auto", "inductor", [0.0, 1.0]) == {}


def after_tensors_without_numbers():
    """The gradient of a loss that has met a compiler's tensors before, and of one that has not."""
    z = torch.randn(2, 200, DIM, generator=torch.Generator().manual_seed(0))
    loss = ContrastiveLoss("dystress")
    with FakeTensorMode():
        fake = torch.empty(2, 200, DIM, requires_grad=True)
        loss(*fake).backward()
    assert fake.grad.shape == z.shape
    leaf = z.clone().requires_grad_()
    loss(*leaf).backward()
    return leaf.grad


@needs_operations
def test_what_a_compiler_creates_is_not_kept_for_the_next_call():
    z = torch.randn(2, 200, DIM, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (expected,) = torch.autograd.grad(ContrastiveLoss("dystress", engine="dense")(*z), z)
    torch.testing.assert_close(in_a_fresh_process(after_tensors_without_numbers), expected, rtol=1e-4, atol=1e-8)


@needs_operations
@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("name", ["dystress", "isogclr"])
def test_a_second_derivative_of_compiled_tiles_is_an_error_by_every_route(name):
    torch._dynamo.reset()
    loss, index = loss_of(name, "views", "auto").eval(), torch.arange(150)
    compiled = torch.compile(lambda z: loss(*z, index=index), backend="eager")
    z = torch.randn(2, 150, DIM)
    for route in (partial(torch.autograd.functional.vhp, v=z), torch.autograd.functional.hessian):
        with pytest.raises(RuntimeError, match="Compiled tiles have no second derivative"):
            route(compiled, z)


@needs_operations
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_an_exported_loss_is_the_loss():
    z = torch.randn(2, 150, DIM)
    loss = ContrastiveLoss("dystress")
    torch.testing.assert_close(torch.export.export(loss, tuple(z)).module()(*z), loss(*z))


@needs_operations
@pytest.mark.parametrize("positives", ["sum", "mean"])
def test_positives_by_class_are_in_one_graph(positives):
    loss = loss_of("dystress", "views", "auto")
    loss.positives = positives
    random = torch.Generator().manual_seed(0)
    z = [torch.randn(150, DIM, generator=random).requires_grad_() for _ in range(2)]
    labels = torch.arange(150) % 7
    torch._dynamo.reset()
    values = [loss(*z, labels=labels), torch.compile(loss, backend="aot_eager", fullgraph=True)(*z, labels=labels)]
    gradients = [torch.stack(torch.autograd.grad(value, z)) for value in values]
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(gradients[1], gradients[0])
