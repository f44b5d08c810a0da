"""The reward table: exact losses, with the same bits in whatever order they are computed."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from deepinsert.backbones import CostModel, load_backbone
from deepinsert.envs import Prompt, RewardTable, encode, load_instructions, prompts_from
from deepinsert.envs.prompts import ImageRef
from deepinsert.envs.rewards import cell_computer
from deepinsert.envs.rewards import keys as prompt_keys
from deepinsert.envs.rewards.group_forward import GroupForward

LAYERS = (0, 3, 8)


@pytest.fixture(scope="module")
def prompts(rendered_data):
    """Ten prompts: two without an image, the others about images of several sources, some of one image."""
    all_prompts = prompts_from(load_instructions(rendered_data))
    with_image = [prompt for prompt in all_prompts if prompt.images]
    text = [prompt for prompt in all_prompts if not prompt.images]
    return [*with_image[:3], text[0], *with_image[-4:], text[-1], with_image[len(with_image) // 2]]


@pytest.fixture(scope="module")
def table(tiny_backbone, prompts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_keys, "MIN_GROUP_PROMPTS", 2)
        filled = RewardTable(tiny_backbone, prompts, LAYERS)
    filled.fill()
    return filled


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Groups of at least two prompts, so that ten prompts make several groups."""
    monkeypatch.setattr(prompt_keys, "MIN_GROUP_PROMPTS", 2)


class RecordingForward(GroupForward):
    """A group forward that records the ids of its prompts and its layers."""

    runs: ClassVar[list[tuple[list[str], list[int]]]] = []

    def run(self, prompts, insert_layers):
        self.runs.append(([prompt.id for prompt in prompts], list(insert_layers)))
        return super().run(prompts, insert_layers)


@pytest.fixture
def runs(monkeypatch):
    """The prompts and layers of each group forward during a test."""
    monkeypatch.setattr(cell_computer, "GroupForward", RecordingForward)
    monkeypatch.setattr(RecordingForward, "runs", [])
    return RecordingForward.runs


def losses_in_random_order(backbone, prompts, seed):
    table = RewardTable(backbone, prompts, LAYERS)
    pairs = [(p, k) for p in range(len(prompts)) for k in range(len(LAYERS))]
    order = np.random.default_rng(seed).permutation(len(pairs))
    losses = np.full((len(prompts), len(LAYERS)), np.nan)
    for p, k in (pairs[index] for index in order):
        losses[p, k] = table.loss(p, k)
    return losses


def test_losses_are_those_of_each_prompt_alone(tiny_backbone, prompts, table):
    for row, prompt in enumerate(prompts):
        inputs = encode(tiny_backbone.processor, [prompt])
        labels = inputs.pop("labels")
        for column, layer in enumerate(LAYERS):
            with torch.no_grad(), tiny_backbone.insert_at(layer):
                logits = tiny_backbone.model(**inputs).logits[0]
            log_probabilities = logits.double().log_softmax(dim=-1)
            answer = [place for place in range(1, labels.shape[1]) if labels[0, place] != -100]
            loss = -sum(log_probabilities[place - 1, labels[0, place]] for place in answer) / len(answer)
            assert table.losses[row, column] == pytest.approx(float(loss), abs=1e-5)


def test_losses_do_not_depend_on_their_order(tiny_backbone, prompts, table):
    np.testing.assert_array_equal(losses_in_random_order(tiny_backbone, prompts, seed=1), table.losses)
    np.testing.assert_array_equal(losses_in_random_order(tiny_backbone, prompts, seed=2), table.losses)


def test_losses_do_not_depend_on_which_process_computes_which_group(tiny_backbone, prompts, table):
    workers = [RewardTable(tiny_backbone, prompts, LAYERS) for _ in range(2)]
    for number, group in enumerate(workers[0].groups):
        for column in range(len(LAYERS)):
            workers[(number + column) % 2].compute(group, np.full(len(group), column))
    merged = np.where(np.isnan(workers[0].losses), workers[1].losses, workers[0].losses)
    np.testing.assert_array_equal(merged, table.losses)


def test_losses_do_not_depend_on_the_other_prompts(tiny_backbone, prompts, table):
    """Prompts about other images make no difference, before or between these."""
    with_image = [index for index, prompt in enumerate(prompts) if prompt.images][::-1]
    images = {prompts[index].image_key for index in with_image[::2]}
    rows = [index for index in range(len(prompts)) if prompts[index].image_key in images]
    part = RewardTable(tiny_backbone, [prompts[index] for index in rows], LAYERS)
    part.fill()
    np.testing.assert_array_equal(part.losses, table.losses[rows])


