"""Images without labels, and images under any name."""

import csv
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dystress, scan_folder  # beside this file
from PIL import Image

from dystress_plugin import metrics
from dystress_plugin.experiment import places
from dystress_plugin.experiment.data import folders
from dystress_plugin.experiment.data.datasets import RANKED, load
from dystress_plugin.experiment.data.scan import fault
from dystress_plugin.experiment.io import pictures


def load_folder(path, **settings):
    return load(str(path), root="", download=False, long_tail=None, seed=0, **settings)


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((12, 12, 3), value, np.uint8)).save(path, (path.suffix and None) or "png")


def fill(root, *names, value=9):
    for name in names:
        picture(root / name, value) if not name.endswith(".txt") else (root / name).write_text("no image")
    return root


def used(data, root):
    return sorted(os.path.relpath(file, root) for file in data.train.files)


FLAT = ("1.png", "2.PNG", "3.jpg", "4.gif")
DEEP = ("a/1.png", "a/b/2.png", "c/3.png")


@pytest.mark.parametrize(
    ("names", "value", "labels", "expected"),
    [
        (FLAT, "{}", None, FLAT),
        ((*FLAT, "notes/a.png"), "{}", None, (*FLAT, "notes/a.png")),  # one folder is no classes
        (("photos/1.png", "photos/2.png"), "{}", None, ("photos/1.png", "photos/2.png")),
        (("photos/1.png", "README.txt"), "{}", None, ("photos/1.png",)),
        (("photos/deep/1.png", "photos/2.png"), "{}", None, ("photos/deep/1.png", "photos/2.png")),
        (DEEP, "{}", False, DEEP),
        ((*DEEP, "4.png"), "{}", False, ("4.png", *DEEP)),
        (DEEP, "[{}/a,{}/c]", None, DEEP),
        (DEEP, '["{}/a", "{}/c/3.png"]', None, DEEP),
        (DEEP, "[{}/a,{}/a/b,{}/./a]", None, ("a/1.png", "a/b/2.png")),  # each image once
        (DEEP, "{}/*", None, DEEP),
        (DEEP, "{}/**", None, DEEP),
        ((*FLAT, "5.txt.png"), "{}/[12]*", None, FLAT[:2]),
        (("train/1.png", "val/2.png", "3.png"), "{}", False, ("train/1.png",)),  # what is held out stays so
        (("[x]/1.png", "x/2.png"), "{}/[x]", None, ("[x]/1.png",)),  # a name, where it is there, and no pattern
    ],
)
def test_images_without_labels_are_all_trained_on(names, value, labels, expected, tmp_path, capsys):
    fill(tmp_path, *names)
    name = value.replace("{}", str(tmp_path))
    data = load_folder(name, labels=labels)
    assert used(data, tmp_path) == sorted(expected)
    assert (data.num_classes, data.classes, set(data.train.labels.tolist())) == (0, (), {0})
    assert sorted(data.test.files) == sorted(data.train.files)
    said = capsys.readouterr().err
    assert said.startswith(
        f"dystress: data={name}: {len(expected)} images without labels, none held out; kNN and linear probe"
    )
    assert said.count("\n") == 1
    assert ("no images: 1 .txt" in said) == ("README.txt" in names)
    scan = scan_folder(name, tmp_path / "run", on_bad_image="stop", num_workers=0, progress=False, labels=labels)
    assert (scan.good, scan.labelled, scan.fits(name)) == (len(expected), False, True)


def test_two_folders_with_images_are_classes_as_ever(images, capsys):
    data = load_folder(images)
    assert (data.num_classes, len(data.train.labels), len(data.test.labels)) == (3, 18, 6)
    assert "3 class folders; for accuracies a quarter of every class is held out." in capsys.readouterr().err
    assert load_folder(images, labels=True).classes == data.classes
    assert len(load_folder(images, labels=False).train.labels) == 24


