"""Keys of a command: typed structures with ranges, from `key=value` tokens and to help texts."""

from __future__ import annotations

import difflib
import operator
import os
import re
from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from functools import partial
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dystress_plugin.checks import unknown_name
from dystress_plugin.experiment import places

T = TypeVar("T")

PATHS = ("data", "val", "indices", "data_root", "out", "checkpoint")

# What raises a ValueError for a key's value that names what is not there.
THERE: dict[str, Callable[[Any], None]] = {
    **{"data": places.check_data, "val": partial(places.check_data, key="val")},
    **{"checkpoint": places.check_run, "runs": places.check_folders},
}

SIGNS = ("", "+", "-", "~")

# --key value, --key=value, -key value, +key=value, key = value: of these or fewer words, a line each.
OTHER_STYLES = re.compile(r"[+~-]*([\w.-]+)(?:(?:\n?=\n?|\n)(?!\S*=)([^-\n][^\n]*))?")

BOUNDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}

ENDS = {"[": "at least", "(": "above", "]": "at most", ")": "below"}


def option(
    default: Any,
    help_: str,
    interval: str = "",
    *,
    words: Sequence[str] = (),
    some: bool = False,
    once: bool = False,
    free: bool = False,
    auto: Callable[[], int] | None = None,
) -> Any:
    """A key and what it can have.

    Args:
        default: its value unless given.
        help_: what it is, up to a semicolon, and more.
        interval: of a number or of each number in a list, such as "(0, 1]".
        words: all that a text can be.
        some: whether a list must have something.
        once: whether a list may have nothing twice.
        auto: what the word auto stands for.
        free: whether a run that has begun may go on with another value, as it does not matter for what is trained.
    """
    numbers = [literal_eval(number) for number in interval[1:-1].split(", ") if interval]
    bounds = {ENDS[end]: number for end, number in zip(interval[:1] + interval[-1:], numbers, strict=True)}
    metadata = {
        **{"help": help_, "words": words, "some": some, "once": once},
        **{"free": free, "auto": auto, "bounds": bounds},
    }
    # RUF009: dataclasses.field behind a shorter name, and each call makes its own.
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


def parse(structure: type[T], tokens: Sequence[str]) -> T:
    """`key=value` tokens merged into a typed structure, all of whose names are known.

    Raises:
        ValueError: as `read`, and for a name such as a method's that there is not.
    """
    settings = read(structure, tokens)
    check_named(settings)
    return settings


def read(structure: type[T], tokens: Sequence[str]) -> T:
    """`key=value` tokens merged into a typed structure.

    Raises:
        ValueError: for a token without `=`, an unknown key (with the nearest one), a value of the wrong type or out of
            its range, or a key without default that is missing.
    """
    known = [f.name for f in fields(structure)]  # type: ignore[arg-type]
    texts = [name for name, hint in get_type_hints(structure).items() if hint in (str, str | None)]
    check_keys(tokens, known)
    autos = {f.name: f.metadata["auto"] for f in fields(structure) if f.metadata["auto"]}  # type: ignore[arg-type]
    tokens = [_without_auto(token, autos) for token in tokens]
    settings: T = merged(structure, *(_parsed(token, texts) for token in tokens))
    return settings


def check_keys(tokens: Sequence[str], known: Sequence[str]) -> None:
    """A ValueError for the first token that is no key=value, or whose key is not known; it says what to write."""
    for number, token in enumerate(tokens):
        key, equals, value = token.partition("=")
        after = tokens[number + 1 :]
        if token[:1] in SIGNS or not equals or (not value and after and "=" not in after[0]):
            raise ValueError(_as_written_here(tokens[number:], tokens[:number], known))
        if key.split(".")[0] not in known:
            raise ValueError(_unknown_key(key, known, tokens))


def _as_written_here(tokens: Sequence[str], before: Sequence[str], known: Sequence[str]) -> str:
    """What to write for a setting in another style, of whose tokens the first one is no key=value."""
    no = f"'{tokens[0]}' is no setting; write "
    if found := OTHER_STYLES.match("\n".join(tokens[:3])):
        first, dot, rest = found[1].partition(".")
        key, value = first.replace("-", "_"), found[2] or "..."
        if key in known:
            return f"'{' '.join(found[0].split(chr(10)))}' is no setting; write {key}{dot}{rest}={value}"
        if tokens[0][0] in SIGNS:
            return f"{no}key=value. {_unknown_key(key, known, tokens)}"
    if os.path.exists(tokens[0]):
        return f"{no}{next((key for key in ('checkpoint', 'data') if key in known), 'key')}={tokens[0]}"
    if before:
        return f"{no}key=value, or quote '{before[-1]} {tokens[0]}' if that is one."
    return f"{no}key=value. {_unknown_key(tokens[0], known, tokens)}"


