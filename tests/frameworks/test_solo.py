"""Everything that needs the real solo-learn: SOLO_LEARN_HOME names a clone of it."""

import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

HOME = os.environ.get("SOLO_LEARN_HOME")
if not HOME:
    pytest.skip(
        "SOLO-LEARN IS NOT TESTED: set SOLO_LEARN_HOME to a clone of github.com/vturrisi/solo-learn (9187ea3)",
        allow_module_level=True,
    )

pytestmark = pytest.mark.filterwarnings("ignore:The 'warn' function is deprecated:DeprecationWarning")  # solo-learn

LAUNCHER = "dystress_plugin.frameworks.solo"
SIZES = ["method_kwargs.proj_hidden_dim=32", "method_kwargs.proj_output_dim=16"]
DATA = ["data.train_path=data/train", "data.val_path=data/val", "data.num_workers=0", "dystress_hardware=cpu"]
PRETRAIN = [
    *DATA,
    *SIZES,
    "image_size=16",
    "dystress_augmentations@augmentations=digits",
    "optimizer.batch_size=10",
    "max_epochs=2",
    "scheduler.warmup_epochs=1",
    "checkpoint.keep_prev=True",
    "hydra.sweep.dir=sweep",
]


# --- the unmodified scripts, as a user starts them ---------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Digits as a folder: 20 images of 16 pixels to train on, 20 for validation."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("solo")
    images, labels = load_digits(return_X_y=True)
    for label in range(10):
        for number, row in enumerate((labels == label).nonzero()[0][:4]):
            place = folder / "data" / ("train" if number < 2 else "val") / str(label)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray((images[row].reshape(8, 8) * 15).astype("uint8")).resize((16, 16)).save(
                place / f"{number}.png"
            )
    return folder


def run(folder, *command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SOLO_LEARN_HOME": HOME, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, command)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def checkpoints(folder, method, seed):
    return sorted((folder / "trained_models" / method).glob(f"*/{method}-custom-seed{seed}-*.ckpt"))


def scalars(folder):
    """The last value of everything that was logged, for every run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = []
    for version in sorted((folder / "lightning_logs").iterdir()):
        events = EventAccumulator(str(version)).Reload()
        runs.append({tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]})
    return runs


@pytest.fixture(scope="module")
def one_process(workplace):
    methods = "method=dystress,macl,isogclr"
    run(workplace, Path(HOME) / "main_pretrain.py", "-m", "--config-name", "dystress_custom", *PRETRAIN, methods)
    return workplace


def test_pretrains_and_tells_what_the_temperature_did(one_process):
    for method in ("dystress", "macl", "isogclr"):
        assert len(checkpoints(one_process, method, seed=5)) == 2
    logged = scalars(one_process)
    for values in logged:
        assert values["tau_negative_min"] - 1e-6 <= values["tau_negative_mean"] <= values["tau_negative_max"] + 1e-6
        assert {"train_nce_loss_epoch", "alignment", "uniformity", "tau_positive_mean"} <= set(values)
        assert values["val_knn_acc1"] > 0
    assert 0.1 <= logged[0]["tau_negative_min"] <= logged[0]["tau_positive_max"] <= 0.2
    assert logged[1]["tau_positive_mean"] == pytest.approx(0.1 * (1 + 0.5 * logged[1]["alignment"]), rel=1e-3)

    arguments = json.loads(next(one_process.glob("trained_models/dystress/*/args.json")).read_text())
    assert arguments["backbone"]["name"] == "resnet18_small"
    assert arguments["method_kwargs"]["tau_max"] == 0.2
    assert arguments["name"] == "dystress-custom-seed5"


@pytest.fixture(scope="module")
def two_processes(one_process):
    """Each method twice: seed 5 goes on where the run of one process stopped, seed 6 begins."""
    for method in ("dystress", "macl", "isogclr"):
        checkpoints(one_process, method, seed=5)[1].unlink()
    sweep = ["method=dystress,macl,isogclr", "seed=5,6", "devices='2'", "strategy=ddp"]
    script = Path(HOME) / "main_pretrain.py"
    output = run(one_process, script, "-m", "--config-name", "dystress_custom", *PRETRAIN, *sweep)
    return one_process, output


def test_two_processes_pretrain_and_resume(two_processes):
    folder, output = two_processes
    resumed = {line.rsplit("/", 1)[-1] for line in output.splitlines() if "Resuming from previous" in line}
    assert len(resumed) == 3
    assert all("seed5" in name and "ep=0" in name for name in resumed)
    for method in ("dystress", "macl", "isogclr"):
        assert [path.stem[-4:] for path in checkpoints(folder, method, seed=6)] == ["ep=0", "ep=1"]
        assert any("ep=1" in path.name for path in checkpoints(folder, method, seed=5))
    for seed in (5, 6):
        (last,) = (path for path in checkpoints(folder, "isogclr", seed) if "ep=1" in path.name)
        state = torch.load(last, weights_only=True)["state_dict"]
        assert state["contrastive.temperature.visited"].shape == (20,)
        assert state["contrastive.temperature.visited"].all()


def test_linear_evaluation_reads_the_checkpoint(two_processes):
    folder, _ = two_processes
    checkpoint = checkpoints(folder, "isogclr", seed=6)[-1].relative_to(folder)
    settings = [f"pretrained_feature_extractor='{checkpoint}'", *DATA, "optimizer.batch_size=10", "max_epochs=1"]
    run(folder, Path(HOME) / "main_linear.py", "--config-name", "dystress_linear_custom", *settings)
    arguments = json.loads(next(folder.glob("trained_models/linear/*/args.json")).read_text())
    assert arguments["name"] == "isogclr-custom-linear"
    assert arguments["backbone"]["name"] == "resnet18_small"
    assert "val_acc1" in scalars(folder)[-1]


def evaluation(folder, method):
    place = checkpoints(folder, method, seed=5)[-1].parent
    data = ["--dataset", "custom", "--train_data_path", "data/train", "--val_data_path", "data/val"]
    return [*data, "--batch_size", "10", "--num_workers", "0", "--pretrained_checkpoint_dir", place]


def test_knn_on_the_cpu(one_process):
    output = run(one_process, "-m", LAUNCHER, "knn", "--cpu", "--k", "1", "5", *evaluation(one_process, "isogclr"))
    results = [line for line in output.splitlines() if line.startswith("Result: acc@1=")]
    assert len(results) == 2
    assert all(float(line.split("=")[1].split(",")[0]) > 10 for line in results)  # chance


def test_umap_on_the_cpu(one_process):
    pytest.importorskip("umap", reason="main_umap.py needs umap-learn")
    run(one_process, "-m", LAUNCHER, "umap", "--cpu", *evaluation(one_process, "dystress"))
    assert (one_process / "im100_val_umap.pdf").stat().st_size > 0


# --- in this process ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def solo():
    """solo-learn with the plugin registered, and what it was like before."""
    sys.path.insert(0, HOME)
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
    sys.path.remove(HOME)


def config(method, **method_kwargs):
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
                "num_small_crops": 1,
                "format": "image_folder",
            },
            "optimizer": {"name": "sgd", "batch_size": 4, "lr": 0.1, "weight_decay": 0.0, "classifier_lr": 0.1},
            "scheduler": {"name": "none", "warmup_epochs": 0},
        }
    )


class Images(torch.utils.data.Dataset):
    """Eight images as solo-learn's data sets hand them out: number, two large crops and a small one, class."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        crops = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(index))
        return index, [crops[0], crops[1], crops[2, :, :4, :4]], index


def fit(model):
    from lightning.pytorch import Trainer

    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=1, **off)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's about workers and the few batches
        trainer.fit(model, torch.utils.data.DataLoader(Images(), batch_size=4))
    return trainer


