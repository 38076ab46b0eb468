"""What the adapters share, and what none of them may ask."""

import ast
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gloo
import pytest
import torch
from grid import embeddings
from torch.nn.parallel import DistributedDataParallel

import dystress_plugin
from dystress_plugin import ContrastiveLoss, recipes, temperature, training
from dystress_plugin.temperature import Constant, CosineSchedule, Individual, Learnable, Temperature, WarmUp
from dystress_plugin.temperature.base import Batch
from dystress_plugin.temperature.maps import LogitMaps, Scaled

PACKAGE = Path(dystress_plugin.__file__).parent
ADAPTERS = [
    PACKAGE / "training.py",
    PACKAGE / "cli.py",
    *(path for folder in ("frameworks", "experiment") for path in (PACKAGE / folder).rglob("*.py")),
]
KINDS = {name for name in temperature.__all__ if name != "Temperature"}


# What temperatures say themselves


def questions(source):
    """Where code asks a temperature for its kind, or knows a method or a table by its name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            named = {getattr(part, "id", getattr(part, "attr", "")) for part in ast.walk(node.args[1])}
            if named & KINDS:
                yield f"{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Constant) and node.value == recipes.TABLE:
            yield f"{node.lineno}: {node.value!r}"
        elif isinstance(node, ast.Compare):
            sides = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
            if sides & {*recipes.METHODS} - {"macl"}:  # also an objective's name
                yield f"{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_adapter_asks_a_temperature_for_its_kind(path):
    assert list(questions(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(t, Individual)",
        "isinstance(t, temperature.ModelAware)",
        "isinstance(t, (int, CosineSchedule))",
        "isinstance(t, WarmUp | int)",
        "issubclass(recipe.temperature, Individual)",
        '"num_samples" in parameters',
        'settings["num_samples"] = 1',
        'method == "isogclr"',
        'method in ("isogclr", "ts")',
    ],
)
def test_such_questions_are_found(source):
    assert len(list(questions(source))) == 1


# The step


class Module:
    """Of a LightningModule what `training` looks at."""

    def __init__(self, every):
        self.trainer = SimpleNamespace(log_every_n_steps=every, num_training_batches=4)
        self.global_step = self.current_epoch = 0
        self.logged = {}

    def log(self, name, value, **how):
        self.logged[name] = how | {"value": value}


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3, 4, 5]), (3, [2, 5]), (7, []), (0, [])])
def test_logging_steps_are_those_in_which_lightning_writes(every, steps):
    module, found, loss = Module(every), [], ContrastiveLoss("dystress")
    for module.global_step in range(6):
        module.logged.clear()
        training.contrast(module, loss, embeddings(3, 4), 0, index=None, epoch=0.0)
        found += [module.global_step] if module.logged else []
    assert found == steps


@pytest.mark.parametrize(("every", "steps"), [(2, [0, 1, 3, 5]), (50, [0, 3])])
def test_an_epoch_that_is_shorter_than_the_logging_interval_has_values_too(every, steps):
    module, found, loss = Module(every), [], ContrastiveLoss("dystress")
    for module.global_step in range(6):  # two epochs of three
        module.logged.clear()
        batch = module.global_step % 3
        training.contrast(module, loss, embeddings(3, 4), batch, index=None, epoch=0.0, on_epoch=True)
        found += [module.global_step] if module.logged else []
    assert found == steps


@pytest.mark.parametrize("on_epoch", [True, False])
def test_minima_are_logged_as_minima_and_steps_need_no_communication(on_epoch):
    module = Module(1)
    training.contrast(module, ContrastiveLoss("ts"), embeddings(5, 4), 0, index=None, epoch=1.0, on_epoch=on_epoch)
    assert len(module.logged) == 8
    for name, how in module.logged.items():
        assert how["reduce_fx"] == name[-3:] if name[-3:] in ("min", "max") else how["reduce_fx"] == "mean"
        assert (how["on_step"], how["on_epoch"], how["sync_dist"]) == (not on_epoch, on_epoch, on_epoch)
        assert how["batch_size"] == 5


def test_the_summary_is_of_the_queue_before_the_batch():
    module, loss = Module(1), ContrastiveLoss("simclr_moco", queue_size=(6, 4))
    before = loss.queue.keys.clone()
    views = [view.requires_grad_() for view in embeddings(3, 4)]
    expected = dystress_plugin.metrics.temperature_summary(loss, *views)
    value = training.contrast(module, loss, views, 0, index=None, epoch=0.0)
    assert {name: how["value"] for name, how in module.logged.items()} == expected
    assert value.requires_grad
    assert not torch.equal(loss.queue.keys, before)


def test_a_batch_of_one_image_has_a_loss_but_nothing_to_log():
    module, loss = Module(1), ContrastiveLoss("simclr_moco", queue_size=(6, 4))
    assert training.contrast(module, loss, embeddings(1, 4), 0, index=None, epoch=0.0).isfinite()
    assert module.logged == {}


def test_a_last_batch_of_one_image_is_0_and_a_first_one_an_error():
    module, loss, views = Module(1), ContrastiveLoss("dystress"), [view.requires_grad_() for view in embeddings(1, 4)]
    value = training.contrast(module, loss, views, 3, index=None, epoch=0.0)
    gradients = torch.autograd.grad(value, views)
    assert value.item() == 0
    assert not any(gradient.any() for gradient in gradients)
    assert module.logged == {}
    with pytest.raises(ValueError, match="one image has no negatives"):
        training.contrast(module, loss, views, 0, index=None, epoch=0.0)


def one_image_beside(rank, images):
    """Gradients of an encoder and a learned temperature; rank 0 has one image, rank 1 has `images`."""
    torch.manual_seed(0)
    loss = ContrastiveLoss(Learnable())
    encoder = DistributedDataParallel(torch.nn.Linear(4, 3).double())
    x = embeddings(5, 4)[0][:1] if rank == 0 else embeddings(5, 4)[0][:images]
    for _ in range(2):  # the first step also begins as rank 0
        encoder.zero_grad(), loss.zero_grad()
        training.loss_or_zero(loss, encoder(x), encoder(x.flip(1))).backward()
    return [parameter.grad for parameter in (*encoder.parameters(), *loss.parameters())]


@pytest.mark.parametrize("images", [1, 4])
def test_a_rank_with_one_image_takes_part_with_gradients_of_0(images, tmp_path):
    first, second = gloo.run(partial(one_image_beside, images=images), 2, tmp_path)
    torch.manual_seed(0)
    loss, encoder, x = ContrastiveLoss(Learnable()), torch.nn.Linear(4, 3).double(), embeddings(5, 4)[0][:images]
    if images > 1:
        (loss(encoder(x), encoder(x.flip(1))) / 2).backward()
    for parameter, *found in zip((*encoder.parameters(), *loss.parameters()), first, second, strict=True):
        expected = torch.zeros_like(parameter) if images == 1 else parameter.grad
        for gradient in found:
            torch.testing.assert_close(gradient, expected)


def test_the_clock_is_the_temperatures():
    module = Module(1)
    module.current_epoch = 3
    assert training.clock(module, CosineSchedule(), 2) == 3.0
    assert training.clock(module, CosineSchedule(per_step=True), 2) == 3.5


@pytest.mark.parametrize(("epochs", "count"), [(200, 1), (201, 0), (None, 0), (-1, 0)])
def test_concerns_are_warned_of_unless_the_training_has_no_end(epochs, count):
    heard = []
    training.warn_of_concerns(CosineSchedule(), epochs, heard.append)
    assert len(heard) == count


# A table of samples


class Foreign(Temperature):
    """A third party's: a table by another name, of several columns, beside a buffer that is none."""

    needs_index = True

    def __init__(self, tau: float = 0.1, num_samples: int = 1) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(1))
        self.tau = tau
        self.resize(num_samples)

    @property
    def num_samples(self):
        return len(self.moments)

    @property
    def has_learned(self):
        return bool(self.moments.any())

    def resize(self, num_samples):
        self.register_buffer("moments", torch.zeros(num_samples, 2))

    def prepare(self, batch: Batch) -> LogitMaps:
        return LogitMaps(Scaled(self.tau), Scaled(self.tau))


