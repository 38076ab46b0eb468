#!/usr/bin/env python
"""Runs on a GPU what tests and benchmarks run on a CPU, and writes down what it finds, within minutes.

    scripts/checks/gpu.sh                                    # all sections, at most nine minutes, into results/gpu
    scripts/checks/gpu.sh --seconds 150 --quick              # smaller
    scripts/checks/gpu.sh --device cpu --quick --out runs/gpu  # that it runs; no CUDA graphs, no waiting to catch
    scripts/checks/gpu.sh --sections steps,errors

It needs PyTorch and says what else it misses and so leaves out. The sections:

    tests     the tests of values, gradients, precision, queues and identities, on the device
    training  `dystress pretrain` of digits in 16-mixed and bf16-mixed
    steps     of every method, layout and engine: whether a step waits for the GPU, and fits into a CUDA graph
    errors    of tiles and of the whole matrix from float64: float32, TF32, autocast
    losses    scripts/benchmarks/loss.py: time and memory beside other libraries, and where engine="auto" should change
    chunks    scripts/benchmarks/chunks.py: memory and time of embed_in_chunks with ResNet-50

The first four run side by side where there are the cores, the last two alone. Each has its own time, and none stops the
others; OUT/README.md is written anew as each ends. The exit status is 1 if any failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
TESTS = (
    "tests/test_grid.py",
    "tests/test_identities.py",
    "tests/test_precision.py",
    "tests/test_queue.py",
    "tests/engine/test_dense.py",
    "tests/engine/test_blockwise.py",
    "tests/temperature/test_individual.py::test_twelve_steps_equal_a_plain_loop",
    "tests/temperature/test_individual.py::test_twelve_steps_of_another_layout_equal_a_plain_loop",
    "tests/temperature/test_temp_net.py::test_value_and_gradient_equal_the_double_loop",
    "tests/test_waiting.py::test_a_step_on_cuda_is_captured_and_replayed",
)
# What the command imports, beside torch.
COMMAND = (
    "jinja2",
    "lightly",
    "matplotlib",
    "omegaconf",
    "pandas",
    "pytorch_lightning",
    "safetensors",
    "sklearn",
    "scipy",
)
COMMAND += ("timm", "torchvision", "tqdm")
VERSIONS = ("lightly", "open_clip_torch", "pytorch-lightning", "timm", "torchvision", "triton", "inf-cl")


@dataclass
class Section:
    """Commands, one after the other, that may take a share of the time together."""

    share: float
    commands: Callable[[Settings], list[list[str]]]
    needs: tuple[str, ...] = ()
    alone: bool = False


@dataclass
class Settings:
    device: str
    out: Path
    seconds: float
    quick: bool

    @property
    def small(self) -> bool:
        return self.device == "cpu"

    def script(self, path: str, *arguments: object) -> list[str]:
        return [sys.executable, path, "--device", self.device, *map(str, arguments)]


@dataclass
class Outcome:
    """How a section ended."""

    status: str
    seconds: float = 0.0
    output: str = ""
    failed: bool = False


def tests(settings: Settings) -> list[list[str]]:
    one_in = 80 if settings.small else 12 if settings.quick else 2
    workers = min(8, max(1, (os.cpu_count() or 1) // 2)) if importlib.util.find_spec("xdist") else 0
    side_by_side = ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []
    options = [
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "--maxfail",
        "60",
        "--tb",
        "short",
        *side_by_side,
    ]
    return [
        [sys.executable, "-m", "pytest", *options, "--device", settings.device, "--one-in", str(one_in), *TESTS],
    ]


def training(settings: Settings) -> list[list[str]]:
    few = ["--few"] if settings.quick else []
    return [settings.script("scripts/checks/gpu_training.py", "--out", settings.out / "training.csv", *few)]


def steps(settings: Settings) -> list[list[str]]:
    more = [*(["--images", 8] if settings.small else []), *(["--few"] if settings.quick else [])]
    return [settings.script("scripts/checks/gpu_steps.py", "--out", settings.out / "steps.csv", *more)]


def errors(settings: Settings) -> list[list[str]]:
    images = 200 if settings.small else 3000
    return [settings.script("scripts/checks/gpu_errors.py", "--out", settings.out / "errors.csv", "--images", images)]


def losses(settings: Settings) -> list[list[str]]:
    if settings.small:
        names = ["ours, dense", "ours, blockwise", "dense PyTorch"]
        batches, dtypes, each = [64], ["float32"], 0.2
    else:
        names = []
        batches, dtypes = [64, 256, 1024, 4096, 8192, 16384, 65536], ["float32", "autocast"]
        each = settings.seconds / 300
    if settings.quick and not settings.small:
        batches, dtypes = [64, 1024, 16384], ["float32"]
    options = ["--layout", "views", "both_ways", "--dims", 128, "--dtypes", *dtypes, "--batches", *batches]
    options += ["--seconds", each, "--out", settings.out / "losses", *(["--only", *names] if names else [])]
    return [settings.script("scripts/benchmarks/loss.py", *options)]


def chunks(settings: Settings) -> list[list[str]]:
    batch = 512 if settings.quick else 2048
    sizes = ["--network", "resnet50", "--image-size", 224, "--batch", batch, "--timed", 128, "--bf16"]
    if settings.small:
        sizes = ["--image-size", 16, "--batch", 128, "--timed", 64, "--chunk", 16, "--repeats", 1]
    return [settings.script("scripts/benchmarks/chunks.py", *sizes)]


SECTIONS = {
    "tests": Section(0.45, tests, ("pytest", "hypothesis")),
    "training": Section(0.45, training, COMMAND),
    "steps": Section(0.45, steps),
    "errors": Section(0.45, errors),
    "losses": Section(0.36, losses, alone=True),
    "chunks": Section(0.18, chunks, ("torchvision",), alone=True),
}


def run(name: str, settings: Settings, limit: float) -> Outcome:
    """Runs a section's commands within its time; says loudly what it leaves out."""
    section, started = SECTIONS[name], time.monotonic()
    if missing := [module for module in section.needs if importlib.util.find_spec(module) is None]:
        return Outcome(f"LEFT OUT: {', '.join(missing)} not installed")
    output, failed, status = "", False, "passed"
    for command in section.commands(settings):
        left = limit - (time.monotonic() - started)
        text, code = finished(command, max(left, 1.0), threads=None if section.alone else 2)
        output += f"$ {' '.join(command)}\n{text}\n"
        if code:
            failed = True
            status = f"FAILED, out of its {limit:.0f} s" if code == TIMEOUT else f"FAILED, exit status {code}"
    return Outcome(status, time.monotonic() - started, output, failed)


