import itertools
import json
import os
import random
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dystress, scan_folder, write_images  # beside this file
from omegaconf import OmegaConf
from PIL import Image
from torchvision.datasets import ImageFolder

from dystress_plugin.cli import main
from dystress_plugin.experiment import places
from dystress_plugin.experiment.data import datasets as data_module
from dystress_plugin.experiment.data import folders, scan
from dystress_plugin.experiment.data.datasets import load, load_evaluated, load_for_run
from dystress_plugin.experiment.evaluate import command as evaluation
from dystress_plugin.experiment.evaluate import scores
from dystress_plugin.experiment.inspect import command as inspection
from dystress_plugin.experiment.io.config import read_config
from dystress_plugin.experiment.report import command as report_command
from dystress_plugin.experiment.report import cost, records

TRAIN = ["train", "training", "trn", "trainset", "training_set", "train-images"]
VAL = ["val", "valid", "validation", "dev", "eval", "val_set"]
TEST = ["test", "testing", "tst", "test set", "testset"]


def load_folder(path, **settings):
    return load(str(path), root="", download=False, long_tail=None, seed=0, **settings)


def make(root, *paths):
    """Empty folders."""
    for path in paths:
        (root / path).mkdir(parents=True)
    return root


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def square():
    return Image.fromarray(np.full((12, 12, 3), 9, np.uint8))


# --- Splits and classes


@pytest.mark.parametrize("case", [str.lower, str.upper, str.title])
def test_splits_are_read_in_every_spelling(case, tmp_path):
    for number, (train, held_out) in enumerate(itertools.product(map(case, TRAIN), map(case, [*VAL, *TEST]))):
        root = make(tmp_path / str(number), f"{train}/cat", f"{train}/dog", f"{held_out}/cat", f"{held_out}/dog")
        assert folders.read(root).splits == [train, held_out]


@pytest.mark.parametrize("held_out", ["valid", "Test", "dev", "validation"])
def test_nothing_held_out_is_trained_on(held_out, tmp_path, capsys):
    write_images(tmp_path / "train", per_class=5)
    write_images(tmp_path / held_out, per_class=2)
    data = load_folder(tmp_path)
    assert {Path(file).relative_to(tmp_path).parts[0] for file in data.train.files} == {"train"}
    assert {Path(file).relative_to(tmp_path).parts[0] for file in data.test.files} == {held_out}
    assert (len(data.train.labels), len(data.test.labels), data.classes) == (15, 6, ("class0", "class1", "class2"))
    assert f"trained on train, accuracies on {held_out}." in capsys.readouterr().err


def test_of_three_splits_validation_is_measured_and_the_line_says_so_and_it_is_kept(tmp_path, capsys):
    for part, each in (("train", 5), ("valid", 2), ("test", 3)):
        write_images(tmp_path / "d" / part, per_class=each)
    data = load_folder(tmp_path / "d")
    assert (len(data.train.labels), len(data.test.labels)) == (15, 6)
    assert "trained on train, accuracies on valid; not used: test." in capsys.readouterr().err
    scan = scan_folder(str(tmp_path / "d"), tmp_path / "run", on_bad_image="stop", num_workers=0, progress=False)
    assert (scan.splits, scan.good) == (["train", "valid"], 21)


