import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from conftest import dystress  # beside this file
from torch import nn
from torchvision import models

from dystress_plugin.experiment import backbone as backbones
from dystress_plugin.experiment.backbone import build_backbone
from dystress_plugin.experiment.data import datasets

SCRIPT = Path(__file__).parents[2] / "scripts" / "checks" / "backbones.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("backbones_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# A sample of those of which scripts/checks/backbones.py tries all.
@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("shufflenet_v2_x0_5", 1024),  # its conv1 is several layers
        ("squeezenet1_1", 512),  # its head pools
        ("googlenet", 1024),  # has other heads, in train mode
        ("mnasnet0_5", 1280),
        ("vit_b_32", 768),  # made for one size
        ("test_vit", 64),  # and by timm
        ("small_resnet", 64),  # our own
        ("starnet_s050", 128),
    ],
)
@pytest.mark.filterwarnings("ignore:In eager mode:UserWarning")
def test_a_sample_of_backbones_trains_a_step_on_small_images(name, features, script):
    digits = datasets.load("digits", root="", download=False, long_tail=None, seed=0)
    assert script.step(name, 32, digits)["features"] == features


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("alexnet", 32, "cannot train on images of 32 pixels: Given input size: (256x1x1)."),
        ("inception_v3", 64, "cannot train on images of 64 pixels: Calculated padded input size per channel: (2 x 2)."),
        ("test_vit", 30, "cannot train on images of 30 pixels: Input height (30) should be divisible by patch size"),
        ("fasterrcnn_resnet50_fpn", 64, "is one of torchvision's models for detection; choose one that classifies"),
        ("deeplabv3_resnet50", 64, "is one of torchvision's models for segmentation; choose one"),
        ("quantized_resnet18", 64, "is one of torchvision's models for quantization; choose one"),
        ("raft_small", 64, "is one of torchvision's models for optical flow; choose one"),
        ("r3d_18", 64, "is one of torchvision's models for video; choose one"),
        ("resnet19", 64, "Unknown backbone 'resnet19'. Did you mean 'resnet"),
        ("hf-hub:timm/resnet18", 64, "Unknown backbone 'hf-hub:timm/resnet18'."),
    ],
)
def test_a_backbone_that_cannot_train_is_refused_in_one_line_before_training(name, size, message, tiny, capsys):
    assert dystress("pretrain", tiny | {"backbone": name, "image_size": size}) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dystress: ")]
    assert message in line
    assert not Path(tiny["out"]).exists()


def odd(returned):
    """A network with a habit of its own."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return returned(self, self.norm(x))

    return Odd


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda self, x: (x, x) if self.training else x, "it returns a tuple and no features."),
        (lambda self, x: x[:, :2] if self.training else x, "it has 128 features in training and 192 in evaluation."),
        (lambda self, x: x / 0, "its features are not finite."),
        (lambda self, x: self.nothing, "'Odd' object has no attribute 'nothing'."),
        (lambda self, x: [][1], "list index out of range."),
        (lambda self, x: next(iter(())), "StopIteration: (lambda self, x: next(iter(())), "),  # the line of code
        (lambda self, x: nn.BatchNorm2d(3)(x[:1, :, :1, :1]), "Expected more than 1 value per channel when training"),
    ],
)
def test_whatever_is_odd_is_said_in_one_line(returned, message, monkeypatch):
    monkeypatch.setattr(backbones, "library", lambda name: "torchvision")
    monkeypatch.setattr(backbones, "build", lambda name, size, of: odd(returned)())
    with pytest.raises(ValueError, match=r"^backbone=odd cannot train on images of 8 pixels: ") as error:
        build_backbone("odd", 8)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_trying_it_leaves_no_trace():
    torch.manual_seed(0)
    expected = models.mobilenet_v3_small(weights=None)
    expected.classifier = nn.Identity()
    random = torch.get_rng_state()
    torch.manual_seed(0)
    found, width = build_backbone("mobilenet_v3_small", 96)
    assert torch.equal(torch.get_rng_state(), random)
    assert width == 576
    assert found.training
    state = expected.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())
    assert all(p.grad is None for p in found.parameters())


def test_a_name_of_both_libraries_is_torchvisions():
    assert timm.is_model("resnet18")
    assert isinstance(build_backbone("resnet18", 32)[0], models.ResNet)


def test_a_network_of_one_size_is_as_timm_makes_it_for_that():
    torch.manual_seed(0)
    expected = timm.create_model("test_vit", num_classes=0, img_size=48).state_dict()
    torch.manual_seed(0)
    found = build_backbone("test_vit", 48)[0].state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
