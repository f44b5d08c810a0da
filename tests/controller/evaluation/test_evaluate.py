"""Figures of an evaluation equal those of its models, computed one prompt at a time by other means."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from deepinsert.backbones import Backbone, CostModel, load_backbone
from deepinsert.controller.answers.batched import generation_inputs
from deepinsert.controller.evaluation import evaluate
from deepinsert.controller.evaluation.comparison import by_source, spread
from deepinsert.controller.evaluation.evaluate import predict, read_predictions
from deepinsert.controller.evaluation.timing import time_forwards
from deepinsert.controller.evaluation.variants import Variant, variant_names
from deepinsert.controller.finetuning import finetune
from deepinsert.controller.metrics.benchmark import Example, benchmark
from deepinsert.controller.metrics.rules.exact_match import exact_match
from deepinsert.controller.options import EvaluateOptions, FinetuneOptions
from deepinsert.controller.policy.layer_policy import LayerPolicy
from deepinsert.envs.data.instructions import load_instructions
from deepinsert.envs.prompts import Prompt, encode, prompts_from

FRACTION = 0.5
LAYERS = (0, 5)


@pytest.fixture(scope="module")
def prompts(rendered_data: Path) -> list[Prompt]:
    return prompts_from(load_instructions(rendered_data, fraction=FRACTION, seed=0))


@pytest.fixture(scope="module")
def options(rendered_data: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluateOptions:
    """An evaluation of two variants, finetuned for two steps."""
    folder = tmp_path_factory.mktemp("evaluation")
    variants = tuple(folder / f"layer-{layer}" for layer in LAYERS)
    for layer, out in zip(LAYERS, variants, strict=True):
        finetune.run(
            FinetuneOptions(
                out=out,
                data=rendered_data,
                insert_layer=layer,
                steps=2,
                batch_size=4,
                gradient_accumulation=1,
                device="cpu",
                lora_rank=4,
            )
        )
    return EvaluateOptions(
        out=folder / "evaluate",
        data=rendered_data,
        variants=variants,
        fraction=FRACTION,
        batch_size=8,
        max_new_tokens=6,
        timing_repeats=1,
        device="cpu",
    )


@pytest.fixture(scope="module")
def variant(options: EvaluateOptions) -> Backbone:
    return load_backbone(options.variants[1] / "checkpoint", device="cpu")


def rows_of(options: EvaluateOptions, name: str) -> list[dict[str, Any]]:
    path = options.out / "predictions" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_the_result_keeps_the_contract(
    result: dict[str, Any], options: EvaluateOptions, prompts: list[Prompt]
) -> None:
    assert [row["name"] for row in result["variants"]] == ["layer-0", "layer-5"]
    assert [row["insert_layer"] for row in result["variants"]] == list(LAYERS)
    figures = {"accuracy", "loss", "flops", "flops_ratio", "prefill_ms", "decode_ms", "kv_cache_bytes"}
    sources = {prompt.source for prompt in prompts}
    assert len(sources) > 2
    for row in result["variants"]:
        assert row.keys() > figures and row["per_source"].keys() == sources
        assert row["prompts"] == len(prompts) == sum(part["prompts"] for part in row["per_source"].values())
        for part in (row, *row["per_source"].values()):
            assert all(part[name] is not None for name in figures)
            assert part["prefill_ms"] > 0 and part["decode_ms"] > 0
    baseline = result["variants"][0]
    assert baseline["time_ratio"] == baseline["flops_ratio"] == 1
    assert baseline["accuracy_difference"] == baseline["loss_difference"] == 0
    assert (options.out / "evaluate.png").is_file()


def test_the_model_card_of_each_variant_holds_the_result(
    result: dict[str, Any], options: EvaluateOptions
) -> None:
    # Other tests evaluate these variants again, and a card holds the last evaluation: this test runs first.
    table = (options.out / "table1.md").read_text().strip()
    for row, folder in zip(result["variants"], options.variants, strict=True):
        card = ModelCard.load(folder / "checkpoint" / "README.md")
        assert table in card.text
        metrics = {entry.metric_type: entry.metric_value for entry in card.data.eval_results}
        assert metrics == pytest.approx({"accuracy": row["accuracy"], "loss": row["loss"]}, abs=1e-6)


def test_losses_are_those_of_the_stock_loss_on_each_prompt_alone(
    result: dict[str, Any], options: EvaluateOptions, variant: Backbone, prompts: list[Prompt]
) -> None:
    rows = rows_of(options, "layer-5")
    assert [row["id"] for row in rows] == [prompt.id for prompt in prompts]
    for row, prompt in list(zip(rows, prompts, strict=True))[::5]:
        with torch.no_grad():
            loss = variant.model(**encode(variant.processor, [prompt])).loss
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-4)
    losses = np.array([row["loss"] for row in rows])
    figures = result["variants"][1]
    assert figures["loss"] == pytest.approx(losses.mean())
    assert figures["loss_interval"][0] < figures["loss"] < figures["loss_interval"][1]
    first = np.array([row["loss"] for row in rows_of(options, "layer-0")])
    assert figures["loss_difference"] == pytest.approx((losses - first).mean())


def test_answers_do_not_depend_on_the_batch(
    options: EvaluateOptions, result: dict[str, Any], variant: Backbone, prompts: list[Prompt]
) -> None:
    for row, prompt in list(zip(rows_of(options, "layer-5"), prompts, strict=True))[::5]:
        inputs = generation_inputs(variant, [prompt])
        tokens = variant.model.generate(**inputs, do_sample=False, max_new_tokens=6)
        answer = tokens[0, inputs["input_ids"].shape[1] :]
        assert row["prediction"] == variant.tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_accuracy_is_the_share_of_right_predictions(result: dict[str, Any], options: EvaluateOptions) -> None:
    for figures in result["variants"]:
        rows = rows_of(options, figures["name"])
        right = [exact_match(row["prediction"], row["reference"]) for row in rows]
        assert [row["correct"] for row in rows] == right
        assert figures["accuracy"] == pytest.approx(np.mean(right))
        for source, part in figures["per_source"].items():
            chosen = [right for row, right in zip(rows, right, strict=True) if row["source"] == source]
            assert part["accuracy"] == pytest.approx(np.mean(chosen))


def test_a_model_whose_answers_are_the_references_is_always_right(
    options: EvaluateOptions, result: dict[str, Any], tmp_path: Path
) -> None:
    records = json.loads(options.data.read_text())
    answers = {
        row["id"]: row["prediction"] for row in rows_of(options, "layer-5") if row["prediction"].strip("?!. ")
    }
    selected = [record for record in records if record["id"] in answers and len(record["conversations"]) == 2]
    assert len(selected) >= 5
    for record in selected:
        record["conversations"][1]["value"] = answers[record["id"]]
    selected[0]["conversations"][1]["value"] = "zebra crossing"
    (tmp_path / "own.json").write_text(json.dumps(selected))
    result = evaluate.run(
        replace(
            options,
            out=tmp_path / "evaluate",
            data=tmp_path / "own.json",
            image_root=options.data.parent,
            fraction=1.0,
            variants=options.variants[1:],
            timing_repeats=1,
        )
    )
    assert result["variants"][0]["accuracy"] == pytest.approx(1 - 1 / len(selected))


def test_flops_are_those_of_the_cost_model_for_each_prompt(
    result: dict[str, Any], variant: Backbone, prompts: list[Prompt]
) -> None:
    costs = CostModel.from_model(variant.model)
    image = variant.tokenizer.convert_tokens_to_ids(variant.processor.image_token)
    flops: dict[int, list[int]] = {layer: [] for layer in LAYERS}
    for prompt in prompts:
        ids = generation_inputs(variant, [prompt])["input_ids"]
        multimodal = int((ids == image).sum())
        for layer in LAYERS:
            cost = costs.prefill_flops(
                ids.numel() - multimodal, multimodal, layer, images=len(prompt.images), logits_to_keep=1
            )
            flops[layer].append(cost)
    for figures, layer in zip(result["variants"], LAYERS, strict=True):
        assert figures["flops"] == pytest.approx(np.mean(flops[layer]))
        assert figures["flops_ratio"] == pytest.approx(np.mean(flops[layer]) / np.mean(flops[0]))
        assert figures["per_source"]["text"]["flops_ratio"] == 1


def test_the_measured_cache_has_the_size_of_the_formula(result: dict[str, Any]) -> None:
    baseline, variant = result["variants"]
    for row in (baseline, variant):
        for part in (row, *row["per_source"].values()):
            assert part["kv_cache_bytes"] == pytest.approx(part["kv_cache_bytes_formula"])
    assert variant["per_source"]["text"]["kv_cache_bytes"] == baseline["per_source"]["text"]["kv_cache_bytes"]
    assert variant["per_source"]["coco"]["kv_cache_bytes"] < baseline["per_source"]["coco"]["kv_cache_bytes"]


def test_every_forward_of_generate_is_timed(variant: Backbone, prompts: list[Prompt]) -> None:
    forwards = time_forwards(variant, generation_inputs(variant, prompts[:3]), 5)
    assert len(forwards.milliseconds) == 5 and min(forwards.milliseconds) > 0
    again = time_forwards(variant, generation_inputs(variant, prompts[:3]), 1)
    assert len(again.milliseconds) == 1 and again.cache_bytes == forwards.cache_bytes


def test_predictions_are_read_again_for_the_same_model_only(
    result: dict[str, Any], options: EvaluateOptions, prompts: list[Prompt], variant: Backbone, tmp_path: Path
) -> None:
    path = options.out / "predictions" / "layer-5.jsonl"
    layers = [5] * len(prompts)
    examples = [Example(prompt, (prompt.answer,)) for prompt in prompts]
    rows = read_predictions(path, examples, variant.fingerprint, layers)
    assert rows is not None and len(rows) == len(prompts)
    assert read_predictions(path, examples, variant.fingerprint, [*layers[1:], 4]) is None
    assert read_predictions(path, examples, "other", layers) is None
    assert read_predictions(path, examples[1:], variant.fingerprint, layers[1:]) is None
    assert read_predictions(path, examples[::-1], variant.fingerprint, layers) is None
    with_other_references = [replace(example, references=("x", "y")) for example in examples]
    assert read_predictions(path, with_other_references, variant.fingerprint, layers) is None
    before = path.stat().st_mtime_ns
    fixed = Variant.fixed("layer-5", None, variant, len(prompts))
    predictions = predict(options.out, fixed, benchmark("instructions"), examples, options)
    assert path.stat().st_mtime_ns == before
    assert predictions.answers == [row["prediction"] for row in rows]


def test_a_model_whose_losses_are_nan_is_named(
    prompts: list[Prompt], options: EvaluateOptions, tmp_path: Path
) -> None:
    broken = load_backbone("tiny", device="cpu")
    with torch.no_grad():
        broken.model.get_output_embeddings().weight[:] = float("nan")
    variant = Variant.fixed("broken", None, broken, len(prompts))
    examples = [Example(prompt, (prompt.answer,)) for prompt in prompts]
    with pytest.raises(ValueError, match=r"^broken: the loss of prompt '.*' is nan \(\d+ such\)"):
        predict(tmp_path, variant, benchmark("instructions"), examples, options)


def test_a_finished_evaluation_is_not_repeated(
    result: dict[str, Any], options: EvaluateOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (options.out / "result.json").stat().st_mtime_ns
    assert evaluate.run(options) == result
    assert (options.out / "result.json").stat().st_mtime_ns == before
    assert "layer-5" in capsys.readouterr().out


def test_without_variants_the_backbone_itself_is_evaluated(options: EvaluateOptions, tmp_path: Path) -> None:
    evaluation = evaluate.run(
        replace(options, out=tmp_path / "run", variants=(), sources="gqa", fraction=0.1, timing_repeats=1)
    )
    (row,) = evaluation["variants"]
    assert row["name"] == "tiny" and row["insert_layer"] == 0 and row["path"] is None
    assert row["per_source"].keys() == {"gqa"} and row["per_source"]["gqa"]["prefill_ms"] == row["prefill_ms"]


def test_a_folder_without_a_finished_finetune_is_refused(options: EvaluateOptions, tmp_path: Path) -> None:
    (tmp_path / "cut-off").mkdir()
    with pytest.raises(ValueError, match=r"--variants .*cut-off"):
        evaluate.run(replace(options, out=tmp_path / "run", variants=(tmp_path / "cut-off",)))


@pytest.fixture(scope="module")
def fewer_prompts(rendered_data: Path) -> list[Prompt]:
    data = load_instructions(rendered_data, sources=("gqa", "text"), fraction=FRACTION, seed=0)
    return prompts_from(data)


@pytest.fixture(scope="module")
def policy(
    tiny_backbone: Backbone,
    fewer_prompts: list[Prompt],
    save_policy: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    return save_policy(tiny_backbone, fewer_prompts, tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def frozen(options: EvaluateOptions, policy: Path) -> EvaluateOptions:
    """An evaluation of the tiny backbone at fixed layers and with the policy, without finetuning."""
    out = options.out.with_name("frozen")
    return replace(options, out=out, variants=(), sources="gqa,text", insert_layers="0,5", policy=policy)


@pytest.fixture(scope="module")
def frozen_result(frozen: EvaluateOptions) -> dict[str, Any]:
    evaluate.run(frozen)
    return json.loads((frozen.out / "result.json").read_text())


def test_a_policy_is_compared_with_fixed_layers_of_its_backbone(
    frozen_result: dict[str, Any], policy: Path, tiny_backbone: Backbone, fewer_prompts: list[Prompt]
) -> None:
    *fixed, chosen = frozen_result["variants"]
    assert [row["name"] for row in fixed] == ["fixed:0", "fixed:5"]
    assert [row["insert_layer"] for row in fixed] == [0, 5] and frozen_result["baseline"] == "fixed:0"
    assert not any("histogram" in row or "choice_ms" in row for row in fixed)
    layers = LayerPolicy.load(policy).layers(tiny_backbone, fewer_prompts)
    layers_with_image = [layer for layer, prompt in zip(layers, fewer_prompts, strict=True) if prompt.images]
    assert len(set(layers_with_image)) > 2, "a policy that always chooses the same layer would test nothing"
    assert chosen["name"] == "policy" and chosen["insert_layer"] is None and chosen["skip_weight"] == 0.5
    assert chosen["mean_insert_layer"] == pytest.approx(np.mean(layers_with_image))
    assert chosen["histogram"] == {str(layer): layers_with_image.count(layer) for layer in range(8)}
    assert chosen["per_source"]["text"]["mean_insert_layer"] is None
    for row in (chosen, *chosen["per_source"].values()):
        assert row["prefill_ms"] > 0 and row["decode_ms"] > 0 and row["choice_ms"] > 0
        assert row["kv_cache_bytes"] == pytest.approx(row["kv_cache_bytes_formula"])


def test_the_figures_of_a_policy_are_those_of_each_prompt_at_its_layer(
    frozen_result: dict[str, Any],
    frozen: EvaluateOptions,
    tiny_backbone: Backbone,
    fewer_prompts: list[Prompt],
) -> None:
    rows = rows_of(frozen, "policy")
    costs = CostModel.from_model(tiny_backbone.model)
    image = tiny_backbone.tokenizer.convert_tokens_to_ids(tiny_backbone.processor.image_token)
    flops = []
    for row, prompt in zip(rows, fewer_prompts, strict=True):
        inputs = generation_inputs(tiny_backbone, [prompt])
        multimodal = int((inputs["input_ids"] == image).sum())
        text = inputs["input_ids"].shape[1] - multimodal
        flops.append(
            costs.prefill_flops(
                text, multimodal, row["insert_layer"], images=len(prompt.images), logits_to_keep=1
            )
        )
    chosen, stock = frozen_result["variants"][-1], frozen_result["variants"][0]
    assert chosen["flops"] == pytest.approx(np.mean(flops))
    assert chosen["flops_ratio"] == pytest.approx(np.mean(flops) / stock["flops"])
    first = np.array([row["loss"] for row in rows_of(frozen, "fixed-0")])
    losses = np.array([row["loss"] for row in rows])
    assert chosen["loss_difference"] == pytest.approx((losses - first).mean())
    for row, prompt in list(zip(rows, fewer_prompts, strict=True))[::4]:
        inputs = generation_inputs(tiny_backbone, [prompt])
        with torch.no_grad(), tiny_backbone.insert_at(row["insert_layer"]):
            loss = tiny_backbone.model(**encode(tiny_backbone.processor, [prompt])).loss
            tokens = tiny_backbone.model.generate(**inputs, do_sample=False, max_new_tokens=6)
        answer = tokens[0, inputs["input_ids"].shape[1] :]
        assert row["prediction"] == tiny_backbone.tokenizer.decode(answer, skip_special_tokens=True).strip()
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-4)


def test_a_policy_is_compared_with_finetuned_variants(
    options: EvaluateOptions, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = replace(options, out=tmp_path / "run", sources="gqa", fraction=0.1, policy=policy)
    both = evaluate.run(few)
    assert [row["name"] for row in both["variants"]] == ["layer-0", "layer-5", "policy"]
    assert "mean " in capsys.readouterr().out
    alone = evaluate.run(replace(few, out=tmp_path / "alone", variants=(), skip_weight=4.0))
    assert [row["name"] for row in alone["variants"]] == ["tiny", "policy"]
    policies = [each["variants"][-1] for each in (both, alone)]
    assert [row["skip_weight"] for row in policies] == [0.5, 4.0]
    assert policies[0]["histogram"] != policies[1]["histogram"], "λ must reach the policy"
    with pytest.raises(ValueError, match=r"skip_weight 5\.0 is outside 0 to 4"):
        evaluate.run(replace(few, out=tmp_path / "outside", variants=(), skip_weight=5.0))


def test_a_policy_of_another_backbone_is_refused(options: EvaluateOptions, policy: Path) -> None:
    other = options.variants[1] / "checkpoint"
    with pytest.raises(ValueError, match="trained on backbone 'tiny'"):
        evaluate.run(replace(options, out=options.out / "x", variants=(), policy=policy, backbone=str(other)))


def test_names_of_variants_differ() -> None:
    assert variant_names([]) == []
    assert variant_names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert variant_names([Path("/a/x"), Path("/b/x"), Path("/b/y")]) == ["a-x", "b-x", "b-y"]
    with pytest.raises(ValueError, match="twice"):
        variant_names([Path("/a/x"), Path("/a/../a/x")])


def test_samples_are_spread_evenly(prompts: list[Prompt]) -> None:
    assert spread(np.arange(10, 20), 3).tolist() == [10, 14, 19]
    assert spread(np.arange(2), 5).tolist() == [0, 1]
    groups = by_source(prompts)
    every = sorted(np.concatenate([rows for name, rows in groups.items() if name]).tolist())
    assert every == groups[""].tolist() == list(range(len(prompts)))
