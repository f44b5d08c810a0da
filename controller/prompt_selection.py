"""The prompts that a command's data options name."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from deepinsert.envs.data.instructions import InstructionData, load_instructions
from deepinsert.envs.prompts import Prompt, prompts_from

from .option_checks import parse_share, parse_sources


class DataChoice(Protocol):
    """What `TrainPolicyOptions`, `RecommendOptions` and the like have in common."""

    @property
    def data(self) -> Path | None: ...
    @property
    def image_root(self) -> Path | None: ...
    @property
    def sources(self) -> str: ...
    @property
    def fraction(self) -> float: ...
    @property
    def max_bad(self) -> str: ...
    @property
    def seed(self) -> int: ...


def read_data(options: DataChoice) -> InstructionData:
    """The records that the options name. Raises `DatasetError` for data that cannot be used."""
    if options.data is None:
        raise ValueError("--data: give a file of instructions")
    return load_instructions(
        options.data,
        options.image_root,
        sources=parse_sources(options.sources),
        fraction=options.fraction,
        seed=options.seed,
        max_bad=parse_share(options.max_bad, "--max-bad"),
    )


def image_prompts(options: DataChoice) -> tuple[list[Prompt], int]:
    """One prompt per question that has an image, and the number of those left out for having none.

    A prompt without multimodal tokens loses nothing at any insert layer. It would pay the whole skip bonus
    for a choice that does not exist, draw every mean towards the deepest layer, and make any policy that can
    tell it apart look good. Raises `ValueError` where no prompt is left.
    """
    every = prompts_from(read_data(options), per="turn")
    prompts = [prompt for prompt in every if prompt.images]
    if not prompts:
        raise ValueError(f"--data {options.data}: none of its {len(every)} questions has an image")
    return prompts, len(every) - len(prompts)
