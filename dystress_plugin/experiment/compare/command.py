"""`dystress compare`: methods and fixed temperatures, each with every seed, scored by every protocol, in one report."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from omegaconf import OmegaConf
from tqdm import tqdm

from dystress_plugin import recipes
from dystress_plugin.experiment import places
from dystress_plugin.experiment.compare.plan import plan
from dystress_plugin.experiment.compare.workers import Workers, shell_lines
from dystress_plugin.experiment.data.datasets import Data, load_for
from dystress_plugin.experiment.data.scan import left_out, scan_images, write_all
from dystress_plugin.experiment.devices import build_trainer
from dystress_plugin.experiment.evaluate.scores import is_scored, pool_for, score_start
from dystress_plugin.experiment.io import files
from dystress_plugin.experiment.io.interruption import sigterm_exits
from dystress_plugin.experiment.io.lock import alone
from dystress_plugin.experiment.keys import checked
from dystress_plugin.experiment.pretrain.folder import check_settings
from dystress_plugin.experiment.pretrain.resolve import (
    build_module,
    check_batch,
    check_first,
    check_network,
    resolve,
)
from dystress_plugin.experiment.report.command import write as write_report
from dystress_plugin.experiment.settings import CompareSettings, PretrainSettings, output_folder
from dystress_plugin.experiment.spec import DataSpec, HardwareSpec, part


class Prepared(NamedTuple):
    """What the runs are trained on.

    Attributes:
        data: for each seed.
        left_out: files in it that cannot be used, by the setting that names them.
    """

    data: dict[int, Data]
    left_out: Mapping[str, Collection[str]]


def compare(settings: CompareSettings, common: PretrainSettings, command: str = "") -> dict[str, str]:
    """Trains and scores what is not there yet, and writes `results.csv` and `report.html`; returns their paths.

    Args:
        settings: what is compared.
        common: the settings of all runs; method, seed and folder are set here.
        command: what the user typed, for the report.

    Raises:
        ValueError: before any training, for settings that do not fit; or after it, where runs have failed.
    """
    settings, common = checked(settings), checked(common)
    runs = _runs(settings, common)
    out = Path(settings.out)
    with alone(out, wait=True) as lock:
        prepared = _prepare(settings, runs)
        files.write_text(out / "compare.yaml", OmegaConf.to_yaml({"command": command, "settings": asdict(settings)}))
        _lay_untrained(settings, runs, prepared)
        failures = _work(settings, runs, lock)
        finished = [output_folder(run) for run in runs if _finished(run) and output_folder(run).name not in failures]
        if not finished:
            raise ValueError(f"All {len(runs)} runs failed: {_lines(failures)}")
        paths = write_report(finished, out, settings.protocols, failures, measure_cost=True, progress=settings.progress)
    if failures:
        raise ValueError(
            f"{len(failures)} of {len(runs)} runs failed; the same command tries them again, and {paths['report']} "
            f"is of the others: {_lines(failures)}"
        )
    return paths


def shell_plan(settings: CompareSettings, common: PretrainSettings) -> list[str]:
    """A line for the shell for each run, and a last one for the report, that together do what `compare` does.

    Raises:
        ValueError: for settings that do not fit.
    """
    settings, common = checked(settings), checked(common)
    runs = _runs(settings, common)
    with alone(Path(settings.out), wait=True):
        _prepare(settings, runs)
    return shell_lines(settings, runs)


def _runs(settings: CompareSettings, common: PretrainSettings) -> list[PretrainSettings]:
    """A run for every seed and arm; seed by seed, so that an unfinished comparison is one of fewer seeds."""
    arms = plan(settings)
    places.check_apart(Path(settings.out), data=common.data, val=common.val)
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
                protocols=settings.protocols,
                map=seed == min(settings.seeds),
                arm=arm.name,
                family=arm.family,
            )
            if queues and not recipes.recipe(arm.method).queue:
                run = replace(run, queue_size=None, momentum_encoder=None)
            runs.append(run)
    return runs


def _prepare(settings: CompareSettings, runs: Sequence[PretrainSettings]) -> Prepared:
    """Finds what is wrong with any run before the first one has trained for an hour.

    Folders of images are scanned once: the runs find in their folders what was found.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for run in runs:
        check_first(run)
    make = partial(build_trainer, part(HardwareSpec, runs[0]), logger=False, enable_checkpointing=False)
    devices = check_network(runs[0], make).world_size  # all have the same
    out = Path(settings.out)
    scans = scan_images(runs[0], out)
    write_all(scans, out)
    data: dict[int, Data] = {}
    for run in runs:
        folder = output_folder(run)
        if scans and not folder.exists():
            folder.mkdir(parents=True)
            write_all(scans, folder)
        if run.seed not in data:
            same = run.long_tail is None and data  # nothing else is drawn with the seed
            here = part(DataSpec, run)
            data[run.seed] = data[runs[0].seed] if same else load_for(here, run.seed, without=left_out(scans))
            check_batch(run, data[run.seed], devices)
        resolved = resolve(run, data[run.seed], devices)
        if run.seed == runs[0].seed:
            build_module(resolved, data[run.seed])
        check_settings(folder, resolved)
    return Prepared(data, left_out(scans))


