"""`dystress compare`: methods and fixed temperatures, each with every seed, scored by every protocol, in one report."""

from __future__ import annotations

import logging
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tqdm import tqdm

from dystress_plugin import recipes
from dystress_plugin.experiment import places
from dystress_plugin.experiment.compare.plan import Arm, plan
from dystress_plugin.experiment.compare.workers import Workers
from dystress_plugin.experiment.data.datasets import load_for
from dystress_plugin.experiment.devices import build_trainer
from dystress_plugin.experiment.evaluate.protocols import protocol
from dystress_plugin.experiment.evaluate.scores import score_run
from dystress_plugin.experiment.io import files
from dystress_plugin.experiment.io.lock import alone
from dystress_plugin.experiment.keys import checked
from dystress_plugin.experiment.pretrain.command import pretrain, scan_images
from dystress_plugin.experiment.pretrain.folder import check_settings
from dystress_plugin.experiment.pretrain.resolve import build_module, check_batch, resolve
from dystress_plugin.experiment.report.command import write as write_report
from dystress_plugin.experiment.settings import CompareSettings, PretrainSettings
from dystress_plugin.experiment.spec import DataSpec, HardwareSpec, part

LOOKS = 40  # of the diagnostics in a run, unless set


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
    devices = build_trainer(part(HardwareSpec, common), logger=False, enable_checkpointing=False).world_size
    out = Path(settings.out)
    runs = _runs(settings, common, arms)
    places.check_apart(out, common.data)
    with alone(out, wait=True) as lock:
        _prepare(settings, runs, len(arms), devices)
        files.write_text(out / "compare.yaml", OmegaConf.to_yaml({"command": command, "settings": asdict(settings)}))
        with _bar(runs, settings.progress):
            failures = _work(settings, runs, lock)
        finished = [Path(run.out or "") for run in runs if _finished(run)]
        if not finished:
            raise ValueError(f"All {len(runs)} runs failed: {_lines(failures)}")
        paths = write_report(finished, out, settings.protocols, failures=failures)
    if failures:
        raise ValueError(
            f"{len(failures)} of {len(runs)} runs failed; the same command tries them again, and {paths['report']} "
            f"is of the others: {_lines(failures)}"
        )
    return paths


def _runs(settings: CompareSettings, common: PretrainSettings, arms: Sequence[Arm]) -> list[PretrainSettings]:
    """A run for every seed and arm; seed by seed, so that an unfinished comparison is one of fewer seeds."""
    queues = any(recipes.recipe(arm.method).queue for arm in arms)
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
            if queues and not recipes.recipe(arm.method).queue:
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
            data = load_for(part(DataSpec, run), run.seed, without=scan.left_out if scan is not None else ())
            check_batch(run, data, devices)
        if looks is None:
            looks = max(1, run.epochs * (len(data.train.labels) // run.batch_size) // LOOKS)
        run.diagnostics_every_n_steps = looks
        resolved = resolve(run, data, 1)
        if number < arms:
            build_module(resolved, data)
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
