"""`python -m dystress_plugin.frameworks.open_clip method=isogclr -- ...`: open_clip's training with a method of ours.

Before `--` stand the method and its parameters, `method_kwargs.tau_min=0.01`, and `temperature_lr=3e-5` for networks of
temperatures (Adam); after it the arguments of `python -m open_clip_train.main`, as they are. To these comes
`--chunk-size 64`: pairs that are embedded at a time, so that a large batch needs the memory of a small one, with all of
its negatives.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dystress_plugin.checks import check_positive, unknown_name
from dystress_plugin.chunks import check_chunks
from dystress_plugin.errors import needing
from dystress_plugin.recipes import Recipe, recipe

with needing("open-clip"):
    from omegaconf import OmegaConf

USAGE = (
    "python -m dystress_plugin.frameworks.open_clip method=NAME [method_kwargs.PARAMETER=VALUE ...] "
    "-- [--chunk-size PAIRS] ARGUMENTS"
)
KEYS = ("method", "method_kwargs", "temperature_lr")


def main(arguments: list[str] | None = None) -> int:
    """Trains; returns the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(f"{__doc__}\nusage: {USAGE}")
        return 0
    try:
        keys, rest, chunk_size = _split(words)
        method, settings, rate = _given(keys)
        from dystress_plugin.frameworks.open_clip import program

        loss = program.build(method, settings, rest, chunk_size)
    except (ValueError, TypeError, ImportError) as error:
        print(f"dystress: {error}", file=sys.stderr)
        return 2
    program.train(loss, rest, chunk_size=chunk_size, **rate)  # what fails from here on, open_clip shows where
    return 0


def _split(words: list[str]) -> tuple[list[str], list[str], int | None]:
    """The keys, open_clip's arguments, which begin at `--` or at the first option, and our own among them.

    Raises:
        ValueError: for a --chunk-size that is no whole number of at least 1.
    """
    first = next((number for number, word in enumerate(words) if word.startswith("-")), len(words))
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--chunk-size")
    given, rest = own.parse_known_args([word for word in words[first:] if word != "--"])
    size = given.chunk_size
    return words[:first], rest, check_chunks(int(size) if size and size.isdecimal() else size, name="--chunk-size")


def _given(keys: list[str]) -> tuple[Recipe, dict[str, Any], dict[str, float]]:
    """The method, its parameters, and the learning rate of the temperature, where there is one.

    Raises:
        ValueError: for a key that there is not, a method without a name, or a parameter that it does not have.
    """
    for key in keys:
        if "=" not in key:
            raise ValueError(f"'{key}' is no key=value. Usage: {USAGE}")
        if key.partition("=")[0].partition(".")[0] not in KEYS:
            raise ValueError(unknown_name("key", key.partition("=")[0], KEYS))
    given: Any = OmegaConf.to_container(OmegaConf.from_dotlist(keys))
    if "method" not in given:
        raise ValueError(f"No method is given. Usage: {USAGE}")
    method, settings = recipe(str(given["method"])), given.get("method_kwargs") or {}
    if method.queue:
        raise ValueError(f"method={method.name} keeps a queue, which images and texts have no place for: take another.")
    method.check_names(settings)
    rate = {"lr": check_positive("temperature_lr", given["temperature_lr"])} if "temperature_lr" in given else {}
    return method, settings, rate


if __name__ == "__main__":
    sys.exit(main())
