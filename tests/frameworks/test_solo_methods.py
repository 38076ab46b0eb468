"""Our classes within the real solo-learn, in this process."""

import dataclasses
import json
import pickle
import re
import sys
import types
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

from dystress_plugin.recipes import METHODS

pytestmark = pytest.mark.filterwarnings("ignore:The 'warn' function is deprecated:DeprecationWarning")  # solo-learn


@pytest.fixture(scope="module")
def solo(solo_home):
    """solo-learn with the plugin registered, and what it was like before."""
    sys.path.insert(0, solo_home)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports from timm and torch
        import solo.data.classification_dataloader
        import solo.methods
        import solo.utils.auto_resumer
        import solo.utils.knn

        methods, matched = dict(solo.methods.METHODS), list(solo.utils.auto_resumer.AutoResumer.SHOULD_MATCH)
        bases = solo.utils.knn.WeightedKNNClassifier.__bases__
        pipeline = solo.data.classification_dataloader.build_custom_pipeline

        from dystress_plugin.frameworks.solo.registration import register

        assert register()
        assert register()
    unchanged = (
        all(solo.methods.METHODS[name] is cls for name, cls in methods.items())
        and matched == solo.utils.auto_resumer.AutoResumer.SHOULD_MATCH
        and solo.utils.knn.WeightedKNNClassifier.__bases__ == bases
        and solo.data.classification_dataloader.build_custom_pipeline is pipeline
    )
    yield types.SimpleNamespace(METHODS=solo.methods.METHODS, own=methods, unchanged=unchanged, module=solo)
    sys.path.remove(solo_home)


def config(method, small_crops=1, **method_kwargs):
    from omegaconf import OmegaConf

    return OmegaConf.create(
        {
            "method": method,
            "max_epochs": 1,
            "backbone": {"name": "resnet18"},
            "method_kwargs": {"proj_hidden_dim": 8, "proj_output_dim": 4, **method_kwargs},
            "data": {
                "dataset": "cifar10",
                "num_classes": 10,
                "num_large_crops": 2,
                "num_small_crops": small_crops,
                "format": "image_folder",
            },
            "optimizer": {"name": "sgd", "batch_size": 4, "lr": 0.1, "weight_decay": 0.0, "classifier_lr": 0.1},
            "scheduler": {"name": "none", "warmup_epochs": 0},
        }
    )


class Images(torch.utils.data.Dataset):
    """Eight images as solo-learn's data sets hand them out: number, two large crops and small ones, class."""

    def __init__(self, small_crops):
        self.small_crops = small_crops

    def __len__(self):
        return 8

    def __getitem__(self, index):
        crops = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(index))
        return index, [crops[0], crops[1], *[crops[2, :, :4, :4]] * self.small_crops], index


