import pickle

import pytest
import torch
from lightly.data import LightlyDataset
from lightly.transforms import SimCLRTransform
from PIL import Image
from pytorch_lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision.transforms import ToTensor

from dystress_plugin.frameworks.lightly import modules
from dystress_plugin.frameworks.lightly.base import sample_numbers
from dystress_plugin.recipes import METHODS

IMAGES = 12  # in `folder`, in two classes


def tiny(method, **settings):
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1))
    model = modules.BENCHMARK_METHODS[method]["model"]
    return model(4, num_classes=2, knn_k=200, knn_t=0.1, backbone=backbone, feature_dim=8, **settings)


def train_loader(folder, subset=None):
    dataset = LightlyDataset(folder, transform=SimCLRTransform(input_size=16, gaussian_blur=0.0))
    dataset = dataset if subset is None else Subset(dataset, subset)
    return DataLoader(dataset, batch_size=4, shuffle=True, drop_last=True)


def four_images(path):
    smaller = path / "smaller"
    smaller.mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16)).save(smaller / f"{number}.png")
    return str(smaller)


def fit(model, folder, path, *, epochs=1, loader=None, ckpt_path=None):
    trainer = Trainer(
        max_epochs=epochs,
        limit_train_batches=2,
        accelerator="cpu",
        logger=False,
        default_root_dir=path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    plain = LightlyDataset(folder, transform=ToTensor())
    val_loaders = [DataLoader(plain, batch_size=5), DataLoader(plain, batch_size=5)]
    loader = train_loader(folder) if loader is None else loader
    trainer.fit(model, loader, val_loaders, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("method", ["dystress", "macl_moco"])
def test_diagnostics_are_written_where_asked_for(method, folder, tmp_path):
    fit(tiny(method, diagnostics_every_n_steps=1), folder, tmp_path)
    steps = [line.split(",")[0] for line in (tmp_path / "diagnostics.csv").read_text().splitlines()[1:]]
    assert steps == ["0"] * 4 + ["1"] * 4  # cosines and temperatures, of positives and negatives


@pytest.mark.filterwarnings("ignore:The temperature never comes down")
@pytest.mark.parametrize("method", modules.BENCHMARK_METHODS)
def test_every_method_trains_validates_and_resumes(method, folder, tmp_path):
    model = tiny(method)
    before = model.backbone[0].weight.detach().clone()
    trainer = fit(model, folder, tmp_path)
    assert not torch.equal(model.backbone[0].weight, before)
    logged = trainer.callback_metrics
    assert 0 <= logged["val_knn_top1"] <= 1
    assert 0 <= logged["val_online_cls_top1"] <= 1
    assert torch.isfinite(logged["train_loss"])
    assert logged["tau_positive_min"] <= logged["tau_positive_max"]
    assert torch.isfinite(logged["tau_negative_mean"])

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = type(model).load_from_checkpoint(tmp_path / "last.ckpt", backbone=tiny(method).backbone)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("method", ["dystress", "isogclr", "macl_moco"])
def test_a_last_batch_of_one_image_trains(method, folder, tmp_path):
    loader = DataLoader(LightlyDataset(folder, transform=SimCLRTransform(input_size=16)), batch_size=11)
    trainer = fit(tiny(method), folder, tmp_path, epochs=2, loader=loader)
    assert trainer.global_step == 4
    assert torch.isfinite(trainer.callback_metrics["train_loss"])


@pytest.mark.filterwarnings("ignore:Total length of")
@pytest.mark.parametrize("method", ["dystress", "isogclr", "macl_moco"])
def test_a_batch_larger_than_the_data_is_refused(method, folder, tmp_path):
    dataset = LightlyDataset(folder, transform=SimCLRTransform(input_size=16))
    with pytest.raises(ValueError, match=r"batch_size_per_device=13 makes no full batch of 12 .* at most 12\."):
        fit(tiny(method), folder, tmp_path, loader=DataLoader(dataset, batch_size=13, drop_last=True))


@pytest.mark.parametrize(("method", "rate"), [("clip", None), ("fastclip", 0.01), ("clip_moco", None)])
def test_a_learned_temperature_is_trained_in_a_group_of_its_own(method, rate, folder, tmp_path):
    model = tiny(method, temperature_lr=rate)
    before = model.criterion.temperature.log_tau.item()
    trainer = fit(model, folder, tmp_path)
    *others, own = trainer.optimizers[0].param_groups
    assert own["name"] == "temperature"
    assert {group["initial_lr"] for group in others} == {trainer.optimizers[0].defaults["lr"]}
    assert own["initial_lr"] == (rate or trainer.optimizers[0].defaults["lr"] / 10)
    assert own["params"] == [model.criterion.temperature.log_tau]
    assert own["weight_decay"] == 0.0
    assert model.criterion.temperature.log_tau.item() != before


@pytest.mark.parametrize("method", ["dystress", "macl_moco"])
def test_in_chunks_it_trains_alike_and_the_backbone_sees_no_more(method, folder, tmp_path):
    sizes, weights = [], []
    for chunk_size in (None, 3):
        torch.manual_seed(0)
        model = tiny(method, chunk_size=chunk_size)
        seen = []
        for backbone in (model.backbone, getattr(model, "key_backbone", model.backbone)):
            backbone[1] = nn.GroupNorm(2, 8)  # batch norm would see a chunk
            backbone.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(len(given[0])))
        fit(model, folder, tmp_path)
        sizes.append(max(seen))
        weights.append(model.state_dict())
    assert sizes == [{"dystress": 8, "macl_moco": 5}[method], 3]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


def test_chunks_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="chunk_size=0 must be an int of at least 1"):
        tiny("dystress", chunk_size=0)
    with pytest.raises(ValueError, match="chunk_size=1 leaves batch norm"):
        tiny("dystress_moco", chunk_size=1)
    with pytest.raises(ValueError, match=r"temperature_lr=0\.0 must be above 0"):
        tiny("clip", temperature_lr=0)