def learned(build):
    table = build(6)
    for x in table.buffers():
        x.fill_(1)
    return table


TABLES = {
    "individual": lambda n: Individual(n),
    "warm-up": lambda n: WarmUp(Individual(n)),
    "foreign": lambda n: Foreign(num_samples=n),
    "foreign-warm-up": lambda n: WarmUp(Foreign(num_samples=n)),
}


@pytest.mark.parametrize("build", TABLES.values(), ids=TABLES)
def test_a_table_takes_the_length_of_the_data_and_never_forgets(build):
    fresh = build(1)
    training.size_table(fresh, 6)
    assert fresh.num_samples == 6
    trained = learned(build)
    training.size_table(trained, 6)
    assert trained.has_learned
    with pytest.raises(ValueError, match="temperatures of 6 images, but this run trains on 7: resume with the data"):
        training.size_table(trained, 7)


@pytest.mark.parametrize("length", [1, 4, 6])
@pytest.mark.parametrize("build", TABLES.values(), ids=TABLES)
def test_a_checkpoint_of_any_length_is_loaded_where_the_data_are_unknown(build, length):
    host = torch.nn.ModuleDict({"criterion": build(length)})
    state = {f"criterion.{name}": value for name, value in learned(build).state_dict().items()}
    training.make_room(host["criterion"], state, "criterion.", known=None)
    host.load_state_dict(state)
    assert host["criterion"].num_samples == 6
    with pytest.raises(ValueError, match="temperatures of 6 images, but this run trains on 4"):
        training.make_room(build(4), state, "criterion.", known=4)
    training.make_room(build(6), state, "criterion.", known=6)