@pytest.mark.parametrize(
    ("paths", "splits", "unused"),
    [
        # Kaggle: intel image classification, ASL alphabet, cats and dogs, chest X-rays with their second copy
        (
            ["seg_train/seg_train/*", "seg_test/seg_test/*", "seg_pred/seg_pred"],
            ["seg_train/seg_train", "seg_test/seg_test"],
            ("seg_pred",),
        ),
        (["asl_train/asl_train/*", "asl_test/*"], ["asl_train/asl_train", "asl_test"], ()),
        (
            ["training_set/training_set/*", "test_set/test_set/*"],
            ["training_set/training_set", "test_set/test_set"],
            (),
        ),
        (["train/*", "val/*", "test/*", "chest/train/*", "__MACOSX/chest"], ["train", "val"], ("chest", "test")),
        (["train2017/*", "val2017/*", "annotations"], ["train2017", "val2017"], ("annotations",)),
        (["TrainImages/*", "TestImages/*"], ["TrainImages", "TestImages"], ()),
        (["1_train/*", "2_val/*"], ["1_train", "2_val"], ()),
        (["ILSVRC2012_img_train/*", "ILSVRC2012_img_val/*"], ["ILSVRC2012_img_train", "ILSVRC2012_img_val"], ()),
        (["trainval/*", "test/*"], ["trainval", "test"], ()),
        # In a split every name is a class.
        (["train/train", "train/bus", "val/train", "val/bus"], ["train", "val"], ()),
    ],
)
def test_layouts_that_tools_and_people_export(paths, splits, unused, tmp_path):
    for path in paths:
        make(tmp_path, *(path.replace("*", name) for name in (["cat", "dog"] if "*" in path else [""])))
    layout = folders.read(tmp_path)
    assert (layout.splits, layout.unused) == (splits, unused)


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["train", "car", "bus"], ["'train' would be a split, or a class like 'bus', 'car'", "rename 'train'"]),
        (["train/cat", "train/dog", "cat"], ["'train' would be a split, or a class like 'cat'", "{}/train"]),
        (["test", "car", "bus"], ["'test' would be a split, or a class like 'bus', 'car'"]),
        (["valid", "invalid"], ["'valid' would be a split, or a class like 'invalid'", "such as to 'valids'"]),
        (["train/cat", "train/dog"], ["has 'train', read as a split, but not something held out", "{}/train"]),
        (["valid/cat", "test/cat"], ["has 'test', 'valid', read as a split, but not train"]),
        (["train/cat", "Train/cat", "val/cat"], ["ambiguous: 'Train', 'train' mean 'train'"]),
        (["train/cat", "val/cat", "valid/cat"], ["ambiguous: 'val', 'valid' mean 'val'"]),
        (["train_1/cat", "train_2/cat", "test_1/cat"], ["'train_1', 'train_2' mean 'train'"]),
        (["train", "test"], ["{}/train has no class folders", "if 'train' is a class, rename 'train'"]),
        (["train", "test", "car"], ["{}/train has no class folders", "if 'train' is a class"]),
        (["train/cat", "train/dog", "test"], ["{}/test has no class folders"]),
    ],
)
def test_what_can_be_read_in_two_ways_is_an_error_that_says_how(paths, words, tmp_path, square):
    for path in paths:
        square.save(make(tmp_path, path) / path / "0.png")
    with pytest.raises(ValueError, match="data=") as caught:
        load_folder(tmp_path)
    assert "\n" not in str(caught.value)
    assert all(word.format(tmp_path) in str(caught.value) for word in words)


def test_splits_inside_of_classes_are_an_error(tmp_path):
    for name, part in itertools.product(("cat", "dog"), ("train", "Test")):
        write_images(tmp_path / name / part, classes=1)
    with pytest.raises(ValueError, match=r"cat is read as a class, but has the splits 'Test', 'train'"):
        load_folder(tmp_path)


def test_an_inner_folder_of_an_archive_is_named(tmp_path):
    for part in ("train", "val"):
        write_images(tmp_path / "archive" / part, per_class=2)
    with pytest.raises(ValueError, match=f"or give data={tmp_path}/archive$"):
        load_folder(tmp_path)
    write_images(tmp_path / "d" / "photos")
    with pytest.raises(ValueError, match=f"the single class 'photos'.* give data={tmp_path}/d/photos$"):
        load_folder(tmp_path / "d")


def test_splits_that_are_one_folder_are_an_error(tmp_path):
    write_images(tmp_path / "train")
    (tmp_path / "val").symlink_to("train")
    with pytest.raises(ValueError, match="has the same images in train and val: one is a link to the other"):
        load_folder(tmp_path)


@pytest.mark.parametrize("place", ["", "class1", "class1/inner"])
def test_a_folder_that_cannot_be_read_is_no_empty_one(place, images, tmp_path, monkeypatch):
    make(images, "class1/inner")
    scandir = os.scandir

    def deny(path):  # root, as whom tests may run, is denied nothing
        if Path(path) == images / place:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(ValueError, match=r"(no readable folder|cannot be listed).*: Permission denied"):
        load_folder(images)
    with pytest.raises(ValueError, match="Permission denied"):
        scan_folder(str(images), tmp_path / "run", on_bad_image="stop", num_workers=0, progress=False)
    if place:
        scan = scan_folder(str(images), tmp_path / "run", on_bad_image="skip", num_workers=0, progress=False)
        assert scan.bad == {place: "Permission denied"}


def test_the_way_out_of_an_error_is_one(tmp_path, square):
    for name in ("trains", "tests", "car"):
        make(tmp_path, name)
        for i in range(8):
            square.save(tmp_path / name / f"{i}.png")
    assert load_folder(tmp_path).classes == ("car", "tests", "trains")
    write_images(tmp_path / "train")
    assert load_folder(tmp_path / "train").num_classes == 3


CLASSES = [
    "bullet_train",
    "taxi",
    "test_tube",
    "Contest",
    "runs",
    "trains",
    "a b",
    "10",
    "9",
    "Ä",
    "ä",
    "devil",
    "wandb",
]


