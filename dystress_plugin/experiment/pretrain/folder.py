"""The folder of a run: whose it is, and whether it can go on."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dystress_plugin import __version__
from dystress_plugin.experiment import places
from dystress_plugin.experiment.data import scan, selection
from dystress_plugin.experiment.evaluate.scores import UNTRAINED_FILES
from dystress_plugin.experiment.io import files, lock
from dystress_plugin.experiment.io.config import comparable, read_config, recorded, recorded_spec
from dystress_plugin.experiment.pretrain.module import PretrainModule
from dystress_plugin.experiment.spec import RunSpec

VERSIONS = ("torch", "torchvision", "lightly", "pytorch-lightning", "timm", "scikit-learn", "numpy")

# What an interruption leaves before config.yaml is there, a scan that found bad images, and what `dystress compare`
# puts there for all runs of a seed.
BEFORE = {"config.yaml", *scan.RECORDS.values(), lock.NAME, *UNTRAINED_FILES}


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run.

    Attributes:
        path: where it is.
        finished: what `summary.json` holds, once the run has been done to the end.
    """

    path: Path
    finished: dict[str, Any] | None = None

    @classmethod
    def open(cls, spec: RunSpec) -> RunFolder:
        """The folder as it is; writes nothing.

        Raises:
            ValueError: for one that holds another run, something else, or a damaged file.
        """
        folder = cls(Path(spec.out))
        if folder.config.exists():
            check_settings(folder.path, spec)
            if not folder.summary.exists():
                return folder
            return replace(folder, finished=files.read_json(folder.summary, ("method", "data", "seed", "epochs")))
        if folder.path.exists() and {path.name.removesuffix(".part") for path in folder.path.iterdir()} - BEFORE:
            raise ValueError(f"out={spec.out} is not empty and holds no run of this command. Choose another out.")
        return folder

    @property
    def config(self) -> Path:
        """Its settings, and of what versions."""
        return self.path / "config.yaml"

    @property
    def summary(self) -> Path:
        """The last file of a run."""
        return self.path / "summary.json"

    @property
    def last(self) -> Path:
        """The checkpoint of the last finished epoch."""
        return self.path / "checkpoints" / "last.ckpt"

    def begin(self, module: PretrainModule) -> None:
        """Makes it ready for a training to start or to go on, and writes `config.yaml`.

        Raises:
            ValueError: for a checkpoint that is damaged or another run's, too little room, or a folder that cannot be
                written.
        """
        if self.last.exists():
            _check_checkpoint(self.last, module)
        files.check_room(self.path, module, have=int(self.last.exists()))
        if self.config.exists():
            changes = _differences(module.spec, read_config(self.config, module.spec))
            if not changes:
                return
            print(f"dystress: out={self.path} goes on with {', '.join(changes.values())}.", file=sys.stderr)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            files.write_text(self.config, OmegaConf.to_yaml(_record(module.spec)))
        except OSError as error:
            raise ValueError(f"out={self.path} cannot be written: {error}. Choose another out.") from None


def check_settings(out: Path, spec: RunSpec) -> None:
    """Raises a ValueError if `out` holds another run than this."""
    if (config := out / "config.yaml").exists():
        metrics = out / "metrics.csv"
        done = metrics.read_bytes().count(b"\n") - 1 if metrics.exists() else 0
        _check_same(spec, read_config(config, spec), max(0, done), f"out={out} holds a run")
        if spec.data.indices is not None:
            selection.check_unchanged(out, spec.data.indices)


def _record(spec: RunSpec) -> DictConfig:
    """What `config.yaml` holds."""
    versions = {name: metadata.version(name) for name in VERSIONS}
    versions |= {"python": platform.python_version(), "dystress_plugin": __version__}
    record = OmegaConf.create({"settings": recorded(spec), "versions": versions})
    if spec.data.indices is not None:
        record[selection.DIGEST] = selection.digest(spec.data.indices)
    return record


def _differences(wanted: RunSpec, found: RunSpec) -> dict[str, str]:
    """By key, the settings in which two runs are not the same."""
    there = comparable(found)
    return {key: f"{key}={its} (there: {there[key]})" for key, its in comparable(wanted).items() if its != there[key]}


def _check_same(wanted: RunSpec, found: RunSpec, done: int, what: str) -> None:
    """Raises a ValueError if a run of which so many epochs are done cannot go on as the one that is wanted."""
    different, reason = _differences(wanted, found), ""
    if set(different) <= {"epochs", "warmup_epochs"} and not (reason := _tied_to_length(wanted, found, done)):
        return
    there = {key: place for key, place in comparable(found).items() if key in scan.RECORDS and key in different}
    if gone := [place for place in there.values() if places.is_gone(place)]:
        reason += f"{' and '.join(gone)} is not there any more; put it, or a link to it, there. "
    raise ValueError(f"{what} with other settings: {', '.join(different.values())}. {reason}Choose another out.")


def _tied_to_length(wanted: RunSpec, found: RunSpec, done: int) -> str:
    """Why the epochs that are done would have been others in a run of another length; nothing if they would not."""
    warmup = found.optimizer.warmup_epochs
    if done == 0 or not _differences(wanted, found):
        return ""
    if done > warmup:
        return f"After {warmup:g} epochs its learning rate began to fall, on a cosine over all epochs={found.epochs}. "
    if warmup != wanted.optimizer.warmup_epochs:
        return f"Its learning rate was rising for warmup_epochs={warmup:g}. "
    if found.queue is not None:
        return f"The momentum of its keys' encoder was rising, on a cosine over all epochs={found.epochs}. "
    return f"{done} epochs are done. " if done >= min(wanted.epochs, found.epochs) else ""


def _check_checkpoint(last: Path, module: PretrainModule) -> None:
    """Raises a ValueError for a checkpoint that is damaged, or of another run."""
    checkpoint = files.load(last, "a checkpoint", files.NO_CHECKPOINT)
    if missing := [key for key in ("state_dict", "epoch", "settings") if key not in checkpoint]:
        raise ValueError(f"{last} is no checkpoint of this command: it has no {missing[0]}. {files.NO_CHECKPOINT}")
    files.check_state(module, checkpoint["state_dict"], last, files.NO_CHECKPOINT)
    found = recorded_spec(checkpoint["settings"], last.parent.parent, module.spec)
    _check_same(module.spec, found, checkpoint["epoch"] + 1, f"{last} belongs to a run")
