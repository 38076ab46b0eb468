"""`config.yaml`: what a run's folder records, and how it is read where paths have moved."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dystress_plugin.experiment import places
from dystress_plugin.experiment.keys import PATHS, merged
from dystress_plugin.experiment.settings import PretrainSettings
from dystress_plugin.experiment.spec import RunSpec

OF_THE_METHOD = ("method_kwargs", "queue_size", "momentum_encoder")

# Other words for the same.
SAME = {"cuda": "gpu", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}


def comparable(spec: RunSpec) -> dict[str, Any]:
    """What makes two runs the same: every setting that is not free as a plain value, each in its one spelling."""
    free = [f.name for f in fields(PretrainSettings) if f.metadata["free"]]
    values = {key: value for key, value in spec.flat().items() if key not in free}
    values |= {key: values[key] and places.place(values[key]) for key in ("data", "val", "indices")}
    values |= {key: SAME.get(values[key], values[key]) for key in ("accelerator", "precision")}
    listed = [device for device in values["devices"].split(",") if device.strip()]
    return values | ({"devices": str(len(listed))} if "," in values["devices"] else {})


def recorded(spec: RunSpec) -> dict[str, Any]:
    """Every setting as a plain value, as a run and its loggers keep them: paths hold from every working directory."""
    values = spec.flat()
    # Links stay in them: a disk may be exchanged under its name.
    absolute = {key: places.each(path, _from_here) for key, path in _paths(values).items()}
    return values | absolute


def located(spec: RunSpec, run: Path, given: RunSpec | None = None) -> RunSpec:
    """A run as recorded with the paths of here and now: where they were, else at the same place beside the run.

    The second is for a run and its data that were moved together, and for version 0.1.0, which kept relative paths.

    Args:
        spec: the run.
        run: the folder it is from.
        given: the run whose choice it is where both places are there, as in a copy of run and data.
    """
    values, wishes = spec.flat(), {} if given is None else given.flat()
    found: dict[str, Any] = {}
    for key, path in _paths(values).items():
        here = places.each(path, _from_here)
        tried = [here]
        absolute = os.path.isabs(places.sources(path)[0])
        if absolute == os.path.isabs(spec.out):
            tried.append(places.each(path, lambda each: os.path.normpath(run.resolve() / _way(spec.out, each))))
        if not absolute:
            tried.reverse()
        if (wanted := wishes.get(key)) is not None:
            tried.sort(key=lambda path: not places.same(path, wanted))
        found[key] = next(filter(places.there, tried), here)
    return RunSpec.of(PretrainSettings(**values | found | {"out": str(run.absolute())}))


def recorded_spec(values: dict[str, Any], run: Path, given: RunSpec) -> RunSpec:
    """A run from what a checkpoint keeps of it, `located`, with its default for a key that is newer."""
    known = {f.name for f in fields(PretrainSettings)}
    settings = PretrainSettings(**_earlier(values) | {key: value for key, value in values.items() if key in known})
    return located(RunSpec.of(settings), run, given)


def _earlier(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What settings stand for that are older than a key whose default is open."""
    return {"diagnostics_every_n_steps": 0, "temperature_lr": settings.get("lr")}


def _from_here(path: str) -> str:
    return os.path.join(os.getcwd(), os.path.expanduser(path))


def _way(start: str, path: str) -> str:
    """The relative path between two places; as it is where there is none, such as to another drive."""
    try:
        return os.path.relpath(path, start)
    except ValueError:
        return path


def _paths(values: dict[str, Any]) -> dict[str, str]:
    """The settings that are paths."""
    return {key: values[key] for key in PATHS if values.get(key) is not None and values[key] not in places.NAMED}


def with_files(tokens: Sequence[str]) -> list[str]:
    """Command line tokens with what a file says in the place of `config=FILE`: a run's own, or any YAML of keys.

    Raises:
        ValueError: for a file that is not there or holds no keys.
    """
    written: list[str] = []
    for number, token in enumerate(tokens):
        key, _, name = token.partition("=")
        if key != "config" or not name:
            written.append(token)
            continue
        values = _keys_in(Path(name).expanduser())
        method = [its.removeprefix("method=") for its in tokens[number:] if its.startswith("method=")]
        if method and method[-1] != values.get("method"):  # whose parameters those in the file are
            values = {key: value for key, value in values.items() if key not in OF_THE_METHOD}
        # JSON is YAML, which all but text is read as.
        written += [f"{key}={its if isinstance(its, str) else json.dumps(its)}" for key, its in values.items()]
    return written


def _keys_in(path: Path) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeError) as error:
        raise ValueError(f"config={path} cannot be read: {str(error).partition(chr(10))[0]}") from None
    if not isinstance(values, dict):
        raise ValueError(f"config={path} holds no keys.")
    if not isinstance(values.get("settings"), dict):
        return {str(key): value for key, value in values.items()}
    return {key: value for key, value in read_config(path).flat().items() if value is not None}


def read_config(path: Path, given: RunSpec | None = None) -> RunSpec:
    """The run of a `config.yaml`, `located`, with its default for a key that is newer than the file.

    Raises:
        ValueError: for a file that is damaged or another program's.
    """
    remedy = "Put the right one there, or choose another folder."
    try:
        config = OmegaConf.load(path)
        settings = config.get("settings") if isinstance(config, DictConfig) else None
        if not isinstance(settings, DictConfig):
            raise ValueError("it has no settings.")
        return located(RunSpec.of(merged(PretrainSettings, _earlier(settings), settings)), path.parent, given)
    except (OmegaConfBaseException, YAMLError, ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is no config.yaml of `dystress pretrain`, or is damaged: {reason} {remedy}") from None
