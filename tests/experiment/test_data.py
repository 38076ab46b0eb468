import numpy as np
import pytest
from conftest import write_images  # beside this file

from dystress_plugin.experiment.data import datasets as data_module
from dystress_plugin.experiment.data.datasets import Views, load


def load_folder(path, long_tail=None):
    return load(str(path), root="", download=False, long_tail=long_tail, seed=0)


def test_digits_are_all_1797_split_once_and_for_all():
    data = load("digits", root="", download=False, long_tail=None, seed=0)
    assert (len(data.train.labels), len(data.test.labels), data.num_classes) == (1347, 450, 10)
    assert np.bincount(data.test.labels).min() >= 43
    picture = data.train.load(0)
    assert picture.mode == "RGB"
    assert picture.size == (8, 8)


def test_a_folder_without_parts_is_split_by_class(images):
    data = load_folder(images)
    assert np.bincount(data.train.labels).tolist() == [6, 6, 6]
    assert np.bincount(data.test.labels).tolist() == [2, 2, 2]


def test_train_and_val_folders_are_taken_as_they_are(tmp_path):
    write_images(tmp_path / "train", per_class=5)
    write_images(tmp_path / "val", per_class=2)
    data = load_folder(tmp_path)
    assert (len(data.train.labels), len(data.test.labels)) == (15, 6)


def test_items_carry_their_number(images):
    data = load_folder(images)
    _, label, number = Views(data.train, lambda picture: picture)[7]
    assert (number, label) == (7, data.train.labels[7])


def break_first(path):
    next(path.glob("class0/*.png")).with_name("0.png").write_bytes(b"no image")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "is neither a folder nor one of cifar10, cifar100, digits"),
        (lambda path: path.mkdir(), "has no images that Pillow can read"),
        (lambda path: (path / "class0").mkdir(parents=True), "is no readable folder of class folders"),
        (lambda path: [write_images(path / part, classes=1) for part in ("train", "val")], "has the single class"),
        (lambda path: write_images(path, per_class=1), r"data=.*: a quarter of every class is held out"),
        (lambda path: break_first(write_images(path)), "cannot be read as an image"),
        (
            lambda path: (write_images(path / "train"), write_images(path / "val", classes=2)),
            "have different class folders: class2",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_a_clear_error(tmp_path, prepare, message):
    prepare(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        load_folder(tmp_path / "data")


def test_cifar_is_not_downloaded_unasked(tmp_path):
    with pytest.raises(ValueError, match=r"data=cifar10 is not in data_root=.* Set data_root, or download=true"):
        load("cifar10", root=str(tmp_path), download=False, long_tail=None, seed=0)


@pytest.mark.parametrize("ratio", [0.0, -1.0, 1.5])
def test_a_tail_outside_of_0_to_1_is_an_error(ratio):
    with pytest.raises(ValueError, match="long_tail="):
        load("digits", root="", download=False, long_tail=ratio, seed=0)


def test_the_held_out_part_does_not_depend_on_chance():
    labels = np.repeat(np.arange(3), 8)
    assert np.array_equal(data_module.split(labels)[1], data_module.split(labels)[1])
