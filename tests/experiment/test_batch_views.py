"""`augment=batch` beside the loader: the same distribution of views, the same numbers whatever comes between."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dystress, write_images  # beside this file
from PIL import Image
from scipy.stats import ks_2samp
from test_interruption import at_epoch
from torchvision.transforms import RandomResizedCrop

from dystress_plugin.experiment.data import memory
from dystress_plugin.experiment.data.datasets import Images, seed_cpu
from dystress_plugin.experiment.data.transforms import plain_transform, view_transform
from dystress_plugin.experiment.data.views import BatchViews, Draws, resampling
from dystress_plugin.experiment.spec import AugmentationSpec

NORMALIZE = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
SPEC = AugmentationSpec("batch", min_scale=0.2, jitter=0.5, grayscale=0.2, blur=0.0, flip=0.5, rotate=0.0)
ALL = AugmentationSpec("batch", min_scale=0.5, jitter=1.0, grayscale=0.2, blur=0.5, flip=0.2, rotate=15.0)
SURE = 1e-3  # of a test that two samples are from one distribution; the draws are seeded, so none fails by chance


def picture(height=24, width=32):
    """Smooth and of many colours, so that it matters where a crop lies, and to which side it is flipped."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    colours = np.stack([x, y, 0.7 - 0.5 * x * y], -1) + 0.2 * np.sin(9 * x + 5 * y)[..., None]
    return (255 * colours.clip(0, 1)).astype(np.uint8)


def batch(pixels, images):
    return torch.from_numpy(pixels).permute(2, 0, 1).expand(images, -1, -1, -1)


def features(views):
    """(views,) by name: what the steps of an augmentation change."""
    low, high = views.flatten(2).min(2).values, views.flatten(2).max(2).values
    across = views.diff(dim=3)
    return {
        "brightness": views.mean((1, 2, 3)),
        "contrast": (high - low).mean(1),
        "colour": (views[:, 0] - views[:, 2]).mean((1, 2)),
        "to the right": across.mean((1, 2, 3)),
        "downwards": views.diff(dim=2).mean((1, 2, 3)),
        "sharpness": across.diff(dim=3).abs().mean((1, 2, 3)),
        "corner": views[:, :, :2, :2].mean((1, 2, 3)),
    }


@pytest.mark.parametrize("spec", [SPEC, ALL], ids=["of small images", "all steps"])
def test_views_are_distributed_as_the_loaders(spec):
    pixels, number = picture(), 1500
    unit = {"mean": [0.0] * 3, "std": [1.0] * 3}
    seed_cpu(1, 2)
    transform = view_transform(spec, 16, unit)
    theirs = torch.stack([transform(Image.fromarray(pixels))[0] for _ in range(number)])
    # Every batch has an order of its own for the jitters.
    views = BatchViews(spec, 16, unit)
    ours = torch.cat([views(batch(pixels, 30), 1, 0, step)[step % 2] for step in range(number // 30)])
    for name, values in features(ours).items():
        assert ks_2samp(values, features(theirs)[name]).pvalue > SURE, name
    grey = [float((its.std(1).amax((1, 2)) < 1e-3).float().mean()) for its in (ours, theirs)]
    assert grey == pytest.approx([spec.grayscale] * 2, abs=0.04)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 8)])  # of the second hardly a try fits
def test_crops_are_distributed_as_torchvisions(height, width):
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])
    ours = Draws.of(SPEC, 4000, height, width, (5,)).columns
    for column, name in enumerate(("top", "left", "height", "width")):
        assert ks_2samp(ours[name], theirs[:, column]).pvalue > SURE, name


@pytest.mark.parametrize("box", [(0, 0, 32, 24), (3, 5, 14, 9), (7, 2, 25, 22), (11, 0, 5, 24)])
def test_a_crop_is_resized_as_pillow_does_to_less_than_a_level(box):
    left, top, width, height = box
    theirs = Image.fromarray(picture()).crop((left, top, left + width, top + height)).resize((16, 16), Image.BILINEAR)
    rows, columns = (
        resampling(torch.tensor([float(start)]), torch.tensor([float(length)]), pixels, 16)[0]
        for start, length, pixels in ((top, height, 24), (left, width, 32))
    )
    ours = rows @ torch.from_numpy(picture()).permute(2, 0, 1).float() @ columns.T
    # Pillow rounds after each of its two passes.
    assert (ours - torch.from_numpy(np.array(theirs)).permute(2, 0, 1)).abs().max() <= 1.0


def test_views_follow_from_the_words_alone():
    views, pixels = BatchViews(ALL, 16, NORMALIZE), batch(picture(), 4)
    first = views(pixels, 3, 1, 7)
    torch.manual_seed(99)
    assert all(map(torch.equal, first, views(pixels, 3, 1, 7)))
    for other in ((4, 1, 7), (3, 2, 7), (3, 1, 8)):
        assert not torch.equal(first[0], views(pixels, *other)[0])
    assert not torch.equal(*first)