def _unknown_key(key: str, known: Sequence[str], tokens: Sequence[str]) -> str:
    """The nearest known key, or the nearest parameter of a method, as that is written."""
    surely = difflib.get_close_matches(key, known, cutoff=0.85)
    if "method_kwargs" in known and not surely:
        from dystress_plugin.recipes import METHODS  # and torch: for nothing that is nearly a key

        owners: dict[str, list[str]] = {}
        for method, recipe in METHODS.items():
            for parameter in recipe.parameters:
                owners.setdefault(parameter, []).append(method)
        nearest, *_ = [*difflib.get_close_matches(key.lower(), {*known, *owners}, n=1, cutoff=0.6), ""]
        if nearest in owners and nearest not in known:
            named = [name for name in owners[nearest] if any(name in token for token in tokens)] + owners[nearest]
            whose = f"{named[0]}." if "methods" in known else ""
            return f"Unknown key '{key}'. Did you mean 'method_kwargs.{whose}{nearest}', a parameter of the method?"
    return unknown_name("key", key, known)


def checked(settings: T) -> T:
    """Settings that a program has made, as `parse` would have: each value of its key's type and in its range.

    Raises:
        ValueError: for one that is not.
    """
    same: T = merged(settings)
    check_named(same)
    return same


def check_named(*structures: Any) -> None:
    """A ValueError for names of what is not there: first of files, then of what only torch can be asked for."""
    for settings in structures:
        for f in fields(settings):
            if f.name in THERE and (value := getattr(settings, f.name)) is not None:
                THERE[f.name](value)
    for settings in structures:
        if check := getattr(settings, "check_names", None):
            check()


def merged(base: Any, *changes: Any) -> Any:
    """Values merged into a structure, and checked."""
    change: Any = {}
    try:
        config = OmegaConf.structured(base)
        for change in changes:
            config = OmegaConf.merge(config, change)
        if missing := OmegaConf.missing_keys(config):
            raise ValueError(f"{', '.join(f'{key}=...' for key in sorted(missing))} must be given.")
        OmegaConf.resolve(config)
        settings = OmegaConf.to_object(config)
    except (OmegaConfBaseException, OverflowError) as error:
        key = getattr(error, "full_key", None) or ", ".join(change) or "setting"
        wanted = {f.name: range_of(f) for f in fields(base)}.get(re.split(r"[.[]", key)[0])
        hint = f"; it must be {wanted}" if wanted else ""
        if "is not a ListConfig" in str(error) and key in change:
            raise ValueError(f"{key}: one or several are a list; write {key}=[{change[key]}]") from None
        raise ValueError(f"{key}: {str(error).splitlines()[0]}{hint}") from None
    for f in fields(settings):
        _check_value(f, getattr(settings, f.name))
    if check := getattr(settings, "check_together", None):
        check()
    return settings


def _check_value(f: Field[Any], value: Any) -> None:
    what = f.metadata["help"].partition(";")[0]
    if value == "":
        raise ValueError(f"{f.name}= is empty: {what}.")
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        raise ValueError(f"{f.name}={value} must be a list of plain values: {what}.")
    if f.metadata["words"] and value is not None and value not in f.metadata["words"]:
        raise ValueError(unknown_name(f.name, value, f.metadata["words"]))
    if f.metadata["some"] and not value:
        raise ValueError(f"{f.name}={value} must be at least one: {what}.")
    if f.metadata["once"] and len(set(value)) < len(value):
        raise ValueError(f"{f.name}={value} must be each once: {what}.")
    bounds = f.metadata["bounds"].items()
    for number in value if isinstance(value, list) else [value]:
        # Inside all, not outside of any: NaN is on neither side of a bound.
        if number is not None and not all(BOUNDS[side](number, bound) for side, bound in bounds):
            which = f": {number}" if isinstance(value, list) else ""
            raise ValueError(f"{f.name}={value}{which} must be {range_of(f)}: {what}.")


def range_of(f: Field[Any]) -> str:
    """What numbers a key can be, in words; nothing where it is none."""
    return " and ".join(f"{name} {bound:,}" for name, bound in f.metadata["bounds"].items())


def _without_auto(token: str, autos: Mapping[str, Callable[[], int]]) -> str:
    key, _, value = token.partition("=")
    return f"{key}={autos[key]()}" if key in autos and value == "auto" else token


def _parsed(token: str, texts: Sequence[str]) -> Any:
    """One `key=value` as a config: a text as it stands, anything else as YAML."""
    key, _, value = token.partition("=")
    # A folder may have a name such as 'a #1' or 'a: b', which means something else in YAML.
    if key in texts and value != "null":
        # bash expands the ~ of key=~/x, other shells do not.
        return OmegaConf.create({key: os.path.expanduser(value) if key in PATHS else value})
    try:
        return OmegaConf.from_dotlist([token])
    except (YAMLError, ValueError) as error:  # ValueError: of a number with thousands of digits
        raise ValueError(f"{token} is no key=value in YAML: {str(error).splitlines()[0]}; quote it.") from None


def describe(structure: type) -> str:
    """A line per key: name, default, the words or the help, the range."""
    lines = []
    for f in fields(structure):
        default = f.default if f.default is not MISSING else f.default_factory()  # type: ignore[operator,misc]
        shown = {"None": "null", "???": "(required)", "True": "true", "False": "false"}.get(str(default), default)
        words = " | ".join(f.metadata["words"])
        help_ = f"{words}: {f.metadata['help']}" if words else f.metadata["help"]
        numbers = f" [{range_of(f)}]" if f.metadata["bounds"] else ""
        lines.append(f"  {f.name}={shown}".ljust(32) + f"  {help_}{numbers}")
    return "\n".join(lines)
