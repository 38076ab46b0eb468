"""`dystress compare`: methods and fixed temperatures, each with every seed, scored by every protocol, in one report."""

from __future__ import annotations

import json
import logging
import os
import queue
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from dystress_plugin import recipes
from dystress_plugin.errors import RunStopped, unknown_name
from dystress_plugin.experiment import files, folders, report
from dystress_plugin.experiment.data import load_for
from dystress_plugin.experiment.devices import build_trainer
from dystress_plugin.experiment.lock import alone
from dystress_plugin.experiment.pretrain import (
    build_module,
    check_batch,
    check_settings,
    pretrain,
    resolve,
    scan_images,
)
from dystress_plugin.experiment.protocols import protocol, score_run
from dystress_plugin.experiment.settings import CompareSettings, PretrainSettings, checked, parse
from dystress_plugin.temperature import DySTreSS

LOOKS = 40  # of the diagnostics in a run, unless set
ELSEWHERE = {"method": "methods=[...]", "seed": "seeds=[...]"}


@dataclass(frozen=True)
class Arm:
    """What is compared: a method with settings.

    Attributes:
        name: unique, the first part of the folders of its runs.
        method: name in `recipes.METHODS`.
        kwargs: parameters that differ from the method's own.
    """

    name: str
    method: str
    kwargs: dict[str, Any]


def parse_compare(tokens: Sequence[str]) -> tuple[CompareSettings, PretrainSettings]:
    """`key=value` tokens divided into what is compared, and what all runs have in common.

    Raises:
        ValueError: as `settings.parse`, and for the keys of a single run.
    """
    own = {f.name for f in fields(CompareSettings)}
    known = own | {f.name for f in fields(PretrainSettings)} - set(ELSEWHERE)
    mine: list[str] = []
    common: list[str] = []
    for token in tokens:
        key = token.partition("=")[0].split(".")[0].lstrip("-")
        if key in ELSEWHERE:
            raise ValueError(f"'{token}' is for `dystress pretrain`; here it is {ELSEWHERE[key]}.")
        if key not in known:
            raise ValueError(unknown_name("key", key, sorted(known)))
        (mine if key in own else common).append(token)
    return parse(CompareSettings, mine), parse(PretrainSettings, common)


def compare(settings: CompareSettings, common: PretrainSettings, command: str = "") -> dict[str, str]:
    """Trains and scores what is not there yet, and writes `results.csv` and `report.html`; returns their paths.

    Args:
        settings: what is compared.
        common: the settings of all runs; method, seed, folder and diagnostics are set here.
        command: what the user typed, for the report.

    Raises:
        ValueError: before any training, for settings that do not fit; or after it, where runs have failed.
    """
    settings, common = checked(settings), checked(common)
    arms = plan(settings)
    for name in settings.protocols:
        protocol(name)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    devices = build_trainer(common, logger=False, enable_checkpointing=False).world_size
    out = Path(settings.out)
    runs = _runs(settings, common, arms)
    folders.check_apart(out, common.data)
    with alone(out, wait=True) as lock:
        _prepare(settings, runs, len(arms), devices)
        files.write_text(out / "compare.yaml", OmegaConf.to_yaml({"command": command, "settings": asdict(settings)}))
        with _bar(runs, settings.progress):
            failures = _work(settings, runs, lock)
        finished = [Path(run.out or "") for run in runs if _finished(run)]
        if not finished:
            raise ValueError(f"All {len(runs)} runs failed: {_lines(failures)}")
        paths = report.write(finished, out, settings.protocols, failures=failures)
    if failures:
        raise ValueError(
            f"{len(failures)} of {len(runs)} runs failed; the same command tries them again, and {paths['report']} "
            f"is of the others: {_lines(failures)}"
        )
    return paths