def fit(model, batches=1, batch_size=4, **settings):
    from lightning.pytorch import Trainer

    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        limit_train_batches=batches,
        log_every_n_steps=1,
        **off,
        **{"max_epochs": 1, **settings},
    )
    loader = torch.utils.data.DataLoader(Images(model.num_small_crops), batch_size=batch_size, drop_last=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's about workers and the few batches
        trainer.fit(model, loader)
    return trainer


@pytest.mark.parametrize("method", ["dystress", "isogclr", "macl_moco"])
def test_a_batch_larger_than_the_data_is_refused(solo, method):
    model = solo.METHODS[method](config(method, small_crops=0))
    with pytest.raises(ValueError, match=r"optimizer.batch_size=9 makes no full batch of 8 .* at most 8\."):
        fit(model, batch_size=9)
    assert fit(model, batch_size=8).global_step == 1
    assert fit(model, batches=0, batch_size=9).global_step == 0  # as asked for


@pytest.mark.parametrize(
    ("enabled", "interrupted", "said"),
    [
        (True, 1, r"Interrupted in epoch 1: the same command goes on from {path}\."),
        (False, 1, r"Interrupted in epoch 1: add '\+resume_from_checkpoint=\"{path}\"' to the command to go on\."),
        (True, 0, "Interrupted in epoch 0: there is no checkpoint yet, and the same command starts anew"),
    ],
)
def test_ctrl_c_says_how_to_go_on(solo, enabled, interrupted, said, tmp_path, capsys):
    from lightning.pytorch import Callback
    from solo.utils.checkpointer import Checkpointer

    class CtrlC(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.current_epoch == interrupted:
                raise KeyboardInterrupt

    cfg = config("dystress")
    cfg.auto_resume = {"enabled": enabled}
    cfg.name = "run"
    with pytest.raises(SystemExit):
        fit(solo.METHODS["dystress"](cfg), max_epochs=3, callbacks=[CtrlC(), Checkpointer(cfg, tmp_path)])
    path = rf"{re.escape(str(tmp_path))}/offline-\w+/run-offline-\w+-ep=0\.ckpt"
    assert re.search(said.format(path=path), capsys.readouterr().err)


def test_registration_leaves_solo_learn_as_it_is(solo):
    assert solo.unchanged
    assert set(solo.METHODS) == set(solo.own) | set(METHODS)
    assert solo.METHODS["simclr"].__module__ == "solo.methods.simclr"


def test_classes_can_be_pickled_for_processes_that_are_spawned(solo):
    classes = [solo.METHODS[name] for name in METHODS]
    assert [pickle.loads(pickle.dumps(cls)) for cls in classes] == classes


def test_diagnostics_are_written_where_asked_for(solo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(solo.METHODS["dystress"](config("dystress", diagnostics_every_n_steps=1)))
    assert len((tmp_path / "diagnostics.csv").read_text().splitlines()) == 1 + 4
    assert len(solo.METHODS["dystress"](config("dystress")).configure_callbacks()) == 1


@pytest.mark.parametrize("crops", [2, 4])
def test_constant_temperature_is_the_loss_of_its_simclr(solo, crops):
    from solo.losses.simclr import simclr_loss_func

    import dystress_plugin as dp

    views = torch.randn(crops, 6, 5)
    theirs = simclr_loss_func(views.flatten(0, 1), indexes=torch.arange(6).repeat(crops), temperature=0.2)
    ours = dp.ContrastiveLoss(dp.temperature.Constant(0.2))(*views)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("method", "rate"), [("clip", None), ("fastclip", 0.02), ("clip_moco", None)])
def test_a_learned_temperature_is_trained_in_a_group_of_its_own(solo, method, rate):
    model = solo.METHODS[method](config(method, small_crops=0, temperature_lr=rate))
    before = model.contrastive.temperature.log_tau.item()
    trainer = fit(model)
    (own,) = [group for group in trainer.optimizers[0].param_groups if group.get("name") == "temperature"]
    assert own["params"] == [model.contrastive.temperature.log_tau]
    assert own["lr"] == (rate or 0.1 / 10)  # of optimizer.lr
    assert own["weight_decay"] == 0.0
    assert model.contrastive.temperature.log_tau.item() != before


@pytest.mark.parametrize("method", ["dystress", "tempfree", "isogclr"])
def test_multi_crop_trains(solo, method):
    logged = fit(solo.METHODS[method](config(method))).callback_metrics
    assert {"train_nce_loss", "tau_positive_mean", "alignment"} <= set(logged)
    assert torch.isfinite(logged["train_nce_loss"])


@pytest.mark.parametrize(("method", "small_crops"), [("dystress", 1), ("macl_moco", 0)])
def test_in_chunks_it_trains_alike_and_the_backbone_sees_no_more(solo, method, small_crops):
    sizes, weights = [], []
    for chunk_size in (None, 3):
        torch.manual_seed(0)
        settings = {"queue_size": 8} if small_crops == 0 else {}
        model = solo.METHODS[method](config(method, small_crops, chunk_size=chunk_size, **settings))
        seen = []
        for name in {"backbone", "momentum_backbone"} & set(dict(model.named_children())):
            layers = torch.nn.Conv2d(3, 512, 4, 4), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
            setattr(model, name, torch.nn.Sequential(*layers))  # without batch norm, which would see a chunk
            getattr(model, name).register_forward_pre_hook(lambda _, given, seen=seen: seen.append(len(given[0])))
        fit(model, batches=2)
        sizes.append(max(seen))
        weights.append(model.state_dict())
    assert sizes == [4, 2]  # of equal size
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


def test_chunks_that_cannot_be_are_refused(solo):
    with pytest.raises(ValueError, match=r"method_kwargs\.chunk_size=0 must be an int of at least 1"):
        solo.METHODS["dystress"](config("dystress", chunk_size=0))
    with pytest.raises(ValueError, match=r"method_kwargs\.chunk_size=1 leaves batch norm"):
        solo.METHODS["dystress"](config("dystress", chunk_size=1))
    with pytest.raises(ValueError, match=r"method_kwargs\.temperature_lr=-1\.0 must be above 0"):
        solo.METHODS["clip"](config("clip", temperature_lr=-1))


def queues(model):
    return torch.stack([model.swapped.queue.keys, model.contrastive.queue.keys])


def test_constant_temperature_with_a_queue_trains_as_its_mocov2plus(solo):
    settings = {"small_crops": 0, "temperature": 0.2, "queue_size": 8}
    configs = [config(method, **settings) for method in ("simclr_moco", "mocov2plus")]
    torch.manual_seed(0)  # where a ReLU is at its corner, rounding alone moves the weights
    for cfg in configs:
        cfg.momentum = {"base_tau": 0.5}
    ours, theirs = (solo.METHODS[cfg.method](cfg) for cfg in configs)
    missing, extra = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert extra == ["queue", "queue_ptr"]
    assert {name.split(".")[1] for name in missing} == {"queue"}
    with torch.no_grad():
        theirs.queue.copy_(queues(ours).mT)

    logged = [fit(model, batches=2).callback_metrics["train_nce_loss"] for model in (ours, theirs)]
    torch.testing.assert_close(*logged, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(queues(ours), theirs.queue.mT, rtol=1e-4, atol=1e-5)
    trained = ours.state_dict()
    for name, value in theirs.state_dict().items():
        if not name.startswith("queue"):
            torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: name + m)


def test_queue_of_any_size_is_in_the_checkpoint(solo, tmp_path):
    cls, settings = solo.METHODS["dystress_moco"], {"small_crops": 0, "queue_size": 5}
    model = cls(config("dystress_moco", **settings))
    assert model.cfg.momentum == {"base_tau": 0.99, "final_tau": 1.0, "classifier": False}
    assert not hasattr(model, "queue")
    trainer = fit(model, batches=2)
    assert model.contrastive.queue.position == model.swapped.queue.position == 3  # 8 keys around 5 places
    assert model.contrastive.temperature is model.swapped.temperature
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = cls.load_from_checkpoint(tmp_path / "x.ckpt", cfg=config("dystress_moco", **settings))
    assert torch.equal(queues(again), queues(model))
    assert again.swapped.queue.position == 3


def test_queue_settings_that_cannot_be(solo):
    with pytest.raises(ValueError, match="no use for the 1 small ones"):
        solo.METHODS["macl_moco"](config("macl_moco"))
    with pytest.raises(ValueError, match="queue_size=0 must be an int of at least 1"):
        solo.METHODS["macl_moco"](config("macl_moco", queue_size=0))


@pytest.mark.parametrize(
    ("method", "refused"),
    [
        ("dystress", {"mae": 3}),
        ("dystress_moco", {"mae": 3, "byol": 1, "simclr": 1, "supcon": 1, "swav": 1, "wmse": 1}),
    ],
)
def test_solo_learns_own_templates_take_our_methods(solo, method, refused, solo_home, tmp_path):
    """All of them but those without a projector, and those with small crops for a queue."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf
    from solo.args.pretrain import parse_cfg

    (tmp_path / "class").mkdir()
    cls, found = solo.METHODS[method], Counter()
    templates = [
        path
        for path in Path(solo_home, "scripts", "pretrain").rglob("*.yaml")
        if path.parent.name not in ("augmentations", "wandb")
    ]
    for path in templates:
        folder = [f"data.train_path={tmp_path}"] if path.parent.name == "custom" else []
        with initialize_config_dir(str(path.parent), version_base="1.2"):
            cfg = compose(path.stem, [f"method={method}", *folder])
        OmegaConf.set_struct(cfg, False)
        cfg = parse_cfg(cfg)
        try:
            completed = cls.add_and_assert_specific_cfg(cfg).method_kwargs
        except ValueError as error:
            reason = str(error)
            found[path.stem] += ("needs method_kwargs" if path.stem == "mae" else "no use for the 6 small") in reason
        else:
            assert completed.tau_max == 0.2
            assert "lamb" not in completed
    assert len(templates) >= 46
    assert found == refused


def test_keys_of_solo_learns_methods_are_ignored_and_others_are_not(solo, capsys):
    from dystress_plugin.frameworks.solo.methods import keys_of_others

    assert {"lamb", "sk_iters", "base_tau_momentum", "queue_size"} <= keys_of_others().keys()
    kept = solo.METHODS["macl"](config("macl", lamb=0.1, alpha=0.3)).cfg.method_kwargs
    assert kept.alpha == 0.3
    assert capsys.readouterr().err.splitlines() == [
        "method_kwargs.lamb=0.1 is ignored: it is a setting of solo-learn's barlow_twins."
    ]
    with pytest.raises(ValueError, match="Unknown key in method_kwargs of method 'macl' 'lambda_'"):
        solo.METHODS["macl"](config("macl", lambda_=0.1))


def test_schedule_per_step(solo):
    cfg = config("ts", small_crops=0, period=1.0, per_step=True)
    logged = fit(solo.METHODS["ts"](cfg), batches=2).callback_metrics  # the second at half an epoch
    assert logged["tau_positive_max"].item() == pytest.approx(1.0)
    assert logged["tau_positive_min"].item() == pytest.approx(0.1)


def test_table_of_samples(solo, tmp_path):
    cls = solo.METHODS["isogclr"]
    model = cls(config("isogclr"))
    trainer = fit(model)
    assert model.contrastive.temperature.num_samples == 8
    assert "num_samples" in model.cfg.method_kwargs  # and empty, so that args.json fits the next run's settings
    assert model.cfg.method_kwargs.num_samples is None

    path = tmp_path / "x.ckpt"
    trainer.save_checkpoint(path)
    again = cls.load_from_checkpoint(path, strict=False, cfg=config("isogclr"))
    assert torch.equal(again.contrastive.temperature.tau, model.contrastive.temperature.tau)
    with pytest.raises(ValueError, match="temperatures of 8 images, but this run trains on 9"):
        cls.load_from_checkpoint(path, cfg=config("isogclr", num_samples=9))
    with pytest.raises(ValueError, match="num_samples=5, but there are 8 training images"):
        fit(cls(config("isogclr", num_samples=5)))


def third_party(recipe):
    from dystress_plugin.frameworks.solo import methods
    from dystress_plugin.training import method_class

    return method_class(recipe, methods.BASES[recipe.queue], methods.__name__, {"recipe": recipe})


@pytest.mark.parametrize(("method", "own"), [("warm_isogclr", {}), ("warm_isogclr_moco", {"queue_size": 6})])
def test_a_third_partys_table_is_sized_and_resumed(solo, warm, tmp_path, method, own):
    cls = third_party(warm[method])
    settings = {"small_crops": 0, "epochs": 0.01, **own}
    model = cls(config(method, **settings))
    assert (model.contrastive.objective, model.contrastive.temperature.num_samples) == ("sogclr", 1)
    model.contrastive.temperature.per_step = True  # so that the second step is after the warm-up
    trainer = fit(model, batches=2)
    assert model.contrastive.temperature.num_samples == 8
    assert model.contrastive.temperature.has_learned
    trainer.save_checkpoint(tmp_path / "x.ckpt")

    again = cls.load_from_checkpoint(tmp_path / "x.ckpt", cfg=config(method, **settings))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    kept = again.contrastive.temperature.temperature.tau
    fit(again)  # a table that has learned is not started anew
    assert again.contrastive.temperature.temperature.tau is kept
    with pytest.raises(ValueError, match="temperatures of 8 images, but this run trains on 9"):
        cls.load_from_checkpoint(tmp_path / "x.ckpt", cfg=config(method, **settings, num_samples=9))


def test_a_third_partys_warm_up_is_the_method_it_arrives_at(solo, warm):
    with pytest.warns(UserWarning, match="warm-up never arrives at ModelAware"):
        model = third_party(warm["warm_macl"])(config("warm_macl", epochs=2.0))
    assert model.contrastive.objective == model.contrastive.temperature.default_objective == "macl"


def test_settings_reach_the_temperature(solo):
    model = solo.METHODS["dystress"](config("dystress", tau_max=0.15, negative_range=[0.1, 0.12]))
    assert model.contrastive.temperature.tau_max == 0.15
    assert model.contrastive.gather_distributed
    assert solo.METHODS["macl"](config("macl", temperature=0.3)).contrastive.temperature.tau == 0.3
    with pytest.raises(ValueError, match=r"tau_maxx.*Did you mean 'tau_max'"):
        solo.METHODS["dystress"](config("dystress", tau_maxx=0.3))
    assert (
        solo.METHODS["ts_dclw"](config("ts_dclw", period=1, sigma=0.3)).contrastive.objective_settings["sigma"] == 0.3
    )
    with pytest.raises(ValueError, match=r"tau_min=0\.3 is above tau_max=0\.2"):
        solo.METHODS["dystress"](config("dystress", tau_min=0.3))


def test_runs_that_are_too_short_warn(solo):
    with pytest.warns(UserWarning, match="never comes down to tau_min"):
        solo.METHODS["ts"](config("ts"))
    short = config("dystress")
    short.scheduler = {"name": "warmup_cosine", "warmup_epochs": 3}
    with pytest.warns(UserWarning, match=r"ends within scheduler\.warmup_epochs=3"):
        solo.METHODS["dystress"](short)


@pytest.mark.parametrize(("dataset", "stem"), [("cifar10", 3), ("imagenet100", 7)])
def test_linear_evaluation_builds_the_backbone_of_the_checkpoint(solo, tmp_path, dataset, stem):
    from omegaconf import OmegaConf

    trained = config("macl")
    trained.data.dataset = dataset
    trained.augmentations = [{"crop_size": 32}]
    (tmp_path / "args.json").write_text(json.dumps(OmegaConf.to_container(trained)))
    cfg = OmegaConf.create(
        {
            "pretrained_feature_extractor": str(tmp_path / "x.ckpt"),
            "backbone": {"name": "resnet50"},
            "data": {"dataset": "custom", "train_path": "a", "val_path": "b"},
        }
    )
    dataloaders = solo.module.data.classification_dataloader
    stock = dataloaders.build_custom_pipeline
    try:
        cfg = solo.module.args.linear.add_and_assert_dataset_cfg(cfg)
        assert dataloaders.prepare_transforms("custom")[1].transforms[1].size == (32, 32)
    finally:
        dataloaders.build_custom_pipeline = stock
    backbone = solo.module.methods.BaseMethod._BACKBONES[cfg.backbone.name](cfg.pretrain_method)
    assert backbone.conv1.kernel_size == (stem, stem)
    assert backbone.inplanes == 512


def test_linear_evaluation_of_their_methods_is_theirs(solo, tmp_path):
    from omegaconf import OmegaConf

    (tmp_path / "args.json").write_text(json.dumps(OmegaConf.to_container(config("simclr"))))
    given = {"pretrained_feature_extractor": str(tmp_path / "x.ckpt"), "backbone": {"name": "resnet18"}}
    cfg = OmegaConf.create({**given, "data": {"dataset": "custom", "train_path": "a", "val_path": "b"}})
    assert solo.module.args.linear.add_and_assert_dataset_cfg(cfg).backbone == {"name": "resnet18"}


def test_dali_without_numbers_is_refused(solo):
    cfg = config("isogclr")
    cfg.data.format = "dali"
    with pytest.raises(ValueError, match="encode_indexes_into_labels"):
        fit(solo.METHODS["isogclr"](cfg))


def test_a_method_that_is_registered_later_is_there_too(solo, monkeypatch):
    from dystress_plugin import recipes
    from dystress_plugin.frameworks.solo import methods

    for table in (recipes._TABLE, methods.CLASSES, solo.METHODS):
        monkeypatch.setitem(table, "later", None)  # so that all of them are afterwards what they were
        del table["later"]
    recipes.register(dataclasses.replace(recipes.recipe("isogclr"), name="later", title="Later"))
    assert solo.METHODS["later"] is methods.CLASSES["later"]
    assert pickle.loads(pickle.dumps(solo.METHODS["later"])) is solo.METHODS["later"]
