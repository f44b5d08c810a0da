"""The benchmarks by name, and what can be asked of the examples of any of them."""

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
from .rules import caption_scores as captions
from .rules import gqa_accuracy as gqa
from .rules import instruction_accuracy as instructions
from .rules import multiple_choice
from .rules import sound_labels as sounds
from .rules import vqa_accuracy as vqa
from .rules import yes_no_accuracy as yes_no

__all__ = ["BENCHMARKS", "Benchmark", "Example", "Score", "askable", "benchmark", "check_images", "questions"]

BENCHMARKS: dict[str, Benchmark] = {
    entry.name: entry
    for room in (instructions, vqa, gqa, yes_no, multiple_choice, sounds, captions)
    for entry in room.BENCHMARKS
}


def benchmark(name: str, **settings: str | None) -> Benchmark:
    """The benchmark of this name, with those of its `settings` that are given (not None).

    Raises `ValueError` that lists the names where there is none, and for a setting that it has not.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"--benchmark {name!r}: there is no such benchmark; choose {', '.join(BENCHMARKS)}")
    found = BENCHMARKS[name]
    given = {key: value for key, value in settings.items() if value is not None}
    for key, value in given.items():
        if key not in found.settings:
            own = ", ".join(f"--{each}" for each in found.settings) or "no setting"
            raise ValueError(f"--{key} {value}: {name} has {own}; leave it out")
    if not given:
        return found
    return replace(
        found,
        score=partial(found.score, **given),
        brief=found.brief and partial(found.brief, **given),
        settings={**found.settings, **given},
    )


def askable(name: str, **settings: str | None) -> Benchmark:
    """The benchmark of this name with its `settings`, whose questions are put to a model.

    Raises `ValueError` where they are about what no command can show one: sounds and molecules.
    """
    found = benchmark(name, **settings)
    if not found.askable:
        raise ValueError(
            f"--benchmark {name}: its questions cannot be put to a model yet; deepinsert score takes answers "
            "made elsewhere"
        )
    return found


def questions(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Indices of one example for each question (Q): the first of those that share a "group".

    Tests of significance take these rows of `Score.items`, since rotations of one question earn together.
    """
    seen: dict[object, int] = {}
    for index, example in enumerate(examples):
        seen.setdefault(("group", example.facts["group"]) if "group" in example.facts else index, index)
    return np.array(list(seen.values()), dtype=np.int64)


def check_images(examples: Sequence[Example]) -> None:
    """Look at the header of every image that is asked about, before hours of work depend on it.

    Raises `DatasetError` naming the first that is missing or broken. Readers do not look, since scoring needs
    no image.
    """
    known: set[ImageRef] = set()
    for example in examples:
        for image in example.prompt.images:
            if not isinstance(image, ImageRef) or image in known:
                continue
            known.add(image)
            if isinstance(image, EncodedImage):
                image.open()
                continue
            try:
                check_image(Path(image.root), image.path)
            except DatasetError as error:
                raise DatasetError(f"{image.origin}: {error}; name its folder with --image-root") from error