@pytest.mark.parametrize("seed", range(3))
def test_an_ordinary_folder_is_what_torchvision_makes_of_it(seed, tmp_path):
    draw = random.Random(seed)
    for name in draw.sample(CLASSES, 6):
        for _ in range(draw.randint(1, 6)):
            place = make(
                tmp_path,
                os.path.join(name, *draw.sample(["x", "Y", "1", "train"], draw.randint(0, 2)), str(draw.random())),
            )
            file = tmp_path / name / draw.choice(["b.PNG", "a.jpg", ".c.png", "10.bmp", "9.bmp", "notes.txt"])
            file.touch()
            (next(p for p in (place / name).rglob("*") if p.is_dir()) / "z.png").touch()
    layout = folders.read(tmp_path)
    ours, classes = data_module._image_folder(tmp_path, layout, ())
    theirs = ImageFolder(str(tmp_path))
    assert list(classes) == theirs.classes
    assert list(zip(ours.files.tolist(), ours.labels.tolist(), strict=True)) == theirs.samples
    assert layout.splits == []


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir", "lost+found", ".Trash-1000"])
def test_hidden_folders_are_no_classes_and_hold_no_images(hidden, images, tmp_path, square):
    before = load_folder(images)
    for place in (images, images / "class1", images / "class1" / "inner"):
        square.save(make(place, hidden) / hidden / "0.png")
        square.save(make(place, f"{hidden}/deep/er") / hidden / "deep" / "er" / "1.png")
    after = load_folder(images)
    assert after.classes == before.classes
    for part in ("train", "test"):
        assert getattr(after, part).files.tolist() == getattr(before, part).files.tolist()
    assert scan_folder(str(images), tmp_path / "run", on_bad_image="stop", num_workers=0, progress=False).good == 24


def test_hidden_folders_beside_and_in_splits_are_passed_over(tmp_path, square):
    for part in ("train", "val"):
        write_images(tmp_path / part, per_class=2)
        square.save(make(tmp_path, f"{part}/.ipynb_checkpoints") / part / ".ipynb_checkpoints" / "0.png")
    make(tmp_path, ".ipynb_checkpoints", "__MACOSX/train")
    assert folders.read(tmp_path).unused == ()
    assert load_folder(tmp_path).num_classes == 3


def test_names_that_are_no_folders_are_those_of_the_data_sets():
    assert set(places.NAMED) == set(data_module.BUILTIN)


# --- Results apart from images

COMMANDS = {
    "pretrain": {"backbone": "test_resnet", "accelerator": "cpu", "epochs": 1, "batch_size": 6, "image_size": 12},
    "compare": {"methods": "[simclr]", "backbone": "test_resnet", "accelerator": "cpu", "image_size": 12},
    "inspect": {"backbone": "test_resnet", "image_size": 12},
    "long-tail": {"long_tail": 0.5},
}


