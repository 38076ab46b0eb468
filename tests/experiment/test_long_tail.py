import errno
import json

import numpy as np
import pytest
from conftest import write_images  # beside this file
from PIL import Image
from torchvision.datasets import ImageFolder

from dystress_plugin.cli import main
from dystress_plugin.experiment.data.datasets import load
from dystress_plugin.experiment.data.selection import class_sizes, draw, read_indices, select


def long_tail(**settings):
    return main(["long-tail", *(f"{key}={value}" for key, value in settings.items())])


def test_exponential_sizes_are_those_of_the_papers():
    for largest, classes, total in ((5000, 10, 12_406), (500, 100, 10_847), (4500, 10, 11_165), (450, 100, 9_754)):
        sizes = class_sizes(largest, classes, 0.01)
        assert (sum(sizes), sizes[0], sizes[-1]) == (total, largest, max(1, largest // 100))
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("classes", "expected"), [(4, [50, 50, 5, 5]), (3, [50, 50, 5]), (1, [50])])
def test_a_step_leaves_the_first_half_whole(classes, expected):
    assert class_sizes(50, classes, 0.1, "step") == expected


def test_every_class_keeps_at_least_one_image():
    labels = np.repeat(np.arange(3), 4)
    for profile, sizes in (("exponential", [4, 1, 1]), ("step", [4, 4, 1])):
        assert np.bincount(labels[draw(labels, 0.001, profile=profile)]).tolist() == sizes


def test_a_tail_of_unequal_classes_is_measured_against_the_largest_and_takes_what_there_is():
    labels = np.repeat([0, 1, 2], [5, 100, 40])
    assert np.bincount(labels[draw(labels, 0.25)]).tolist() == [5, 50, 25]


def test_the_draw_depends_on_the_seed_alone():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 50))
    first, again, other = (draw(labels, 0.1, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.bincount(labels[first]).tolist() == np.bincount(labels[other]).tolist() == [50, 23, 10, 5]
    assert (np.diff(first) > 0).all()


def test_shuffled_classes_have_the_same_sizes_in_another_order():
    labels = np.repeat(np.arange(8), 50)
    sizes = [tuple(np.bincount(labels[draw(labels, 0.1, seed=seed, shuffle_classes=True)])) for seed in range(3)]
    assert len(set(sizes)) == 3
    assert {tuple(sorted(row, reverse=True)) for row in sizes} == {tuple(class_sizes(50, 8, 0.1))}


@pytest.mark.parametrize("name", ["split.npy", "split.json", "split.txt"])
def test_an_index_file_is_read_in_its_order(name, tmp_path):
    positions, path = [7, 0, 3], tmp_path / name
    if path.suffix == ".npy":
        np.save(path, np.asarray(positions))
    else:
        path.write_text(json.dumps(positions) if path.suffix == ".json" else "7\n0 3\n")
    assert read_indices(path, 8).tolist() == positions


def test_indices_and_then_a_tail_give_the_sizes_of_temperature_schedules(tmp_path):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 5000))
    held_in = np.concatenate([np.flatnonzero(labels == c)[:4500] for c in range(10)])
    np.save(tmp_path / "train.npy", held_in)
    chosen = select(
        labels, indices=tmp_path / "train.npy", long_tail=0.01, seed=1, profile="exponential", shuffle_classes=True
    )
    counts = sorted(np.bincount(labels[chosen]))
    assert (len(chosen), counts[-1], counts[0]) == (11_165, 4500, 45)
    assert set(chosen) <= set(held_in)
    assert len(set(chosen)) == len(chosen)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([0, 8], "has 8, but positions run from 0 to 7"),
        ([-1, 2], "has -1, but positions run from 0 to 7"),
        ([3, 1, 3], "lists 3 more than once"),
        ([0.5, 1.0], r"holds float64 of shape \(2,\); needs a list of integers"),
        ([[0], [1]], r"holds int64 of shape \(2, 1\)"),
        ([], r"holds float64 of shape \(0,\); needs a list of integers"),
        ([True, False], "holds bool"),
        (np.asarray([{}], dtype=object), "cannot be read: Object arrays cannot be loaded"),
    ],
)
def test_a_bad_index_file_is_named(content, message, tmp_path):
    path = tmp_path / "bad.npy"
    np.save(path, np.asarray(content), allow_pickle=True)
    with pytest.raises(ValueError, match=r"indices=.*bad\.npy " + message):
        read_indices(path, 8)


@pytest.mark.parametrize(("name", "text"), [("no.npy", None), ("x.json", "[1,"), ("x.txt", "1 two"), ("x.npy", "no")])
def test_an_unreadable_index_file_is_named(name, text, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"indices=.* cannot be read: "):
        read_indices(tmp_path / name, 8)


def test_indices_choose_from_a_folder_in_image_folder_order(tmp_path):
    write_images(tmp_path / "d" / "train", per_class=5)
    write_images(tmp_path / "d" / "val", per_class=2, seed=1)
    np.save(tmp_path / "i.npy", np.asarray([12, 1, 6]))
    data = load(str(tmp_path / "d"), root="", download=False, long_tail=None, seed=0, indices=str(tmp_path / "i.npy"))
    reference = ImageFolder(str(tmp_path / "d" / "train"))
    assert data.train.labels.tolist() == [2, 0, 1]
    assert all(data.train.load(n).tobytes() == reference[i][0].tobytes() for n, i in enumerate([12, 1, 6]))
    assert len(data.test.labels) == 6


@pytest.fixture
def source(tmp_path):
    write_images(tmp_path / "data" / "train", per_class=8)
    write_images(tmp_path / "data" / "val", per_class=2, seed=1)
    return tmp_path / "data"


