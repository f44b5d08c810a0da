"""ESC-50, VocalSound and VGGSound by the nearest label, FSD50K and AudioSet by mean average precision.

LTU answers in free text. Its evaluation (github.com/YuanGongND/ltu, src/ltu/eval) embeds the answer and each
label as "sound of ..." and compares them by cosine. LTU used OpenAI's text-embedding-ada-002. Numbers are
only comparable for the same embedder, so the settings name it and there is no default.
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


def answer_text(answer: str) -> str:
    """Return an answer in the form of a label: "sound of ..." in lower case.

    LTU's answers begin with "Audio caption:", which is removed.
    """
    text = answer.replace('"', "").split("Audio caption")[-1].lstrip(" :").strip()
    return f"sound of {text.lower()}"


def label_text(label: str) -> str:
    """Return a label as a text to compare with, in which underscores are spaces."""
    return f"sound of {label.replace('_', ' ').lower()}"


def label_similarities(answers: Sequence[str], labels: Sequence[str], embedder: str) -> NDArray[np.float64]:
    """Return the cosine of each answer and each label, (answers, labels)."""
    return similarities(
        [answer_text(answer) for answer in answers], [label_text(label) for label in labels], embedder
    )


def score_nearest_label(answers: Sequence[str], examples: Sequence[Example], embedder: str = "") -> Score:
    """Return the share of answers whose nearest label is right.

    An answer that is similar to no label is wrong.
    """
    labels = examples[0].facts["labels"]
    cosines = label_similarities(answers, labels, embedder)
    nearest = np.where(cosines.max(axis=1) > 0, cosines.argmax(axis=1), -1)
    right = [labels.index(example.references[0]) for example in examples]
    return mean_score((nearest == right).astype(np.float64))


def score_mean_average_precision(
    answers: Sequence[str], examples: Sequence[Example], embedder: str = ""
) -> Score:
    """Return the mean over the classes of average precision (scikit-learn's), in percent.

    Each class ranks the clips by the cosine of answer and label. Only classes that a clip has are counted;
    the details hold their number.
    """
    labels = examples[0].facts["labels"]
    column = {label: index for index, label in enumerate(labels)}
    true = np.zeros((len(examples), len(labels)), dtype=bool)
    for row, example in enumerate(examples):
        true[row, [column[label] for label in example.references]] = True
    return mean_average_precision(true, label_similarities(answers, labels, embedder))


def mean_average_precision(true: NDArray[np.bool_], scores: NDArray[np.float64]) -> Score:
    """Return the macro mean average precision of `scores` (clips, classes), given which are `true`."""
    from sklearn.metrics import average_precision_score

    has_clips = true.any(axis=0)
    precision = average_precision_score(true[:, has_clips], scores[:, has_clips], average="macro")
    return Score(100 * float(precision), "mAP", None, {"classes": float(has_clips.sum())})


_LTU = "github.com/YuanGongND/ltu: src/ltu/eval/"
_EMBEDDER = {"embedder": ""}

BENCHMARKS = (
    Benchmark(
        "esc50", "github.com/YuanGongND/ltu: src/ltu_as/eval/eval_esc.py", read_esc50, score_nearest_label,
        _EMBEDDER, promptable=False,
    ),
    Benchmark(
        "vocalsound", f"{_LTU}eval_vs.py", read_vocalsound, score_nearest_label, _EMBEDDER, promptable=False
    ),
    Benchmark(
        "vggsound", f"{_LTU}eval_vggsound.py", read_vggsound, score_nearest_label, _EMBEDDER, promptable=False
    ),
    Benchmark(
        "fsd50k", f"{_LTU}eval_fsd50k.py", read_fsd50k, score_mean_average_precision, _EMBEDDER,
        promptable=False,
    ),
    Benchmark(
        "audioset", f"{_LTU}eval_as.py", read_audioset, score_mean_average_precision, _EMBEDDER,
        promptable=False,
    ),
)  # fmt: skip
