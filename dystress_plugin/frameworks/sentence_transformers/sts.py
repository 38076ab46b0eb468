"""Semantic textual similarity: pairs of sentences with a score, from the files that their sources release."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator


class ScoredPairs(NamedTuple):
    """Sentences side by side, and how alike people found them: 0 to 5, in SICK-R 1 to 5."""

    first: list[str]
    second: list[str]
    scores: list[float]


def evaluator(path: str | Path, *, batch_size: int = 128) -> EmbeddingSimilarityEvaluator:
    """The library's evaluator of `read_pairs(path)`, named after the file or folder.

    Spearman's correlation of cosines and scores; for a folder over all of its pairs together, which SimCSE calls "all".
    """
    name = Path(path).name if Path(path).is_dir() else Path(path).stem
    pairs = read_pairs(path)
    return EmbeddingSimilarityEvaluator(*pairs, batch_size=batch_size, main_similarity="cosine", name=name)


def read_pairs(path: str | Path) -> ScoredPairs:
    """Pairs of one task.

    Args:
        path: one of
            - a .csv of sentence, sentence, score, with or without a heading;
            - the STS benchmark's own sts-dev.csv or sts-test.csv: with tabs, the score in the fifth column;
            - STS.input.NAME.txt of STS12 to STS16, with STS.gs.NAME.txt beside it; pairs without a score are left out;
            - SICK_*.txt of SICK: with tabs and a heading;
            - a folder of STS.input.*.txt, for one year's task.

    Raises:
        FileNotFoundError: if it, or the file of scores, is not there.
        ValueError: for a file of another form, or without a pair; it names the file and the line.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("STS.input.*.txt"))
        if not files:
            raise ValueError(f"{path} has no STS.input.*.txt: name a file, or a year's folder of SentEval's data.")
        parts = [read_pairs(file) for file in files]
        return ScoredPairs(
            [entry for part in parts for entry in part.first],
            [entry for part in parts for entry in part.second],
            [entry for part in parts for entry in part.scores],
        )
    found = _semeval(path) if path.name.startswith("STS.input.") else _table(path)
    if not found.scores:
        raise ValueError(f"{path} has no pair with a score.")
    return found


def _semeval(path: Path) -> ScoredPairs:
    scores = path.with_name(path.name.replace("STS.input.", "STS.gs.", 1)).read_text(encoding="utf-8").splitlines()
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) != len(scores):
        raise ValueError(f"{path} has {len(lines)} pairs, but its file STS.gs.* {len(scores)} scores.")
    scored = [(line, score) for line, score in zip(lines, scores, strict=True) if score]
    return _pairs(path, [(*line.split("\t")[:2], score) for line, score in scored])


def _table(path: Path) -> ScoredPairs:
    with path.open(encoding="utf-8", newline="") as file:
        first = file.readline()
        file.seek(0)
        if "\t" not in first:
            return _pairs(path, [row[:3] for row in csv.reader(file) if row], heading=True)
        rows = [line.rstrip("\r\n").split("\t") for line in file]
    if rows[0][:2] == ["pair_ID", "sentence_A"]:
        score = rows[0].index("relatedness_score")
        return _pairs(path, [(row[1], row[2], row[score]) for row in rows[1:]])
    return _pairs(path, [(*row[5:7], row[4]) if len(row) > 6 else row for row in rows])


def _pairs(path: Path, rows: Sequence[Sequence[str]], *, heading: bool = False) -> ScoredPairs:
    pairs = ScoredPairs([], [], [])
    for number, row in enumerate(rows):
        try:
            first, second, score = row
            value = float(score)
        except ValueError:
            if heading and not number:
                continue
            raise ValueError(
                f"{path}, pair {number + 1}: {row!r} is not sentence, sentence, score; see read_pairs for known forms."
            ) from None
        pairs.first.append(first)
        pairs.second.append(second)
        pairs.scores.append(value)
    return pairs