TIMEOUT = -1000


def finished(command: list[str], limit: float, threads: int | None) -> tuple[str, int]:
    """What a command says, and its exit status; it and all that it started are ended at the limit."""
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except BaseException as error:  # Ctrl-C too: it does not reach another session
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = TIMEOUT
        file.seek(0)
        return file.read(), code


def card(device: str) -> str:
    lines = [f"* {platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"]
    lines.append(f"* PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            driver = "unknown"
        lines.insert(0, f"* {properties.name}, {properties.total_memory / 2**30:.0f} GiB, driver {driver}")
    return "\n".join([*lines, f"* {', '.join(map(version, VERSIONS))}"])


def version(name: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"no {name}"


def shown(name: str, outcome: Outcome) -> str:
    """The tables that a section printed, and its last words; all of them where it failed."""
    parts = [f"## {name}: {outcome.status}, {outcome.seconds:.0f} s"]
    if outcome.failed:
        parts.append(f"```\n{outcome.output[-6000:].strip()}\n```")
    lines, table = outcome.output.splitlines(), False
    for number, line in enumerate(lines):
        below = lines[number + 1] if number + 1 < len(lines) else ""
        begins = line.startswith("|") and below.startswith(("|--", "| --"))
        table = line.startswith("|") and (table or begins)
        if table:
            parts.append(f"\n{line}" if begins else line)
    words = [line for line in lines if line.strip() and not line.startswith(("|", "$"))]
    parts += ["", *words[-1:]]
    return "\n".join(parts)


def write(settings: Settings, outcomes: dict[str, Outcome]) -> None:
    """The summary so far, and everything that was said."""
    title = f"# On {torch.cuda.get_device_name() if settings.device == 'cuda' else 'a CPU'}\n\n"
    about = f"Written by `scripts/checks/gpu.sh`, on {time.strftime('%Y-%m-%d')}.\n\n{card(settings.device)}"
    body = "\n\n".join(shown(name, outcomes[name]) for name in SECTIONS if name in outcomes)
    (settings.out / "README.md").write_text(f"{title}{about}\n\n{body}\n")
    said = "\n".join(f"===== {name}\n{outcome.output[-500_000:]}" for name, outcome in outcomes.items())
    (settings.out / "log.txt").write_text(said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu", help="a folder for at most eight files")
    parser.add_argument("--seconds", type=float, default=520.0, help="that everything may take")
    parser.add_argument("--quick", action="store_true", help="fewer tests and sizes")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of them, with commas between")
    args = parser.parse_args()
    chosen = args.sections.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"no section {', '.join(unknown)}; choose from {', '.join(SECTIONS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU; --device cpu tries everything that does not need one")
    settings = Settings(args.device, args.out.resolve(), args.seconds, args.quick)
    settings.out.mkdir(parents=True, exist_ok=True)

    outcomes: dict[str, Outcome] = {}
    started = time.monotonic()

    def do(name: str, later: float = 0.0) -> None:
        """One section; those alone may take what is left of the time, less what is kept for later ones."""
        print(f"{name} ...", flush=True)
        share, left = SECTIONS[name].share, settings.seconds - (time.monotonic() - started)
        own = settings.seconds * share if name not in alone else left - settings.seconds * later
        outcomes[name] = run(name, settings, own)
        write(settings, outcomes)
        print(f"{name}: {outcomes[name].status}, {outcomes[name].seconds:.0f} s", flush=True)

    alone = [name for name in chosen if SECTIONS[name].alone]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4)) as pool:
        list(pool.map(do, [name for name in chosen if name not in alone]))
    for number, name in enumerate(alone):
        do(name, sum(SECTIONS[other].share for other in alone[number + 1 :]))
    print(settings.out / "README.md")
    return int(any(outcome.failed for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
