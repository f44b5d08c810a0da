"""Compares observations of a layer policy: policies on several observations, on one table and one split.

Every observation gets policies of the same algorithm and seeds, which are compared with the same baselines on
the same held-out prompts, so that only the observation differs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from deepinsert.controller.option_checks import parse_observation
from deepinsert.controller.options import TrainPolicyOptions
from deepinsert.controller.policy.baselines import FEW_IMAGES
from deepinsert.controller.runs.atomic_files import atomic_file, write_json
from deepinsert.controller.runs.command import run_command
from deepinsert.controller.statistics import paired_interval
from deepinsert.controller.tables import markdown_table
from deepinsert.envs.observations import Observation

if TYPE_CHECKING:
    from deepinsert.backbones import Backbone
    from deepinsert.envs.prompts import Prompt
    from deepinsert.envs.rewards.table import RewardTable

COMMON_CHOICES = ("best_fixed", "layer_0", "uniform", "oracle")
"""Choices of layers that do not depend on the observation."""

Result = dict[str, Any]


@dataclass(kw_only=True)
class ObservationAblationOptions(TrainPolicyOptions):
    """Compare what a policy can observe of a prompt: the same training on several observations."""

    observation: str = "embeddings,hidden:1,hidden:2,hidden:4"
    """Observations of a prompt's text, one after the other: embeddings (paper), or hidden:K, the hidden state
    after K layers."""
    observe_image: bool = True
    """Also try each observation with the mean of the projected image features."""


def run(options: ObservationAblationOptions) -> Result:
    """Train and compare policies on each observation; write `ablation.md` and `result.json`.

    An interrupted run continues: it keeps the reward table, the finished observations in `observations/`, and
    the state of the current training. A finished run is not repeated.

    Raises:
        ValueError: as `train-policy` does, or the backbone does not have an observation.
        DatasetError: the data cannot be used.
    """
    return run_command(options, partial(compare_observations, options), page)


def compare_observations(options: ObservationAblationOptions, out: Path) -> Result:
    """Train and compare policies on each observation, write `ablation.md` to `out`, and return the result."""
    observations = chosen_observations(options)
    train, held_out, text_only = split_prompts(options)
    prompts = [*train, *held_out]
    backbone = load_backbone(options.backbone, device=options.device, dtype=options.dtype)
    for observation in observations:
        # This raises for a layer that the backbone does not have, before anything is computed.
        observation(backbone, prompts[:1])
    table = reward_table(options, backbone, prompts)
    in_training = np.arange(len(table)) < len(train)
    outcomes = [
        outcome_of(options, observation, backbone, prompts, table, in_training)
        for observation in observations
    ]
    images = [key for key, training in zip(table.image_keys, in_training, strict=True) if not training]
    rewards = table.rewards(options.skip_weight, options.bonus)[~in_training]
    result: Result = {
        "algorithm": options.algorithm,
        "skip_weight": options.skip_weight,
        "bonus": options.bonus,
        "seeds": options.seeds,
        "prompts": {"train": len(train), "held_out": len(held_out), "text_only_left_out": text_only},
        "images": {"train": len({prompt.image_key for prompt in train}), "held_out": len(set(images))},
        "observations": compared(outcomes, rewards, images),
        **{name: outcomes[0]["reward"][name] for name in COMMON_CHOICES},
    }
    with atomic_file(out / "ablation.md") as temporary:
        temporary.write_text(page(result), "utf-8")
    return result


def chosen_observations(options: ObservationAblationOptions) -> list[Observation]:
    """Return the observations that the options name; the first is the one that others are compared with.

    Raises:
        ValueError: an observation is named twice.
    """
    layers = [parse_observation(part) for part in options.observation.split(",")]
    if len(set(layers)) < len(layers):
        raise ValueError(f"--observation {options.observation!r}: name each observation once")
    images = (False, True) if options.observe_image else (False,)
    return [Observation(layer, image) for image in images for layer in layers]


def outcome_of(
    options: ObservationAblationOptions,
    observation: Observation,
    backbone: Backbone,
    prompts: Sequence[Prompt],
    table: RewardTable,
    in_training: NDArray[np.bool_],
) -> dict[str, Any]:
    """Return the comparison of policies on one observation, and the columns that each seed's policy chose.

    The outcome is read from `observations/` if the observation is finished, or computed and written there.

    Args:
        options: the options of the study.
        observation: what the policies observe.
        backbone: the backbone.
        prompts: all prompts (P).
        table: their rewards.
        in_training: the mask (P) of the training prompts; the others are held out.
    """
    name = observation.name.replace(":", "-")
    path = Path(options.out) / "observations" / f"{name}.json"
    if not path.is_file():
        values = observation(backbone, prompts, options.batch_size)
        training_options = replace(options, out=Path(options.out) / "policies" / name)
        policies = train_seeds(
            training_options, backbone, table.subset(in_training), values[in_training], observation
        )
        comparison = compare_policies(policies, table, values, in_training)
        columns = [policy.columns(values[~in_training]) for policy in policies.values()]
        write_json(
            path,
            {
                "observation": observation.name,
                "width": values.shape[1],
                "reward": comparison["reward"],
                "seeds": comparison["seeds"],
                "columns": [column.tolist() for column in columns],
            },
        )
    outcome: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return outcome


def compared(
    outcomes: Sequence[dict[str, Any]], rewards: NDArray[np.float64], images: Sequence[str]
) -> list[dict[str, Any]]:
    """Return one row per observation: the mean policy of all seeds, and its difference from the first one.

    Differences are paired by prompt and have 95 % intervals, clustered by image.

    Args:
        outcomes: the outcome of each observation.
        rewards: the rewards (Q, K) of Q held-out prompts at K layers.
        images: the image of each held-out prompt (Q).
    """
    prompts = np.arange(len(rewards))
    mean_rewards = [
        np.mean([rewards[prompts, columns] for columns in outcome["columns"]], axis=0) for outcome in outcomes
    ]
    rows = []
    for outcome, mean_reward in zip(outcomes, mean_rewards, strict=True):
        difference = paired_interval(mean_reward, mean_rewards[0], images)
        rows.append(
            {
                "observation": outcome["observation"],
                "width": outcome["width"],
                **outcome["seeds"]["pooled"],
                "difference": difference.mean,
                "difference_interval": [difference.low, difference.high],
                "each_seed": outcome["seeds"]["each"],
                "nearest_neighbours": outcome["reward"]["nearest_neighbours"],
                "ridge": outcome["reward"]["ridge"],
            }
        )
    return rows


def page(result: Result) -> str:
    """Render the ablation in Markdown."""
    return "\n\n".join(
        [observation_table(result), choice_table(result), note(result), f"{verdict(result)}\n"]
    )


def observation_table(result: Result) -> str:
    """Render the rewards of each observation."""
    first = result["observations"][0]["observation"]
    headings = [
        "observation",
        "numbers",
        "reward (nats)",
        "share of the gap",
        f"minus {first}",
        "kNN",
        "ridge",
    ]
    rows = []
    for row in result["observations"]:
        low, high = row["difference_interval"]
        difference = f"{row['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
        rows.append(
            [
                row["observation"],
                str(row["width"]),
                reward_of(row),
                share_of(row),
                "" if row["observation"] == first else difference,
                *(f"{row[name]['reward']:.4f}" for name in ("nearest_neighbours", "ridge")),
            ]
        )
    return markdown_table(headings, rows, compact_rule=True)


def choice_table(result: Result) -> str:
    """Render the rewards of choices that do not depend on the observation."""
    rows = []
    for name in COMMON_CHOICES:
        if (choice := result[name]) is not None:
            label = name.replace("_", " ") + (f" ({choice['insert_layer']})" if name == "best_fixed" else "")
            rows.append([label, reward_of(choice), share_of(choice)])
    headings = ["for any observation", "reward (nats)", "share of the gap"]
    return markdown_table(headings, rows, compact_rule=True)


def note(result: Result) -> str:
    """Return the sentences below the tables."""
    prompts = result["prompts"]
    return (
        f"Algorithm {result['algorithm']}, mean of {result['seeds']} seeds, skip weight "
        f"{result['skip_weight']:g}, bonus {result['bonus']}; the policies were trained on "
        f"{prompts['train']} prompts and compared on {prompts['held_out']} prompts of "
        f"{result['images']['held_out']} other images. Brackets hold 95 % intervals of each figure, "
        "bootstrapped over images. The gap is that from the best fixed layer to the oracle; kNN and ridge "
        "have the same observation as the policy."
    )


def verdict(result: Result) -> str:
    """Return a sentence on whether an observation earned significantly more than the first, or less."""
    first, *others = result["observations"]
    better = [row for row in others if row["difference_interval"][0] > 0]
    worse = [row for row in others if row["difference_interval"][1] < 0]
    if better:
        best = max(better, key=lambda row: row["difference"])
        sentence = (
            f"{len(better)} of {len(others)} observations earn significantly more than "
            f"{first['observation']}; {best['observation']} earns most ({best['difference']:+.4f} nats)"
        )
    else:
        sentence = f"No observation earns significantly more than {first['observation']}"
    if worse:
        sentence += f"; these earn less: {', '.join(row['observation'] for row in worse)}"
    if (images := result["images"]["held_out"]) < FEW_IMAGES:
        sentence += f"; with only {images} held-out images, this is weak evidence"
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
