"""What a layer policy should see of a prompt: policies on several observations, on one table and one split.

Each observation gets policies of the same algorithm and seeds, judged on the same held-out prompts beside
what is simple, so that only what is observed differs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepinsert.backbones import load_backbone
from deepinsert.controller.learning.train_policy import (
    compare_policies,
    reward_table,
    split_prompts,
    train_seeds,
)
from deepinsert.controller.option_checks import check, parse_observation
from deepinsert.controller.options import TrainPolicyOptions
from deepinsert.controller.policy.baselines import FEW_IMAGES
from deepinsert.controller.runs.atomic_files import atomic_file, write_json
from deepinsert.controller.runs.folder import read_result, start_run, write_result
from deepinsert.controller.statistics import paired_interval
from deepinsert.envs.observations import Observation

if TYPE_CHECKING:
    from deepinsert.backbones import Backbone
    from deepinsert.envs.prompts import Prompt
    from deepinsert.envs.rewards.table import RewardTable

SHARED = ("best_fixed", "layer_0", "uniform", "oracle")
"""Choices that no observation changes."""


@dataclass(kw_only=True)
class ObservationAblationOptions(TrainPolicyOptions):
    """Compare what a policy can see of a prompt: the same training on several observations."""

    observation: str = "embeddings,hidden:1,hidden:2,hidden:4"
    """What to see of a prompt's text, each in turn: embeddings (paper), hidden:K after K layers."""
    observe_image: bool = True
    """Also try each with the mean of the projected image features."""


def run(options: ObservationAblationOptions) -> dict[str, Any]:
    """Train and judge policies on each observation; write `ablation.md` and `result.json`, return the result.

    What a killed run had computed is kept: the reward table, finished observations in `observations/`, and
    the training of the one it was at. A finished run is not repeated. Raises as `train-policy` does, and for
    an observation that the backbone does not have.
    """
    check(options)
    out = start_run(options)
    if (out / "result.json").is_file():
        result = read_result(out)
        print(table_of(result))
        return result
    observations = chosen_observations(options)
    train, held_out, text_only = split_prompts(options)
    prompts = [*train, *held_out]
    backbone = load_backbone(options.backbone, device=options.device, dtype=options.dtype)
    for observation in observations:
        # Before anything is computed, so that a layer that is not there is named at once.
        observation(backbone, prompts[:1])
    table = reward_table(options, backbone, prompts)
    seen = np.arange(len(table)) < len(train)
    judged = [observed(options, each, backbone, prompts, table, seen) for each in observations]
    images = [key for key, used in zip(table.image_keys, seen, strict=True) if not used]
    rewards = table.rewards(options.skip_weight, options.bonus)[~seen]
    result = {
        "algorithm": options.algorithm,
        "skip_weight": options.skip_weight,
        "bonus": options.bonus,
        "seeds": options.seeds,
        "prompts": {"train": len(train), "held_out": len(held_out), "text_only_left_out": text_only},
        "images": {"train": len({prompt.image_key for prompt in train}), "held_out": len(set(images))},
        "observations": compared(judged, rewards, images),
        **{name: judged[0]["reward"][name] for name in SHARED},
    }
    with atomic_file(out / "ablation.md") as temporary:
        temporary.write_text(table_of(result), "utf-8")
    write_result(out, result)
    print(table_of(result))
    return read_result(out)


def chosen_observations(options: ObservationAblationOptions) -> list[Observation]:
    """The observations that the options name, the paper's or else the first as what others stand against.

    Raises `ValueError` for one that is named twice.
    """
    layers = [parse_observation(part) for part in options.observation.split(",")]
    if len(set(layers)) < len(layers):
        raise ValueError(f"--observation {options.observation!r}: name each observation once")
    images = (False, True) if options.observe_image else (False,)
    return [Observation(layer, image) for image in images for layer in layers]


def observed(
    options: ObservationAblationOptions,
    observation: Observation,
    backbone: Backbone,
    prompts: Sequence[Prompt],
    table: RewardTable,
    train: NDArray[np.bool_],
) -> dict[str, Any]:
    """The judgement of policies that see `observation`, with each seed's choices; read where it is there."""
    name = observation.name.replace(":", "-")
    path = Path(options.out) / "observations" / f"{name}.json"
    if not path.is_file():
        values = observation(backbone, prompts, options.batch_size)
        own = replace(options, out=Path(options.out) / "policies" / name)
        policies = train_seeds(own, backbone, table.subset(train), values[train], observation)
        judgement = compare_policies(policies, table, values, train)
        columns = [policy.columns(values[~train]) for policy in policies.values()]
        write_json(
            path,
            {
                "observation": observation.name,
                "width": values.shape[1],
                "reward": judgement["reward"],
                "seeds": judgement["seeds"],
                "columns": [each.tolist() for each in columns],
            },
        )
    outcome: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return outcome