def test_groups_keep_images_whole_in_order_of_first_appearance(tiny_backbone, prompts, monkeypatch):
    order = [prompts[index] for index in (9, 3, 0, 4, 8, 1, 0, 4)]  # 3 and 8 have no image
    images = [prompt.image_key if prompt.images else str(index) for index, prompt in enumerate(order)]
    by_image = [[i for i, key in enumerate(images) if key == image] for image in dict.fromkeys(images)]
    for least in (1, 2, 3, 100):
        monkeypatch.setattr(prompt_keys, "MIN_GROUP_PROMPTS", least)
        groups = [group.tolist() for group in RewardTable(tiny_backbone, order, LAYERS).groups]
        assert list(chain.from_iterable(groups)) == list(chain.from_iterable(by_image))
        assert all(len(group) >= least for group in groups[:-1])
        for indices in by_image:
            assert sum(set(indices) <= set(group) for group in groups) == 1
        # No group could have ended before its last image.
        for group in groups:
            last = next(len(indices) for indices in by_image if indices[-1] == group[-1])
            assert len(group) - last < least


def test_text_prompts_are_grouped_in_runs(tiny_backbone, monkeypatch):
    monkeypatch.undo()
    prompts = [Prompt.from_question(f"What is {n} and {n}?", answer="an even number") for n in range(70)]
    assert [len(group) for group in RewardTable(tiny_backbone, prompts, (0,)).groups] == [32, 32, 6]


def test_prompts_are_identified_by_their_content(tiny_backbone, prompts):
    same = replace(prompts[0], id="other", source="elsewhere")
    table = RewardTable(tiny_backbone, [prompts[0], same, replace(same, answer="no")], LAYERS)
    keys = table.prompt_keys
    assert keys[0] == keys[1] != keys[2] and all(len(key) == 16 for key in keys)
    pixels = prompts[0].images[0].open()
    other = pixels.copy()
    other.putpixel((3, 3), (1, 2, 3))
    opened = [replace(prompts[0], images=(image,)) for image in (pixels, pixels.copy(), other)]
    keys = RewardTable(tiny_backbone, opened, LAYERS).prompt_keys
    assert keys[0] == keys[1] != keys[2]


def test_a_changed_image_makes_another_prompt(tiny_backbone, prompts, tmp_path):
    first, second = tmp_path / "a" / "image.bmp", tmp_path / "b" / "image.bmp"
    keys = []
    for path, colour in ((first, "red"), (second, "blue")):
        path.parent.mkdir()
        Image.new("RGB", (40, 40), colour).save(path)
        prompt = replace(prompts[0], images=(ImageRef(path.parent, path.name),))
        keys += RewardTable(tiny_backbone, [prompt], LAYERS).prompt_keys
    assert first.stat().st_size == second.stat().st_size
    assert keys[0] != keys[1]


def test_the_same_question_twice_is_computed_once(tiny_backbone, prompts, table, runs):
    twice = [prompts[0], replace(prompts[0], id="again"), *prompts[1:]]
    repeated = RewardTable(tiny_backbone, twice, LAYERS)
    repeated.fill()
    np.testing.assert_array_equal(repeated.losses[0], repeated.losses[1])
    np.testing.assert_array_equal(repeated.losses[1:], table.losses)
    computed = [name for names, _ in runs for name in names]
    assert sorted(computed) == sorted(prompt.id for prompt in prompts)


def test_a_table_may_have_one_prompt(tiny_backbone, prompts):
    for prompt in (prompts[3], prompts[-1]):
        table = RewardTable(tiny_backbone, [prompt], (0, 4))
        table.fill()
        assert table.complete and table.losses.shape == (1, 2)


def test_one_question_computes_its_group_at_one_layer(tiny_backbone, prompts, runs):
    table = RewardTable(tiny_backbone, prompts, LAYERS)
    table.loss(8, 1)
    has_loss = ~np.isnan(table.losses)
    expected = np.zeros_like(has_loss)
    group = table.groups[table.group_of[8]]
    assert 1 < len(group) < len(prompts)
    expected[group, 1] = True
    np.testing.assert_array_equal(has_loss, expected)
    assert runs == [([prompts[index].id for index in group], [3])]


def test_known_losses_are_not_computed_again(tiny_backbone, prompts, runs):
    table = RewardTable(tiny_backbone, prompts, LAYERS)
    for _ in range(3):
        table.loss(0, 0)
    assert [layers for _, layers in runs] == [[0]]
    table.fill()
    computed = [(name, layer) for names, layers in runs for name in names for layer in layers]
    assert sorted(computed) == sorted((prompt.id, layer) for prompt in prompts for layer in LAYERS)
    table.rewards(0.5)
    assert len(computed) == sum(len(names) * len(layers) for names, layers in runs)


