"""ESC-50, VocalSound and VGGSound by the nearest label, FSD50K and AudioSet by mean average precision.

LTU answers in free text; its evaluation (github.com/YuanGongND/ltu, src/ltu/eval) embeds the answer and each
label as "sound of ..." and compares by cosine. LTU took OpenAI's text-embedding-ada-002; numbers are
comparable within one embedder only, so it is named in the settings and nothing stands in for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deepinsert.controller.metrics.contract import Benchmark, Example, Score, mean_score
from deepinsert.controller.metrics.formats.sounds import (
    read_audioset,
    read_esc50,
    read_fsd50k,
    read_vggsound,
    read_vocalsound,
)

from .embedders import similarities


def heard(answer: str) -> str:
    """What an answer says is heard, the way labels are written: "sound of ..." in lower case.

    LTU's answers begin with "Audio caption:", which goes.
    """
    text = answer.replace('"', "").split("Audio caption")[-1].lstrip(" :").strip()
    return f"sound of {text.lower()}"


def label_text(label: str) -> str:
    """A label as a text to compare with: underscores are spaces."""
    return f"sound of {label.replace('_', ' ').lower()}"


def nearness(answers: Sequence[str], labels: Sequence[str], embedder: str) -> NDArray[np.float64]:
    """Cosine of each answer and each label: (answers, labels)."""
    return similarities(
        [heard(answer) for answer in answers], [label_text(label) for label in labels], embedder
    )


def score_nearest_label(answers: Sequence[str], examples: Sequence[Example], embedder: str = "") -> Score:
    """Share of answers whose nearest label is right; an answer that is like no label at all is wrong."""
    labels = examples[0].facts["labels"]
    cosines = nearness(answers, labels, embedder)
    nearest = np.where(cosines.max(axis=1) > 0, cosines.argmax(axis=1), -1)
    right = [labels.index(example.references[0]) for example in examples]
    return mean_score((nearest == right).astype(np.float64))


def score_mean_average_precision(
    answers: Sequence[str], examples: Sequence[Example], embedder: str = ""
) -> Score:
    """Mean over the classes of average precision (scikit-learn's), in percent; each class ranks the clips by
    the cosine of answer and label.

    Only classes that a clip has count; the details say how many.
    """
    labels = examples[0].facts["labels"]
    column = {label: index for index, label in enumerate(labels)}
    true = np.zeros((len(examples), len(labels)), dtype=bool)
    for row, example in enumerate(examples):
        true[row, [column[label] for label in example.references]] = True
    return mean_average_precision(true, nearness(answers, labels, embedder))


def mean_average_precision(true: NDArray[np.bool_], scores: NDArray[np.float64]) -> Score:
    """Macro mean average precision of `scores` (clips, classes) for what is `true` (clips, classes)."""
    from sklearn.metrics import average_precision_score

    there = true.any(axis=0)
    found = average_precision_score(true[:, there], scores[:, there], average="macro")
    return Score(100 * float(found), "mAP", None, {"classes": float(there.sum())})


_LTU = "github.com/YuanGongND/ltu: src/ltu/eval/"
_EMBEDDER = {"embedder": ""}

BENCHMARKS = (
    Benchmark(
        "esc50", "github.com/YuanGongND/ltu: src/ltu_as/eval/eval_esc.py", read_esc50, score_nearest_label,
        _EMBEDDER, askable=False,
    ),
    Benchmark(
        "vocalsound", f"{_LTU}eval_vs.py", read_vocalsound, score_nearest_label, _EMBEDDER, askable=False
    ),
    Benchmark(
        "vggsound", f"{_LTU}eval_vggsound.py", read_vggsound, score_nearest_label, _EMBEDDER, askable=False
    ),
    Benchmark(
        "fsd50k", f"{_LTU}eval_fsd50k.py", read_fsd50k, score_mean_average_precision, _EMBEDDER, askable=False
    ),
    Benchmark(
        "audioset", f"{_LTU}eval_as.py", read_audioset, score_mean_average_precision, _EMBEDDER, askable=False
    ),
)  # fmt: skip
