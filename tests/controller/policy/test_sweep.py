"""The sweep: its figures, and the options that it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from deepinsert.backbones import CostModel
from deepinsert.controller.metrics.rules.exact_match import exact_match
from deepinsert.controller.options import SweepOptions
from deepinsert.controller.policy import sweep
from deepinsert.envs import RewardTable, encode, load_instructions, prompts_from

LAYERS = (0, 3, 8)


@pytest.fixture(scope="module")
def data(rendered_data, tmp_path_factory):
    """Two records of each source; their images are those of the rendered data."""
    records = json.loads(rendered_data.read_text())
    chosen: dict[str, list] = {}
    for record in records:
        chosen.setdefault(record.get("image", "text").split("/")[0], []).append(record)
    path = tmp_path_factory.mktemp("few") / "instructions.json"
    path.write_text(json.dumps([record for few in chosen.values() for record in few[:2]]))
    return path


def options_for(data, rendered_data, out, **changed):
    return SweepOptions(
        **{
            "data": data,
            "image_root": rendered_data.parent,
            "out": out,
            "insert_layers": "0,3,8",
            "batch_size": 3,
            "device": "cpu",
            **changed,
        }
    )


@pytest.fixture(scope="module")
def finished(data, rendered_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    sweep.run(options_for(data, rendered_data, out))
    return out


@pytest.fixture(scope="module")
def result(finished):
    return json.loads((finished / "result.json").read_text())


@pytest.fixture(scope="module")
def prompts(data, rendered_data):
    return prompts_from(load_instructions(data, rendered_data.parent))


def test_the_folder_contains_table_picture_and_result(finished, result, prompts):
    assert {entry.name for entry in finished.iterdir()} == {
        "config.json",
        "result.json",
        "table",
        "sweep.png",
    }
    assert [path for path in (finished / "table").iterdir() if path.name.startswith("losses-00000-")]
    assert result["table_digest"] == RewardTable.load(finished / "table").digest
    assert result["insert_layers"] == list(LAYERS)
    assert result["prompts"] == len(prompts) and result["skipped"] == []
    assert set(result["per_source"]) == {prompt.source for prompt in prompts}
    for group in (result, *result["per_source"].values()):
        assert [row["insert_layer"] for row in group["by_layer"]] == list(LAYERS)
        for row in group["by_layer"]:
            assert {"loss", "accuracy", "flops_ratio", "depth"} <= row.keys()
            for name in ("loss", "loss_difference", "accuracy"):
                low, high = row[f"{name}_interval"]
                assert low <= row[name] <= high
    assert sum(group["prompts"] for group in result["per_source"].values()) == len(prompts)
    assert sum(group["images"] for group in result["per_source"].values()) == result["images"]
    assert result["per_source"]["text"]["images"] == 0


def test_figures_are_those_of_the_table(tiny_backbone, finished, result, prompts):
    table = RewardTable(tiny_backbone, prompts, LAYERS)
    table.fill()
    np.testing.assert_array_equal(RewardTable.load(finished / "table").losses, table.losses)
    for source, group in [(None, result), *result["per_source"].items()]:
        rows = [row for row, prompt in enumerate(prompts) if source in (None, prompt.source)]
        losses = table.losses[rows].mean(axis=0)
        for column, figures in enumerate(group["by_layer"]):
            assert figures["depth"] == LAYERS[column] / tiny_backbone.num_layers
            assert figures["loss"] == pytest.approx(losses[column], abs=1e-12)
            assert figures["loss_difference"] == pytest.approx(losses[column] - losses[0], abs=1e-12)


def test_flops_ratio_is_that_of_all_prompts_together(tiny_backbone, result, prompts):
    costs = CostModel.from_model(tiny_backbone.model)
    total = np.zeros(len(LAYERS))
    for prompt in prompts:
        ids = encode(tiny_backbone.processor, [prompt], with_answers=False)["input_ids"][0].tolist()
        multimodal = sum(token in tiny_backbone.placeholder_ids for token in ids)
        counts = (len(ids) - multimodal, multimodal)
        total += [
            costs.prefill_flops(*counts, layer, images=len(prompt.images), logits_to_keep=1)
            for layer in LAYERS
        ]
    ratios = [row["flops_ratio"] for row in result["by_layer"]]
    np.testing.assert_allclose(ratios, total / total[0])
    assert ratios[0] == 1 and ratios[2] < ratios[1] < 1
    assert [row["flops_ratio"] for row in result["per_source"]["text"]["by_layer"]] == [1, 1, 1]


def test_accuracy_is_that_of_greedy_answers_one_by_one(tiny_backbone, result, finished, prompts):
    correct = np.zeros((len(prompts), len(LAYERS)))
    for row, prompt in enumerate(prompts):
        limit = len(tiny_backbone.tokenizer.tokenize(prompt.answer)) + 4
        for column, layer in enumerate(LAYERS):
            inputs = encode(tiny_backbone.processor, [prompt], with_answers=False, padding_side="left")
            with torch.no_grad(), tiny_backbone.insert_at(layer):
                out = tiny_backbone.model.generate(**inputs, do_sample=False, max_new_tokens=limit)
            answer = tiny_backbone.tokenizer.decode(
                out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            correct[row, column] = exact_match(answer, prompt.answer)
    np.testing.assert_array_equal(RewardTable.load(finished / "table").correct, correct)
    assert [row["accuracy"] for row in result["by_layer"]] == correct.mean(axis=0).tolist()


def test_a_finished_sweep_is_not_repeated(finished, result, data, rendered_data, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "load_backbone", None)
    assert sweep.run(options_for(data, rendered_data, finished)) == result
    output = capsys.readouterr().out
    assert "insert layer" in output and f"{result['by_layer'][1]['loss']:.3f}" in output


def test_another_sweep_s_folder_is_refused(finished, data, rendered_data):
    with pytest.raises(ValueError, match="seed"):
        sweep.run(options_for(data, rendered_data, finished, seed=1))


def test_without_accuracy(data, rendered_data, tmp_path, capsys):
    result = sweep.run(
        options_for(data, rendered_data, tmp_path, accuracy=False, sources="coco", insert_layers="0-1")
    )
    assert [row["accuracy"] for row in result["by_layer"]] == [None, None]
    assert set(result["per_source"]) == {"coco"} and result["insert_layers"] == [0, 1]
    assert (tmp_path / "sweep.png").is_file()
    assert np.isnan(RewardTable.load(tmp_path / "table").correct).all()
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split()[0] for row in rows] == ["0", "1"] and all(" - " in row for row in rows)


def test_agreement_is_with_layer_0_though_it_is_no_candidate(finished, data, rendered_data, tmp_path):
    options = options_for(data, rendered_data, tmp_path, agreement=True, accuracy=False, insert_layers="3,8")
    result = sweep.run(options)
    assert result["insert_layers"] == [3, 8] == [row["insert_layer"] for row in result["by_layer"]]
    expected = RewardTable.load(finished / "table").agreement
    assert [row["agreement"] for row in result["by_layer"]] == expected[:, 1:].mean(axis=0).tolist()
    for row in result["by_layer"]:
        low, high = row["agreement_interval"]
        assert low <= row["agreement"] <= high
    assert RewardTable.load(tmp_path / "table").insert_layers == LAYERS
    assert "agreement" in sweep.summary(result)


def test_bad_options_are_named(data, rendered_data, tmp_path):
    with pytest.raises(ValueError, match=r"--insert-layers '0-9'.*outside 0 to 8"):
        sweep.run(options_for(data, rendered_data, tmp_path / "out", insert_layers="0-9"))
    with pytest.raises(ValueError, match="--batch-size 0"):
        sweep.run(options_for(data, rendered_data, tmp_path / "out", batch_size=0))
    with pytest.raises(ValueError, match="--batch-tokens 0"):
        sweep.run(options_for(data, rendered_data, tmp_path / "out", batch_tokens=0))
    for shard in ("1", "2/2", "-1/2", "a/b", "0/0"):
        with pytest.raises(ValueError, match=f"--shard '{shard}'"):
            sweep.run(options_for(data, rendered_data, tmp_path / "out", shard=shard))