def test_first_tokens_and_greedy_answers_are_those_of_each_prompt_alone(tiny_backbone, prompts, table):
    first = np.zeros((len(prompts), len(LAYERS)), dtype=int)
    for row, prompt in enumerate(prompts):
        inputs = encode(tiny_backbone.processor, [prompt])
        labels = inputs.pop("labels")[0]
        answer = (labels != -100).nonzero()[:, 0]
        for column, layer in enumerate(LAYERS):
            with torch.no_grad(), tiny_backbone.insert_at(layer):
                best = tiny_backbone.model(**inputs).logits[0].argmax(dim=-1)
            first[row, column] = best[answer[0] - 1]
            assert table.greedy[row, column] == (best[answer - 1] == labels[answer]).all()
    np.testing.assert_array_equal(table.agreement, first == first[:, :1])
    assert 0 < table.greedy.mean() < 1 and table.agreement.mean() < 1


def test_agreement_needs_layer_0(tiny_backbone, prompts):
    table = RewardTable(tiny_backbone, prompts[:3], (3,))
    table.fill()
    assert np.isnan(table.agreement).all()


def test_a_table_reports_why_prompts_ran_by_themselves(tiny_backbone, prompts, table):
    assert table.unshared_reason is None
    tiny_backbone.model.train()
    try:
        unshared = RewardTable(tiny_backbone, prompts[:1], (0,))
        unshared.fill()
    finally:
        tiny_backbone.model.eval()
    assert unshared.unshared_reason == "it is in training mode"


def test_different_tables_have_different_digests(tiny_backbone, prompts, table):
    other = RewardTable(tiny_backbone, prompts, LAYERS)
    assert other.origin == table.origin and other.digest != table.digest
    other.fill()
    assert other.digest == table.digest and len(table.digest) == 16
    assert RewardTable(tiny_backbone, prompts, (0, 3, 7)).digest != table.digest
    moved = table.subset(np.arange(len(table))[::-1])
    assert moved.origin == table.origin and moved.digest == table.digest
    changed = RewardTable.from_losses([[1.0, 2.0]], (0, 1), 2)
    assert changed.digest == RewardTable.from_losses([[1.0, 2.0]], (0, 1), 2).digest
    assert changed.digest != RewardTable.from_losses([[1.0, 2.5]], (0, 1), 2).digest


def test_a_loss_that_is_not_finite_names_prompt_and_layer(prompts):
    backbone = load_backbone("tiny", device="cpu")
    with torch.no_grad():
        backbone.model.get_output_embeddings().weight[5] = float("nan")
    table = RewardTable(backbone, prompts[:2], (3,))
    with pytest.raises(ValueError, match=rf"{prompts[0].id!r} at insert layer 3 is nan"):
        table.fill()


def test_a_loss_without_a_backbone_is_an_error():
    table = RewardTable.from_losses([[1.0, np.nan]], (0, 1), 2, prompt_ids=["known-id"])
    assert table.loss(0, 0) == 1.0
    with pytest.raises(LookupError, match="'known-id' at insert layer 1"):
        table.loss(0, 1)
    with pytest.raises(LookupError, match="no backbone"):
        table.rewards(0.5)


def test_reward_is_minus_loss_plus_weighted_bonus():
    losses = np.array([[1.0, 2.0, 3.0], [0.5, 0.25, 4.0]])
    flops = np.array([[100.0, 80.0, 60.0], [10.0, 10.0, 12.0]])
    table = RewardTable.from_losses(losses, (0, 2, 4), 4, flops=flops, times=[1.0, 0.75, 1.01])
    np.testing.assert_allclose(table.bonus(), [[0, 0.5, 1], [0, 0.5, 1]])
    np.testing.assert_allclose(table.bonus("flops"), [[0, 0.2, 0.4], [0, 0, 0]])
    np.testing.assert_allclose(table.rewards(0.5), [[-1, -1.75, -2.5], [-0.5, 0, -3.5]])
    np.testing.assert_allclose(table.rewards(2, "flops"), [[-1, -1.6, -2.2], [-0.5, -0.25, -4]])
    with pytest.raises(LookupError, match="no times"):
        RewardTable.from_losses(losses, (0, 2, 4), 4).bonus("time")
    np.testing.assert_allclose(table.bonus("time"), [[0, 0.25, 0]] * 2)
    np.testing.assert_allclose(table.subset([1]).bonus("time"), [[0, 0.25, 0]])
    with pytest.raises(ValueError, match="'width'"):
        table.bonus("width")
    for weight in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="skip_weight"):
            table.rewards(weight)


def test_flops_without_layer_0_need_those_of_layer_0():
    with pytest.raises(ValueError, match="full_flops"):
        RewardTable.from_losses([[1.0]], (2,), 4, flops=[[50.0]])
    table = RewardTable.from_losses([[1.0]], (2,), 4, flops=[[50.0]], full_flops=[200.0])
    assert table.bonus("flops").tolist() == [[0.75]]
    with pytest.raises(LookupError, match="FLOPs"):
        RewardTable.from_losses([[1.0]], (2,), 4).bonus("flops")


