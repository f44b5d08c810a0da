"""The command `recommend`: a trained policy's advice for one prompt, or for a data set to finetune on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deepinsert.backbones import load_backbone
from deepinsert.controller.option_checks import flag
from deepinsert.controller.options import RecommendOptions
from deepinsert.controller.prompt_selection import image_prompts
from deepinsert.controller.runs.command import run_command
from deepinsert.controller.runs.folder import read_config
from deepinsert.envs.prompts import Prompt
from deepinsert.envs.rewards.keys import prompt_keys
from deepinsert.envs.rewards.table import RewardTable

from .advice import advise, describe_prompt
from .layer_policy import LayerPolicy
from .policy_files import HELD_OUT
from .policy_pictures import plot_pareto, plot_recommendation
from .sentences import policy_sentence

TABLE = "table"


def run(options: RecommendOptions) -> dict[str, Any]:
    """Ask the policy in `options.policy` and write `result.json`.

    For a data set it also writes `recommend.png` and, if FLOPs are known, `pareto.png`. A finished run is not
    repeated.

    Raises:
        ValueError: unless exactly one of a prompt and a data set is given; for a wish that the policy cannot
            meet, a backbone that it was not trained on, a table that does not contain the prompts, and data
            without any image.
    """
    return run_command(options, partial(recommend, options), summary)


def recommend(options: RecommendOptions, out: Path) -> dict[str, Any]:
    """Return the advice for the prompt or the data set; draw the pictures of a data set."""
    policy = LayerPolicy.load(options.policy)
    wishes = {name: getattr(options, name) for name in ("skip_weight", "flops_ratio", "max_loss_increase")}
    skip_weight = resolve_wishes(policy, wishes)
    backbone = load_backbone(options.backbone, device=options.device, dtype=options.dtype)
    policy = replace(policy, backbone=backbone)
    policy.checked_backbone()
    if options.prompt is not None:
        result = advise_prompt(policy, Prompt.from_question(options.prompt, options.image), skip_weight)
    else:
        prompts, text_only = image_prompts(options)
        result = advise_data(policy, prompts, skip_weight, options)
        result["prompts"]["text_only_left_out"] = text_only
        plot_recommendation(result, out / "recommend.png")
        if result["pareto"] is not None:
            plot_pareto(result, out / "pareto.png")
    result["asked"] = {name: value for name, value in wishes.items() if value is not None}
    return result


def resolve_wishes(policy: LayerPolicy, wishes: dict[str, float | None]) -> float:
    """Return the skip weight that the options ask for; errors name the options."""
    try:
        return policy.resolve_skip_weight(**wishes)
    except ValueError as error:
        text = str(error)
        for name in wishes:
            text = text.replace(name, flag(name))
        raise ValueError(text) from None


def summary(result: dict[str, Any]) -> str:
    """Format the advice in a few lines."""
    expected = result["expected"]
    ratio = "unknown" if expected["flops_ratio"] is None else f"{expected['flops_ratio']:.3f}"
    figures = f"expected loss {expected['loss']:.4f} nats, prefill FLOPs ratio {ratio}"
    layer, weight = result["insert_layer"], f"skip weight {result['skip_weight']:g}"
    if result["confidence_interval"] is None:
        return (
            f"insert layer {layer} (probability {result['probability']:.2f}, {weight}), {figures}\n"
            f"{result['note']}"
        )
    low, high = result["mean_interval"]
    lines = [
        f"insert layer {layer} by the {result['chosen_by']} ({weight}), {figures}",
        f"mean of the {len(result['per_prompt'])} prompts' layers {result['mean_insert_layer']:.2f}, 95 % "
        f"interval {low:.2f} to {high:.2f}: depth {result['mean_depth']:.2f} (paper: "
        f"{result['paper_mean_depth']})",
        result["verdict"],
    ]
    lines += [result["caveat"]] if result["caveat"] else []
    lines += [result["table"]["note"]] if result["table"] and result["table"]["note"] else []
    return "\n".join(lines)


def advise_prompt(policy: LayerPolicy, prompt: Prompt, skip_weight: float) -> dict[str, Any]:
    """Return the layer for one prompt, its probability, and what to expect of it.

    Expected are the training prompts' mean loss, this prompt's FLOPs ratio, and the depth.
    """
    advice = policy.recommend_prompts([prompt], skip_weight)[0]
    note = "The expected loss is the mean of the policy's training prompts at this layer."
    if not prompt.images:
        note += " Without an image nothing enters at the insert layer: the choice changes nothing."
    return {
        "question": prompt.question,
        "skip_weight": advice.skip_weight,
        "insert_layer": advice.insert_layer,
        "confidence_interval": None,
        "probability": advice.probability,
        "probabilities": advice.probabilities,
        "expected": asdict(advice.expected) | {"saving": 1 - advice.expected.flops_ratio},
        "per_prompt": [describe_prompt(prompt, advice.insert_layer, advice.probability)],
        "note": note,
        "verdict": policy_sentence(policy, advice.skip_weight),
    }


def advise_data(
    policy: LayerPolicy, prompts: Sequence[Prompt], skip_weight: float, options: RecommendOptions
) -> dict[str, Any]:
    """Return the advice for a data set.

    It uses the reward table of `--table`, or the policy's own if it contains all prompts, or none.

    Args:
        policy: the policy to ask.
        prompts: the data set.
        skip_weight: λ.
        options: the command's options.
    """
    folder, source = options.table, f"--table {options.table}"
    whole = table = held_out = None
    if folder is not None:
        whole = RewardTable.load(folder, policy.insert_layers, times=policy.training.times)
    elif (training_folder := table_of_policy(options.policy)) is not None:
        folder, source = training_folder, f"--policy {options.policy}"
        whole = RewardTable.load(folder, policy.insert_layers, times=policy.training.times)
        if not set(prompt_keys(prompts)) <= set(whole.prompt_keys):
            whole = None  # the policy was trained on other prompts
    if whole is not None:
        table = table_of(whole, policy, prompts, source)
        if (options.policy / HELD_OUT).is_file():
            keys = held_out_keys(options.policy / HELD_OUT)
            held_out = np.array([key in keys for key in table.prompt_keys])
    result = advise(
        policy,
        prompts,
        skip_weight=skip_weight,
        table=table,
        held_out=held_out,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    result["table"] = None if whole is None else describe_table(whole, folder, policy)
    return result


def table_of_policy(run: Path) -> Path | None:
    """Return the folder of the reward table that train-policy used; None if it does not exist any more.

    It is in the run folder, or at the place that the run's `--table` names.
    """
    table = (read_config(run) or {}).get("options", {}).get("table")
    folder = Path(table) if table else run / TABLE
    return folder if folder.is_dir() else None


def describe_table(table: RewardTable, folder: Path | None, policy: LayerPolicy) -> dict[str, Any]:
    """Return which reward table the advice uses, and whether the policy was trained on the same one."""
    digest = table.digest
    same = digest == policy.table_digest
    note = f"Rewards of table {digest}; the policy was trained on another, {policy.table_digest}."
    return {"folder": folder, "digest": digest, "trained_on": same, "note": None if same else note}


def held_out_keys(path: Path) -> set[str]:
    """Return the keys of the prompts that train-policy held out.

    Raises:
        ValueError: if the file in `path` does not contain them.
    """
    try:
        return {str(key) for key in json.loads(path.read_text("utf-8"))["prompt_keys"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} does not list prompts ({error}); remove it to compare the policy on all prompts"
        ) from None


def table_of(whole: RewardTable, policy: LayerPolicy, prompts: Sequence[Prompt], source: str) -> RewardTable:
    """Return the part of a table about exactly these prompts, in their order.

    Args:
        whole: the table.
        policy: the policy that will be compared on it.
        prompts: the prompts.
        source: the option that named the table, for errors.

    Raises:
        ValueError: if the table belongs to another backbone or lacks a prompt or a loss.
    """
    fingerprint = whole.origin["fingerprint"]
    if fingerprint != policy.backbone_fingerprint:
        raise ValueError(
            f"{source}: its losses are those of backbone {fingerprint}, the policy's is "
            f"{policy.backbone_name!r} ({policy.backbone_fingerprint}); give a table of the policy's backbone"
        )
    position = {key: index for index, key in enumerate(whole.prompt_keys)}
    rows = [position.get(key, -1) for key in prompt_keys(prompts)]
    if -1 in rows:
        raise ValueError(
            f"{source}: {rows.count(-1)} of the {len(rows)} prompts are not in its reward table; sweep the "
            "data set with deepinsert sweep, or leave --table out"
        )
    table = whole.subset(rows)
    if not table.complete:
        missing = int(np.isnan(table.losses).any(axis=0).argmax())
        raise ValueError(
            f"{source}: losses at insert layer {policy.insert_layers[missing]} are missing; sweep the data "
            f"set at layers {','.join(map(str, policy.insert_layers))} with deepinsert sweep"
        )
    return table
