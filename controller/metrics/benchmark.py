"""All benchmarks by name, and functions on the examples of any of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepinsert.envs.data.media import DatasetError, check_image
from deepinsert.envs.prompts import EncodedImage, ImageRef

from .contract import Benchmark, Example, Score
from .rules import (
    caption_scores,
    gqa_accuracy,
    instruction_accuracy,
    multiple_choice,
    sound_labels,
    vqa_accuracy,
    yes_no_accuracy,
)

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Example",
    "Score",
    "benchmark",
    "check_images",
    "promptable_benchmark",
    "question_rows",
]

RULES = (
    instruction_accuracy,
    vqa_accuracy,
    gqa_accuracy,
    yes_no_accuracy,
    multiple_choice,
    sound_labels,
    caption_scores,
)

BENCHMARKS: dict[str, Benchmark] = {entry.name: entry for module in RULES for entry in module.BENCHMARKS}


def benchmark(name: str, **settings: str | None) -> Benchmark:
    """Return the benchmark of this name, with those `settings` that are not None.

    Raises:
        ValueError: there is no such benchmark, or it does not have a setting; the message lists the names.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"--benchmark {name!r}: there is no such benchmark; choose {', '.join(BENCHMARKS)}")
    entry = BENCHMARKS[name]
    changes = {key: value for key, value in settings.items() if value is not None}
    for key, value in changes.items():
        if key not in entry.settings:
            options = ", ".join(f"--{setting}" for setting in entry.settings) or "no setting"
            raise ValueError(f"--{key} {value}: {name} has {options}; leave it out")
    if not changes:
        return entry
    brief = entry.score_without_details
    return replace(
        entry,
        score=partial(entry.score, **changes),
        score_without_details=brief and partial(brief, **changes),
        settings={**entry.settings, **changes},
    )


def promptable_benchmark(name: str, **settings: str | None) -> Benchmark:
    """Return the benchmark of this name with its `settings`, if its questions can be put to a model.

    Raises:
        ValueError: as `benchmark` does, or no command can show a model its questions (sounds, molecules).
    """
    entry = benchmark(name, **settings)
    if not entry.promptable:
        raise ValueError(
            f"--benchmark {name}: its questions cannot be put to a model yet; deepinsert score takes answers "
            "made elsewhere"
        )
    return entry


def question_rows(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Return the index of one example per question (Q): the first one of those that share a "group".

    Tests of significance take these rows of `Score.items`, because all rotations of one question have the
    same score.
    """
    first_rows: dict[object, int] = {}
    for row, example in enumerate(examples):
        key = ("group", example.facts["group"]) if "group" in example.facts else row
        first_rows.setdefault(key, row)
    return np.array(list(first_rows.values()), dtype=np.int64)


def check_images(examples: Sequence[Example]) -> None:
    """Read the header of every image, before hours of work depend on it.

    Readers of benchmarks do not open images, because scoring needs none.

    Raises:
        DatasetError: an image is missing or broken; the message names the first one.
    """
    checked: set[ImageRef] = set()
    for example in examples:
        for image in example.prompt.images:
            if not isinstance(image, ImageRef) or image in checked:
                continue
            checked.add(image)
            if isinstance(image, EncodedImage):
                image.open()
                continue
            try:
                check_image(Path(image.root), image.path)
            except DatasetError as error:
                raise DatasetError(f"{image.origin}: {error}; name its folder with --image-root") from error
