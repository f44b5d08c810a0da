"""The order of an epoch: every prompt once, alike on any number of processes, near lengths together."""

import pytest
from PIL import Image

from deepinsert.controller.finetuning.batches import PromptOrder, word_count
from deepinsert.envs.prompts import Prompt

PICTURE = Image.new("RGB", (8, 8))
PROMPTS = [
    Prompt.from_question("word " * (1 + 7 * number % 31), PICTURE if number % 3 else None, "yes")
    for number in range(50)
]


def order(group_by: str, processes: int = 1, batch_size: int = 4, accumulation: int = 2) -> PromptOrder:
    return PromptOrder(
        PROMPTS,
        seed=5,
        batch_size=batch_size // processes,
        processes=processes,
        accumulation=accumulation,
        group_by=group_by,
    )


def counted(indices: list[int]) -> list[int]:
    return [index for index in indices if index >= 0]


@pytest.mark.parametrize("group_by", ["none", "length", "modality-length"])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_an_epoch_has_every_prompt_once(group_by: str, processes: int) -> None:
    found = order(group_by, processes)
    for epoch in (0, 1):
        found.set_epoch(epoch)
        assert sorted(counted(list(found))) == list(range(len(PROMPTS)))
        assert len(list(found)) == len(found)
    assert found.order(0) != found.order(1)
    assert found.order(1) == order(group_by, processes).order(1)


@pytest.mark.parametrize("group_by", ["none", "length", "modality-length"])
def test_steps_have_the_same_prompts_on_any_number_of_processes(group_by: str) -> None:
    steps = {}
    for processes in (1, 2, 4):
        indices = order(group_by, processes).order(3)
        if processes > 1:
            assert len(indices) % 4 == 0
        steps[processes] = [sorted(counted(indices[start : start + 8])) for start in range(0, 56, 8)]
    assert steps[1] == steps[2] == steps[4]


def test_no_batch_mixes_prompts_with_and_without_images() -> None:
    indices = order("modality-length").order(0)
    for start in range(0, len(indices), 4):
        batch = [index if index >= 0 else ~index for index in indices[start : start + 4]]
        assert len({bool(PROMPTS[index].images) for index in batch}) == 1


def test_batches_of_a_step_have_near_lengths() -> None:
    def spread(indices: list[int]) -> float:
        batches = [counted(indices[start : start + 4]) for start in range(0, len(indices), 4)]
        lengths = [[word_count(PROMPTS[index]) for index in batch] for batch in batches]
        return sum(max(batch) * len(batch) for batch in lengths)

    plain = spread(order("none").order(0))
    assert spread(order("length", accumulation=4).order(0)) < plain
    assert spread(order("modality-length", accumulation=4).order(0)) < plain


def test_another_grouping_is_refused() -> None:
    with pytest.raises(ValueError, match="--group-by size: give one of none, length, modality-length"):
        order("size")