def test_every_method_of_the_table_is_there():
    assert modules.BENCHMARK_METHODS.keys() >= METHODS.keys()  # another test may have registered more, for a while


def test_classes_have_names_to_import_and_pickle():
    from dystress_plugin.frameworks.lightly.modules import MACL, DySTreSS, DySTreSSMoCo

    assert DySTreSS is modules.BENCHMARK_METHODS["dystress"]["model"]
    assert tiny("macl", alpha=0.2).criterion.temperature.alpha == 0.2
    assert isinstance(tiny("macl"), MACL)
    assert pickle.loads(pickle.dumps(MACL)) is MACL
    assert pickle.loads(pickle.dumps(DySTreSSMoCo)) is DySTreSSMoCo


def test_the_schedule_follows_the_epoch(folder, tmp_path):
    model = tiny("ts", tau_min=0.1, tau_max=0.9, period=4.0)
    trainer = fit(model, folder, tmp_path, epochs=3)
    assert trainer.callback_metrics["tau_positive_mean"].item() == pytest.approx(0.1)


def test_the_schedule_follows_the_step(folder, tmp_path):
    model = tiny("ts", tau_min=0.1, tau_max=0.9, period=1.0, per_step=True)
    trainer = fit(model, folder, tmp_path)  # two steps, the second at half an epoch
    assert trainer.callback_metrics["tau_positive_mean"].item() == pytest.approx(0.1)


@pytest.mark.parametrize("momentum", [1.0, 0.0])
def test_the_key_encoder_follows_at_its_momentum(momentum, folder, tmp_path):
    model = tiny("simclr_moco", momentum=momentum, queue_size=5)
    start = model.backbone[0].weight.detach().clone()
    assert torch.equal(model.projection_head.layers[0].weight, model.key_projection_head.layers[0].weight)
    fit(model, folder, tmp_path)
    assert not torch.equal(model.backbone[0].weight, start)
    assert torch.equal(model.key_backbone[0].weight, start) == (momentum == 1.0)
    assert all(parameter.grad is None for parameter in model.key_backbone.parameters())
    # eight keys have gone around a queue of five
    assert model.criterion.queue.position == 3
    with pytest.raises(ValueError, match=r"momentum=1\.5"):
        tiny("simclr_moco", momentum=1.5)


