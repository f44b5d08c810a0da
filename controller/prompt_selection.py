"""Reads the prompts that a command's data options select."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from deepinsert.envs.data.instructions import InstructionData, load_instructions
from deepinsert.envs.prompts import Prompt, prompts_from

from .option_checks import parse_share, parse_sources


class DataChoice(Protocol):
    """The data options that commands such as train-policy, recommend and finetune share."""

    @property
    def data(self) -> Path | None:
        """File of instructions."""

    @property
    def image_root(self) -> Path | None:
        """Folder that image paths are relative to; None means the folder of the data file."""

    @property
    def sources(self) -> str:
        """Sources to keep, separated by commas."""

    @property
    def fraction(self) -> float:
        """Share of the records to use, above 0 and at most 1."""

    @property
    def max_bad(self) -> str:
        """Largest share of broken records, as a number or a percentage."""

    @property
    def seed(self) -> int:
        """Seed of the choice of records."""


def read_data(options: DataChoice) -> InstructionData:
    """Read the records that the options select.

    Raises:
        ValueError: `--data` is missing, or an option cannot be used.
        DatasetError: the data cannot be used.
    """
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
    """Return one prompt per question with an image, and the number of questions without one.

    A prompt without multimodal tokens has the same loss at every insert layer. It would earn the whole skip
    bonus without a trade-off, draw every mean towards the deepest layer, and favour any policy that
    recognises it.

    Raises:
        ValueError: no question has an image.
        DatasetError: the data cannot be used.
    """
    all_prompts = prompts_from(read_data(options), per="turn")
    prompts = [prompt for prompt in all_prompts if prompt.images]
    if not prompts:
        raise ValueError(f"--data {options.data}: none of its {len(all_prompts)} questions has an image")
    return prompts, len(all_prompts) - len(prompts)
