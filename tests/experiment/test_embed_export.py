"""What a run leaves is usable, also for those who have not this package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dystress, write_images  # beside this file
from omegaconf import OmegaConf
from PIL import Image

from dystress_plugin.experiment import load_backbone
from dystress_plugin.experiment.backbone import build_backbone
from dystress_plugin.experiment.data.datasets import load
from dystress_plugin.experiment.evaluate.export import loading_lines
from dystress_plugin.experiment.io import files
from dystress_plugin.experiment.io.config import recorded
from dystress_plugin.experiment.pretrain.resolve import resolve
from dystress_plugin.experiment.settings import PretrainSettings


def finished(out, data, backbone="test_resnet", image_size=12, **settings):
    """What `embed` and `export` read of a run, with weights as they are drawn."""
    given = PretrainSettings(data=str(data), out=str(out), backbone=backbone, image_size=image_size, **settings)
    images = load(str(data), root="", download=False, long_tail=None, seed=0, labels=given.labels)
    spec = resolve(given, images, 1)
    out.mkdir()
    (out / "config.yaml").write_text(OmegaConf.to_yaml({"settings": recorded(spec), "versions": {}}))
    torch.manual_seed(0)
    files.save(out / "backbone.pt", build_backbone(backbone, image_size)[0].state_dict())
    return out


# Every script in a namespace of its own, on the same images, in a process that finds no dystress_plugin.
ELSEWHERE = """
import runpy, sys
sys.modules["dystress_plugin"] = None
import numpy as np, torch
features = {}
for script, size in zip(sys.argv[2::2], map(int, sys.argv[3::2])):
    names = runpy.run_path(script)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features[script] = names["model"](images).flatten(1).numpy()
np.savez(sys.argv[1], **features)
"""

# Stems for small images and not, heads that pool, networks of one size, settings of a builder; and who can load them.
NETWORKS = [
    ("resnet18", 32, ("torchvision", "timm", "safetensors", None)),
    ("resnet18", 96, ("torchvision",)),
    ("resnet10t", 8, ("timm", "safetensors", None)),
    ("squeezenet1_1", 64, ("torchvision", None)),
    ("mobilenet_v3_small", 32, ("torchvision",)),
    ("test_vit", 32, ("timm",)),
    ("test_convnext", 32, ("timm", None)),
]


def test_an_export_and_the_lines_at_the_end_of_a_run_load_where_this_package_is_not(tmp_path, capsys):
    expected, asked = {}, []
    for number, (backbone, size, libraries) in enumerate(NETWORKS):
        run = finished(tmp_path / f"run{number}", "digits", backbone, size)
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            features = load_backbone(run)(images).flatten(1)
        (tmp_path / f"end{number}.py").write_text("\n".join(line.strip() for line in loading_lines(run)[1:]))
        scripts = [tmp_path / f"end{number}.py"]
        for to in libraries:
            given = {"checkpoint": run, "out": tmp_path / f"{number}-{to}.pt"}
            assert dystress("export", given | ({"to": to} if to else {})) == 0
            scripts += [tmp_path / f"printed{number}-{to}.py", tmp_path / "moved" / f"load_{number}-{to}.py"]
            scripts[-2].write_text(capsys.readouterr().out.partition("\n")[2])
            scripts[-1].parent.mkdir(exist_ok=True)
            shutil.copy(given["out"], scripts[-1].parent)
            shutil.move(tmp_path / scripts[-1].name, scripts[-1])
            assert ("conv1 and maxpool are not" in scripts[-1].read_text()) == ("res" in backbone and size <= 64)
        for script in scripts:
            expected[str(script)] = features.numpy()
            asked += [str(script), str(size)]
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(tmp_path / "found.npz"), *asked], check=True)
    found = np.load(tmp_path / "found.npz")
    assert set(found.files) == set(expected)
    for script, features in expected.items():
        np.testing.assert_allclose(found[script], features, rtol=1e-4, atol=1e-5, err_msg=script)


@pytest.mark.parametrize(
    ("backbone", "to", "own"), [("resnet10t", "torchvision", "timm"), ("squeezenet1_1", "timm", "torchvision")]
)
def test_a_library_without_the_network_is_refused(backbone, to, own, tmp_path, capsys):
    run = finished(tmp_path / "run", "digits", backbone, 32)
    assert dystress("export", {"checkpoint": run, "to": to, "out": tmp_path / "x.pt"}) == 2
    said = capsys.readouterr().err
    assert f"to={to} has no network that backbone={backbone} fits, which is {own}'s: to={own}." in said
    assert not (tmp_path / "x.pt").exists()


def test_nothing_is_overwritten_and_a_folder_is_made(tmp_path, capsys):
    run = finished(tmp_path / "run", "digits", image_size=8)
    for command, name in (("embed", "e.npz"), ("export", "b.pt"), ("export", "b.safetensors")):
        (tmp_path / name).write_text("mine")
        assert dystress(command, {"checkpoint": run, "out": tmp_path / name}) == 2
        assert f"out={tmp_path / name} exists already, and nothing is ever overwritten" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "mine"
    (tmp_path / "load_c.py").write_text("mine")
    assert dystress("export", {"checkpoint": run, "out": tmp_path / "c.pt"}) == 2
    assert dystress("export", {"checkpoint": run, "out": tmp_path / "new" / "er" / "c.pt"}) == 0
    assert dystress("embed", {"checkpoint": tmp_path, "out": tmp_path / "f.npz"}) == 2
    assert "holds no run of `dystress pretrain`" in capsys.readouterr().err


@pytest.fixture
def run(images, tmp_path):
    """A run, and what its backbone makes of a picture file."""
    return finished(tmp_path / "run", images)


def of_files(run, names, folder):
    """The features of files, one at a time."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    pictures = [np.asarray(Image.open(folder / name).convert("RGB")) for name in names]
    batch = torch.stack([(torch.from_numpy(p.copy()).permute(2, 0, 1) / 255 - mean) / std for p in pictures])
    with torch.no_grad():
        return load_backbone(run)(batch).flatten(1).numpy()