# The checkpoint knows lightly's schedule of the shorter training.
@pytest.mark.filterwarnings("ignore:Current step number:RuntimeWarning")
def test_queue_is_resumed(folder, tmp_path):
    loader = DataLoader(train_loader(folder).dataset, batch_size=4)
    torch.manual_seed(0)
    model = tiny("dystress_moco", queue_size=10)
    trainer = fit(model, folder, tmp_path, loader=loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    keys = model.criterion.queue.keys.clone()

    resumed = tiny("dystress_moco", queue_size=10)
    fit(resumed, folder, tmp_path, epochs=2, loader=loader, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.criterion.queue.position == 6
    assert torch.equal(resumed.criterion.queue.keys[6:8], keys[6:8])  # not yet overwritten
    assert not torch.equal(resumed.criterion.queue.keys[:6], keys[:6])


def test_isogclr_numbers_images_by_their_filenames(folder, tmp_path):
    model = tiny("isogclr")
    trainer = fit(model, folder, tmp_path, loader=train_loader(folder, subset=[1, 3, 4, 8]))
    temperature = model.criterion.temperature
    assert temperature.visited.nonzero().flatten().tolist() == [1, 3, 4, 8]
    assert temperature.num_samples == IMAGES

    # a plain state dict, as lightly's benchmark loads it; then on with the training
    fresh = tiny("isogclr")
    fresh.load_state_dict(model.state_dict())
    fit(fresh, folder, tmp_path)
    assert fresh.criterion.temperature.visited.sum() > 4

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="temperatures of 12 images, but this run trains on 4"):
        fit(model, four_images(tmp_path), tmp_path)


@pytest.mark.parametrize("method", ["warm_isogclr", "warm_isogclr_moco"])
def test_a_third_partys_table_is_sized_and_resumed(method, warm, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(modules.BENCHMARK_METHODS, method, modules.entry(warm[method]))
    own = {"queue_size": 6} if warm[method].queue else {}
    model = tiny(method, **own)
    assert (model.criterion.objective, model.criterion.temperature.num_samples) == ("sogclr", 1)
    trainer = fit(model, folder, tmp_path, epochs=2)  # the second after the warm-up
    assert model.criterion.temperature.num_samples == IMAGES
    assert model.criterion.temperature.has_learned

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    cls = type(model)
    assert pickle.loads(pickle.dumps(cls)) is cls
    loaded = cls.load_from_checkpoint(tmp_path / "last.ckpt", backbone=tiny(method, **own).backbone)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with pytest.raises(ValueError, match="temperatures of 12 images, but this run trains on 4"):
        fit(tiny(method, **own), four_images(tmp_path), tmp_path, ckpt_path=tmp_path / "last.ckpt")


def test_a_third_partys_warm_up_is_the_method_it_arrives_at(warm, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(modules.BENCHMARK_METHODS, "warm_macl", modules.entry(warm["warm_macl"]))
    model = tiny("warm_macl", epochs=1.0, alpha=0.2)
    assert model.criterion.objective == model.criterion.temperature.default_objective == "macl"
    fit(model, folder, tmp_path, epochs=2)
    model = tiny("warm_macl", epochs=3)
    model.trainer = Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.warns(UserWarning, match="warm-up never arrives at ModelAware"):
        model.on_fit_start()
    with pytest.raises(ValueError, match=r"Unknown parameter of method 'warm_macl' 'alpa'\. Did you mean 'alpha'"):
        tiny("warm_macl", alpa=0.2)


def test_isogclr_needs_filenames():
    with pytest.raises(ValueError, match="TensorDataset does not list filenames"):
        sample_numbers(TensorDataset(torch.zeros(3)))


def test_one_validation_loader_is_enough(folder, tmp_path):
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    plain = LightlyDataset(folder, transform=ToTensor())
    (metrics,) = trainer.validate(tiny("dystress"), DataLoader(plain, batch_size=5), verbose=False)
    assert "val_online_cls_top1" in metrics
    assert "val_knn_top1" not in metrics