def test_what_is_not_read_is_named(images, capsys):
    fill(images, "1.png", "2.jpg")
    (images / "class0" / "notes.txt").write_text("which camera")
    (images / "class0" / "LICENSE").write_text("none")
    (images / "class0" / ".DS_Store").write_bytes(b"\0")
    assert load_folder(images).num_classes == 3
    said = capsys.readouterr().err
    assert "; not used, as they lie beside class folders: '1.png', '2.jpg'; no images: " in said
    assert "1 .txt" in said
    assert "1 without an ending" in said
    assert "DS_Store" not in said
    for part in ("train", "val"):
        shutil.copytree(images / "class0", images.parent / "d" / part / "a")
        shutil.copytree(images / "class1", images.parent / "d" / part / "b")
    fill(images.parent / "d", "sample.png")
    load_folder(images.parent / "d")
    assert "on val; not used, as they lie beside class folders: 'sample.png'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "value", "labels", "words"),
    [
        (
            (*FLAT, "a/1.png", "b/1.png"),
            "{}",
            None,
            ["is ambiguous: 4 images lie beside the folders 'a', 'b'", "have 2"],
        ),
        (("d/a/1.png", "d/b/1.png"), "{}", None, ["single class 'd'", "labels=false", "give data={}/d"]),
        (FLAT, "{}", True, ["has no class folders", "labels=false"]),
        (FLAT, "[{}]", True, ["has no class folders"]),
        (DEEP, "[{}/a,{}/c]", True, ["has no labels: they need one folder"]),
        (DEEP, "[{}/a,{}/gone]", None, ["is neither a folder nor"]),
        (DEEP, "{}/*.png", None, ["is neither a folder nor"]),
        *(
            (names, "{}", labels, ["data={} has no images that Pillow can read"])
            for names in ((), ("notes.txt",), ("a.txt", "sub.txt"))
            for labels in (None, False)
        ),
        (DEEP, "[{}/a,,{}/c]", None, ["must be a list of folders, such as data=[imgs/a,imgs/b]"]),
        (DEEP, "[]", None, ["must be a list of folders"]),
        (("d/train/a/1.png", "d/val/a/1.png", "e/1.png"), "[{}/d,{}/e]", None, ["the splits", "such as {}/d/train"]),
        (("train/a/1.png", "train/b/1.png", "car/1.png"), "{}", None, ["ambiguous: 'train' would be a split"]),
        (("train/1.png", "val/1.png"), "{}", None, ["has splits, but {}/train has no class folders", "labels=false"]),
    ],
)
def test_what_is_not_sure_is_an_error_in_one_line_that_says_what_to_type(names, value, labels, words, tmp_path):
    fill(tmp_path, *names)
    with pytest.raises(ValueError, match=r"data=|labels=") as caught:
        load_folder(value.replace("{}", str(tmp_path)), labels=labels)
    assert "\n" not in str(caught.value)
    assert all(word.format(tmp_path) in str(caught.value) for word in words)


def test_results_are_no_images_in_a_list_either(tmp_path):
    fill(tmp_path, "a/1.png", "run/figures/curves.png")
    (tmp_path / "run" / "config.yaml").write_text("")
    (tmp_path / "run" / "metrics.csv").write_text("")
    with pytest.raises(ValueError, match=r"holds results of `dystress pretrain`"):
        load_folder(f"[{tmp_path}/a,{tmp_path}/run]")


def test_a_list_is_one_name_from_everywhere(tmp_path, monkeypatch):
    fill(tmp_path, *DEEP)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("a")
    assert places.same("[a,c]", f'["{tmp_path}/link", "./c"]')
    assert not places.same("[a,c]", "[c,a]")
    assert places.sources(places.each("[a,c]", os.path.abspath)) == [str(tmp_path / "a"), str(tmp_path / "c")]
    assert places.name_of("[a,c]") == "a"
    assert places.name_of("photos/*.png") == "photos"
    for out in ("a/x", "c"):
        with pytest.raises(ValueError, match="where its figures would be taken for images"):
            places.check_apart(Path(out), data="[a,c]")
    with pytest.raises(ValueError, match="a folder for results alone"):
        places.check_apart(Path("."), data="[a,c]")
    with pytest.raises(ValueError, match="out=c/x lies in val=c"):
        places.check_apart(Path("c/x"), data="digits", val="c")
    places.check_apart(Path("b"), data="[a,c]", val=None)


def test_any_named_data_set_is_trained_on_without_labels():
    data = load("digits", root="", download=False, long_tail=None, seed=0, labels=False)
    assert (len(data.train.labels), data.classes, len(data.test.labels)) == (1347, (), min(RANKED, 1347))
    with pytest.raises(ValueError, match=r"long_tail=0.5 is of classes, but the images in data=digits have no labels"):
        load("digits", root="", download=False, long_tail=0.5, seed=0, labels=False)


def test_a_long_tail_needs_classes(tmp_path, capsys):
    fill(tmp_path / "flat", *FLAT)
    (tmp_path / "kept.txt").write_text("0 1")
    for given in ({"long_tail": 0.5}, {"indices": tmp_path / "kept.txt"}):
        assert dystress("long-tail", {"data": tmp_path / "flat", "out": tmp_path / "tail", **given}) == 2
        assert f"data={tmp_path}/flat has no class folders, but a long tail is of classes." in capsys.readouterr().err


