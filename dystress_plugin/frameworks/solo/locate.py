"""Where solo-learn is on this machine, and how it gets there. Standard library only."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

COMMIT = "9187ea39c2c3f43c455ab06664d2b019a9802954"  # solo-learn 1.0.6, main; what we test with
SOURCE = "https://github.com/vturrisi/solo-learn"
COMMAND = "python -m dystress_plugin.frameworks.solo"
ADVICE = (
    f"Install it with `{COMMAND} install`, or set SOLO_LEARN_HOME to a clone of {SOURCE} (commit {COMMIT[:7]}); "
    "what the package index has under this name is 1.0.2 of 2021, which has no scripts."
)
_PTH = "dystress_solo_learn.pth"


class SoloLearnError(RuntimeError):
    """solo-learn is missing, or is not one that we can serve. The message says what to do."""


def find() -> Path:
    """The folder with solo-learn's main_*.py: SOLO_LEARN_HOME, or where an import of `solo` leads, or our clone.

    Raises:
        SoloLearnError: if there is none; two lines.
    """
    named = os.environ.get("SOLO_LEARN_HOME")
    if named:
        home = Path(named).expanduser().resolve()
        if not is_home(home):
            raise SoloLearnError(f"SOLO_LEARN_HOME={named} has no main_pretrain.py and solo/methods.\n{ADVICE}")
        return home
    spec = importlib.util.find_spec("solo")
    places = [Path(place).resolve().parent for place in (spec.submodule_search_locations or [])] if spec else []
    for home in (*places, cache_folder()):
        if is_home(home):
            return home
    if not places:
        raise SoloLearnError(f"solo-learn is not installed.\n{ADVICE}")
    raise SoloLearnError(f"solo-learn {_version()} in {places[0]} has no main_pretrain.py.\n{ADVICE}")


def is_home(folder: Path) -> bool:
    """Whether a folder is a clone of solo-learn with its scripts."""
    return (folder / "main_pretrain.py").is_file() and (folder / "solo" / "methods" / "base.py").is_file()


def cache_folder() -> Path:
    """Where `install` puts its clone."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(base) / "dystress_plugin" / f"solo-learn-{COMMIT[:7]}"


def install(source: str = SOURCE) -> Path:
    """Finds solo-learn, or clones it at the tested commit, and makes `import solo` find it in this environment.

    A line in a .pth file, not pip: solo-learn's setup.py fails without an old setuptools, and its pins would
    downgrade Lightning and torchmetrics.

    Args:
        source: a git URL or path to clone from.

    Returns:
        The folder with solo-learn's scripts.

    Raises:
        SoloLearnError: if SOLO_LEARN_HOME is no solo-learn, or git is missing or fails.
    """
    home = find() if os.environ.get("SOLO_LEARN_HOME") else cache_folder()
    if not is_home(home):
        _clone(source, home)
    _write_pth(home)
    return home


def commit_of(home: Path) -> str | None:
    """The commit that a clone is at, or None where git cannot say."""
    if shutil.which("git") is None or not (home / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(home), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def missing_module(home: Path) -> str | None:
    """What hinders `import solo.methods` in a fresh process, or None where it works."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import solo.methods, hydra"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(home)], capture_output=True, text=True, check=False
    )
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["unknown error"])[-1]


def _clone(source: str, home: Path) -> None:
    if shutil.which("git") is None:
        raise SoloLearnError(f"git is not installed, so {source} cannot be cloned.\n{ADVICE}")
    home.parent.mkdir(parents=True, exist_ok=True)
    # Renamed only when complete, so that an interrupted clone is never mistaken for solo-learn.
    partial = home.with_name(f"{home.name}.{os.getpid()}.partial")
    try:
        for command in (
            ["git", "clone", "--quiet", source, str(partial)],
            ["git", "-C", str(partial), "-c", "advice.detachedHead=false", "checkout", "--quiet", COMMIT],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SoloLearnError(f"`{' '.join(command)}` failed: {done.stderr.strip()}\n{ADVICE}")
        if not is_home(partial):
            raise SoloLearnError(f"{source} at {COMMIT[:7]} has no main_pretrain.py.\n{ADVICE}")
        shutil.rmtree(home, ignore_errors=True)
        partial.rename(home)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_pth(home: Path) -> None:
    folders = [Path(sysconfig.get_path("purelib"))]
    if site.ENABLE_USER_SITE:
        folders.append(Path(site.getusersitepackages()))
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _PTH).write_text(f"{home}\n")
        except OSError:
            continue
        return
    raise SoloLearnError(f"Cannot write into {folders[0]}; solo-learn itself is ready in {home}.\n{ADVICE}")


def _version() -> str:
    try:
        return importlib.metadata.version("solo-learn")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
