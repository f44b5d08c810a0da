"""Label files of ESC-50, VocalSound, VGGSound, FSD50K and AudioSet.

Audio is not opened: the commands do not ask about sounds yet, answers made elsewhere are scored. The id of a
clip is its file's name without its ending.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from deepinsert.controller.metrics.contract import Example
from deepinsert.envs.data.media import DatasetError

from .question_prompts import ask
from .records import Row, beside, not_empty, read_record, read_table, read_text

QUESTION = "Write an audio caption describing the sound."


def read_esc50(data: Path, image_root: Path | None) -> list[Example]:
    """Examples of esc50.csv: all five folds, 50 labels."""
    rows = read_table(data, ",", ("filename", "category"))
    labels = sorted({row.text("category") for row in rows})
    return _examples("esc50", [(row, row.text("filename"), (row.text("category"),)) for row in rows], labels)


def read_vocalsound(data: Path, image_root: Path | None) -> list[Example]:
    """Examples of datafiles/te.json, with class_labels_indices_vs.csv beside it or above."""
    names = ("class_labels_indices_vs.csv", "../class_labels_indices_vs.csv")
    known = _names(beside(data, names, "the names of the labels"))
    rows = read_record(data).rows("data")
    return _examples(
        "vocalsound",
        [(row, row.text("wav"), (_named(row, "labels", row.text("labels"), known),)) for row in rows],
        list(known.values()),
    )


def read_vggsound(data: Path, image_root: Path | None) -> list[Example]:
    """Examples of the test split in vggsound.csv (video, second, label, split; no header). Ids are
    VIDEO_SECOND with six digits."""
    rows = _bare_table(data, ("video", "second", "label", "split"))
    labels = sorted({row.text("label") for row in rows})
    kept = [row for row in rows if row.text("split") == "test"]
    if not kept:
        raise DatasetError(f'{data}: no row whose fourth column is "test"; give vggsound.csv')
    named = [
        (row, f"{row.text('video')}_{row.whole('second'):06d}.wav", (row.text("label"),)) for row in kept
    ]
    return _examples("vggsound", named, labels)


def read_fsd50k(data: Path, image_root: Path | None) -> list[Example]:
    """Examples of FSD50K.ground_truth/eval.csv, with vocabulary.csv beside it."""
    vocabulary = _bare_table(
        beside(data, ("vocabulary.csv",), "the names of the labels"), ("index", "label", "mid")
    )
    known = {row.text("label"): row.text("label") for row in vocabulary}
    rows = read_table(data, ",", ("fname", "labels"))
    return _examples(
        "fsd50k",
        [
            (
                row,
                f"{row.text('fname')}.wav",
                tuple(_named(row, "labels", label, known) for label in row.text("labels").split(",")),
            )
            for row in rows
        ],
        list(known),
    )


def read_audioset(data: Path, image_root: Path | None) -> list[Example]:
    """Examples of eval_segments.csv, with class_labels_indices.csv beside it. Ids are the videos'."""
    known = _names(beside(data, ("class_labels_indices.csv",), "the names of the labels"))
    rows = _bare_table(data, ("YTID", "start_seconds", "end_seconds", "positive_labels"))
    return _examples(
        "audioset",
        [
            (
                row,
                row.text("YTID") + ".wav",
                tuple(
                    _named(row, "positive_labels", mid.strip(), known)
                    for mid in row.text("positive_labels").split(",")
                ),
            )
            for row in rows
        ],
        list(known.values()),
    )


def _names(path: Path) -> dict[str, str]:
    """Names of labels by their mid, in the file's order."""
    rows = read_table(path, ",", ("mid", "display_name"))
    return {row.text("mid"): row.text("display_name") for row in rows}


def _named(row: Row, field: str, label: str, known: dict[str, str]) -> str:
    if label not in known:
        row.fault(field, f"{label!r} is no label of the vocabulary; do both files belong together?")
    return known[label]


def _bare_table(path: Path, names: Sequence[str]) -> list[Row]:
    """The rows of a CSV without header, by `names` of its columns; lines that begin with # are left out."""
    reader = csv.reader(StringIO(read_text(path), newline=""), skipinitialspace=True)
    rows = []
    for cells in reader:
        if not cells or cells[0].startswith("#"):
            continue
        where = f"{path}, line {reader.line_num}"
        if len(cells) != len(names):
            raise DatasetError(
                f"{where}: {len(cells)} columns, {len(names)} are expected: {', '.join(names)}"
            )
        rows.append(Row(dict(zip(names, cells, strict=True)), where))
    return not_empty(rows, path)


def _examples(
    source: str, clips: Sequence[tuple[Row, str, tuple[str, ...]]], labels: Sequence[str]
) -> list[Example]:
    known: dict[str, Row] = {}
    examples = []
    for row, file, references in clips:
        name = Path(file).name.rpartition(".")[0]
        if name in known:
            raise DatasetError(f"{row.where}: clip {name!r} was already in {known[name].where}")
        known[name] = row
        prompt = ask(name, source, QUESTION, (), references[0])
        examples.append(Example(prompt, references, {"labels": list(labels)}))
    return examples