def nested(images, link):
    """(data, out) such that the one lies in the other, spelled in all ways."""
    up = f"{images.name}/../{images.name}"
    return {
        "in it": (images, images / "runs/x"),
        "in a class": (images, images / "class0/x"),
        "itself": (f"{images}/", f"{images}/."),
        "relative": (images, f"{images.name}/x"),
        "by ..": (up, f"{images.name}/class0/../x"),
        "data by a link": (link, images / "x"),
        "out by a link": (images, link / "x"),
        "data in out": (images, images.parent),
        "data in out by ..": (f"{up}/", f"{images}/.."),
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_out_and_data_inside_of_each_other_are_refused_before_anything(command, images, tmp_path, monkeypatch, capsys):
    link = tmp_path / "link"
    link.symlink_to(images)
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    for how, (data, out) in nested(images, link).items():
        assert dystress(command, COMMANDS[command] | {"data": data, "out": out}) == 2, how
        said = capsys.readouterr().err
        wanted = "lies in out=" if "data in" in how else "Give an out elsewhere"
        # inspect knows of the data only when it has seen that its folder is not in use
        assert wanted in said or (command == "inspect" and "is not empty. Choose another out" in said), (how, said)
        assert said.count("\n") == 1
        assert tree(tmp_path) == before, how


@pytest.mark.parametrize("command", ["pretrain", "compare", "inspect"])
def test_the_default_out_in_the_data_is_refused(command, images, monkeypatch, capsys):
    monkeypatch.chdir(images)
    before = tree(images)
    assert dystress(command, COMMANDS[command] | {"data": "."}) == 2
    said = capsys.readouterr().err
    assert "lies in data=., where its figures would be taken for images" in said
    assert f"Give an out elsewhere, such as out={images.parent}" in said
    assert tree(images) == before


@pytest.mark.parametrize("place", ["", "runs/", "runs/deep/er/", "class1/"])
@pytest.mark.parametrize(
    ("names", "writer"),
    [
        (["config.yaml", "images.json"], "dystress pretrain"),
        (["config.yaml", "metrics.csv"], "dystress pretrain"),
        (["compare.yaml"], "dystress compare"),
        (["inspect.json"], "dystress inspect"),
        (["results.csv", "report.html"], "dystress report"),
        (["long_tail.json"], "dystress long-tail"),
        (["hparams.yaml"], "Lightning"),
        (["wandb-metadata.json"], "wandb"),
    ],
)
def test_folders_that_commands_left_are_no_classes(place, names, writer, images, tmp_path, square):
    folder = make(images, f"{place}x/figures") / place / "x"
    square.save(folder / "figures" / "curves.png")
    for name in names:
        (folder / name).touch()
    message = f"x holds results of `?{writer}`?, which are no images"
    with pytest.raises(ValueError, match=message):
        load_folder(images)
    with pytest.raises(ValueError, match=message):
        scan_folder(str(images), tmp_path / "run", on_bad_image="skip", num_workers=0, progress=False)


def test_a_run_is_no_folder_of_images_but_a_written_long_tail_is(tmp_path, images):
    make(tmp_path, "run/figures")
    for name in ("config.yaml", "images.json"):
        (tmp_path / "run" / name).touch()
    with pytest.raises(ValueError, match="holds results of `dystress pretrain`, no images"):
        load_folder(tmp_path / "run")
    assert dystress("long-tail", {"data": images, "out": tmp_path / "lt", "long_tail": 0.5}) == 0
    assert load_folder(tmp_path / "lt").num_classes == 3


# --- The same folder, spelled otherwise


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A run in `project/runs/x` on a long tail of `project/photos`, trained from `project`, with a file left out."""
    root = tmp_path_factory.mktemp("home") / "project"
    write_images(root / "photos")
    (root / "photos" / "class0" / "bad.png").write_bytes(b"")
    (root / "keep.txt").write_text(" ".join(map(str, range(16))))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("dystress_plugin.experiment.pretrain.figures.curves", lambda *args: None)
        patch.setattr("dystress_plugin.experiment.pretrain.figures.profile", lambda *args: None)
        assert main(["pretrain", *RUN, "data=photos", "out=runs/x"]) == 0
    return root


RUN = [
    *("backbone=test_resnet", "image_size=12", "epochs=1", "batch_size=6", "accelerator=cpu", "progress=false"),
    *("on_bad_image=skip", "long_tail=0.5", "indices=keep.txt"),
]


@pytest.fixture
def own(project, tmp_path):
    """A copy that may be changed."""
    return Path(shutil.copytree(project, tmp_path / "copy", symlinks=True))


def spellings(root):
    """(working directory, data) that are all the same folder, `root/photos`."""
    (root.parent / "elsewhere").mkdir(exist_ok=True)
    for link, target in ((root / "link", "photos"), (root.parent / "elsewhere" / "home", root.parent)):
        if not link.is_symlink():
            link.symlink_to(target)
    up = os.path.relpath(root, root.parent / "elsewhere")
    return [
        (root, "photos"),
        (root, "photos/"),
        (root, "./photos/."),
        (root, "runs/../photos"),
        (root, str(root / "photos")),
        (root, "link"),
        (root / "photos", "."),
        (root / "runs", "../photos/class0/.."),
        (root.parent / "elsewhere", f"{up}/photos"),
        (root.parent / "elsewhere", f"home/{root.name}/link/"),
    ]


def sizes(monkeypatch):
    """Instead of accuracies the numbers of images."""

    def number(_, data, **rest):
        return {"train": len(data.train.labels), "test": len(data.test.labels)}

    monkeypatch.setattr(evaluation, "features_of", number)
    monkeypatch.setattr(evaluation, "score_features", lambda features, *rest: scores.Scores(features, [], None))


def test_evaluate_leaves_out_the_same_whatever_the_spelling(project, monkeypatch, capsys):
    sizes(monkeypatch)
    monkeypatch.chdir(project)
    assert main(["evaluate", "checkpoint=runs/x"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert expected["train"] < 16
    for here, data in spellings(project):
        monkeypatch.chdir(here)
        checkpoint = os.path.relpath(project / "runs" / "x", here)
        for given in ([], [f"data={data}"]):
            assert main(["evaluate", f"checkpoint={checkpoint}/", *given]) == 0, (here, data)
            printed = capsys.readouterr()
            assert json.loads(printed.out) == expected, (here, data)
            assert "no long tail" not in printed.err


def test_inspect_knows_the_runs_own_data_whatever_the_spelling(project, monkeypatch, tmp_path):
    monkeypatch.setattr(inspection.figures, "draw", lambda *args: None)
    found = []
    for number, (here, data) in enumerate(spellings(project)[3::2]):
        monkeypatch.chdir(here)
        out = tmp_path / str(number)
        given = {"checkpoint": project / "runs" / "x", "data": data, "methods": "[]", "constants": "[]", "out": out}
        assert dystress("inspect", given) == 0
        report = json.loads((out / "inspect.json").read_text())
        assert list(report["temperatures"]) == ["DySTreSS, this run's"]
        found.append(report["alignment"])
    assert len(set(found)) == 1


def test_protocols_and_cost_find_the_data_from_everywhere(project, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = project / "runs" / "x"
    settings = read_config(run / "config.yaml")
    backbone = scores.trained_backbone(run)[1]
    its = scores.features_of_run(backbone, run, settings, ["few_shot_1"])
    own = load_for_run(run, settings)
    assert own.own
    assert (
        len(its.train_labels) == len(own.data.train.labels) < len(its.pool_labels) == 17
    )  # and the one that was left out


def test_a_run_goes_on_whatever_the_spelling_and_not_with_other_data(own, monkeypatch, capsys, quick):
    last = own / "runs" / "x" / "checkpoints" / "last.ckpt"
    write_images(own / "others", per_class=9)
    for here, data in spellings(own):
        monkeypatch.chdir(here)
        (own / "runs" / "x" / "summary.json").unlink(missing_ok=True)
        paths = [f"data={data}", f"out={os.path.relpath(last.parent.parent, here)}/", f"indices={own}/runs/../keep.txt"]
        assert main(["pretrain", *RUN[:-1], *paths]) == 0, (here, data)
    capsys.readouterr()
    monkeypatch.chdir(own)
    assert main(["pretrain", *RUN, "data=others", "out=runs/x"]) == 2
    said = capsys.readouterr().err
    assert f"data={own}/others" in said or "has other images than this run began with" in said


def test_a_home_folder_is_found_by_its_tilde(project, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(project))
    sizes(monkeypatch)
    assert main(["evaluate", "checkpoint=~/runs/x", "data=~/photos"]) == 0
    assert json.loads(capsys.readouterr().out)["train"] < 16
    assert records.run_folders([Path("~/runs")]) == [(project / "runs" / "x").resolve()]


def as_of_0_1_0(run):
    """What version 0.1.0 left of a run: paths as typed, no digest of the index file, no record of the splits."""
    typed = {"data": "photos", "indices": "keep.txt", "out": "runs/x", "data_root": "datasets"}
    config = OmegaConf.load(run / "config.yaml")
    del config["indices_sha256"]
    config.settings.update(typed)
    OmegaConf.save(config, run / "config.yaml")
    scan = json.loads((run / "images.json").read_text())
    del scan["splits"]
    (run / "images.json").write_text(json.dumps(scan | {"folder": "photos"}))
    last = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["settings"] |= typed
    del checkpoint["settings"]["out"]
    torch.save(checkpoint, last)


def test_a_run_of_0_1_0_goes_on_here_and_from_elsewhere(own, tmp_path, monkeypatch, quick):
    run = own / "runs" / "x"
    as_of_0_1_0(run)
    (tmp_path / "else").mkdir()
    for here in (own, tmp_path / "else"):
        (run / "summary.json").unlink()
        monkeypatch.chdir(here)
        paths = [os.path.relpath(path, here) for path in (own / "photos", run, own / "keep.txt")]
        settings = [f"{key}={path}" for key, path in zip(("data", "out", "indices"), paths, strict=True)]
        assert main(["pretrain", *RUN[:-1], *settings]) == 0


@pytest.mark.parametrize("version", ["0.1.0", "now"])
@pytest.mark.parametrize("moved", [False, True])
def test_runs_are_evaluated_from_elsewhere_also_when_moved_with_their_data(
    version, moved, own, tmp_path, monkeypatch, capsys
):
    """Also those of 0.1.0, which kept the paths as they were typed."""
    if version == "0.1.0":
        as_of_0_1_0(own / "runs" / "x")
    else:  # the paths of the copy, not of what it is a copy of
        text = (own / "runs" / "x" / "config.yaml").read_text()
        old = OmegaConf.create(text).settings.out.removesuffix("/runs/x")
        (own / "runs" / "x" / "config.yaml").write_text(text.replace(old, str(own)))
    if moved:
        own = own.rename(tmp_path / "another place")
    sizes(monkeypatch)
    found = []
    (tmp_path / "else").mkdir()
    for here in (own, tmp_path / "else", own / "runs" / "x"):
        monkeypatch.chdir(here)
        assert main(["evaluate", f"checkpoint={own}/runs/x"]) == 0
        printed = capsys.readouterr()
        found.append(json.loads(printed.out)["train"])
        assert "other images" not in printed.err
    assert found[0] < 16
    assert len(set(found)) == 1


def test_data_that_is_gone_is_an_error_and_found_again_where_it_is_said_to_be(own, monkeypatch, tmp_path, capsys):
    """Its tail is not lost, while that of other data never was one."""
    monkeypatch.chdir(tmp_path)
    sizes(monkeypatch)
    config = own / "runs" / "x" / "config.yaml"
    config.write_text(config.read_text().replace(f"data: {read_config(config).data.name}", "data: /gone/photos"))
    checkpoint = f"checkpoint={own}/runs/x"
    (own / "photos").rename(tmp_path / "moved")
    assert main(["evaluate", checkpoint]) == 2
    assert (
        "was trained on data=/gone/photos, which is not there. Put it, or a link to it, there"
        in capsys.readouterr().err
    )
    assert main(["evaluate", checkpoint, "data=moved"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["train"] < 16
    assert "data=moved has the very files" in printed.err
    write_images(tmp_path / "others", per_class=12)
    assert main(["evaluate", checkpoint, "data=others"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["train"] == 27
    assert "data=others is not what" in printed.err
    assert "no long tail, indices or skipped files are left out" in printed.err


@pytest.fixture
def with_val(tmp_path, monkeypatch, quick):
    """The folder of a run `x` that was evaluated on `seen`, of which a file was left out, and that is `moved` now."""
    write_images(tmp_path / "photos")
    write_images(tmp_path / "seen", per_class=4)
    (tmp_path / "seen" / "class1" / "bad.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", *WITH_VAL, "val=seen"]) == 0
    (tmp_path / "seen").rename(tmp_path / "moved")
    return tmp_path


WITH_VAL = [*RUN[:-2], "data=photos", "out=x"]


def test_images_that_accuracies_are_of_are_found_where_they_are_said_to_be(with_val, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "features_of", lambda _, data, **rest: files_of(data))
    monkeypatch.setattr(evaluation, "score_features", lambda features, *rest: scores.Scores(features, [], None))
    gone = f"x was evaluated on val={with_val}/seen, which is not there. Put it, or a link to it, there"
    assert main(["evaluate", "checkpoint=x"]) == 2
    assert f"{gone}; `dystress evaluate` also takes val=FOLDER." in capsys.readouterr().err
    assert main(["report", "x", "protocols=[knn_1]", "out=page"]) == 2
    assert gone in capsys.readouterr().err
    assert main(["evaluate", "checkpoint=x", "val=moved"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"moved": 12}
    assert f"val=moved has the very files that x was evaluated on in {with_val}/seen" in printed.err
    write_images(with_val / "others")
    for given, found in (
        (["val=others"], {"others": 24}),
        (["data=others"], {"others": 24}),
        (["data=photos", "val=moved"], None),
        (["data=others", "val=photos"], None),
        (["labels=false", "val=photos"], None),
    ):
        assert main(["evaluate", "checkpoint=x", *given]) == (2 if found is None else 0)
        printed = capsys.readouterr()
        assert (json.loads(printed.out) if printed.out else None) == found
        assert ("not read with val=" in printed.err) == (found is None)
    assert main(["evaluate", "checkpoint=x", "val=nowhere"]) == 2
    assert "val=nowhere is neither a folder nor one of" in capsys.readouterr().err
    (with_val / "seen").symlink_to("moved")
    assert main(["evaluate", "checkpoint=x"]) == 0
    assert json.loads(capsys.readouterr().out) == {"seen": 12}


def test_accuracies_of_other_images_need_none_of_those_that_were_trained_on(with_val, monkeypatch, capsys):
    """Not theirs after the training either, and shown in the colours that the network knows."""
    config = OmegaConf.load("x/config.yaml")
    for data, normalize in (("cifar10", data_module.CIFAR), (f"{with_val}/gone", data_module.IMAGENET_NORMALIZE)):
        config.settings.data = data
        OmegaConf.save(config, "x/config.yaml")
        shown = load_evaluated(with_val / "x", read_config(with_val / "x" / "config.yaml"), val="moved")
        assert (files_of(shown), shown.normalize) == ({"moved": 12}, normalize)
    assert main(["evaluate", "checkpoint=x", "val=moved", "accelerator=cpu"]) == 0
    assert main(["evaluate", "checkpoint=x", "accelerator=cpu"]) == 2
    assert f"x was evaluated on val={with_val}/seen, which is not there" in capsys.readouterr().err
    (with_val / "moved").rename(with_val / "seen")
    assert main(["evaluate", "checkpoint=x", "accelerator=cpu"]) == 0
    assert {each.n for each in scores.score_run(with_val / "x", ["knn_1"])} == {3, 1}
    assert {each.n for each in scores.score_run(with_val / "x", ["knn_1"], untrained=True)} == {3, 1}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("one", "the single class 'class0'; accuracies need at least two. If the classes are in there, give val=one/"),
        (
            "split",
            "val=split has 'train', read as a split, but not something held out, such as val. Add it, or give val=",
        ),
        ("flat", "flat is no readable folder of class folders with images: it has no class folders. val needs labels:"),
        ("[]", "val=[] must be a list of folders, such as val=[imgs/a,imgs/b]."),
        ("flats", "val=flats has splits, but flats/train has no class folders, and accuracies need classes. Sort its"),
        ("tree", "tree/class0 is read as a class, but has the splits 'train', 'val'; all would be of it."),
        ("x", "val=x holds results of `dystress pretrain`, no images. Choose another val."),
        ("more data=/empty", "more data=/empty is no readable folder of class folders with images: no images in a;"),
        ("[one,split]", "val=[one,split] has no labels: they need one folder of class folders."),
    ],
)
def test_what_is_wrong_with_val_is_said_of_val_before_an_image_is_read(name, said, with_val, monkeypatch, capsys):
    monkeypatch.setattr(scan, "_bad", lambda *_: pytest.fail("decoded images"))
    for place in ("flat", "flats/train", "flats/val"):
        shutil.copytree(with_val / "photos" / "class0", with_val / place)
    make(with_val / "more data=" / "empty", "a")
    for place in ("class0/train", "class0/val", "class1"):
        write_images(with_val / "tree" / place)
    write_images(with_val / "one", classes=1)
    write_images(with_val / "split" / "train")
    for given in (["pretrain", *WITH_VAL[:-1], "out=y"], ["evaluate", "checkpoint=x"]):
        capsys.readouterr()
        assert main([*given, f"val={name}"]) == 2
        found = capsys.readouterr().err
        assert said in found
        assert not re.search("data=|labels=|held out for testing|quarter", found.replace(name, ""))


def test_what_is_found_out_later_is_said_of_val_as_well(tmp_path, capsys):
    write_images(tmp_path / "few", per_class=1)
    with pytest.raises(ValueError, match=r"val=.*few: a quarter of every class is held out for accuracies, but"):
        load_folder(tmp_path / "few", labels=True, key="val")
    with pytest.raises(ValueError, match="val=cifar10 is not in data_root="):
        load("cifar10", root=str(tmp_path), download=False, long_tail=None, seed=0, key="val")
    folders.say.cache_clear()
    load("digits", root="", download=False, long_tail=None, seed=0, key="val")
    assert "dystress: val=digits: a quarter of every class" in capsys.readouterr().err


def test_what_a_network_is_evaluated_on_is_not_said_to_be_trained_on(tmp_path):
    for part in ("train", "val"):
        write_images(tmp_path / part, per_class=1)
    assert "val=" in (line := str(folders.read(tmp_path, True, key="val")))
    assert "kNN and linear probe fitted on train, accuracies on val" in line
    assert "trained on train, accuracies on val" in str(folders.read(tmp_path, True))


@pytest.mark.parametrize("out", ["seen/y", "seen"])
def test_results_are_not_written_among_images_of_val_either(out, with_val, capsys):
    (with_val / "moved").rename(with_val / "seen")
    assert main(["pretrain", *WITH_VAL[:-1], "val=seen", f"out={out}"]) == 2
    assert f"out={out} lies in val=seen, where its figures" in capsys.readouterr().err
    assert main(["report", "x", "protocols=[knn_1]", f"out={out}"]) == 2
    assert f"out={out} lies in val={with_val}/seen, where its figures" in capsys.readouterr().err


def files_of(data):
    """How many images accuracies are measured with, by the folder that they lie in."""
    paths = [*data.evaluated.train.files, *data.evaluated.test.files]
    return dict(Counter(Path(path).parents[1].name for path in paths))


def test_what_needs_no_accuracies_needs_no_images_for_them(with_val, monkeypatch):
    monkeypatch.setattr(inspection.figures, "draw", lambda *args: None)
    assert main(["inspect", "checkpoint=x", "methods=[]", "out=seen-by", "accelerator=cpu"]) == 0
    assert main(["embed", "checkpoint=x", "out=e.npz", "accelerator=cpu"]) == 0


@pytest.mark.parametrize("augment", ["loader", "batch"])
def test_the_cost_of_a_step_needs_no_images(augment, with_val, monkeypatch):
    (with_val / "photos").rename(with_val / "gone")
    config = OmegaConf.load("x/config.yaml")
    config.settings.augment = augment
    OmegaConf.save(config, "x/config.yaml")
    for name, value in (("WARM_UP", 0), ("ROUNDS", (2, 2))):
        monkeypatch.setattr(cost, name, value)
    run = records.read_run(with_val / "x")
    cost.measure([run], with_val / "cost.csv")
    (found,) = cost.read([run], with_val / "cost.csv")
    assert (found.name, found.ratio, found.rounds) == (run.name, 1.0, 2)
    assert found.seconds > 0


@pytest.mark.parametrize("key", ["data", "val"])
def test_a_run_whose_images_have_moved_says_how_it_goes_on(key, with_val, monkeypatch, capsys):
    (with_val / "x" / "summary.json").unlink()
    (with_val / "moved").rename(with_val / "seen")
    name = {"data": "photos", "val": "seen"}[key]
    (with_val / name).rename(with_val / "moved")
    assert main(["pretrain", *WITH_VAL, "val=seen", f"{key}=moved"]) == 2
    said = capsys.readouterr().err
    assert f"with other settings: {key}={with_val}/moved (there: {with_val}/{name}). " in said
    assert f"{with_val}/{name} is not there any more; put it, or a link to it, there. Choose another out." in said
    (with_val / name).symlink_to("moved")
    assert main(["pretrain", *WITH_VAL, "val=seen", f"{key}=moved"]) == 0


def test_a_part_of_images_that_are_others_now_is_an_error(own, monkeypatch, capsys):
    sizes(monkeypatch)
    config = own / "runs" / "x" / "config.yaml"
    config.write_text(config.read_text().replace(read_config(config).data.name, str(own / "photos")))
    (own / "photos" / "class1" / "0.png").unlink()
    assert main(["evaluate", f"checkpoint={own}/runs/x"]) == 2
    assert "has other images, or other splits, than" in capsys.readouterr().err


def test_an_index_file_that_has_changed_is_refused(own, monkeypatch, capsys):
    config = own / "runs" / "x" / "config.yaml"
    config.write_text(config.read_text().replace(OmegaConf.load(config).settings.out[: -len("/runs/x")], str(own)))
    monkeypatch.chdir(own)
    sizes(monkeypatch)
    Path("keep.txt").write_text(" ".join(map(str, range(2, 18))))
    (own / "runs" / "x" / "summary.json").unlink()
    for command in (["pretrain", *RUN, "data=photos", "out=runs/x"], ["evaluate", "checkpoint=runs/x"]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "keep.txt has changed since the run in" in said
        assert "Put it back as it was, or choose another out." in said


def test_a_run_whose_folder_was_read_otherwise_is_not_gone_on_with(tmp_path, tiny, capsys, quick):
    """Version 0.1.0 took train and valid for classes; and a split may be added under a run."""
    data = tmp_path / "d"
    for part in ("train", "test"):
        write_images(data / part, per_class=4)
    settings = tiny | {"data": data, "epochs": 1}
    assert dystress("pretrain", settings) == 0
    record = Path(tiny["out"], "images.json")
    scan = json.loads(record.read_text())
    assert scan.pop("splits") == ["train", "test"]
    record.write_text(json.dumps(scan))
    assert dystress("pretrain", settings) == 0  # as version 0.1.0 read it

    (data / "test").rename(data / "valid")
    record.write_text(json.dumps(scan))
    assert dystress("pretrain", settings) == 2
    assert "is read as train, valid, but was read as" in capsys.readouterr().err
    (data / "valid").rename(data / "test")
    write_images(data / "val", per_class=1)
    record.write_text(json.dumps(scan | {"splits": ["train", "test"]}))
    assert dystress("pretrain", settings) == 2
    assert "is read as train, val, but was read as train, test when this run began" in capsys.readouterr().err


def test_a_run_is_one_and_named_the_same_however_a_report_is_pointed_at_it(project, monkeypatch):
    run = project / "runs" / "x"
    monkeypatch.chdir(run)
    found = records.run_folders([run, Path("."), Path("../x"), Path("../../runs/x"), Path("..")])
    assert found == [run.resolve()]
    assert report_command._beside(found) == run.resolve().parent


def test_a_report_is_of_one_data_set_however_it_is_named(own):
    runs = []
    (own / "another link").symlink_to("photos")
    for seed, data in enumerate(("photos", "another link", "runs/../photos")):
        run = Path(shutil.copytree(own / "runs" / "x", own / "runs" / f"dystress-{seed}"))
        config = OmegaConf.load(run / "config.yaml")
        config.settings.update({"data": str(own / data), "seed": seed})
        OmegaConf.save(config, run / "config.yaml")
        runs.append(records.read_run(run))
    records.check_together(runs)
    assert "data" not in records.unequal(runs)
    write_images(own / "photos 2")
    spec = runs[0].settings
    runs[0] = replace(runs[0], settings=replace(spec, data=replace(spec.data, name=str(own / "photos 2"))))
    with pytest.raises(ValueError, match="The runs differ in data"):
        records.check_together(runs)


def test_a_report_into_the_images_is_refused(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    before = tree(project)
    assert main(["report", "runs/x", "out=photos/report", "protocols=[knn_1]"]) == 2
    assert "out=photos/report lies in data=" in capsys.readouterr().err
    assert tree(project) == before