def test_without_a_table_nothing_is_sized():
    for plain in (Constant(), WarmUp(Constant())):
        training.size_table(plain, 6)
        training.make_room(plain, {"x.tau": torch.ones(6)}, "x.", known=4)
        assert list(plain.buffers()) == []


def test_a_checkpoint_of_a_method_without_a_table_leaves_the_table_alone():
    table = Individual(3)
    training.make_room(table, {}, "x.", known=3)
    assert table.num_samples == 3


# Recipes of it


def test_a_recipe_knows_its_table_by_the_name_of_the_parameter():
    foreign = recipes.Recipe("foreign", "Foreign", Foreign, "sogclr", "A paper, 2030", "https://arxiv.org/abs/2030.1")
    assert foreign.keeps_table
    assert foreign.choices == {"tau": 0.1}
    assert foreign.table_length({"tau": 0.2}) is foreign.table_length({recipes.TABLE: None}) is None
    assert foreign.table_length({recipes.TABLE: 7}) == 7
    assert foreign.sized({"tau": 0.2}) == {"tau": 0.2, "num_samples": 1}
    assert foreign.sized({"num_samples": None}, 5) == {"num_samples": 5}
    assert foreign.sized({"num_samples": 7}, 5) == {"num_samples": 7}
    plain = recipes.recipe("dystress_dclw")
    assert not plain.keeps_table
    assert plain.choices == plain.parameters
    assert plain.table_length({"tau_min": 0.1}) is None
    assert plain.sized({"tau_min": 0.1}, 5) == {"tau_min": 0.1}


def test_names_are_checked_against_temperature_and_objective():
    recipes.recipe("dystress_dclw").check_names(["sigma", "tau_min"])
    with pytest.raises(ValueError, match=r"Unknown parameter of method 'dystress_dclw' 'sigm'\. Did you mean 'sigma'"):
        recipes.recipe("dystress_dclw").check_names(["sigm"])


# A momentum encoder


def test_copies_begin_the_same_take_no_gradient_and_follow():
    pytest.importorskip("lightly")
    part = torch.nn.Linear(2, 2)
    (average,) = training.momentum_copies(part)
    start = part.weight.detach().clone()
    assert torch.equal(average.weight, start)
    assert part.weight.requires_grad
    assert not any(p.requires_grad for p in average.parameters())
    with torch.no_grad():
        part.weight += 1
    training.update_momentum([(part, average)], 0.75)
    torch.testing.assert_close(average.weight, start + 0.25)


def test_keys_come_back_in_the_order_of_their_images():
    pytest.importorskip("lightly")
    seen = []

    def encode(images):
        seen.append(images)
        return 2 * images

    images = torch.arange(32.0)[:, None].requires_grad_()
    keys = training.shuffled_keys(encode, images, distributed=False)
    assert torch.equal(keys, 2 * images)
    assert not torch.equal(seen[0], images)
    assert not keys.requires_grad
