import io
import json
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import dystress, write_images  # beside this file
from PIL import Image

from dystress_plugin.experiment import images as images_module
from dystress_plugin.experiment.data import load
from dystress_plugin.experiment.images import fault, left_out, scan_folder


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
    "class2/photo.dat": (png(), "a PNG image whose name does not end like one"),
}


@pytest.fixture
def mixed(images):
    """Class folders with bad files, and others that are no images and do not pretend to be."""
    for name, (content, _) in BAD.items():
        (images / name).write_bytes(content)
    (images / "class0" / "notes.txt").write_text("which camera")
    (images / "class0" / ".DS_Store").write_bytes(b"\0")
    (images / "class1" / "really_a.jpg").write_bytes(png())  # a PNG by content, which is as good
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
    assert scan.good == 25


def test_training_stops_before_it_begins_and_all_files_are_listed(mixed, tiny, capsys, quick):
    assert dystress("pretrain", tiny) == 2
    said = capsys.readouterr().err
    assert f"7 of 32 files in {mixed} cannot be used" in said
    assert said.count("\n  class") == images_module.SHOWN
    assert "and 2 more" in said
    assert "on_bad_image=skip" in said
    listed = json.loads(Path(tiny["out"], "images.json").read_text())
    assert (set(listed["bad"]), listed["good"]) == (set(BAD), 25)
    assert not Path(tiny["out"], "config.yaml").exists()

    for name in BAD:
        (mixed / name).unlink()
    assert dystress("pretrain", tiny | {"epochs": 1}) == 0
    assert json.loads(Path(tiny["out"], "images.json").read_text())["bad"] == {}


def test_training_goes_on_with_the_rest_and_remembers_which(mixed, tiny, capsys, monkeypatch, quick):
    settings = tiny | {"on_bad_image": "skip", "epochs": 1, "batch_size": 9}
    assert dystress("pretrain", settings) == 0
    assert f"7 of 32 files in {mixed} cannot be used and are left out" in capsys.readouterr().err
    data = load(
        str(mixed), root="", download=False, long_tail=None, seed=0, without=left_out(Path(tiny["out"]), str(mixed))
    )
    used = [str(Path(file).relative_to(mixed)) for part in (data.train, data.test) for file in part.files]
    assert len(used) == len(set(used)) == 25
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
    assert len(data.train.labels) + len(data.test.labels) == 25


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
