import copy
import csv
import importlib
import pickle
import warnings
from contextlib import contextmanager

import pytest
import torch
from grid import trained_on
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dystress_plugin import ContrastiveLoss, temperature
from dystress_plugin.diagnostics import BINS, COLUMNS, Recorder, Summary, callback, callbacks, some_pairs, summaries

HOSTS = ("lightning.pytorch", "pytorch_lightning")
DIM, BATCH = 6, 8


def make_loss(name):
    settings = {"num_samples": 40} if name == "isogclr" else {}
    return ContrastiveLoss(name, queue_size=(20, DIM) if name.endswith("_moco") else None, **settings)


def table(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def batch(seed=0, images=BATCH):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(images, DIM, generator=generator)
    return [base + 0.3 * torch.randn(images, DIM, generator=generator) for _ in range(2)]


NAMES = ("dystress", "macl", "ts", "isogclr", "tempfree_dclw", "dystress_moco", "macl_moco")
CONTEXT = {"index": torch.arange(BATCH) + 3, "epoch": 5.0}


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_shows_the_pairs_as_the_loss_has_them(name):
    loss = make_loss(name)
    loss(*trained_on(batch(1)), **CONTEXT)
    expected = loss.pairs(*batch(2), **CONTEXT)
    found = summaries(loss, *batch(2), **CONTEXT)
    assert [(s.pairs, s.quantity) for s in found] == [
        (pairs, quantity) for pairs in ("positive", "negative") for quantity in ("similarity", "temperature")
    ]
    for summary, values in zip(found, expected, strict=True):
        assert torch.equal(summary.values, values)
        assert summary.statistics == {how: float(getattr(values.double(), how)()) for how in ("mean", "min", "max")}
        assert sum(summary.counts) == len(values)
        assert len(summary.counts) == BINS
        assert len(summary.edges) == BINS + 1
        for low, high, count in zip(summary.edges, summary.edges[1:], summary.counts, strict=False):
            # A value at an edge may round to either side.
            assert ((values > low + 1e-6) & (values < high - 1e-6)).sum() <= count
            assert count <= ((values > low - 1e-6) & (values < high + 1e-6)).sum()


def test_only_the_first_images_and_some_keys_are_sampled():
    loss = ContrastiveLoss("simclr", queue_size=(5000, DIM))
    found = summaries(loss, *batch(images=9), max_images=3)
    assert [len(summary.values) for summary in found] == [3, 3, 3000, 3000]
    every_fifth = loss.pairs(*(view[:3] for view in batch(images=9))).negative_cosine.view(3, 5000)[:, ::5]
    assert torch.equal(found[2].values, every_fifth.flatten())


@pytest.mark.parametrize("max_keys", [1, 7, 19, 20, 21, None])
def test_pairs_with_some_keys_are_those_with_a_queue_of_them(max_keys):
    loss = make_loss("macl_moco")
    loss(*trained_on(batch(1)))
    state, seed = copy.deepcopy(loss.state_dict()), torch.get_rng_state()
    found = loss.pairs(*batch(2), max_keys=max_keys)
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(value, state[key]) for key, value in loss.state_dict().items())
    kept = range(0, 20, -(-20 // (max_keys or 20)))
    assert len(kept) <= (max_keys or 20)
    every = loss.pairs(*batch(2))
    for some, whole in zip(found, every, strict=True):
        expected = whole if len(whole) == BATCH else whole.view(BATCH, 20)[:, list(kept)].flatten()
        assert torch.allclose(some, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [0, -3, 2.0, True])
def test_a_number_of_keys_that_is_none_is_named(bad):
    with pytest.raises(ValueError, match=f"max_keys={bad} must be an int of at least 1"):
        some_pairs(make_loss("simclr_moco"), *batch(), max_keys=bad)


def test_values_that_are_not_finite_are_left_out():
    loss = ContrastiveLoss("simclr")
    seen = loss.pairs(*batch())
    broken = seen._replace(
        negative_cosine=seen.negative_cosine.clone(), positive_cosine=seen.positive_cosine * torch.nan
    )
    broken.negative_cosine[:5] = torch.inf
    loss.pairs = lambda *views, **context: broken
    found = summaries(loss, *batch())
    assert [(s.pairs, s.quantity) for s in found] == [
        ("positive", "temperature"),
        ("negative", "similarity"),
        ("negative", "temperature"),
    ]
    assert len(found[1].values) == len(seen.negative_cosine) - 5


@pytest.mark.parametrize("name", NAMES)
def test_recording_changes_nothing(name, tmp_path):
    plain = make_loss(name)
    watched = copy.deepcopy(plain)
    recorder = Recorder(watched, tmp_path / "x.csv", every_n_steps=1)
    state = torch.get_rng_state()
    with recorder:
        for seed in range(3):
            views = [[view.clone().requires_grad_() for view in batch(seed)] for _ in range(2)]
            values = [loss(*view, **CONTEXT) for loss, view in zip((plain, watched), views, strict=True)]
            assert torch.equal(*values)
            for value in values:
                value.backward()
            assert all(torch.equal(a.grad, b.grad) for a, b in zip(*views, strict=True) if a.grad is not None)
            recorder.step()
    assert torch.equal(torch.get_rng_state(), state)
    assert plain.training == watched.training
    assert plain.state_dict().keys() == watched.state_dict().keys()
    assert all(torch.equal(value, watched.state_dict()[key]) for key, value in plain.state_dict().items())
    assert not watched._forward_pre_hooks


def test_a_loop_of_ones_own_gets_its_rows_and_resumes(tmp_path):
    path = tmp_path / "sub" / "x.csv"
    loss = make_loss("dystress_moco")

    def loop(start, stop):
        with Recorder(loss, path, every_n_steps=2, first_step=start) as recorder:
            for step in range(start, stop):
                expected[step] = loss.pairs(*batch(step))
                assert bool(loss._forward_pre_hooks) == (step % 2 == 0)
                loss(*trained_on(batch(step)))
                loss(*trained_on(batch(step + 100)))  # a second call in a step is not sampled
                recorder.step(epoch=step // 3)

    expected = {}
    loop(0, 5)
    with path.open("a") as file:
        file.write("4,0,,posi")  # the power went
    loop(4, 8)
    rows = table(path)
    assert tuple(rows[0]) == COLUMNS
    assert [(row["step"], row["epoch"]) for row in rows[::4]] == [("0", "0"), ("2", "0"), ("4", "1"), ("6", "2")]
    assert len(rows) == 16
    for number, row in enumerate(rows):
        values = expected[int(row["step"])][number % 4]
        assert int(row["count"]) == len(values) == sum(int(row[f"bin_{b}"]) for b in range(BINS))
        for how in ("mean", "min", "max"):
            assert float(row[how]) == pytest.approx(float(getattr(values, how)()), rel=1e-6, abs=1e-7)
    with Recorder(loss, path):  # anew
        pass
    assert table(path) == []


@pytest.mark.parametrize(("name", "cell"), [("", ""), ("criteria.0", "criteria.0"), ('a,"b"', '"a,""b"""')])
def test_the_bytes_of_the_table(name, cell, tmp_path, monkeypatch):
    values = torch.tensor([-1.0, 0.25, 0.25, 1 / 3, 1.0])
    found = [
        Summary(name, "negative", "similarity", values, -1.0, 1.0),
        Summary(name, "x", "y", values + 1.5, 0.0, 2.5),
    ]
    counts = [["0"] * BINS for _ in found]
    counts[0][0], counts[0][25], counts[0][26], counts[0][39] = "1", "2", "1", "1"
    counts[1][8], counts[1][28], counts[1][29], counts[1][39] = "1", "2", "1", "1"
    heading = ",".join(COLUMNS)
    first = f"6,2,{cell},negative,similarity,5,0.16666667,-1,1,-1,1,{','.join(counts[0])}"
    second = f"6,2,{cell},x,y,5,1.6666667,0.5,2.5,0,2.5,{','.join(counts[1])}"
    module = importlib.import_module("dystress_plugin.diagnostics.recorder")
    monkeypatch.setattr(module, "summaries", lambda *views, **context: found)
    path, loss = tmp_path / "x.csv", make_loss("simclr")
    for start, stop in ((0, 7), (7, 8)):  # the second keeps the rows as they are
        with Recorder(loss, path, every_n_steps=6, first_step=start) as recorder:
            for step in range(start, stop):
                loss(*batch(step))
                recorder.step(epoch=step // 3)
        expected = [heading, *(line.replace("6,2", "0,0", 1) for line in (first, second)), first, second]
        assert path.read_bytes() == "".join(f"{line}\n" for line in expected).encode()


def test_a_batch_with_classes_shows_the_pairs_of_its_images(tmp_path):
    tables = []
    for name, labels in (("without", None), ("with", torch.arange(BATCH) % 2)):
        loss = make_loss("dystress")
        with Recorder(loss, tmp_path / f"{name}.csv") as recorder:
            loss(*batch(), labels=labels)
            recorder.step()
        tables.append(table(tmp_path / f"{name}.csv"))
    assert tables[0] == tables[1] != []


def test_an_exception_leaves_no_hook(tmp_path):
    loss = make_loss("simclr")
    with pytest.raises(ValueError, match="View 1 has shape"), Recorder(loss, tmp_path / "x.csv"):
        loss(batch()[0], batch(images=2)[0])
    assert not loss._forward_pre_hooks


def test_a_loop_of_ones_own_can_write_to_tensorboard(tmp_path):
    tensorboard = importlib.import_module("torch.utils.tensorboard")
    loss = make_loss("dystress")
    path = tmp_path / "x.csv"
    with tensorboard.SummaryWriter(tmp_path) as writer, Recorder(loss, path, writer=writer) as recorder:
        loss(*batch())
        recorder.step()
    check_events(tmp_path, "diagnostics/")


@pytest.mark.parametrize("setting", [{"every_n_steps": 0}, {"every_n_steps": 2.5}, {"max_images": True}])
def test_bad_numbers_are_named(setting, tmp_path):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name}={value!r} must be an int"):
        Recorder(make_loss("simclr"), tmp_path / "x.csv", **setting)
    with pytest.raises(ValueError, match=f"{name}={value!r} must be an int"):
        callback(**setting)


def test_a_module_without_loss_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="Linear has no ContrastiveLoss"):
        Recorder(nn.Linear(2, 2), tmp_path / "x.csv")
    assert not list(tmp_path.iterdir())


class Rows(Dataset):
    def __len__(self):
        return 3 * BATCH

    def __getitem__(self, i):
        return batch(i, 1)[0][0], batch(i, 1)[1][0], i


def user_module(pl, name="dystress_moco", losses=1):
    class Users(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(DIM, DIM)
            self.criteria = nn.ModuleList([make_loss(name) for _ in range(losses)])
            self.expected = {}

        def training_step(self, rows, batch_idx):
            z = self.net(rows[0]), self.net(rows[1])
            context = {"index": rows[2], "epoch": float(self.current_epoch)}
            self.expected[self.global_step] = self.criteria[0].pairs(*z, **context)
            return sum(criterion(*z, **context) for criterion in self.criteria)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    torch.manual_seed(0)
    return Users()


@contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fit(pl, module, root, callbacks=(), ckpt=None, **options):
    options = {"max_epochs": 3, "logger": False} | options
    with quiet():
        trainer = pl.Trainer(
            default_root_dir=root,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
            **options,
        )
        trainer.fit(module, DataLoader(Rows(), BATCH), ckpt_path=ckpt)
    return trainer


@pytest.fixture(params=HOSTS)
def pl(request):
    return importlib.import_module(request.param)


def test_any_lightning_module_is_sampled(pl, tmp_path):
    module = user_module(pl)
    fit(pl, module, tmp_path, [callback(tmp_path / "x.csv", every_n_steps=2)])
    rows = table(tmp_path / "x.csv")
    assert [row["step"] for row in rows[::4]] == ["0", "2", "4", "6", "8"]
    assert [row["epoch"] for row in rows[::4]] == ["0", "0", "1", "2", "2"]
    assert {row["loss_name"] for row in rows} == {"criteria.0"}
    for number, row in enumerate(rows):
        values = module.expected[int(row["step"])][number % 4]
        assert int(row["count"]) == len(values)
        assert float(row["mean"]) == pytest.approx(float(values.mean()), rel=1e-6, abs=1e-7)
    assert not module.criteria[0]._forward_pre_hooks


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("stop", [2, 3])
def test_resuming_neither_loses_nor_doubles_rows(explicit, stop, tmp_path):
    pl = importlib.import_module("pytorch_lightning")

    def run(root, steps, ckpt=None):
        # As Lightning's loggers do, the second start takes a folder of its own.
        saver = pl.callbacks.ModelCheckpoint(root / f"{steps}", "last", save_top_k=1, every_n_train_steps=stop)
        mine = callback(root / "x.csv" if explicit else None, every_n_steps=1)
        fit(pl, user_module(pl), root, [mine, saver], ckpt, max_steps=steps, max_epochs=-1)
        return root / "x.csv" if explicit else root / f"{steps}" / "diagnostics.csv"

    whole = run(tmp_path / "whole", 7)
    # A step more than its last checkpoint knows of.
    run(tmp_path / "cut", stop + 1)
    resumed = run(tmp_path / "cut", 7, tmp_path / "cut" / f"{stop + 1}" / "last.ckpt")
    assert len(table(whole)) == 28
    # Within an epoch Lightning starts a plain DataLoader from its beginning, so the values are others.
    columns = COLUMNS if stop == 3 else COLUMNS[:6]
    assert [[row[c] for c in columns] for row in table(resumed)] == [[row[c] for c in columns] for row in table(whole)]


def test_the_weights_are_those_of_a_training_without(pl, tmp_path):
    plain, watched = user_module(pl, "isogclr"), user_module(pl, "isogclr")
    fit(pl, plain, tmp_path)
    fit(pl, watched, tmp_path, [callback(every_n_steps=1)])
    assert all(torch.equal(value, watched.state_dict()[key]) for key, value in plain.state_dict().items())


def test_accumulated_batches_are_one_step(tmp_path):
    pl = importlib.import_module("pytorch_lightning")
    fit(pl, user_module(pl), tmp_path, [callback(tmp_path / "x.csv", every_n_steps=1)], accumulate_grad_batches=3)
    assert [row["step"] for row in table(tmp_path / "x.csv")[::4]] == ["0", "1", "2"]


def check_events(folder, prefix):
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    quantities = [f"{pairs}_{what}" for pairs in ("positive", "negative") for what in ("similarity", "temperature")]
    assert sorted(tags["histograms"]) == sorted(prefix + quantity for quantity in quantities)
    scalars = {prefix + f"{quantity}_{how}" for quantity in quantities for how in ("mean", "min", "max")}
    assert scalars <= set(tags["scalars"])
    histogram = events.Histograms(prefix + "negative_similarity")[0].histogram_value
    assert histogram.num == 2 * BATCH * (2 * BATCH - 2)
    for limit in histogram.bucket_limit:  # without the empty bins at both ends
        assert (limit + 1) * BINS / 2 == pytest.approx(round((limit + 1) * BINS / 2), abs=1e-6)


def test_tensorboard_gets_scalars_and_histograms(pl, tmp_path):
    logger = pl.loggers.TensorBoardLogger(tmp_path, name="", version="board")
    other = pl.loggers.CSVLogger(tmp_path, name="", version="csv")
    fit(pl, user_module(pl, "dystress"), tmp_path, [callback()], logger=[logger, other], max_epochs=1)
    check_events(tmp_path / "board", "diagnostics/criteria.0/")
    assert table(tmp_path / "board" / "checkpoints" / "diagnostics.csv")
    assert "diagnostics/criteria.0/negative_temperature_max" in table(tmp_path / "csv" / "metrics.csv")[0]


def test_wandb_gets_scalars_and_histograms(pl, tmp_path, monkeypatch):
    wandb = importlib.import_module("wandb")
    logger = pl.loggers.WandbLogger("x", tmp_path, offline=True, project="x")
    logged = []
    log = type(logger.experiment).log
    monkeypatch.setattr(
        type(logger.experiment), "log", lambda run, values, *rest, **more: logged.append(values) or log(run, values)
    )
    fit(pl, user_module(pl, losses=2), tmp_path, [callback()], logger=logger, max_epochs=1)
    wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    (values,) = (values for values in logged if "diagnostics/criteria.0/negative_similarity" in values)
    histogram = values["diagnostics/criteria.1/negative_similarity"]
    assert isinstance(histogram, wandb.Histogram)
    assert sum(histogram.histogram) == BATCH * 20
    assert values["trainer/global_step"] == 0
    assert isinstance(values["diagnostics/criteria.1/negative_similarity_mean"], float)


def test_it_stands_beside_the_checkpoints_or_in_the_root(tmp_path):
    pl = importlib.import_module("pytorch_lightning")
    fit(pl, user_module(pl), tmp_path, [callback()], enable_checkpointing=False, max_epochs=1)
    assert len(table(tmp_path / "diagnostics.csv")) == 4


def test_solo_learns_checkpointer_is_known(tmp_path):
    pl = importlib.import_module("pytorch_lightning")

    class Checkpointer(pl.Callback):
        def on_train_start(self, trainer, module):
            self.path = tmp_path / "trained_models"

    # As with configure_callbacks: after those of the Trainer.
    options = {"enable_checkpointing": False, "max_epochs": 1}
    fit(pl, user_module(pl), tmp_path, [Checkpointer(), callback()], **options)
    assert len(table(tmp_path / "trained_models" / "diagnostics.csv")) == 4


def test_other_ranks_do_nothing(tmp_path):
    class Trainer:
        is_global_zero, global_step, loggers = False, 0, ()

    other = callback(tmp_path / "x.csv")
    other.on_train_start(Trainer, nn.Linear(1, 1))
    other.on_train_batch_start(Trainer, None, None, 0)
    other.on_train_batch_end(Trainer, None, None, None, 0)
    assert other.state_dict() == {}
    assert not list(tmp_path.iterdir())


def test_it_is_a_callback_of_every_lightning_that_is_loaded(pl):
    assert isinstance(callback(), pl.Callback)


def test_it_can_be_pickled_for_processes_that_are_spawned(tmp_path):
    again = pickle.loads(pickle.dumps(callback(tmp_path, every_n_steps=7, max_images=9)))
    assert (again.path, again.every_n_steps, again.max_images) == (tmp_path, 7, 9)


def test_configure_callbacks_gets_it_on_request():
    assert callbacks(None) == callbacks(0) == []
    (made,) = callbacks(3)
    assert (made.every_n_steps, made.path) == (3, None)


def test_a_wrapped_criterion_is_found(tmp_path):
    criterion = nn.Module()
    criterion.loss = ContrastiveLoss(temperature.Constant(0.2))
    with Recorder(criterion, tmp_path / "x.csv") as recorder:
        criterion.loss(*batch())
        recorder.step()
    assert {row["loss_name"] for row in table(tmp_path / "x.csv")} == {"loss"}
    assert [float(row["max"]) for row in table(tmp_path / "x.csv")[1::2]] == [pytest.approx(0.2)] * 2


@pytest.mark.parametrize("content", ["a,b\nnow,1\n", "a,b\n\n", "a,b\n\xff,1\n"])
def test_a_damaged_table_is_named_before_the_training_goes_on(content, tmp_path):
    path = tmp_path / "diagnostics.csv"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"diagnostics\.csv is damaged: .*\. Delete it") as caught:
        Recorder(make_loss("simclr"), path, first_step=4)
    assert str(path) in str(caught.value)
    assert path.read_text(encoding="latin-1") == content
