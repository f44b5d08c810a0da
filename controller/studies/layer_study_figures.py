"""The figures of a layer study, from the results and files of its steps.

A figure is an array (1 + samples, K) of K layers: the means over the held-out prompts, then those of
bootstrap samples that draw whole images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepinsert.controller.option_checks import parse_skip_weight_list
from deepinsert.controller.policy.layer_policy import LayerPolicy
from deepinsert.controller.runs.machine import machine_facts
from deepinsert.envs.prompts import Prompt, prompts_from
from deepinsert.envs.rewards.table import RewardTable

from .layer_study_steps import LayerStudy
from .rank_agreement import DataAndSamples, choice, correlations, interval

FloatArray = NDArray[np.float64]


def study_result(study: LayerStudy, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the result of a study, given the results of its steps by name."""
    prompts = prompts_from(study.read_held_out(), per="turn")
    samples = DataAndSamples([prompt.image_key for prompt in prompts], seed=study.options.seed)
    means = {name: samples.means(values) for name, values in values_by_prompt(study, prompts).items()}
    policy = LayerPolicy.load(study.folder("train-policy"))
    expected_loss = np.array(policy.training.loss)
    flops_ratios = [row["flops_ratio"] for row in results["sweep"]["by_layer"]]
    weights = parse_skip_weight_list(study.options.skip_weights)
    return {
        "insert_layers": list(study.layers),
        "num_layers": study.num_layers,
        "prompts": len(prompts),
        "images": len({prompt.image_key for prompt in prompts}),
        "training_prompts": results[f"finetune-{study.layers[0]}"]["prompts"],
        "policy_prompts": policy.training.prompts,
        "finetuning": finetuning_facts(study, results),
        "by_layer": [
            {
                "insert_layer": layer,
                "depth": layer / study.num_layers,
                "flops_ratio": flops_ratios[column],
                "expected_loss": float(expected_loss[column]),
                **{name: mean_and_interval(mean[:, column]) for name, mean in means.items()},
            }
            for column, layer in enumerate(study.layers)
        ],
        "rank_correlations": rank_correlations(means, expected_loss),
        "by_skip_weight": [at_skip_weight(study, means, expected_loss, weight) for weight in weights],
        "shared": shared_models(study, means),
        "machine": machine_facts(),
    }


def finetuning_facts(study: LayerStudy, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings and durations of the finetunings."""
    finetunings = {name: result for name, result in results.items() if "train_loss" in result}
    return {
        "method": study.options.method,
        "learning_rate": next(iter(finetunings.values()))["learning_rate"],
        "steps": study.options.steps,
        "batch_size": study.options.batch_size,
        "seconds": {name: result["seconds"] for name, result in finetunings.items()},
        "longer": study.options.longer,
        "distillation": study.options.distillation,
    }


def values_by_prompt(study: LayerStudy, prompts: Sequence[Prompt]) -> dict[str, FloatArray]:
    """Return loss and accuracy (P, K) of each held-out prompt at each layer, by kind of model."""
    table = RewardTable.load(study.folder("sweep") / "table", study.layers)
    row_of_prompt = {name: row for row, name in enumerate(table.prompt_ids)}
    rows = [row_of_prompt[prompt.id] for prompt in prompts]
    values = {"zero_shot_loss": table.losses[rows], "zero_shot_accuracy": table.correct[rows]}
    names = [f"finetune-{layer}" for layer in study.layers]
    values |= evaluated_values(study, "finetuned", names, prompts)
    for model in study.shared_models:
        names = [f"fixed:{layer}" for layer in study.layers]
        values |= evaluated_values(study, model, names, prompts)
    return values


def evaluated_values(
    study: LayerStudy, kind: str, variants: Sequence[str], prompts: Sequence[Prompt]
) -> dict[str, FloatArray]:
    """Return loss and accuracy (P, K) from the predictions of an evaluation.

    Args:
        study: the study.
        kind: the kind of model that was evaluated.
        variants: the names of its variants (K).
        prompts: the held-out prompts (P).
    """
    columns: dict[str, list[list[float]]] = {"loss": [], "correct": []}
    for variant in variants:
        path = study.folder(f"evaluate-{kind}") / "predictions" / f"{variant.replace(':', '-')}.jsonl"
        rows = {row["id"]: row for row in map(json.loads, path.read_text("utf-8").strip().split("\n"))}
        for name, values in columns.items():
            values.append([float(rows[prompt.id][name]) for prompt in prompts])
    return {
        f"{kind}_loss": np.array(columns["loss"]).T,
        f"{kind}_accuracy": np.array(columns["correct"]).T,
    }


def rank_correlations(means: Mapping[str, FloatArray], expected_loss: FloatArray) -> dict[str, Any]:
    """Return how figures that need no finetuning rank the layers against finetuned accuracy and reward."""
    predictors = {
        "zero_shot_reward": -means["zero_shot_loss"],
        "zero_shot_accuracy": means["zero_shot_accuracy"],
        "policy_expectation": np.broadcast_to(-expected_loss, means["zero_shot_loss"].shape),
    }
    truths = {"accuracy": means["finetuned_accuracy"], "reward": -means["finetuned_loss"]}
    return {
        predictor: {truth: correlations(values, true) for truth, true in truths.items()}
        for predictor, values in predictors.items()
    }


def at_skip_weight(
    study: LayerStudy, means: Mapping[str, FloatArray], expected_loss: FloatArray, weight: float
) -> dict[str, Any]:
    """Return the layer that a skip weight selects before finetuning, and its regret after finetuning.

    Args:
        study: the study.
        means: the figures by name.
        expected_loss: the mean loss (K) that the policy expects.
        weight: the skip weight λ.
    """
    bonus = weight * np.array(study.layers) / study.num_layers
    truth = bonus - means["finetuned_loss"]
    zero_shot = bonus - means["zero_shot_loss"]
    predictions = {"zero_shot": zero_shot, "policy": np.broadcast_to(bonus - expected_loss, zero_shot.shape)}
    accuracy = means["finetuned_accuracy"]
    figures: dict[str, Any] = {"skip_weight": weight}
    for name, predicted in predictions.items():
        chosen = choice(predicted, truth)
        accuracy_lost = accuracy[:, chosen["best"]] - accuracy[:, chosen["picked"]]
        figures[name] = {
            **chosen,
            "picked": study.layers[chosen["picked"]],
            "best": study.layers[chosen["best"]],
            "accuracy_lost": mean_and_interval(accuracy_lost),
            "rank_correlation": correlations(predicted, truth),
        }
    return figures


def shared_models(study: LayerStudy, means: Mapping[str, FloatArray]) -> dict[str, Any]:
    """Return the accuracy of each model for all depths minus that of the separate variants, by layer."""
    figures = {}
    for model in study.shared_models:
        difference = means[f"{model}_accuracy"] - means["finetuned_accuracy"]
        figures[model] = {
            "accuracy_difference": [mean_and_interval(column) for column in difference.T],
            "least": float(difference[0].min()),
            "mean": mean_and_interval(difference.mean(axis=1)),
        }
    return figures


def mean_and_interval(values: FloatArray) -> dict[str, Any]:
    """Return the mean of the data and its interval, from a figure (1 + samples)."""
    return {"mean": float(values[0]), "interval": interval(values[1:])}