def test_the_command_writes_folders_that_hold_the_very_images(source, tmp_path, capsys):
    out = tmp_path / "new" / "tail"
    assert long_tail(data=source, long_tail=0.25, seed=3, out=out) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["class_sizes"] == {"class0": 8, "class1": 4, "class2": 2}
    assert json.loads((out / "long_tail.json").read_text()) == printed
    positions = np.load(out / "indices.npy")
    assert np.array_equal(positions, draw(np.repeat(np.arange(3), 8), 0.25, seed=3))

    written, whole = ImageFolder(str(out / "train")), ImageFolder(str(source / "train"))
    # Both are sorted by class and then by name, so that the n-th written is the n-th chosen.
    assert written.targets == [whole.targets[i] for i in positions]
    assert all(written[n][0].tobytes() == whole[i][0].tobytes() for n, i in enumerate(positions))
    assert len(ImageFolder(str(out / "val"))) == 6
    assert sorted(path.name for path in out.parent.iterdir()) == ["tail"]


def test_what_the_command_wrote_is_what_pretrain_would_train_on(source, tmp_path):
    options = {"root": "", "download": False, "seed": 3}
    assert long_tail(data=source, long_tail=0.3, long_tail_profile="step", seed=3, out=tmp_path / "tail") == 0
    there = load(str(tmp_path / "tail"), long_tail=None, **options)
    here = load(str(source), long_tail=0.3, long_tail_profile="step", **options)
    again = load(str(source), long_tail=None, indices=str(tmp_path / "tail" / "indices.npy"), **options)
    for other in (here, again):
        assert there.train.labels.tolist() == other.train.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 2
        assert all(there.train.load(i).tobytes() == other.train.load(i).tobytes() for i in range(18))


def test_the_index_file_alone_can_be_written(source, tmp_path):
    assert long_tail(data=source, long_tail=0.25, out=tmp_path / "tail", images="false") == 0
    assert sorted(path.name for path in (tmp_path / "tail").iterdir()) == ["indices.npy", "long_tail.json"]


def test_digits_are_written_with_their_names(tmp_path):
    np.save(tmp_path / "i.npy", np.arange(0, 1347, 100))
    assert long_tail(data="digits", indices=tmp_path / "i.npy", out=tmp_path / "tail") == 0
    written = ImageFolder(str(tmp_path / "tail" / "val"))
    assert written.classes == list("0123456789")
    assert len(written) == 450
    data = load("digits", root="", download=False, long_tail=None, seed=0)
    for path in (tmp_path / "tail" / "train").glob("*/*.png"):
        i = int(path.stem)
        assert int(path.parent.name) == data.train.labels[i]
        assert Image.open(path).convert("RGB").tobytes() == data.train.load(i).tobytes()


def test_indices_may_mean_the_numbers_in_the_names(source, tmp_path):
    # As CIFAR's official indices, which go across the classes, while a folder is sorted by class.
    for c in range(3):
        for i in range(8):
            (source / "train" / f"class{c}" / f"{i}.png").rename(
                source / "train" / f"class{c}" / f"{3 * i + c:02d}.png"
            )
    np.save(tmp_path / "i.npy", np.asarray([22, 0, 5]))
    options = {"data": source, "indices": tmp_path / "i.npy", "indices_by": "number"}
    assert long_tail(**options, out=tmp_path / "tail") == 0
    assert np.load(tmp_path / "tail" / "indices.npy").tolist() == [8 + 7, 0, 16 + 1]
    written = ImageFolder(str(tmp_path / "tail" / "train"))
    assert sorted(written.targets) == [0, 1, 2]
    np.save(tmp_path / "i.npy", np.asarray([22, 24]))
    assert long_tail(**options, out=tmp_path / "no") == 2


def test_names_that_are_no_different_numbers_have_none(source, tmp_path, capsys):
    np.save(tmp_path / "i.npy", np.asarray([1, 0]))
    for data in (source, "digits"):  # 0.png is in every class; no files at all
        assert long_tail(data=data, indices=tmp_path / "i.npy", indices_by="number", out=tmp_path / "tail") == 2
        assert "needs a folder whose files are all named by different numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"long_tail": 0.25}, "is not empty; nothing is ever overwritten"),
        ({"out": "fresh"}, "Give long_tail=RATIO"),
        ({"out": "fresh", "long_tail": 0.1, "indices_by": "names"}, "Unknown indices_by 'names'."),
        ({"out": "fresh", "long_tail": 2}, "long_tail=2.0 must be above 0 and at most 1"),
        ({"out": "fresh", "long_tail": 0}, "long_tail=0.0 must be above 0 and at most 1"),
        (
            {"out": "fresh", "long_tail": 0.1, "long_tail_profile": "steps"},
            "Unknown long_tail_profile 'steps'. Did you mean 'step'?",
        ),
        ({"out": "fresh", "indices": "none.npy"}, "indices=none.npy cannot be read"),
    ],
)
def test_nothing_is_written_where_something_is_wrong(settings, message, source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "letter.txt").write_text("dear")
    assert long_tail(**{"data": source, "out": "kept"} | settings) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "kept"]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["letter.txt"]


def test_a_disk_that_fills_leaves_no_half_folder_and_is_told(source, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    out = tmp_path / "tail"
    assert long_tail(data=source, long_tail=0.25, out=out) == 2
    told = f"dystress: out={out} cannot be written: [Errno 28] No space left on device. Nothing was left there.\n"
    assert capsys.readouterr().err.endswith(told)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_interrupted_command_leaves_no_half_folder(source, tmp_path, monkeypatch):
    def power_cut(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", power_cut)
    assert long_tail(data=source, long_tail=0.25, out=tmp_path / "tail") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
