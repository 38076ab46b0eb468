import errno
import io
import json
import os
import socket
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import dystress, scan_folder, write_images  # beside this file
from PIL import Image
from torchvision.datasets import ImageFolder

from dystress_plugin.experiment.data import scan as images_module
from dystress_plugin.experiment.data.datasets import load
from dystress_plugin.experiment.data.folders import class_files
from dystress_plugin.experiment.data.scan import fault, read
from dystress_plugin.experiment.io import files, pictures


def png(size=12):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3)).astype(np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def bomb(side):
    """A PNG of a few hundred bytes that says it has side x side pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


BAD = {
    "class0/empty.png": (b"", "empty file"),
    "class0/letter.jpg": (b"dear reader", "no image"),
    "class0/cut.png": (png()[:-40], "damaged: "),
    "class1/flipped.png": (png()[:100] + bytes([png()[100] ^ 1]) + png()[101:], "damaged: "),
    "class1/large.png": (bomb(12_000), "decompression bomb"),
    "class2/huge.png": (bomb(60_000), "decompression bomb"),
}


@pytest.fixture
def mixed(images):
    """Class folders with bad files, and others that are no images and do not pretend to be."""
    for name, (content, _) in BAD.items():
        (images / name).write_bytes(content)
    (images / "class0" / "notes.txt").write_text("which camera")
    (images / "class0" / ".DS_Store").write_bytes(b"\0")
    (images / "class1" / "really_a.jpg").write_bytes(png())  # a PNG by content, which is as good
    (images / "class2" / "photo.dat").write_bytes(png())  # and so is this
    return images


@pytest.mark.parametrize("name", BAD)
def test_every_kind_of_fault_is_told(name, mixed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert BAD[name][1] in fault(str(mixed / name))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_scan_lists_the_bad_files_and_no_other(workers, mixed, tmp_path):
    scan = scan_folder(str(mixed), tmp_path / "run", on_bad_image="skip", num_workers=workers, progress=False)
    assert set(scan.bad) == set(BAD)
    assert scan.good == 26


def test_training_stops_before_it_begins_and_all_files_are_listed(mixed, tiny, capsys, quick):
    assert dystress("pretrain", tiny) == 2
    said = capsys.readouterr().err
    assert f"6 of 32 files in {mixed} cannot be used" in said
    assert said.count("\n  class") == images_module.SHOWN
    assert "and 1 more" in said
    assert "on_bad_image=skip" in said
    listed = json.loads(Path(tiny["out"], "images.json").read_text())
    assert (set(listed["bad"]), listed["good"]) == (set(BAD), 26)
    assert not Path(tiny["out"], "config.yaml").exists()

    for name in BAD:
        (mixed / name).unlink()
    assert dystress("pretrain", tiny | {"epochs": 1}) == 0
    assert json.loads(Path(tiny["out"], "images.json").read_text())["bad"] == {}


def test_training_goes_on_with_the_rest_and_remembers_which(mixed, tiny, capsys, monkeypatch, quick):
    settings = tiny | {"on_bad_image": "skip", "epochs": 1, "batch_size": 9}
    assert dystress("pretrain", settings) == 0
    assert f"6 of 32 files in {mixed} cannot be used and are left out" in capsys.readouterr().err
    data = load(str(mixed), root="", download=False, long_tail=None, seed=0, without=read(Path(tiny["out"])).left_out)
    used = [str(Path(file).relative_to(mixed)) for part in (data.train, data.test) for file in part.files]
    assert len(used) == len(set(used)) == 26
    assert not set(used) & set(BAD)

    # To resume decodes nothing again, and to evaluate leaves the same files out.
    monkeypatch.setattr(images_module, "fault", lambda file: pytest.fail("decoded again"))
    Path(tiny["out"], "summary.json").unlink()
    assert dystress("pretrain", settings) == 0
    assert dystress("evaluate", {"checkpoint": tiny["out"], "accelerator": "cpu"}) == 0


def test_other_images_than_a_run_began_with_are_refused(images, tiny, capsys, quick):
    assert dystress("pretrain", tiny | {"epochs": 1}) == 0
    (images / "class0" / "0.png").unlink()
    assert dystress("pretrain", tiny | {"epochs": 1}) == 2
    assert "has other images than this run began with: 23 that can be used now, 24 then" in capsys.readouterr().err
    (images / "class0" / "0.png").write_bytes(png())  # another time and size, but the same names
    assert dystress("pretrain", tiny | {"epochs": 1}) == 0


def test_the_same_images_by_another_spelling_of_the_folder_are_left_out(mixed, tmp_path):
    scan = scan_folder(f"{mixed}/", tmp_path / "run", on_bad_image="skip", num_workers=0, progress=False)
    data = load(f"{mixed}/.", root="", download=False, long_tail=None, seed=0, without=scan.left_out)
    assert len(data.train.labels) + len(data.test.labels) == 26


def test_parts_are_both_scanned(tmp_path):
    for part in ("train", "val", "else"):
        write_images(tmp_path / part, per_class=2)
        (tmp_path / part / "class1" / "0.png").write_bytes(b"")
    scan = scan_folder(str(tmp_path), tmp_path / "run", on_bad_image="skip", num_workers=0, progress=False)
    assert set(scan.bad) == {"train/class1/0.png", "val/class1/0.png"}
    assert scan.good == 10


def test_a_class_without_a_usable_image_is_an_error(images, tiny, capsys):
    for file in (images / "class1").glob("*.png"):
        file.write_bytes(b"")
    assert dystress("pretrain", tiny | {"on_bad_image": "skip"}) == 2
    assert "Class 'class1' has no image left" in capsys.readouterr().err


def test_an_empty_class_folder_is_an_error(images, tiny, capsys):
    (images / "class9").mkdir()
    assert dystress("pretrain", tiny) == 2
    said = capsys.readouterr().err
    assert "no readable folder of class folders" in said
    assert "class9" in said


def test_an_unknown_choice_is_an_error(tiny, capsys):
    assert dystress("pretrain", tiny | {"on_bad_image": "skp"}) == 2
    assert "Unknown on_bad_image 'skp'. Did you mean 'skip'?" in capsys.readouterr().err


def bind(path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(path))  # whose length is limited


NO_FILE = "no regular file, but a folder, pipe, socket or device"
NOT_THERE = "a link to what is not there"
LOOP = "a link to a folder that it lies in"
CIRCLE = "Too many levels of symbolic links"
# What makes a path unreadable and why, each in a folder of its own; a pipe and a device would never end.
UNREADABLE = {
    "dangling.png": (lambda path: path.symlink_to("nowhere.png"), NOT_THERE),
    "DANGLING.JPG": (lambda path: path.symlink_to(path.parent / "nowhere"), NOT_THERE),
    "more": (lambda path: path.symlink_to("unmounted"), NOT_THERE),  # of images, perhaps
    "circle.png": (lambda path: path.symlink_to(path.name), CIRCLE),
    "pipe.png": (os.mkfifo, NO_FILE),
    "endless.png": (lambda path: path.symlink_to("/dev/zero"), NO_FILE),
    "socket.png": (bind, NO_FILE),
    "long.png": (lambda path: path.symlink_to("x" * 300), "File name too long"),
    os.fsdecode(b"caf\xe9.png"): (lambda path: path.write_bytes(b"dear reader"), "no image that Pillow can read"),
    "self": (lambda path: path.symlink_to("."), LOOP),
    "again": (lambda path: path.symlink_to("../class1"), LOOP),
    "up": (lambda path: path.symlink_to("../.."), LOOP),
}


@pytest.fixture
def unreadable(images, monkeypatch):
    """Class folders with everything that cannot be read, and class folders that cannot."""
    monkeypatch.chdir(images)
    for name, (make, _) in UNREADABLE.items():
        make(images / "class1" / name)
    (images / "class_unmounted").symlink_to("/nowhere")
    (images / "class_circle").symlink_to("class_circle")
    (images / "class_loop").symlink_to("..")
    reasons = {f"class1/{name}": reason for name, (_, reason) in UNREADABLE.items()}
    return reasons | {"class_unmounted": NOT_THERE, "class_circle": CIRCLE, "class_loop": LOOP}


@pytest.mark.parametrize("name", [name for name, (_, reason) in UNREADABLE.items() if reason != LOOP])
def test_no_file_that_cannot_be_read_holds_up_the_scan_or_the_reading(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    UNREADABLE[name][0](tmp_path / name)
    assert fault(str(tmp_path / name)) == UNREADABLE[name][1]
    with pytest.raises(pictures.BadPicture) as error:
        pictures.read(str(tmp_path / name))
    assert str(error.value) == f"{tmp_path / name} cannot be read as an image: {UNREADABLE[name][1]}"


def test_what_does_not_pretend_to_be_an_image_is_left_alone(images):
    os.mkfifo(images / "class0" / "pipe")
    os.mkfifo(images / "pipe.png")  # in no class
    (images / "class0" / ".#notes.txt").symlink_to("user@machine:1")  # an editor's lock
    (images / "notes.txt").write_text("which camera")
    (images / "class0" / "folder.png").mkdir()
    (images / "class0" / "folder.png" / "IMAGE.PNG").write_bytes(png())
    scan = scan_folder(str(images), images.parent / "run", on_bad_image="stop", num_workers=0, progress=False)
    assert (scan.good, scan.bad) == (25, {})


def test_what_cannot_be_read_is_listed_and_stops_or_is_skipped_everywhere(unreadable, images, tiny, capsys, quick):
    assert dystress("pretrain", tiny) == 2
    said = capsys.readouterr().err
    assert f"{len(unreadable)} of {24 + len(unreadable)} files in {images} cannot be used" in said
    assert "last finished epoch" not in said
    assert json.loads(Path(tiny["out"], "images.json").read_text())["bad"] == unreadable
    assert dystress("pretrain", tiny | {"epochs": 1, "on_bad_image": "skip"}) == 0
    assert dystress("evaluate", {"checkpoint": tiny["out"], "accelerator": "cpu"}) == 0
    data = load(str(images), root="", download=False, long_tail=None, seed=0, without=read(Path(tiny["out"])).left_out)
    assert data.classes == ("class0", "class1", "class2")
    assert len(data.train.labels) + len(data.test.labels) == 24


def test_commands_without_a_scan_miss_no_class_in_silence(unreadable, images, tmp_path, capsys):
    assert dystress("long-tail", {"data": images, "long_tail": 1, "out": tmp_path / "tail"}) == 2
    assert capsys.readouterr().err.startswith(f"dystress: {images}/class_")
    for name in unreadable:
        (images / name).unlink()
    assert dystress("long-tail", {"data": images, "long_tail": 1, "out": tmp_path / "tail"}) == 0


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("call", ["stat", "open"])
def test_an_error_of_the_system_is_the_files_and_not_believed_when_it_is_gone(
    number, call, images, tiny, monkeypatch, capsys, quick
):
    target = str(images / "class2" / "3.png")
    module = {"stat": os, "open": pictures}[call]
    working = getattr(module, call, open)

    def failing(file, *args, **kwargs):
        if file == target:
            raise OSError(number, os.strerror(number), file)
        return working(file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, call, failing, raising=False)
        assert dystress("pretrain", tiny) == 2
    assert capsys.readouterr().err.splitlines()[-2] == f"  class2/3.png: {os.strerror(number)}"
    scan = scan_folder(str(images), Path(tiny["out"]), on_bad_image="stop", num_workers=0, progress=False)
    assert scan.bad == {}


def test_a_folder_below_that_cannot_be_listed_is_told(images, tmp_path, monkeypatch):
    deep = images / "class0" / "deep"
    deep.mkdir()
    monkeypatch.chdir(deep)
    for _ in range(20):  # beyond what a path may have, which is 4096 on Linux
        os.mkdir("x" * 250)
        os.chdir("x" * 250)
    Path("lost.png").write_bytes(png())
    scan = scan_folder(str(images), tmp_path / "run", on_bad_image="skip", num_workers=0, progress=False)
    assert scan.good == 24
    assert list(scan.bad.values()) == ["File name too long"]
    assert all(name.startswith("class0/deep/x") for name in scan.bad)


def test_the_files_are_those_of_torchvision_in_its_order(images):
    for name in ("b/2.png", "b/10.png", "b-c/1.png", "B/1.png", "b/x/1.png", ".1.png", "é/1.JPG"):
        (images / "class0" / name).parent.mkdir(exist_ok=True)
        (images / "class0" / name).write_bytes(png())
    (images / "elsewhere").mkdir()
    for name in ("1.png", "2.png"):
        (images / "elsewhere" / name).write_bytes(png())
    (images / "class1" / "link").symlink_to("../elsewhere")
    (images / "class1" / "twin").symlink_to("../elsewhere")  # twice is what was asked for
    (images / "class1" / "same.png").symlink_to("0.png")
    found, faults = class_files(images)
    reference = ImageFolder(str(images))
    assert (list(found), faults) == (reference.classes, {})
    assert [file for files in found.values() for file in files] == [file for file, _ in reference.samples]
    data = load(str(images), root="", download=False, long_tail=None, seed=0)
    files = np.concatenate([data.train.files, data.test.files])
    labels = np.concatenate([data.train.labels, data.test.labels])
    assert sorted(zip(files.tolist(), labels.tolist(), strict=True)) == sorted(reference.samples)


def test_folders_may_have_names_in_another_encoding(images, tmp_path):
    os.rename(images / "class1", os.fsencode(images) + b"/caf\xe9")
    data = os.fsdecode(os.fsencode(images) + b"\xe9")
    images.rename(data)
    network = {"backbone": "test_resnet", "image_size": 12, "methods": "[]", "constants": "[0.1]"}
    assert dystress("inspect", {"data": data, "out": tmp_path / "inspect", **network}) == 0
    assert dystress("long-tail", {"data": data, "long_tail": 1, "out": tmp_path / "tail"}) == 0
    assert b"caf\xe9" in os.listdir(os.fsencode(tmp_path / "tail" / "train"))
    files.write_text(tmp_path / "table.csv", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "table.csv").read_text() == r"caf\udce9"


@pytest.mark.parametrize("links", [{"loop": "."}, {"a": ".", "b": "."}, {"a": "../class1"}])
def test_links_that_lead_back_end(links, images):
    """Two of them are followed 2^40 times by torchvision."""
    for label in range(3):
        for name, target in links.items():
            (images / f"class{label}" / name).symlink_to(target)
    (images / "class1" / "across").symlink_to("../class0")
    found, faults = class_files(images)
    files = [file for files in found.values() for file in files]
    assert len(files) == len(set(files)) <= 4 * 24
    assert set(map(os.path.realpath, files)) == {str(file) for file in images.resolve().glob("*/*.png")}
    assert set(faults.values()) == {LOOP}