# --- Names and formats

FORMATS = {
    end: kind for end, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind in Image.SAVE
}


def saved(path, kind):
    """Whether a picture could be written in a format."""
    try:
        Image.fromarray(np.full((16, 16, 3), 9, np.uint8)).save(path, kind)
    except Exception:  # formats without RGB, sizes of their own, or an encoder that is not there
        return False
    return True


def test_whatever_pillow_writes_and_reads_is_an_image_under_any_name(tmp_path):
    found = set()
    for number, (end, kind) in enumerate(FORMATS.items()):
        if kind in pictures.TOLD_ALONE or not saved(tmp_path / f"{number}{end}", kind):
            continue
        found.add(kind)
        for name in (f"{number}{end.upper()}", f"{number}", f"{number}.scan", f"{number}.v2"):
            shutil.copy(tmp_path / f"{number}{end}", tmp_path / name)
    assert {"PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM"} <= found
    files = [str(path) for path in tmp_path.iterdir()]
    assert [file for file in files if not pictures.is_picture(file) or fault(file)] == []
    assert len(load_folder(tmp_path).train.labels) == len(files)


def test_what_is_no_image_is_none_whatever_it_is_called(tmp_path):
    fill(tmp_path, "1.png")
    for name, content in {
        "features.h5": b"\x89HDF\r\n\x1a\n" + bytes(64),
        "film.mpg": b"\x00\x00\x01\xb3" + bytes(64),
        "table.csv": b"a,b\n",
        "README": b"hello",
        "empty": b"",
        "._2.txt": b"\0",
    }.items():
        (tmp_path / name).write_bytes(content)
    scan = scan_folder(str(tmp_path), tmp_path / "run", on_bad_image="stop", num_workers=0, progress=False)
    assert (scan.good, scan.bad) == (1, {})