def plan(settings: CompareSettings) -> list[Arm]:
    """The methods in the order given, then the fixed temperatures that are not among them.

    Raises:
        ValueError: for an unknown method, a name with a slash, or settings of a method that is not compared.
    """
    for name, kwargs in settings.method_kwargs.items():
        if not isinstance(kwargs, dict):
            raise ValueError(f"method_kwargs.{name}: say whose, such as method_kwargs.{settings.methods[0]}.{name}=...")
        if name not in settings.methods:
            raise ValueError(unknown_name("method in method_kwargs", name, settings.methods))
    for name in settings.methods:
        if Path(name).name != name:
            raise ValueError(f"methods={settings.methods}: the folders of {name}'s runs are named by it; no slashes.")
    arms = [
        Arm(name, recipes.recipe(name.partition("-")[0]).name, settings.method_kwargs.get(name, {}))
        for name in settings.methods
    ]
    families = dict.fromkeys(report.family(arm.method) for arm in arms)
    return [*arms, *(arm for family in families for arm in _constants(family, arms, settings.constants))]


def _constants(family: str, arms: Sequence[Arm], chosen: Sequence[float] | None) -> list[Arm]:
    """The fixed temperatures for the methods of a family; with its objective and layout where simclr has them."""
    method = f"simclr_{family}" if family else "simclr"
    own = [arm for arm in arms if report.family(arm.method) == family]
    taus = list(chosen) if chosen is not None else _range_of(own)
    there = {_parameters(arm)["tau"] for arm in own if arm.method == method}
    prefix = f"constant_{family}" if family else "constant"
    return [Arm(f"{prefix}-{tau:g}", method, {"tau": tau}) for tau in taus if tau not in there]


def _range_of(arms: Sequence[Arm]) -> list[float]:
    """Lowest temperature, midpoint and highest of each method that has a range; else the temperatures they have."""
    spans = [(p["tau_min"], p["tau_max"]) for p in map(_parameters, arms) if "tau_min" in p and "tau_max" in p]
    fixed = [p["tau"] for p in map(_parameters, arms) if "tau" in p]
    if not spans and not fixed:  # temperature-free
        base = DySTreSS()
        spans = [(base.tau_min, base.tau_max)]
    found = [float(f"{tau:.6g}") for low, high in spans for tau in (low, (low + high) / 2, high)]
    return sorted(set(found or fixed))


def _parameters(arm: Arm) -> dict[str, Any]:
    return recipes.recipe(arm.method).parameters | arm.kwargs


def _runs(settings: CompareSettings, common: PretrainSettings, arms: Sequence[Arm]) -> list[PretrainSettings]:
    """A run for every seed and arm; seed by seed, so that an unfinished comparison is one of fewer seeds."""
    queues = any(recipes.recipe(arm.method).layout == "queue" for arm in arms)
    runs = []
    for seed in settings.seeds:
        for arm in arms:
            run = replace(
                common,
                method=arm.method,
                method_kwargs=arm.kwargs,
                seed=seed,
                out=str(Path(settings.out, "runs", f"{arm.name}-{seed}")),
                progress=False,
            )
            if queues and recipes.recipe(arm.method).layout != "queue":
                run = replace(run, queue_size=None, momentum_encoder=None)
            runs.append(run)
    return runs


