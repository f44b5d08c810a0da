"""Label files of ESC-50, VocalSound, VGGSound, FSD50K and AudioSet.

Audio is not opened: the commands do not send sounds to a model yet, and only answers made elsewhere are
scored. The id of a clip is its file's name without its extension.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path

from deepinsert.controller.metrics.contract import Example
from deepinsert.envs.data.media import DatasetError

from .question_prompts import question_prompt
from .records import Row, file_beside, not_empty, read_record, read_table, read_text

QUESTION = "Write an audio caption describing the sound."
LABEL_NAMES = "the names of the labels"


def read_esc50(data: Path, image_root: Path | None) -> list[Example]:
    """Read esc50.csv: all five folds, 50 labels."""
    rows = read_table(data, ",", ("filename", "category"))
    labels = sorted({row.text("category") for row in rows})
    return _examples("esc50", [(row, row.text("filename"), (row.text("category"),)) for row in rows], labels)


def read_vocalsound(data: Path, image_root: Path | None) -> list[Example]:
    """Read datafiles/te.json, with class_labels_indices_vs.csv beside it or in the folder above."""
    files = ("class_labels_indices_vs.csv", "../class_labels_indices_vs.csv")
    vocabulary = _vocabulary(file_beside(data, files, LABEL_NAMES))
    rows = read_record(data).rows("data")
    clips = [(row, row.text("wav"), (_label(row, "labels", row.text("labels"), vocabulary),)) for row in rows]
    return _examples("vocalsound", clips, list(vocabulary.values()))


def read_vggsound(data: Path, image_root: Path | None) -> list[Example]:
    """Read the test split of vggsound.csv, whose columns are video, second, label and split, without header.

    Ids are VIDEO_SECOND with six digits.
    """
    rows = _table_without_header(data, ("video", "second", "label", "split"))
    labels = sorted({row.text("label") for row in rows})
    test_rows = [row for row in rows if row.text("split") == "test"]
    if not test_rows:
        raise DatasetError(f'{data}: no row has "test" in its fourth column; give vggsound.csv')
    clips = [
        (row, f"{row.text('video')}_{row.whole('second'):06d}.wav", (row.text("label"),)) for row in test_rows
    ]
    return _examples("vggsound", clips, labels)


def read_fsd50k(data: Path, image_root: Path | None) -> list[Example]:
    """Read FSD50K.ground_truth/eval.csv, with vocabulary.csv beside it."""
    path = file_beside(data, ("vocabulary.csv",), LABEL_NAMES)
    names = [row.text("label") for row in _table_without_header(path, ("index", "label", "mid"))]
    vocabulary = {name: name for name in names}
    clips = []
    for row in read_table(data, ",", ("fname", "labels")):
        labels = [_label(row, "labels", label, vocabulary) for label in row.text("labels").split(",")]
        clips.append((row, f"{row.text('fname')}.wav", tuple(labels)))
    return _examples("fsd50k", clips, list(vocabulary))


def read_audioset(data: Path, image_root: Path | None) -> list[Example]:
    """Read eval_segments.csv, with class_labels_indices.csv beside it. Ids are those of the videos."""
    vocabulary = _vocabulary(file_beside(data, ("class_labels_indices.csv",), LABEL_NAMES))
    columns = ("YTID", "start_seconds", "end_seconds", "positive_labels")
    clips = []
    for row in _table_without_header(data, columns):
        mids = [mid.strip() for mid in row.text("positive_labels").split(",")]
        labels = [_label(row, "positive_labels", mid, vocabulary) for mid in mids]
        clips.append((row, f"{row.text('YTID')}.wav", tuple(labels)))
    return _examples("audioset", clips, list(vocabulary.values()))


def _vocabulary(path: Path) -> dict[str, str]:
    """Return the names of labels by their mid, in the file's order."""
    rows = read_table(path, ",", ("mid", "display_name"))
    return {row.text("mid"): row.text("display_name") for row in rows}


def _label(row: Row, field: str, label: str, vocabulary: Mapping[str, str]) -> str:
    """Return the name of a label in the field of a row."""
    if label not in vocabulary:
        row.fault(field, f"{label!r} is no label of the vocabulary; do both files belong together?")
    return vocabulary[label]


def _table_without_header(path: Path, columns: Sequence[str]) -> list[Row]:
    """Return the rows of a CSV without header, by the names of its columns; lines with # are comments."""
    reader = csv.reader(StringIO(read_text(path), newline=""), skipinitialspace=True)
    rows = []
    for cells in reader:
        if not cells or cells[0].startswith("#"):
            continue
        origin = f"{path}, line {reader.line_num}"
        if len(cells) != len(columns):
            raise DatasetError(
                f"{origin}: the line has {len(cells)} columns, {len(columns)} are expected: "
                f"{', '.join(columns)}"
            )
        rows.append(Row(dict(zip(columns, cells, strict=True)), origin))
    return not_empty(rows, path)


def _examples(
    source: str, clips: Sequence[tuple[Row, str, tuple[str, ...]]], labels: Sequence[str]
) -> list[Example]:
    """Return one example per clip.

    Args:
        source: the benchmark.
        clips: the record, the file and the labels of each clip.
        labels: all labels of the benchmark.
    """
    row_of_clip: dict[str, Row] = {}
    examples = []
    for row, file, references in clips:
        name = Path(file).name.rpartition(".")[0]
        if name in row_of_clip:
            raise DatasetError(f"{row.origin}: clip {name!r} was already in {row_of_clip[name].origin}")
        row_of_clip[name] = row
        prompt = question_prompt(name, source, QUESTION, (), references[0])
        examples.append(Example(prompt, references, {"labels": list(labels)}))
    return examples
