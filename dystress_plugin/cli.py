"""The `dystress` command."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Collection, Sequence
from typing import Any

from dystress_plugin import __version__
from dystress_plugin.errors import RunStopped
from dystress_plugin.recipes import METHODS, Recipe

EXTRA = "The command needs more than torch: pip install 'dystress-plugin[cli]' ({error})."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `dystress ...`; returns the exit status: 1 for a training that had to stop, 2 for bad settings or files."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["methods"]:  # needs torch alone
        print(methods_table())
        return 0
    try:
        # Options that argparse does not know are settings in another library's style; the error for them is ours.
        parsed, options = _parser().parse_known_args(given)
        result: dict[str, Any] = parsed.run([*options, *parsed.settings])
    except ImportError as error:
        print(f"dystress: {EXTRA.format(error=error)}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError) as error:  # of the system: a file that cannot be read or written
        print(f"dystress: {error}", file=sys.stderr)
        return 2
    except RunStopped as error:
        print(f"dystress: {error}", file=sys.stderr)
        return 1
    if result:
        print(json.dumps(result, indent=2))
    return 0


def methods_table() -> str:
    """The methods with their temperature, objective, parameters and paper; then their variants, a line each."""
    variants = {
        name: base
        for name in METHODS
        if (base := name.rpartition("_")[0]) in METHODS and METHODS[name].temperature is METHODS[base].temperature
    }
    lines = _columns(
        [("method", "temperature", "objective", "paper")]
        + [
            (recipe.name, recipe.temperature.__name__, recipe.objective, f"{recipe.paper}, {recipe.url}")
            for recipe in METHODS.values()
            if recipe.name not in variants
        ]
    )
    lines += ["", *_columns([("parameters and defaults, method_kwargs.NAME=VALUE", "")])]
    lines += _columns([(name, _defaults(METHODS[name])) for name in METHODS if name not in variants])
    lines += ["", "variants, with temperature, parameters and paper of the method before the underscore"]
    lines += _columns([(name, *_difference(METHODS[name], METHODS[base])) for name, base in variants.items()])
    return "\n".join(lines)


def _defaults(recipe: Recipe, without: Collection[str] = ()) -> str:
    return ", ".join(
        name if default is inspect.Parameter.empty else f"{name}={default}"
        for name, default in recipe.parameters.items()
        if name not in without
    )


def _difference(recipe: Recipe, base: Recipe) -> tuple[str, str]:
    if recipe.queue:
        return (
            f"objective {recipe.objective}",
            "a queue of negatives and a momentum encoder: queue_size, momentum_encoder",
        )
    return f"objective {recipe.objective}", _defaults(recipe, without=base.parameters)


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _methods(tokens: Sequence[str]) -> dict[str, Any]:
    if tokens:
        raise ValueError(f"`dystress methods` takes no settings, not '{tokens[0]}'.")
    print(methods_table())
    return {}


def _pretrain(tokens: Sequence[str]) -> dict[str, Any]:
    from dystress_plugin.experiment.keys import parse
    from dystress_plugin.experiment.settings import PretrainSettings, output_folder

    settings = parse(PretrainSettings, tokens)  # before the imports that take seconds, as for every command
    from dystress_plugin.experiment.pretrain.command import pretrain

    summary = pretrain(settings)
    if summary:
        print(summary_table(summary))
        for path in sorted((output_folder(settings) / "figures").glob("*.png")):
            print(f"figure: {path}")
    return {}


def _evaluate(tokens: Sequence[str]) -> dict[str, Any]:
    from dystress_plugin.experiment.keys import parse
    from dystress_plugin.experiment.settings import EvaluateSettings

    settings = parse(EvaluateSettings, tokens)
    from dystress_plugin.experiment.evaluate.command import evaluate_run

    return evaluate_run(settings)


def _long_tail(tokens: Sequence[str]) -> dict[str, Any]:
    from dystress_plugin.experiment.data.export import write_long_tail
    from dystress_plugin.experiment.keys import parse
    from dystress_plugin.experiment.settings import LongTailSettings

    return write_long_tail(parse(LongTailSettings, tokens))


def _inspect(tokens: Sequence[str]) -> dict[str, Any]:
    from dystress_plugin.experiment.keys import parse
    from dystress_plugin.experiment.settings import InspectSettings

    settings = parse(InspectSettings, tokens)
    from dystress_plugin.experiment.inspect.command import inspect_temperatures, output_folder, table

    report = inspect_temperatures(settings)
    print("\n".join([report["network"], "", *_columns(table(report)), ""]))
    print("\n".join(found["advice"] for found in report["temperatures"].values()))
    for path in sorted(output_folder(settings).glob("*.png")):
        print(f"figure: {path}")
    return {}


def _compare(tokens: Sequence[str]) -> dict[str, Any]:
    from dystress_plugin.experiment.compare.command import command_line, compare
    from dystress_plugin.experiment.compare.plan import parse_compare

    return dict(compare(*parse_compare(tokens), command_line(tokens)))


def _report(tokens: Sequence[str]) -> dict[str, Any]:
    from dystress_plugin.experiment.keys import parse
    from dystress_plugin.experiment.settings import ReportSettings

    folders = [token for token in tokens if os.path.exists(token) or not ("=" in token or token.startswith("-"))]
    settings = parse(ReportSettings, [token for token in tokens if token not in folders])
    settings.runs += folders
    from dystress_plugin.experiment.report.command import report

    return dict(report(settings))


def summary_table(summary: dict[str, Any]) -> str:
    """The accuracies of a run beside those of its untrained backbone, in percent."""
    lines = [
        f"{summary['method']} on {summary['data']}, seed {summary['seed']}, {summary['epochs']} epochs, "
        f"{summary['seconds']} s",
        f"{'top-1 accuracy (%)':<22}{'untrained':>10}{'trained':>10}{'gain':>8}",
    ]
    for name, label in (("knn_top1", "weighted kNN"), ("linear_top1", "linear probe")):
        before, after = summary[f"untrained_{name}"], summary[name]
        lines.append(f"{label:<22}{before:>10.2f}{after:>10.2f}{after - before:>+8.2f}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    from dystress_plugin.experiment.keys import describe
    from dystress_plugin.experiment.settings import (
        CompareSettings,
        EvaluateSettings,
        InspectSettings,
        LongTailSettings,
        PretrainSettings,
        ReportSettings,
    )

    parser = argparse.ArgumentParser(
        "dystress",
        description="Contrastive pretraining with adaptive temperatures. Settings are written key=value.",
    )
    parser.add_argument("--version", action="version", version=f"dystress_plugin {__version__}")
    commands = parser.add_subparsers(
        required=True, metavar="{methods,pretrain,evaluate,compare,report,long-tail,inspect}"
    )
    commands.add_parser("methods", help="print the table of methods").set_defaults(run=_methods, settings=())
    for name, run, structure, help_ in (
        ("pretrain", _pretrain, PretrainSettings, "train a method, evaluate it and draw figures"),
        (
            "compare",
            _compare,
            CompareSettings,
            "methods and fixed temperatures over seeds; takes pretrain's keys too",
        ),
        ("report", _report, ReportSettings, "table and page of finished runs: dystress report runs/*"),
        ("evaluate", _evaluate, EvaluateSettings, "kNN and linear probe of a trained backbone"),
        ("long-tail", _long_tail, LongTailSettings, "write a long-tailed part of a data set as image folders"),
        ("inspect", _inspect, InspectSettings, "what each temperature would do to a network's similarities"),
    ):
        command = commands.add_parser(
            name,
            help=help_,
            description=f"dystress {name}: {help_}.",
            epilog=f"keys and their defaults:\n{describe(structure)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("settings", nargs="*", metavar="key=value")
        command.set_defaults(run=run)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
