"""The subcommands: settings are read and checked first, then what takes seconds to import is imported and called."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from dystress_plugin import __version__
from dystress_plugin.experiment.keys import check_keys, check_named, checked, describe, parse, read
from dystress_plugin.experiment.settings import (
    CompareSettings,
    EmbedSettings,
    EvaluateSettings,
    ExportSettings,
    InspectSettings,
    LongTailSettings,
    PretrainSettings,
    ReportSettings,
    output_folder,
)
from dystress_plugin.experiment.terminal import columns, summary_table

WRITTEN = (
    "Settings are written key=value. config=FILE stands for those in a YAML file, such as a run's own config.yaml; "
    "later ones win."
)

FIRST = """first steps, without a download or a GPU:
  dystress pretrain data=digits epochs=10 out=runs/first   a training, its accuracies and figures: a minute
  dystress inspect checkpoint=runs/first                   what other temperatures would do to its network
  dystress compare methods=[dystress,macl] data=digits     what they end with, over seeds and beside constants"""
LAST = f"""{WRITTEN}
`dystress COMMAND --help` lists its keys with default, meaning and range."""

EXAMPLES = {
    "methods": "dystress methods",
    "pretrain": "dystress pretrain method=dystress method_kwargs.tau_max=0.3 data=PHOTOS image_size=64 out=runs/x",
    "compare": "dystress compare methods=[simclr,dystress,macl] seeds=[0,1,2] data=digits jobs=2 out=runs/cmp",
    "report": "dystress report runs/cmp/runs/*",
    "evaluate": "dystress evaluate checkpoint=runs/x data=FOLDER",
    "embed": "dystress embed checkpoint=runs/x data=PHOTOS out=e.npz",
    "export": "dystress export checkpoint=runs/x out=backbone.pt to=timm",
    "long-tail": "dystress long-tail data=cifar10 long_tail=0.01 seed=1 out=cifar10-lt",
    "inspect": "dystress inspect checkpoint=runs/x methods=[dystress,macl,ts] constants=[0.1,0.2]",
}

ELSEWHERE = {
    "method": "methods=[...]",
    "seed": "seeds=[...]",
    "arm": "NAME-WORD in methods=[...]",
    "family": "that of the method",
    "map": "drawn for the first seed",
}


def parser() -> argparse.ArgumentParser:
    """Of the command line; `run` is what a subcommand calls with `settings`, its tokens."""
    whole = argparse.ArgumentParser(
        "dystress", description=guide(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole.add_argument("--version", action="version", version=f"dystress_plugin {__version__}")
    commands = whole.add_subparsers(required=True, metavar="COMMAND", help="one of those above, then its settings")
    commands.add_parser("methods").set_defaults(run=_methods, settings=())
    for name, (run, structure, help_) in COMMANDS.items():
        command = commands.add_parser(
            name,
            description=f"dystress {name}: {help_}. {WRITTEN}\n\nexample:\n  {EXAMPLES[name]}",
            epilog=f"keys and their defaults:\n{describe(structure)}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("settings", nargs="*", metavar="key=value")
        command.set_defaults(run=run)
    return whole


def guide() -> str:
    """What to do first, and an example of every command."""
    said = {"methods": "print the table of methods"} | {name: help_ for name, (_, _, help_) in COMMANDS.items()}
    lines = [f"  {name:<10} {help_}\n             {EXAMPLES[name]}" for name, help_ in said.items()]
    return "\n".join(
        ["Contrastive pretraining with adaptive temperatures.", "", FIRST, "", "commands:", *lines, "", LAST]
    )


def _methods(tokens: Sequence[str]) -> None:
    raise ValueError(f"`dystress methods` takes no settings, not '{tokens[0]}'.")


def _pretrain(tokens: Sequence[str]) -> None:
    settings = parse(PretrainSettings, tokens)
    from dystress_plugin.experiment.pretrain.command import pretrain

    if summary := pretrain(settings):
        print(summary_table(summary))
        _name_figures(output_folder(settings) / "figures")
        from dystress_plugin.experiment.evaluate.export import loading_lines

        print("\n".join(loading_lines(output_folder(settings))))


def _evaluate(tokens: Sequence[str]) -> None:
    settings = parse(EvaluateSettings, tokens)
    from dystress_plugin.experiment.evaluate.command import evaluate_run

    _print(evaluate_run(settings))


def _embed(tokens: Sequence[str]) -> None:
    settings = parse(EmbedSettings, tokens)
    from dystress_plugin.experiment.evaluate.command import embed

    _print(embed(settings))


def _export(tokens: Sequence[str]) -> None:
    settings = parse(ExportSettings, tokens)
    from dystress_plugin.experiment.evaluate.export import export

    print("\n".join(export(settings)))


def _long_tail(tokens: Sequence[str]) -> None:
    settings = parse(LongTailSettings, tokens)
    from dystress_plugin.experiment.data.export import write_long_tail

    _print(write_long_tail(settings))


def _inspect(tokens: Sequence[str]) -> None:
    settings = parse(InspectSettings, tokens)
    from dystress_plugin.experiment.inspect import command

    report = command.inspect_temperatures(settings)
    print("\n".join([report["network"], "", *columns(command.table(report)), ""]))
    print("\n".join(found["advice"] for found in report["temperatures"].values()))
    _name_figures(Path(report["settings"]["out"]))
    print(f"\n{report['try_first']}")
    if "command" in report:
        print(report["command"])


def _compare(tokens: Sequence[str]) -> None:
    settings, common = parse_compare(tokens)
    from dystress_plugin.experiment.compare.command import command_line, compare, shell_plan

    if settings.plan:
        print("\n".join(shell_plan(settings, common)))
    else:
        _show(compare(settings, common, command_line(tokens)))


def parse_compare(tokens: Sequence[str]) -> tuple[CompareSettings, PretrainSettings]:
    """`key=value` tokens divided into what is compared, and what all runs have in common.

    Raises:
        ValueError: as `settings.parse`, and for the keys of a single run.
    """
    own = {f.name for f in fields(CompareSettings)}
    known = own | {f.name for f in fields(PretrainSettings)} - set(ELSEWHERE)
    mine: list[str] = []
    common: list[str] = []
    for token in tokens:
        if (key := re.split("[.=]", token.lstrip("-"))[0]) in ELSEWHERE:
            raise ValueError(f"'{token}' is for `dystress pretrain`; here it is {ELSEWHERE[key]}.")
        (mine if key in own else common).append(token)
    check_keys(tokens, sorted(known))
    settings, common_settings = read(CompareSettings, mine), read(PretrainSettings, common)
    check_named(settings, common_settings)
    return settings, common_settings


def _report(tokens: Sequence[str]) -> None:
    folders = [token for token in tokens if os.path.exists(token) or not ("=" in token or token.startswith("-"))]
    settings = parse(ReportSettings, [token for token in tokens if token not in folders])
    settings = checked(replace(settings, runs=[*settings.runs, *folders]))
    from dystress_plugin.experiment.report.command import report

    _show(report(settings))


def _print(result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=2))


def _show(paths: dict[str, str]) -> None:
    """The scores of a comparison, and where the rest of it is."""
    import pandas as pd

    from dystress_plugin.experiment.report.page import summary

    scores = pd.read_csv(paths["results"], keep_default_na=False)
    protocols = list(scores["protocol"].unique())
    rows = [(name, *(its.get(each, "–") for each in protocols)) for name, its in summary(scores, "all").items()]
    print("\n".join(columns([("", *protocols), *rows])))
    print("\n".join(f"{what}: {path}" for what, path in paths.items()))


def _name_figures(folder: Path) -> None:
    for path in sorted(folder.glob("*.png")):
        print(f"figure: {path}")


COMMANDS = {
    "pretrain": (_pretrain, PretrainSettings, "train a method, evaluate it and draw figures"),
    "compare": (_compare, CompareSettings, "methods and fixed temperatures over seeds; takes pretrain's keys too"),
    "report": (_report, ReportSettings, "table and page of finished runs"),
    "evaluate": (_evaluate, EvaluateSettings, "kNN and linear probe of a trained backbone"),
    "embed": (_embed, EmbedSettings, "features of images and the names of their files, as arrays in a .npz"),
    "export": (_export, ExportSettings, "a backbone for torchvision, timm or safetensors, and the lines that load it"),
    "long-tail": (_long_tail, LongTailSettings, "write a long-tailed part of a data set as image folders"),
    "inspect": (_inspect, InspectSettings, "what each temperature would do to a network's similarities"),
}