def test_of_several_frames_the_first_is_taken_and_this_is_said_once(tmp_path, capsys):
    frames = [Image.new("RGB", (12, 12), color) for color in ("red", "blue")]
    for name in ("a.gif", "b.tif", "c.png", "d.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    fill(tmp_path, "one.png")
    for _ in range(2):
        scan_folder(str(tmp_path), tmp_path / "run", on_bad_image="stop", num_workers=0, progress=False)
    assert capsys.readouterr().err.count("several frames") == 1
    for name in ("a.gif", "b.tif", "c.png", "d.webp"):
        assert pictures.read(str(tmp_path / name)).getpixel((3, 3)) == (255, 0, 0)
    folders.say.cache_clear()
    scan_folder(str(tmp_path), tmp_path / "run", on_bad_image="stop", num_workers=0, progress=False)
    assert f"dystress: 4 files in {tmp_path} have several frames, such as a.gif: the first is used." in (
        capsys.readouterr().err
    )


# --- Runs


def test_the_effective_rank_is_that_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    share = [float(s) for s in torch.linalg.svdvals(z) / torch.linalg.svdvals(z).sum()]
    assert float(metrics.effective_rank(z)) == pytest.approx(math.exp(-sum(p * math.log(p) for p in share)))
    assert float(metrics.effective_rank(torch.eye(5).repeat(3, 1))) == pytest.approx(5)
    assert float(metrics.effective_rank(torch.ones(9, 4))) == pytest.approx(1, abs=1e-4)
    assert float(metrics.effective_rank(torch.zeros(9, 4))) == 1
    with pytest.raises(ValueError, match="rows"):
        metrics.effective_rank(torch.zeros(4))


@pytest.fixture
def flat(images, tmp_path):
    """The images of the class folders in one."""
    (tmp_path / "flat").mkdir()
    for number, file in enumerate(sorted(images.glob("*/*.png"))):
        shutil.copy(file, tmp_path / "flat" / f"{number}.png")
    return tmp_path / "flat"


def test_a_run_without_labels_measures_what_needs_none(flat, images, tiny, tmp_path, capsys):
    out = Path(tiny["out"])
    given = tiny | {"data": flat, "epochs": 2, "map": "true", "protocols": "[linear]"}
    assert dystress("pretrain", given) == 0
    printed = capsys.readouterr()
    assert "24 images without labels, none held out; kNN and linear probe" in printed.err
    assert "effective rank" in printed.out
    assert "accuracy" not in printed.out
    with (out / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert "knn_top1" not in table[0]
    assert {"loss", "effective_rank", "tau_positive_mean", "alignment", "uniformity"} <= set(table[0])
    summary = json.loads((out / "summary.json").read_text())
    assert not any("top1" in name for name in summary)
    for name in ("loss", "alignment", "uniformity", "effective_rank"):
        assert summary[name] == pytest.approx(float(table[-1][name]), rel=1e-4)
    assert 1 <= summary["untrained_effective_rank"] <= 24
    assert (out / "map.csv").read_text().count("no label") == 24
    assert dystress("pretrain", given) == 0  # it is finished, and stays so
    assert (out / "figures" / "curves.png").exists()

    capsys.readouterr()
    assert dystress("evaluate", {"checkpoint": out, "accelerator": "cpu"}) == 0
    assert json.loads(capsys.readouterr().out) == {"effective_rank": pytest.approx(summary["effective_rank"], rel=1e-4)}
    assert dystress("evaluate", {"checkpoint": out, "accelerator": "cpu", "data": images}) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"knn_top1", "linear_top1"}
    network = {"methods": "[]", "constants": "[0.1]"}
    assert dystress("inspect", {"checkpoint": out, **network}) == 0
    assert dystress("report", {"runs": f"[{out}]", "out": tmp_path / "page"}) == 0
    with (tmp_path / "page" / "results.csv").open() as file:
        rows = {(row["name"], row["protocol"]): float(row["value"]) for row in csv.DictReader(file)}
    assert rows["dystress", "loss"] == pytest.approx(summary["loss"])
    assert rows["untrained", "effective_rank"] == pytest.approx(summary["untrained_effective_rank"])
    assert len(rows) == 5
    page = (tmp_path / "page" / "report.html").read_text()
    assert "The images have no labels" in page
    assert "accuracy in %" not in page


def test_other_data_with_labels_is_evaluated_on(flat, images, tiny, capsys):
    given = tiny | {"data": flat, "epochs": 1, "val": images, "on_bad_image": "skip"}
    (images / "class1" / "bad.png").write_bytes(b"")
    assert dystress("pretrain", given) == 0
    summary = json.loads(Path(tiny["out"], "summary.json").read_text())
    assert {"knn_top1", "untrained_linear_top1"} <= set(summary)
    said = capsys.readouterr().err
    assert "24 images without labels" in said
    assert f"1 of 25 files in {images} cannot be used and are left out" in said
    assert dystress("evaluate", {"checkpoint": tiny["out"], "accelerator": "cpu"}) == 0
    own = json.loads(capsys.readouterr().out)
    assert own == {name: pytest.approx(summary[name]) for name in ("knn_top1", "linear_top1")}
    (images / "class1" / "bad.png").unlink()
    assert dystress("evaluate", {"checkpoint": tiny["out"], "accelerator": "cpu", "data": images}) == 0
    assert json.loads(capsys.readouterr().out) == own
    for out, labels in ((tiny["out"] + "2", "false"), (tiny["out"] + "3", "null")):  # the same images, without and with
        assert dystress("pretrain", tiny | {"data": images, "epochs": 1, "labels": labels, "out": out}) == 0
        capsys.readouterr()
        assert dystress("evaluate", {"checkpoint": out, "accelerator": "cpu", "labels": "true"}) == 0
        assert set(json.loads(capsys.readouterr().out)) == set(own)
        assert dystress("evaluate", {"checkpoint": out, "accelerator": "cpu", "labels": "false"}) == 0
        assert set(json.loads(capsys.readouterr().out)) == {"effective_rank"}
    (images / "class1" / "0.png").unlink()
    Path(tiny["out"], "summary.json").unlink()
    assert dystress("pretrain", given) == 2
    assert f"val={images} has other images than this run began with" in capsys.readouterr().err


def test_a_run_is_not_gone_on_with_where_its_images_are_read_otherwise_now(flat, tiny, capsys, quick):
    given = tiny | {"data": flat, "epochs": 1}
    assert dystress("pretrain", given) == 0
    Path(tiny["out"], "summary.json").unlink()
    for name in "ab":
        (flat / name).mkdir()
    for number, file in enumerate(sorted(flat.glob("*.png"))):
        file.rename(flat / "ab"[number % 2] / file.name)
    capsys.readouterr()
    assert dystress("pretrain", given) == 2
    assert "is read as class folders, but was read as images without labels when this run began" in (
        capsys.readouterr().err
    )
    assert dystress("pretrain", given | {"labels": "false"}) == 2  # other names


def test_other_data_without_labels_cannot_be_evaluated_on(flat, images, tiny, capsys):
    assert dystress("pretrain", tiny | {"val": flat}) == 2
    assert "has no class folders" in capsys.readouterr().err