def test_registration_leaves_solo_learn_as_it_is(solo):
    assert solo.unchanged
    assert set(solo.METHODS) - set(solo.own) >= {"dystress", "macl", "ts", "isogclr", "tempfree"}
    assert solo.METHODS["simclr"].__module__ == "solo.methods.simclr"


@pytest.mark.parametrize("crops", [2, 4])
def test_constant_temperature_is_the_loss_of_its_simclr(solo, crops):
    from solo.losses.simclr import simclr_loss_func

    import dystress_plugin as dp

    views = torch.randn(crops, 6, 5)
    theirs = simclr_loss_func(views.flatten(0, 1), indexes=torch.arange(6).repeat(crops), temperature=0.2)
    ours = dp.ContrastiveLoss(dp.temperature.Constant(0.2))(*views)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["dystress", "tempfree", "isogclr"])
def test_multi_crop_trains(solo, method):
    logged = fit(solo.METHODS[method](config(method))).callback_metrics
    assert {"train_nce_loss", "tau_positive_mean", "alignment"} <= set(logged)
    assert torch.isfinite(logged["train_nce_loss"])


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
    with pytest.raises(ValueError, match="temperatures of 8 images, this run has 9"):
        cls.load_from_checkpoint(path, cfg=config("isogclr", num_samples=9))
    with pytest.raises(ValueError, match="num_samples=5, but there are 8 training images"):
        fit(cls(config("isogclr", num_samples=5)))


def test_settings_reach_the_temperature(solo):
    model = solo.METHODS["dystress"](config("dystress", tau_max=0.15, negative_range=[0.1, 0.12]))
    assert model.contrastive.temperature.tau_max == 0.15
    assert model.contrastive.gather_distributed
    assert solo.METHODS["macl"](config("macl", temperature=0.3)).contrastive.temperature.tau == 0.3
    with pytest.raises(ValueError, match=r"tau_maxx.*Did you mean 'tau_max'"):
        solo.METHODS["dystress"](config("dystress", tau_maxx=0.3))
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