def test_flops_are_those_of_the_prompt_before_its_answer(tiny_backbone, prompts, table):
    costs = CostModel.from_model(tiny_backbone.model)
    for row, prompt in enumerate(prompts):
        ids = encode(tiny_backbone.processor, [prompt], with_answers=False)["input_ids"][0].tolist()
        multimodal = sum(token in tiny_backbone.placeholder_ids for token in ids)
        assert (multimodal > 0) == bool(prompt.images)
        for column, layer in enumerate(LAYERS):
            expected = costs.prefill_flops(
                len(ids) - multimodal, multimodal, layer, images=len(prompt.images), logits_to_keep=1
            )
            assert table.flops[row, column] == expected
        if not prompt.images:
            assert table.bonus("flops")[row].tolist() == [0, 0, 0]
    assert (table.flops_ratio[:, 0] == 1).all() and (table.flops_ratio <= 1).all()


def test_flops_are_counted_without_a_forward(tiny_backbone, prompts, table):
    fresh = RewardTable(tiny_backbone, prompts, LAYERS)
    np.testing.assert_array_equal(fresh.flops, table.flops)
    assert np.isnan(fresh.losses).all()


def test_a_subset_computes_with_its_table(tiny_backbone, prompts, table):
    whole = RewardTable(tiny_backbone, prompts, LAYERS)
    part = whole.subset([8, 1, 5])
    assert part.prompt_ids == [prompts[8].id, prompts[1].id, prompts[5].id]
    part.loss(2, 1)
    assert whole.losses[5, 1] == table.losses[5, 1]
    np.testing.assert_array_equal(part.agreement, whole.agreement[[8, 1, 5]])
    part.fill()
    np.testing.assert_array_equal(part.losses, table.losses[[8, 1, 5]])
    np.testing.assert_array_equal(part.flops, table.flops[[8, 1, 5]])
    mask = np.arange(len(prompts)) % 2 == 0
    np.testing.assert_array_equal(table.subset(mask).rewards(0.5), table.rewards(0.5)[mask])


@pytest.mark.parametrize("layers", [(), (3, 0), (0, 0), (-1, 2), (0, 9), ("all",)])
def test_candidates_must_be_ascending_insert_layers(layers):
    with pytest.raises(ValueError, match=r"insert_layers|'all'"):
        RewardTable.from_losses(np.zeros((1, max(len(layers), 1))), layers, 8)


def test_all_candidates_are_layers_0_to_the_last(tiny_backbone, prompts):
    table = RewardTable(tiny_backbone, prompts)
    assert table.insert_layers == tuple(range(tiny_backbone.num_layers))


@pytest.mark.parametrize(
    ("losses", "named", "message"),
    [
        ([1.0, 2.0], {}, "losses of shape"),
        ([[1.0]], {}, "losses of shape"),
        (np.empty((0, 2)), {}, "losses of shape"),
        ([[1.0, np.inf]], {}, "infinite"),
        ([[1.0, 2.0]], {"correct": [1]}, "correct of shape"),
        ([[1.0, 2.0]], {"flops": [[1.0]]}, "flops of shape"),
        ([[1.0, 2.0]], {"sources": ["a", "b"]}, "sources: 2 values for 1 prompts"),
        ([[1.0, 2.0]], {"times": [1.0]}, "times of shape"),
    ],
)
def test_losses_from_elsewhere_are_checked(losses, named, message):
    with pytest.raises(ValueError, match=message):
        RewardTable.from_losses(losses, (0, 1), 2, **named)


def test_no_prompts_and_no_tokens_are_errors(tiny_backbone, prompts):
    with pytest.raises(ValueError, match="no prompts"):
        RewardTable(tiny_backbone, [])
    with pytest.raises(ValueError, match="batch_tokens 0"):
        RewardTable(tiny_backbone, prompts, batch_tokens=0)


def test_only_the_table_changes_its_arrays(table):
    part = table.subset([0, 1])
    for array in (table.losses, table.correct, table.greedy, table.flops, table.stock_flops, part.losses):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_recorded_grades_reach_the_whole_table(tiny_backbone, prompts):
    whole = RewardTable(tiny_backbone, prompts, LAYERS)
    whole.subset([4, 2]).record_correct([1, 0], [0, 2], [True, False])
    expected = np.full((len(prompts), len(LAYERS)), np.nan)
    expected[2, 0], expected[4, 2] = 1, 0
    np.testing.assert_array_equal(whole.correct, expected)
    assert whole.known_correct is None
    whole.record_correct(*np.indices(expected.shape), 1)
    assert whole.known_correct.all()
