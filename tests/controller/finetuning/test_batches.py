"""An epoch has every prompt once, in the same steps on any number of processes; lengths can be grouped."""

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


def with_loss(indices: list[int]) -> list[int]:
    return [index for index in indices if index >= 0]


@pytest.mark.parametrize("group_by", ["none", "length", "modality-length"])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_an_epoch_has_every_prompt_once(group_by: str, processes: int) -> None:
    sampler = order(group_by, processes)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        assert sorted(with_loss(list(sampler))) == list(range(len(PROMPTS)))
        assert len(list(sampler)) == len(sampler)
    assert sampler.order(0) != sampler.order(1)
    assert sampler.order(1) == order(group_by, processes).order(1)


@pytest.mark.parametrize("group_by", ["none", "length", "modality-length"])
def test_steps_have_the_same_prompts_on_any_number_of_processes(group_by: str) -> None:
    steps = {}
    for processes in (1, 2, 4):
        indices = order(group_by, processes).order(3)
        if processes > 1:
            assert len(indices) % 4 == 0
        steps[processes] = [sorted(with_loss(indices[start : start + 8])) for start in range(0, 56, 8)]
    assert steps[1] == steps[2] == steps[4]


def test_no_batch_mixes_prompts_with_and_without_images() -> None:
    indices = order("modality-length").order(0)
    for start in range(0, len(indices), 4):
        batch = [index if index >= 0 else ~index for index in indices[start : start + 4]]
        assert len({bool(PROMPTS[index].images) for index in batch}) == 1


def test_batches_of_a_step_have_similar_lengths() -> None:
    def padded_words(indices: list[int]) -> int:
        batches = [with_loss(indices[start : start + 4]) for start in range(0, len(indices), 4)]
        lengths = [[word_count(PROMPTS[index]) for index in batch] for batch in batches]
        return sum(max(batch) * len(batch) for batch in lengths)

    random_order = padded_words(order("none").order(0))
    assert padded_words(order("length", accumulation=4).order(0)) < random_order
    assert padded_words(order("modality-length", accumulation=4).order(0)) < random_order


def test_an_unknown_grouping_is_an_error() -> None:
    with pytest.raises(ValueError, match="--group-by size: give one of none, length, modality-length"):
        order("size")
