"""The reward table: exact, the same to the last bit however it is asked for, and safe on disk."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from backbones import CostModel, load_backbone
from envs import Prompt, RewardTable, block_forward, encode, load_instructions, prompts_from

LAYERS = (0, 3, 8)
BATCH = 4


@pytest.fixture(scope="module")
def prompts(rendered_data):
    """Ten prompts: two of text alone, the others about images of several sources, long and short answers."""
    found = prompts_from(load_instructions(rendered_data))
    with_image = [prompt for prompt in found if prompt.images]
    text = [prompt for prompt in found if not prompt.images]
    return [*with_image[:3], text[0], *with_image[-4:], text[-1], with_image[len(with_image) // 2]]


@pytest.fixture(scope="module")
def table(tiny_backbone, prompts):
    filled = RewardTable(tiny_backbone, prompts, LAYERS, BATCH)
    filled.fill()
    return filled


def in_random_order(backbone, prompts, seed):
    table = RewardTable(backbone, prompts, LAYERS, BATCH)
    pairs = [(p, k) for p in range(len(prompts)) for k in range(len(LAYERS))]
    asked = np.random.default_rng(seed).permutation(len(pairs))
    answers = np.full((len(prompts), len(LAYERS)), np.nan)
    for p, k in (pairs[index] for index in asked):
        answers[p, k] = table.loss(p, k)
    return answers


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


def test_losses_do_not_depend_on_the_order_they_are_asked_in(tiny_backbone, prompts, table):
    np.testing.assert_array_equal(in_random_order(tiny_backbone, prompts, seed=1), table.losses)
    np.testing.assert_array_equal(in_random_order(tiny_backbone, prompts, seed=2), table.losses)


def test_losses_do_not_depend_on_who_computes_which_block(tiny_backbone, prompts, table):
    workers = [RewardTable(tiny_backbone, prompts, LAYERS, BATCH) for _ in range(2)]
    for start in range(0, len(prompts), BATCH):
        rows = np.arange(start, min(start + BATCH, len(prompts)))
        for column in range(len(LAYERS)):
            workers[(start // BATCH + column) % 2].compute(rows, np.full(len(rows), column))
    merged = np.where(np.isnan(workers[0].losses), workers[1].losses, workers[0].losses)
    np.testing.assert_array_equal(merged, table.losses)


def test_batch_size_changes_rounding_alone(tiny_backbone, prompts, table):
    other = RewardTable(tiny_backbone, prompts, LAYERS, batch_size=7)
    other.fill()
    np.testing.assert_allclose(other.losses, table.losses, atol=1e-5)


def test_one_question_computes_one_block_at_one_layer(tiny_backbone, prompts):
    table = RewardTable(tiny_backbone, prompts, LAYERS, BATCH)
    table.loss(5, 1)
    known = ~np.isnan(table.losses)
    expected = np.zeros_like(known)
    expected[4:8, 1] = True
    np.testing.assert_array_equal(known, expected)
    assert table.missing_blocks() == 3


def test_known_losses_are_not_computed_again(tiny_backbone, prompts):
    table = RewardTable(tiny_backbone, prompts, LAYERS, BATCH)
    forwards = []
    handle = tiny_backbone.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        for _ in range(3):
            table.loss(0, 0)
        assert len(forwards) == 1
        table.fill()
        assert len(forwards) == 3 * len(LAYERS)
        table.rewards(0.5)
        assert len(forwards) == 3 * len(LAYERS)
    finally:
        handle.remove()


def test_filling_encodes_each_block_once(tiny_backbone, prompts, monkeypatch):
    encoded = []

    def counting(processor, batch, **named):
        encoded.append(len(batch))
        return encode(processor, batch, **named)

    monkeypatch.setattr(block_forward, "encode", counting)
    table = RewardTable(tiny_backbone, prompts, LAYERS, BATCH)
    table.fill()
    assert encoded == [4, 4, 2]
    assert table.flops.shape == (len(prompts), len(LAYERS))
    assert len(encoded) == 3


def test_a_resume_gives_the_same_bits(tiny_backbone, prompts, table, tmp_path):
    path = tmp_path / "table.npz"
    partial = RewardTable(tiny_backbone, prompts, LAYERS, BATCH)
    assert next(partial.fill_by_block()) == BATCH
    partial.loss(9, 2)
    partial.save(path)

    resumed = RewardTable(tiny_backbone, prompts, LAYERS, BATCH)
    assert resumed.restore(path) == BATCH
    np.testing.assert_array_equal(resumed.losses, partial.losses)
    assert resumed.missing_blocks() == 2
    resumed.fill()
    np.testing.assert_array_equal(resumed.losses, table.losses)
    np.testing.assert_array_equal(resumed.flops, table.flops)


@pytest.mark.parametrize("change", ["batch size", "layers", "order", "answer"])
def test_a_resume_refuses_losses_of_another_table(tiny_backbone, prompts, table, tmp_path, change):
    path = tmp_path / "table.npz"
    table.save(path)
    layers, batch, others = LAYERS, BATCH, list(prompts)
    if change == "batch size":
        batch = 5
    elif change == "layers":
        layers = (0, 3, 7)
    elif change == "order":
        others = others[::-1]
    else:
        others[0] = Prompt.from_question("What is this?", answer="a test")
    with pytest.raises(ValueError, match="another"):
        RewardTable(tiny_backbone, others, layers, batch).restore(path)


def test_save_and_load(table, tmp_path):
    path = tmp_path / "below" / "table.npz"
    table.save(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["table.npz"]
    loaded = RewardTable.load(path)
    np.testing.assert_array_equal(loaded.losses, table.losses)
    np.testing.assert_array_equal(loaded.flops, table.flops)
    np.testing.assert_array_equal(loaded.bonus("flops"), table.bonus("flops"))
    for name in ("insert_layers", "num_layers", "sources", "image_keys", "prompt_ids", "identity"):
        assert getattr(loaded, name) == getattr(table, name)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 half"])
def test_a_file_that_is_no_table_is_named(tmp_path, content):
    path = tmp_path / "table.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"table\.npz is not a reward table"):
        RewardTable.load(path)


def test_another_archive_is_no_table(tmp_path):
    np.savez(tmp_path / "table.npz", losses=np.zeros((1, 1)))
    with pytest.raises(ValueError, match="is not a reward table"):
        RewardTable.load(tmp_path / "table.npz")


def test_a_table_holding_a_pickle_is_not_read(table, tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    table.save(tmp_path / "table.npz")
    with np.load(tmp_path / "table.npz") as file:
        content = dict(file)
    content["identity"] = np.array([Trap()], dtype=object)
    np.savez(tmp_path / "table.npz", **content)
    with pytest.raises(ValueError, match="is not a reward table"):
        RewardTable.load(tmp_path / "table.npz")
    assert not (tmp_path / "sprung").exists()


def test_a_failed_save_leaves_the_old_file(table, tmp_path, monkeypatch):
    path = tmp_path / "table.npz"
    table.save(path)
    before = path.read_bytes()

    def full(*_args, **_named):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="disk full"):
        table.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.npz"]


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
    table = RewardTable.from_losses(losses, (0, 2, 4), 4, flops=flops)
    np.testing.assert_allclose(table.bonus(), [[0, 0.5, 1], [0, 0.5, 1]])
    np.testing.assert_allclose(table.bonus("flops"), [[0, 0.2, 0.4], [0, 0, 0]])
    np.testing.assert_allclose(table.rewards(0.5), [[-1, -1.75, -2.5], [-0.5, 0, -3.5]])
    np.testing.assert_allclose(table.rewards(2, "flops"), [[-1, -1.6, -2.2], [-0.5, -0.25, -4]])
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


def test_flops_are_those_of_the_prompt_that_generate_reads(tiny_backbone, prompts, table):
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
    fresh = RewardTable(tiny_backbone, prompts, LAYERS, BATCH)
    np.testing.assert_array_equal(fresh.flops, table.flops)
    assert np.isnan(fresh.losses).all()


def test_a_subset_asks_its_table(tiny_backbone, prompts, table):
    whole = RewardTable(tiny_backbone, prompts, LAYERS, BATCH)
    part = whole.subset([8, 1, 5])
    assert part.prompt_ids == [prompts[8].id, prompts[1].id, prompts[5].id]
    part.loss(2, 1)
    assert whole.losses[5, 1] == table.losses[5, 1]
    part.fill()
    np.testing.assert_array_equal(part.losses, table.losses[[8, 1, 5]])
    np.testing.assert_array_equal(part.flops, table.flops[[8, 1, 5]])
    mask = np.arange(len(prompts)) % 2 == 0
    np.testing.assert_array_equal(table.subset(mask).rewards(0.5), table.rewards(0.5)[mask])


@pytest.mark.parametrize("layers", [(), (3, 0), (0, 0), (-1, 2), (0, 9), ("all",)])
def test_candidates_must_be_ascending_insert_layers(layers):
    with pytest.raises(ValueError):
        RewardTable.from_losses(np.zeros((1, max(len(layers), 1))), layers, 8)


def test_all_candidates_are_layers_0_to_the_last(tiny_backbone, prompts):
    table = RewardTable(tiny_backbone, prompts)
    assert table.insert_layers == tuple(range(tiny_backbone.num_layers))


@pytest.mark.parametrize(
    ("losses", "named"),
    [
        ([1.0, 2.0], {}),
        ([[1.0]], {}),
        (np.empty((0, 2)), {}),
        ([[1.0, np.inf]], {}),
        ([[1.0, 2.0]], {"flops": [[1.0]]}),
        ([[1.0, 2.0]], {"sources": ["a", "b"]}),
    ],
)
def test_known_losses_are_checked(losses, named):
    with pytest.raises(ValueError):
        RewardTable.from_losses(losses, (0, 1), 2, **named)


def test_no_prompts_and_no_batch_are_errors(tiny_backbone, prompts):
    with pytest.raises(ValueError, match="no prompts"):
        RewardTable(tiny_backbone, [])
    with pytest.raises(ValueError, match="batch_size 0"):
        RewardTable(tiny_backbone, prompts, batch_size=0)