def test_views_are_the_same_in_every_precision_of_the_training():
    views, pixels = BatchViews(ALL, 16, NORMALIZE), batch(picture(), 4)
    expected = views(pixels, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, expected, views(pixels, 3)))
    try:
        torch.set_default_dtype(torch.float64)  # as Lightning's 64-true does
        assert all(map(torch.equal, expected, views(pixels, 3)))
    finally:
        torch.set_default_dtype(torch.float32)


def test_nothing_random_leaves_the_picture_itself():
    still = AugmentationSpec("batch", min_scale=1.0, jitter=0.0, grayscale=0.0, blur=0.0, flip=0.0, rotate=0.0)
    pixels = picture(16, 16)
    expected = plain_transform(16, NORMALIZE)(Image.fromarray(pixels))
    # A whole square fits in no try but a square one: those of another ratio are cropped from the middle.
    columns = Draws.of(still, 2000, 16, 16, (0,)).columns
    whole = torch.nonzero((columns["height"] == 16) & (columns["width"] == 16))[:, 0]
    assert len(whole) > 500
    made = torch.cat(BatchViews(still, 16, NORMALIZE)(batch(pixels, 1000), 0))[whole]
    torch.testing.assert_close(made, expected.expand_as(made), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [8, 16])
def test_images_in_memory_are_shown_as_the_loader_shows_them_to_the_digit(size):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 12, 14, 3), dtype=np.uint8)
    images = Images(pixels, np.arange(5))
    transform = plain_transform(size, NORMALIZE)
    expected = torch.stack([transform(images.load(i)) for i in range(5)])
    loader = memory.plain_batches(images, 2, lambda: torch.device("cpu"), image_size=size, normalize=NORMALIZE)
    shown, labels, numbers = map(torch.cat, zip(*loader, strict=True))
    assert torch.equal(shown, expected)
    assert labels.tolist() == numbers.tolist() == list(range(5))
    assert len(loader) == 3


def numbers_of(out):
    """What a run computed: metrics, summary without times, weights."""
    summary = json.loads(Path(out, "summary.json").read_text()) | {"seconds": 0, "images_per_second": 0}
    return Path(out, "metrics.csv").read_text(), summary, torch.load(Path(out, "backbone.pt"), weights_only=True)


def assert_same(mine, its):
    assert mine[:2] == its[:2]
    assert all(map(torch.equal, mine[2].values(), its[2].values()))


@pytest.fixture
def in_batches(tiny):
    return tiny | {"augment": "batch", "check_every_n_epochs": 2, "log_every_n_steps": 100, "method": "isogclr"}


def test_a_run_in_batches_resumes_to_the_digit_and_needs_no_memory(in_batches, tmp_path, monkeypatch):
    assert dystress("pretrain", in_batches) == 0
    whole = numbers_of(in_batches["out"])
    with open(Path(in_batches["out"], "metrics.csv"), newline="") as file:
        measured = [bool(row["knn_top1"]) for row in csv.DictReader(file)]
    assert measured == [False, True, False]  # every second epoch
    assert json.loads(Path(in_batches["out"], "summary.json").read_text())["images_per_second"] > 0

    def stop():
        raise KeyboardInterrupt

    again = in_batches | {"out": str(tmp_path / "again")}
    with monkeypatch.context() as patch:
        at_epoch(patch, 2, stop)
        assert dystress("pretrain", again) != 0
    assert dystress("pretrain", again) == 0
    assert_same(numbers_of(again["out"]), whole)

    # Images that do not fit come from a loader, in the same order and with the same views.
    loaded = in_batches | {"out": str(tmp_path / "loaded"), "num_workers": 0}
    monkeypatch.setattr(memory, "IN_MEMORY", 0)
    assert dystress("pretrain", loaded) == 0
    assert_same(numbers_of(loaded["out"]), whole)


@pytest.mark.parametrize("room", [memory.IN_MEMORY, 0])
def test_images_of_different_sizes_are_refused_before_training(room, in_batches, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "IN_MEMORY", room)
    # One that is as the others when it is upright is no other size.
    upright = write_images(tmp_path / "mixed", per_class=8, size=12)
    odd = upright / "class1" / "3.png"
    Image.new("RGB", (12, 9)).save(odd)
    assert dystress("pretrain", in_batches | {"data": str(upright)}) == 2
    error = capsys.readouterr().err
    assert f"{odd} has 12x9. Leave augment out." in error.replace("\n", " ")
    assert not Path(in_batches["out"], "checkpoints").exists()
