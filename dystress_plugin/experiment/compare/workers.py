"""Runs in processes of their own."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dystress_plugin.errors import RunStopped
from dystress_plugin.experiment.settings import CompareSettings, PretrainSettings


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
