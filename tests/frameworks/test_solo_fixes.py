import types

import pytest
import torch
import torchmetrics
from omegaconf import OmegaConf
from PIL import Image
from torchvision import transforms

from dystress_plugin.frameworks.solo import fixes
from dystress_plugin.frameworks.solo.cpu import StayOnCPU


def metric_class(**arguments):
    class Count(torchmetrics.Metric):
        def __init__(self, k=20):
            super().__init__(dist_sync_on_step=False, **arguments)
            self.k = k
            self.add_state("seen", default=[], persistent=False)

        def update(self, values=None):
            self.seen.append(values)

        def compute(self):
            return torch.cat(self.seen).sum()

    return Count


def test_knn_metric_collects_until_it_is_asked():
    metric = metric_class(compute_on_step=False)
    with pytest.raises(ValueError, match="compute_on_step"):
        metric()
    fixes.knn_metric(metric)
    fixes.knn_metric(metric)
    counted = metric(k=3)
    assert counted.k == 3
    assert counted(values=torch.tensor([1.0])) is None
    assert counted(values=torch.tensor([2.0, 4.0])) is None
    assert counted.compute() == 7


def test_knn_metric_that_works_is_left_alone():
    metric = metric_class()
    fixes.knn_metric(metric)
    assert metric.__bases__ == (torchmetrics.Metric,)


def test_auto_resume_compares_settings_and_seed():
    resumer = types.SimpleNamespace(SHOULD_MATCH=["name", "seed"])
    fixes.auto_resume(resumer)
    fixes.auto_resume(resumer)
    assert resumer.SHOULD_MATCH.count("seed") == resumer.SHOULD_MATCH.count("method_kwargs") == 1


def stock_pipeline(size=224):
    normalize = transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    val = [transforms.Resize(256), transforms.CenterCrop(size), transforms.ToTensor(), normalize]
    train = [transforms.RandomResizedCrop(size), transforms.ToTensor(), normalize]
    return {"T_train": transforms.Compose(train), "T_val": transforms.Compose(val)}


@pytest.mark.parametrize(("crop_size", "shorter"), [(16, 16), (64, 64), (112, 128)])
def test_custom_images_are_shown_as_they_were_trained(crop_size, shorter):
    module = types.SimpleNamespace(build_custom_pipeline=stock_pipeline)
    fixes.custom_pipeline(module, crop_size)
    pipeline = module.build_custom_pipeline()
    image = Image.new("RGB", (40, 30))
    for part in ("T_train", "T_val"):
        assert pipeline[part](image).shape == (3, crop_size, crop_size)
    assert pipeline["T_val"].transforms[0].size == shorter
    assert pipeline["T_val"].transforms[-1].mean == (0.485, 0.456, 0.406)


def test_custom_normalisation_is_the_training_s():
    module = types.SimpleNamespace(build_custom_pipeline=stock_pipeline)
    fixes.custom_pipeline(module, 224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert module.build_custom_pipeline()["T_val"](Image.new("RGB", (30, 30))).unique().tolist() == [-1.0]


def test_custom_pipeline_that_is_right_or_the_user_s_is_left_alone():
    for build, crop_size in ((stock_pipeline, 224), (lambda: stock_pipeline(96), 32)):
        module = types.SimpleNamespace(build_custom_pipeline=build)
        fixes.custom_pipeline(module, crop_size)
        assert module.build_custom_pipeline is build


def test_small_backbones_keep_the_size_of_small_images():
    from torchvision.models import resnet18

    backbones = {name: lambda method, **kwargs: resnet18(**kwargs) for name in ("resnet18", "resnet50")}
    own = dict(backbones)
    fixes.add_small_backbones(backbones)
    assert {name: backbones[name] for name in own} == own
    net = backbones["resnet18_small"]("dystress", num_classes=7)
    assert net.conv1.stride == (1, 1)
    assert net(torch.zeros(2, 3, 16, 16)).shape == (2, 7)


@pytest.mark.parametrize(
    ("dataset", "crop_size", "small_stem", "expected"),
    [
        ("custom", 64, None, "resnet18_small"),
        ("custom", 65, None, "resnet18"),
        ("custom", 32, False, "resnet18"),
        ("stl10", 96, True, "resnet18_small"),
        ("stl10", 64, None, "resnet18"),
        ("cifar10", 32, None, "resnet18"),
    ],
)
def test_choice_of_the_stem(dataset, crop_size, small_stem, expected):
    cfg = OmegaConf.create(
        {
            "backbone": {"name": "resnet18", "small_stem": small_stem},
            "data": {"dataset": dataset},
            "augmentations": [{"crop_size": crop_size}],
        }
    )
    for _ in range(2):
        fixes.choose_stem(cfg, ["resnet18", "resnet18_small"])
        assert cfg.backbone.name == expected


def test_arguments_beside_a_checkpoint(tmp_path):
    assert fixes.arguments_beside(None) is None
    assert fixes.arguments_beside(str(tmp_path / "x.ckpt")) is None
    (tmp_path / "args.json").write_text('{"method": "macl"}')
    assert fixes.arguments_beside(str(tmp_path / "x.ckpt")).method == "macl"


def test_cuda_means_cpu():
    tensor, layer = torch.ones(2), torch.nn.Linear(2, 2)
    with StayOnCPU():
        moved = [tensor.cuda(), tensor.cuda(non_blocking=True), tensor.to("cuda:0"), tensor.to(device="cuda")]
        layer.to("cuda:0")
        assert tensor.to(torch.float64).dtype == torch.float64
    assert {value.device.type for value in [*moved, layer.weight]} == {"cpu"}
