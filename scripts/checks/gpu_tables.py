"""Rows as a CSV file and as a Markdown table, for the sections of gpu.py."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TypeAlias

Rows: TypeAlias = list[dict[str, object]]


def columns(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def write(rows: Rows, path: Path | None) -> None:
    """Into a CSV file, if there is to be one."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns(rows))
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: Rows) -> str:
    names = columns(rows)
    cells = [names, ["---"] * len(names), *([str(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"