def _lay_untrained(settings: CompareSettings, runs: Sequence[PretrainSettings], prepared: Prepared) -> None:
    """Scores what the runs of a seed start from, once, and puts the scores into the folders of those not begun."""
    for seed in tqdm(settings.seeds, "scoring the start", unit="seed", disable=None if settings.progress else True):
        its = [run for run in runs if run.seed == seed]
        new = [run for run in its if not (output_folder(run) / "config.yaml").exists()]
        if not new:
            continue
        data = prepared.data[seed]
        start = resolve(new[0], data, 1)
        whole = partial(load_for, start.data, seed, without=prepared.left_out, whole=True)
        scores = score_start(start, data, settings.protocols, pool=pool_for(start, settings.protocols, whole))
        for run in new:
            folder = output_folder(run)
            folder.mkdir(parents=True, exist_ok=True)
            scores.write_untrained(folder, start)


def _work(settings: CompareSettings, runs: Sequence[PretrainSettings], lock: int | None) -> dict[str, str]:
    """Trains and scores every run, each in a process of its own; what went wrong, by the run's name."""
    failures: dict[str, str] = {}

    def one(run: PretrainSettings, children: Workers) -> None:
        folder = output_folder(run)
        try:
            children.train(run)
        except Exception as error:
            if not (folder / "config.yaml").exists():
                raise  # it never began, and the others would not either
            failures[folder.name] = f"{type(error).__name__}: {error}"

    todo = [run for run in runs if not (_finished(run) and is_scored(output_folder(run), run.protocols, run.map))]
    with sigterm_exits(), Workers(settings, lock) as children, ThreadPoolExecutor(settings.jobs) as pool:
        futures = [pool.submit(one, run, children) for run in todo]
        try:
            _watch(runs, futures, settings.progress)
        except BaseException:
            children.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def command_line(arguments: Sequence[str]) -> str:
    """What to type to run the command again."""
    return shlex.join(["dystress", "compare", *arguments])


def _finished(run: PretrainSettings) -> bool:
    return (output_folder(run) / "summary.json").exists()


def _lines(failures: dict[str, str]) -> str:
    return "; ".join(f"{name}: {error}" for name, error in failures.items())


def _watch(runs: Sequence[PretrainSettings], futures: Sequence[Future[None]], show: bool) -> None:
    """Waits for all of them, with a progress bar over the epochs of all runs, which it counts in their tables;
    a line a finished run where the output is no terminal.

    Raises:
        BaseException: the first one of theirs, at once.
    """
    # What is there already is no measure for the time that is left.
    options = {"unit": "epoch", "disable": None if show else True, "smoothing": 0.05}  # None: shown by terminals alone
    said = sum(map(_finished, runs))
    with tqdm(total=sum(run.epochs for run in runs), initial=sum(map(_epochs, runs)), **options) as bar:
        left = set(futures)
        while left:
            done, left = wait(left, timeout=1, return_when=FIRST_COMPLETED)
            finished = sum(map(_finished, runs))
            bar.set_description(f"{finished} of {len(runs)} runs", refresh=False)
            bar.update(sum(map(_epochs, runs)) - bar.n)
            if show and bar.disable and finished > said:
                print(f"{finished} of {len(runs)} runs", flush=True)
                said = finished
            for future in done:
                future.result()


def _epochs(run: PretrainSettings) -> int:
    try:
        return max(0, (output_folder(run) / "metrics.csv").read_bytes().count(b"\n") - 1)
    except FileNotFoundError:
        return 0