def compared(
    judged: Sequence[dict[str, Any]], rewards: NDArray[np.float64], images: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each observation: the mean policy of all seeds, and how far it lies from the first
    observation's on `rewards` (Q, K), paired by prompt, with 95 % intervals clustered by image."""
    rows = np.arange(len(rewards))
    earned = [np.mean([rewards[rows, each] for each in one["columns"]], axis=0) for one in judged]
    found = []
    for one, mine in zip(judged, earned, strict=True):
        difference = paired_interval(mine, earned[0], images)
        found.append(
            {
                "observation": one["observation"],
                "width": one["width"],
                **one["seeds"]["pooled"],
                "difference": difference.mean,
                "difference_interval": [difference.low, difference.high],
                "each_seed": one["seeds"]["each"],
                "nearest_neighbours": one["reward"]["nearest_neighbours"],
                "ridge": one["reward"]["ridge"],
            }
        )
    return found


def table_of(result: dict[str, Any]) -> str:
    """The ablation in Markdown."""
    first = result["observations"][0]["observation"]
    heads = ["observation", "numbers", "reward (nats)", "share of the gap", f"minus {first}", "kNN", "ridge"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in result["observations"]:
        cells = [row["observation"], str(row["width"]), reward_of(row), share_of(row)]
        if row["observation"] == first:
            cells.append("")
        else:
            low, high = row["difference_interval"]
            cells.append(f"{row['difference']:+.4f} ({low:+.4f} to {high:+.4f})")
        cells += [f"{row[name]['reward']:.4f}" for name in ("nearest_neighbours", "ridge")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| whatever is seen | reward (nats) | share of the gap |", "|---|---|---|"]
    for name in SHARED:
        if (choice := result[name]) is not None:
            label = name.replace("_", " ") + (f" ({choice['insert_layer']})" if name == "best_fixed" else "")
            lines.append(f"| {label} | {reward_of(choice)} | {share_of(choice)} |")
    prompts = result["prompts"]
    note = (
        f"Algorithm {result['algorithm']}, mean of {result['seeds']} seeds, skip weight "
        f"{result['skip_weight']:g}, bonus {result['bonus']}; trained on {prompts['train']} prompts, judged "
        f"on {prompts['held_out']} of {result['images']['held_out']} other images. In brackets "
        "95 % intervals, bootstrapped over images, each for itself. The gap is that from the best fixed "
        "layer to the oracle; kNN and ridge see the same as the policy."
    )
    return "\n".join([*lines, "", note, "", verdict(result), ""])


def verdict(result: dict[str, Any]) -> str:
    """One sentence on whether any observation was worth more than the first, or less."""
    first, *others = result["observations"]
    better = [row for row in others if row["difference_interval"][0] > 0]
    worse = [row for row in others if row["difference_interval"][1] < 0]
    if better:
        best = max(better, key=lambda row: row["difference"])
        sentence = (
            f"{len(better)} of {len(others)} observations earn more than {first['observation']}; most does "
            f"{best['observation']} ({best['difference']:+.4f} nats)"
        )
    else:
        sentence = f"No observation earns more than {first['observation']} that could be told from chance"
    if worse:
        sentence += f"; less: {', '.join(row['observation'] for row in worse)}"
    if (images := result["images"]["held_out"]) < FEW_IMAGES:
        sentence += f"; with only {images} held-out images this says little"
    return sentence + "."


def reward_of(row: dict[str, Any]) -> str:
    """Format a mean reward with its interval."""
    low, high = row["confidence_interval"]
    return f"{row['reward']:.4f} ({low:.4f} to {high:.4f})"


def share_of(row: dict[str, Any]) -> str:
    """Format the share of the gap between the best fixed layer and the oracle, with its interval."""
    if row["share_of_gap"] is None:
        return "no gap"
    low, high = row["share_of_gap_interval"]
    return f"{row['share_of_gap']:.1%} ({low:.1%} to {high:.1%})"
