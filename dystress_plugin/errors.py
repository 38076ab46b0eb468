"""Errors that are no fault of a setting: what another library says of its own, and what is not installed."""

from __future__ import annotations

import json
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.version import Version

PACKAGE = "dystress-plugin"
# What is installed is mostly called as what is imported.
_DISTRIBUTIONS = {"hydra": "hydra-core", "PIL": "torchvision", "sklearn": "scikit-learn", "umap": "umap-learn"}


class RunStopped(RuntimeError):
    """A training that cannot go on, through no setting of its own; what it has written is whole."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line that ends with a full stop; of a bare one, the line of code."""
    line = str(error).strip().partition("\n")[0].strip()
    if not line:
        code = [frame.line or "" for frame in traceback.extract_tb(error.__traceback__)]
        last = [text for text in code if not text.startswith("raise ")][-1:]  # what led to a bare `raise`
        line = ": ".join([type(error).__name__, *last])
    return line if line.endswith((".", "!", "?")) else f"{line}."


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Around imports of optional packages: where one is missing, the error says what to install."""
    try:
        yield
    except ImportError as error:
        if "pip install" in str(error):  # said already
            raise
        raise ImportError(
            f"{first_line(error)}\nInstall what it needs: {to_install(extra, error)}", name=error.name
        ) from error


def to_install(extra: str, lacking: ImportError | str = "") -> str:
    """The command that installs an extra, from where this package came: no package index has it.

    Args:
        extra: what the failing code needs.
        lacking: its error, or the last line of that; an extra that has the missing package takes the place of one that
            has not.
    """
    named = re.search(r"No module named '(\w+)", str(lacking))
    path = lacking.name if isinstance(lacking, ImportError) else named and named[1]
    module = (path or "").partition(".")[0]
    extra = _extra_with(_DISTRIBUTIONS.get(module, module), extra)
    clone = Path(__file__).resolve().parents[1]
    if (clone / "pyproject.toml").is_file():
        return f'pip install -e "{clone}[{extra}]"'
    return f'pip install "{PACKAGE}[{extra}]{_origin()}"'


def checked_version(distribution: str, oldest: str, newest: str, supported: str, advice: str) -> Version:
    """The installed version of a host, which the caller's caller imports.

    Args:
        distribution: name of the host's package.
        oldest: the first that works.
        newest: the last that was tried, of which any patch will do.
        supported: which versions are, the beginning of a sentence.
        advice: what to do about another one, a line.

    Raises:
        ImportError: if it is missing or older; two lines.

    Warns:
        UserWarning: if it is newer.
    """
    from packaging.version import Version  # which the loss alone does without

    try:
        version = Version(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        raise ImportError(f"{supported}, and none is installed.\n{advice}") from None
    if version < Version(oldest):
        raise ImportError(f"{supported}, and {version} is installed.\n{advice}")
    if version.release[:2] > Version(newest).release[:2]:
        warnings.warn(f"{supported}; {version} is installed, and nobody has tried it yet.", stacklevel=4)
    return version


def _extra_with(distribution: str, otherwise: str) -> str:
    try:
        required = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return otherwise
    entries = [re.match(r"([\w.-]+).*\bextra == ['\"]([\w-]+)", entry) for entry in required]
    holding = [entry[2] for entry in entries if entry and entry[1].replace("_", "-") == distribution.replace("_", "-")]
    small = [extra for extra in holding if extra not in ("all", "dev")]
    return otherwise if otherwise in holding or not small else small[0]


def _origin() -> str:
    """Where pip took this package from, as it wants to read it; nothing where that was an index."""
    url = json.loads(metadata.distribution(PACKAGE).read_text("direct_url.json") or "{}")
    if not url:
        return ""
    version = url.get("vcs_info")
    return f" @ {version['vcs']}+{url['url']}@{version['commit_id']}" if version else f" @ {url['url']}"