def embedded(tmp_path, **settings):
    out = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
    assert dystress("embed", {"out": out, "accelerator": "cpu", "progress": "false", "batch_size": 7, **settings}) == 0
    return np.load(out, allow_pickle=False)


def test_every_image_is_embedded_under_its_name(run, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = sorted(str(path.relative_to(tmp_path)) for path in images.glob("*/*.png"))
    expected = of_files(run, names, tmp_path)
    own = embedded(tmp_path, checkpoint=run)
    assert [os.path.relpath(name, tmp_path) for name in own["files"].tolist()] == names
    np.testing.assert_allclose(own["embeddings"], expected, rtol=1e-4, atol=1e-5)
    assert own["embeddings"].dtype == np.float32
    for data, labels in (("images", True), ("[images/class0,images/class1,images/class2]", False), ("images/*", False)):
        found = embedded(tmp_path, checkpoint=run, data=data)
        assert [os.path.relpath(name) for name in found["files"].tolist()] == names
        np.testing.assert_array_equal(found["embeddings"], own["embeddings"])
        assert ("labels" in found.files) == labels
    of_class = [own["classes"][label] for label in own["labels"]]
    assert of_class == [name.split("/")[1] for name in names]


def test_splits_and_named_data_are_embedded_whole(run, tmp_path):
    for part, each in (("train", 3), ("valid", 2)):
        write_images(tmp_path / "d" / part, per_class=each)
    found = embedded(tmp_path, checkpoint=run, data=tmp_path / "d")
    assert len(found["files"]) == len(set(found["files"])) == 15
    assert np.bincount(found["labels"]).tolist() == [5, 5, 5]
    digits = embedded(tmp_path, checkpoint=run, data="digits")
    assert len(digits["files"]) == len(set(digits["files"])) == 1797
    assert (digits["files"][0], digits["files"][-1]) == ("train/00000", "test/00449")
    assert digits["embeddings"].shape[0] == len(digits["labels"]) == 1797


def test_files_that_cannot_be_embedded_stop_it_before_or_are_left_out(run, tmp_path, capsys):
    write_images(tmp_path / "other")
    (tmp_path / "other" / "class1" / "bad.png").write_bytes(b"")
    given = {"checkpoint": run, "data": tmp_path / "other", "accelerator": "cpu"}
    assert dystress("embed", given | {"out": tmp_path / "e.npz"}) == 2
    said = capsys.readouterr().err
    assert f"1 of 25 files in {tmp_path}/other cannot be used:\n  class1/bad.png: empty file" in said
    assert "on_bad_image=skip" in said
    assert not (tmp_path / "e.npz").exists()
    assert len(embedded(tmp_path, **given, on_bad_image="skip")["files"]) == 24


def test_the_end_of_a_run_says_how_its_backbone_is_loaded(tiny, quick, capsys):
    assert dystress("pretrain", tiny | {"epochs": 1}) == 0
    printed = capsys.readouterr().out
    assert "\n".join(loading_lines(Path(tiny["out"]))) in printed
    assert f"model.load_state_dict(torch.load('{tiny['out']}/backbone.pt', weights_only=True))" in printed
