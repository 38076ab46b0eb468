"""Runs lightly's own, unmodified ImageNet benchmark with our methods beside lightly's.

    python -m dystress_plugin.frameworks.lightly --repo PATH_TO_LIGHTLY_CLONE --methods dystress macl [its arguments]

`--repo` may be left out where the environment has LIGHTLY_HOME. The other arguments are the benchmark's; `--help`
lists them.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from dystress_plugin.checks import unknown_name
from dystress_plugin.errors import first_line, to_install

BENCHMARK = Path("benchmarks", "imagenet", "resnet50")


def benchmark_directory(repo: str | None) -> Path:
    """The folder of lightly's benchmark, in `repo` or else in LIGHTLY_HOME.

    Raises:
        SystemExit: with a message of two lines, if there is none.
    """
    clone = repo or os.environ.get("LIGHTLY_HOME")
    directory = Path(clone or "").expanduser().resolve() / BENCHMARK
    if clone and (directory / "main.py").is_file():
        return directory
    problem = "lightly's benchmark is in its GitHub repository, not in the installed package."
    if clone:
        problem = f"'{clone}' is not a clone of lightly's GitHub repository: it has no {BENCHMARK / 'main.py'}."
    raise SystemExit(
        f"{problem}\n"
        "Clone lightly-ai/lightly, and name the clone with --repo PATH, or in the environment as LIGHTLY_HOME."
    )


def load_benchmark(directory: Path) -> ModuleType:
    """lightly's main module, its METHODS extended in place by those of ours whose names it does not have.

    lightly's own methods run as well where Lightning would stop them, see `base.log_as_outermost`.

    Raises:
        SystemExit: with a message of two lines, if lightly is missing or the clone needs another version of it.
    """
    try:
        from lightly.utils.benchmarking import KNNClassifier

        from dystress_plugin.frameworks.lightly.base import log_as_outermost
        from dystress_plugin.frameworks.lightly.modules import BENCHMARK_METHODS
    except ImportError as error:
        raise SystemExit(
            f"The benchmark needs lightly and pytorch-lightning, and Python says: {first_line(error)}\n"
            f"Install both: {to_install('lightly', error)}"
        ) from error
    # The benchmark's modules import each other by bare names, as from a script's folder.
    sys.path.insert(0, str(directory))
    try:
        benchmark = importlib.import_module("main")
    except ImportError as error:
        raise SystemExit(
            f"lightly's benchmark in {directory} does not start with the installed lightly: {error}\n"
            "Check out the clone's tag of the installed version, or install the clone: pip install PATH_TO_CLONE"
        ) from error
    for name, entry in BENCHMARK_METHODS.items():
        benchmark.METHODS.setdefault(name, entry)
    KNNClassifier.log_dict = log_as_outermost
    return benchmark


def main(argv: Sequence[str] | None = None) -> None:
    """Calls the benchmark's own parser and main. `sys.argv` stays as it is: Lightning starts further ranks with it."""
    parser = argparse.ArgumentParser("python -m dystress_plugin.frameworks.lightly", add_help=False, allow_abbrev=False)
    parser.add_argument("--repo", help="clone of lightly's GitHub repository; default: LIGHTLY_HOME")
    options, rest = parser.parse_known_args(argv)
    benchmark = load_benchmark(benchmark_directory(options.repo))
    benchmark.parser.prog = f"{parser.prog} [--repo PATH]"
    benchmark.parser.epilog = f"Methods: {', '.join(benchmark.METHODS)}."
    arguments = benchmark.parser.parse_args(rest)
    for method in arguments.methods or ():
        if method not in benchmark.METHODS:
            benchmark.parser.error(unknown_name("method", method, benchmark.METHODS))
    benchmark.main(**vars(arguments))


if __name__ == "__main__":
    main()
