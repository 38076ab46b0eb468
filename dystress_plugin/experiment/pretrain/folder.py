"""The folder of a run: whose it is, and whether it can go on."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dystress_plugin import __version__
from dystress_plugin.experiment.data import scan, selection
from dystress_plugin.experiment.evaluate.scores import UNTRAINED_FILES
from dystress_plugin.experiment.io import files, lock
from dystress_plugin.experiment.io.config import comparable, read_config, recorded, recorded_settings
from dystress_plugin.experiment.pretrain.module import PretrainModule
from dystress_plugin.experiment.settings import PretrainSettings

VERSIONS = ("torch", "torchvision", "lightly", "pytorch-lightning", "timm", "scikit-learn", "numpy")

# What an interruption leaves before config.yaml is there, a scan that found bad images, and what `dystress compare`
# puts there for all runs of a seed.
BEFORE = {"config.yaml", scan.RECORD, lock.NAME, *UNTRAINED_FILES}


def open_run(out: Path, settings: PretrainSettings, module: PretrainModule, last: Path) -> dict[str, Any] | None:
    """Makes `out` ready for these settings; the summary if they have been run to the end already."""
    config = out / "config.yaml"
    if config.exists():
        check_settings(out, settings)
        if (out / "summary.json").exists():
            return files.read_json(out / "summary.json")
        if last.exists():
            _check_checkpoint(last, module)
    elif out.exists() and {path.name.removesuffix(".part") for path in out.iterdir()} - BEFORE:
        raise ValueError(f"out={out} is not empty and holds no run of this command. Choose another out.")
    files.check_room(out, module, have=int(last.exists()))
    if not config.exists():
        versions = {name: metadata.version(name) for name in VERSIONS}
        versions |= {"python": platform.python_version(), "dystress_plugin": __version__}
        record = OmegaConf.create({"settings": recorded(settings), "versions": versions})
        if settings.indices is not None:
            record[selection.DIGEST] = selection.digest(settings.indices)
        try:
            out.mkdir(parents=True, exist_ok=True)
            files.write_text(config, OmegaConf.to_yaml(record))
        except OSError as error:
            raise ValueError(f"out={out} cannot be written: {error}. Choose another out.") from None
    return None


def check_settings(out: Path, settings: PretrainSettings) -> None:
    """Raises a ValueError if `out` holds a run with other settings than these, which `resolve` has completed."""
    if (config := out / "config.yaml").exists():
        _check_same(comparable(settings), comparable(read_config(config, settings)), f"out={out} holds a run")
        if settings.indices is not None:
            selection.check_unchanged(out, settings.indices)


def _check_same(wanted: dict[str, Any], found: dict[str, Any], what: str) -> None:
    different = [f"{key}={value} (there: {found.get(key)})" for key, value in wanted.items() if value != found.get(key)]
    if different:
        raise ValueError(f"{what} with other settings: {', '.join(different)}. Choose another out.")


def _check_checkpoint(last: Path, module: PretrainModule) -> None:
    """Raises a ValueError for a checkpoint that is damaged, or of another run."""
    checkpoint = files.load(last, "a checkpoint", files.NO_CHECKPOINT)
    if missing := [key for key in ("state_dict", "epoch", "settings") if key not in checkpoint]:
        raise ValueError(f"{last} is no checkpoint of this command: it has no {missing[0]}. {files.NO_CHECKPOINT}")
    files.check_state(module, checkpoint["state_dict"], last, files.NO_CHECKPOINT)
    found = recorded_settings(checkpoint["settings"], last.parent.parent, module.settings)
    _check_same(comparable(module.settings), comparable(found), f"{last} belongs to a run")