def _prepare(settings: CompareSettings, runs: list[PretrainSettings], arms: int, devices: int) -> None:
    """Finds what is wrong with any method before the first one has trained for an hour; sets the diagnostics."""
    scan = scan_images(runs[0], Path(settings.out))  # once: the runs find what it found
    if scan is not None:
        scan.write(Path(settings.out))
    looks = settings.diagnostics_every_n_steps
    for number, run in enumerate(runs):
        folder = Path(run.out or "")
        if scan is not None and not folder.exists():
            folder.mkdir(parents=True)
            scan.write(folder)
        if number == 0 or (run.long_tail is not None and run.seed != runs[number - 1].seed):
            data = load_for(run, without=scan.left_out if scan is not None else ())
            check_batch(run, data, devices)
        if looks is None:
            looks = max(1, run.epochs * (len(data.train.labels) // run.batch_size) // LOOKS)
        run.diagnostics_every_n_steps = looks
        recipe = recipes.recipe(run.method)
        resolved = resolve(run, recipe, data, 1)
        if number < arms:
            build_module(resolved, recipe, data, resolved.image_size or data.image_size)
        if run.devices == "1" and run.num_nodes == 1:  # with more of them lr=null is another; found out in training
            check_settings(folder, resolved)


def _work(settings: CompareSettings, runs: Sequence[PretrainSettings], lock: int | None) -> dict[str, str]:
    """Trains and scores every run; what went wrong, by the run's name."""
    failures: dict[str, str] = {}

    def one(run: PretrainSettings, train: Callable[[PretrainSettings], Any]) -> None:
        folder = Path(run.out or "")
        try:
            if not _finished(run):
                train(run)
            score_run(folder, settings.protocols, with_map=run.seed == min(settings.seeds))
        except Exception as error:
            if not (folder / "config.yaml").exists():
                raise  # it never began, and the others would not either
            failures[folder.name] = f"{type(error).__name__}: {error}"

    for run in filter(_finished, runs):
        pretrain(run)  # which only checks that it was with these settings
    if settings.jobs == 1 and runs[0].devices == "1" and runs[0].num_nodes == 1:
        for run in runs:
            one(run, pretrain)
        return failures
    with Workers(settings, lock) as children, ThreadPoolExecutor(settings.jobs) as pool:
        futures = [pool.submit(one, run, children.train) for run in runs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            children.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


class Workers:
    """Runs in processes of their own, which end with this one unless it is killed; then the lock stays with them."""

    def __init__(self, settings: CompareSettings, lock: int | None) -> None:
        self.logs = Path(settings.out, "logs")
        self.jobs = settings.jobs
        self.lock = () if lock is None else (lock,)
        self.slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.stopped = False
        for slot in range(settings.jobs):
            self.slots.put(slot)

    def __enter__(self) -> Workers:
        self.logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *exception: Any) -> None:
        self.stop()
        for process in self.processes:  # or they would still write when the lock is gone
            process.wait()

    def stop(self) -> None:
        self.stopped = True
        for process in self.processes:
            if process.poll() is None:
                process.terminate()

    def train(self, run: PretrainSettings) -> None:
        slot = self.slots.get()
        log = self.logs / f"{Path(run.out or '').name}.log"
        try:
            if self.stopped:
                return
            with log.open("a") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "dystress_plugin.cli", "pretrain", *tokens(run)],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=self._environment(slot, run),
                    pass_fds=self.lock,
                )
                self.processes.append(process)
                status = process.wait()
        finally:
            self.slots.put(slot)
        if status:
            last = (log.read_text().strip().splitlines() or ["(nothing)"])[-1]
            raise RunStopped(f"{log.stem} ended with status {status}: {last} All of it is in {log}.")

    def _environment(self, slot: int, run: PretrainSettings) -> dict[str, str]:
        chosen = dict(os.environ)
        chosen.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
        gpus = [gpu for gpu in visible.split(",") if gpu]
        if run.devices == "1" and len(gpus) > 1:
            chosen["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        return chosen


def tokens(run: PretrainSettings) -> list[str]:
    """The settings of a run that differ from the defaults, as `dystress pretrain` takes them."""
    default = PretrainSettings()
    changed = {key: value for key, value in asdict(run).items() if value != getattr(default, key)}
    # JSON is YAML, which all but text is read as.
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changed.items()]


def command_line(arguments: Sequence[str]) -> str:
    """What to type to run the command again."""
    return shlex.join(["dystress", "compare", *arguments])


def _finished(run: PretrainSettings) -> bool:
    return Path(run.out or "", "summary.json").exists()


def _lines(failures: dict[str, str]) -> str:
    return "; ".join(f"{name}: {error}" for name, error in failures.items())


@contextmanager
def _bar(runs: Sequence[PretrainSettings], show: bool) -> Iterator[None]:
    """A progress bar over the epochs of all runs, which it counts in their tables."""
    stop = threading.Event()
    bar = tqdm(total=sum(run.epochs for run in runs), unit="epoch", disable=not show, smoothing=0.05)

    def count() -> None:
        done = sum(map(_epochs, runs))
        finished = sum(map(_finished, runs))
        bar.set_description(f"{finished} of {len(runs)} runs", refresh=False)
        bar.update(done - bar.n)

    def watch() -> None:
        while not stop.wait(1):
            count()

    bar.initial = sum(map(_epochs, runs))  # so that the time left is estimated from what this process does
    bar.n = bar.initial
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        count()
        bar.close()


def _epochs(run: PretrainSettings) -> int:
    try:
        return max(0, Path(run.out or "", "metrics.csv").read_text().count("\n") - 1)
    except FileNotFoundError:
        return 0
