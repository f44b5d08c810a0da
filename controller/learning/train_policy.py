"""The command `train-policy`: trains layer policies on a data set and compares them with baselines.

It computes the reward table, trains a policy per seed, and evaluates them on held-out images. The paper
trains its policy with PPO and shows one reward curve (Figure 9); the command draws the same curve.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepinsert.backbones import load_backbone
from deepinsert.controller.option_checks import parse_layers, parse_observation, parse_skip_weights
from deepinsert.controller.options import TrainPolicyOptions
from deepinsert.controller.policy.baselines import (
    PAPER_MEAN_DEPTH,
    baseline_columns,
    compare_with_baselines,
)
from deepinsert.controller.policy.layer_policy import LayerPolicy
from deepinsert.controller.policy.policy_files import HELD_OUT
from deepinsert.controller.policy.policy_pictures import plot_policy_rewards
from deepinsert.controller.prompt_selection import image_prompts
from deepinsert.controller.runs.atomic_files import atomic_file, write_json
from deepinsert.controller.runs.command import run_command
from deepinsert.controller.statistics import Interval
from deepinsert.envs.data.instructions import split_by_image
from deepinsert.envs.observations import Observation
from deepinsert.envs.rewards.table import RewardTable
from deepinsert.envs.rewards.time_bonus import measure_times

from .algorithms import STEPS
from .fitting import isolated_random_state, train_policy

if TYPE_CHECKING:
    from deepinsert.backbones import Backbone
    from deepinsert.envs.prompts import Prompt

__all__ = ["compare_policies", "isolated_random_state", "run", "train_policy"]

TABLE = "table"
STATES = "training"
TIMES = "times.json"


def run(options: TrainPolicyOptions) -> dict[str, Any]:
    """Train a policy per seed, compare them with baselines on held-out images, and fill the run folder.

    It writes `table/` (the reward table, unless `--table` names another), `policy.json` and
    `policy.safetensors` of the first seed's policy, `progress.csv`, TensorBoard events,
    `policy_rewards.png`, `judgement.md` and `result.json`. The first seed's policy is saved, not the best
    one, because selection by held-out reward would bias that reward. A killed run continues; a finished run
    is not repeated.

    Raises:
        ValueError: if an option cannot be used, or if no prompts are left to train on or to hold out.
        DatasetError: if the data cannot be read.
    """
    return run_command(options, partial(train_and_compare, options), summary)


def train_and_compare(options: TrainPolicyOptions, out: Path) -> dict[str, Any]:
    """Train the policies, write everything but `result.json` to the run folder, and return the result."""
    train, held_out, text_only = split_prompts(options)
    prompts = [*train, *held_out]
    backbone = load_backbone(options.backbone, device=options.device, dtype=options.dtype)
    table = reward_table(options, backbone, prompts)
    observation = Observation(parse_observation(options.observation), options.observe_image)
    observations = observation(backbone, prompts, options.batch_size)
    in_training = np.arange(len(table)) < len(train)
    policies = train_seeds(
        options, backbone, table.subset(in_training), observations[in_training], observation
    )
    comparison = compare_policies(policies, table, observations, in_training)
    policy = with_held_out_figures(
        policies[options.seed], comparison, table, observations, held_out=~in_training
    )
    result = {
        "algorithm": options.algorithm,
        "skip_weight": options.skip_weight,
        "skip_weight_range": [policy.skip_weights.low, policy.skip_weights.high],
        "bonus": options.bonus,
        "observation": observation.name,
        "insert_layers": table.insert_layers,
        "num_layers": backbone.num_layers,
        "prompts": {"train": len(train), "held_out": len(held_out), "text_only_left_out": text_only},
        "images": {"train": count_images(train), "held_out": count_images(held_out)},
        "steps": STEPS[options.algorithm] if options.steps is None else options.steps,
        **comparison,
        "training": policy.training,
    }
    held_out_keys = [key for key, trained in zip(table.prompt_keys, in_training, strict=True) if not trained]
    write_json(out / HELD_OUT, {"prompt_keys": held_out_keys})
    policy.save(out)
    plot_policy_rewards(out / "progress.csv", out / "policy_rewards.png")
    with atomic_file(out / "judgement.md") as temporary:
        temporary.write_text(comparison_table(result), "utf-8")
    return result


def split_prompts(options: TrainPolicyOptions) -> tuple[list[Prompt], list[Prompt], int]:
    """Return training prompts, held-out prompts, and how many prompts are left out for lack of an image."""
    prompts, text_only = image_prompts(options)
    train, held_out = split_by_image(prompts, options.held_out, options.seed)
    if not train or not held_out:
        raise ValueError(
            f"--data {options.data}: {len(prompts)} prompts with images give {len(train)} to train on and "
            f"{len(held_out)} to hold out; use more data (--fraction, --sources) or another --held-out than "
            f"{options.held_out}"
        )
    return list(train), list(held_out), text_only


def reward_table(options: TrainPolicyOptions, backbone: Backbone, prompts: list[Prompt]) -> RewardTable:
    """Return the filled reward table of all prompts.

    For the bonus "time" it includes prefill times, which are measured once and stored in the run folder.
    """
    layers = parse_layers(options.insert_layers, backbone.num_layers)
    folder = options.out / TABLE if options.table is None else options.table
    times = prefill_times(options, backbone, prompts, layers) if options.bonus == "time" else None
    table = RewardTable(
        backbone, prompts, layers, batch_tokens=options.batch_tokens, folder=folder, times=times
    )
    table.fill(progress=True)
    return table


def prefill_times(
    options: TrainPolicyOptions, backbone: Backbone, prompts: list[Prompt], layers: Sequence[int]
) -> list[float]:
    """Return prefill times (K,) at the candidate `layers` relative to layer 0; measure them only once."""
    path = Path(options.out) / TIMES
    if not path.is_file():
        write_json(path, measure_times(backbone, prompts, layers, options.batch_size, seed=options.seed))
    return [float(ratio) for ratio in json.loads(path.read_text("utf-8"))["ratios"]]


def train_seeds(
    options: TrainPolicyOptions,
    backbone: Backbone,
    table: RewardTable,
    observations: NDArray[np.float32],
    observation: Observation,
) -> dict[int, LayerPolicy]:
    """Train a policy per seed on P prompts; a seed that has finished is not trained again.

    The first seed's log is written to the run folder, the others' logs to folders in it.

    Args:
        options: the command's options.
        backbone: the backbone that the policies belong to.
        table: the training prompts' rewards.
        observations: their observations (P, D).
        observation: describes `observations`.
    """
    policies = {}
    for seed in range(options.seed, options.seed + options.seeds):
        folder = options.out / STATES / f"seed-{seed}"
        policies[seed] = train_policy(
            table,
            observations,
            skip_weight=options.skip_weight,
            skip_weights=parse_skip_weights(options.skip_weight_range, options.skip_weight),
            bonus=options.bonus,
            algorithm=options.algorithm,
            steps=options.steps,
            seed=seed,
            log_folder=options.out if seed == options.seed else folder,
            state=folder / "state.safetensors",
            observation=observation,
            backbone=(backbone.name, backbone.fingerprint),
        )
    return policies


def compare_policies(
    policies: Mapping[int, LayerPolicy],
    table: RewardTable,
    observations: ArrayLike,
    in_training: NDArray[np.bool_],
) -> dict[str, Any]:
    """Compare the policies' most probable layers with baselines on held-out prompts.

    Args:
        policies: the policy of each seed; the first is the one that is saved.
        table: rewards of all P prompts.
        observations: observations (P, D) of the prompts.
        in_training: the mask (P) of the training prompts; the others are held out.

    Returns:
        The fields of `compare_with_baselines`, the mean insert layer of every policy, and the histogram of
        the saved policy's layers.
    """
    saved = next(iter(policies.values()))
    values = np.asarray(observations)
    rewards = table.rewards(saved.skip_weight, saved.bonus)
    columns = {seed: policy.columns(values[~in_training]) for seed, policy in policies.items()}
    layers = {seed: np.array(saved.insert_layers)[chosen] for seed, chosen in columns.items()}
    comparison = compare_with_baselines(
        columns,
        baseline_columns(
            saved.normaliser(values[in_training]),
            rewards[in_training],
            table.losses[in_training],
            saved.normaliser(values[~in_training]),
        ),
        rewards[in_training],
        rewards[~in_training],
        saved.insert_layers,
        [key for key, trained in zip(table.image_keys, in_training, strict=True) if not trained],
    )
    for row in comparison["seeds"]["each"]:
        row["mean_insert_layer"] = float(layers[row["seed"]].mean())
    saved_layers = layers[saved.seed]
    return {
        "mean_insert_layer": float(saved_layers.mean()),
        "mean_depth": float(saved_layers.mean()) / saved.num_layers,
        "paper_mean_depth": PAPER_MEAN_DEPTH,
        "histogram": {str(layer): int((saved_layers == layer).sum()) for layer in saved.insert_layers},
        **comparison,
        "training": saved.training,
    }


def with_held_out_figures(
    policy: LayerPolicy,
    comparison: Mapping[str, Any],
    table: RewardTable,
    observations: NDArray[np.float32],
    held_out: NDArray[np.bool_],
) -> LayerPolicy:
    """Return `policy` with what the held-out prompts show of it.

    Args:
        policy: the trained policy.
        comparison: its comparison with baselines, of which its `training` records the advantage.
        table: rewards of all P prompts, whose digest the policy records.
        observations: observations (P, D) of the prompts.
        held_out: the mask (P) of the held-out prompts, on which the frontier is measured.
    """
    advantage = comparison["difference"]["policy_minus_best_fixed"]
    interval = Interval(advantage["reward"], *advantage["confidence_interval"])
    policy = policy.with_frontier(table.subset(held_out), observations[held_out])
    training = replace(policy.training, advantage=interval)
    return replace(policy, training=training, table_digest=table.digest)


def count_images(prompts: Sequence[Prompt]) -> int:
    """Return the number of different images, or sets of images, of the prompts."""
    return len({prompt.image_key for prompt in prompts})


def summary(result: dict[str, Any]) -> str:
    """Format the comparison as a short table: the mean reward of each choice on held-out prompts."""
    lines = [f"{'held-out reward':<28}{'mean':>9}   95 % interval       of the gap"]
    for label, row in labelled_choices(result):
        low, high = row["confidence_interval"]
        share = "" if row["share_of_gap"] is None else f"{row['share_of_gap']:>7.0%}"
        lines.append(f"{label:<28}{row['reward']:>9.4f}   {low:.4f} to {high:.4f}  {share}")
    depth = f"mean insert layer {result['mean_insert_layer']:.2f}, depth {result['mean_depth']:.2f}"
    return "\n".join([*lines, f"{depth} (paper: {result['paper_mean_depth']})", result["verdict"]])


def comparison_table(result: dict[str, Any]) -> str:
    """Format the comparison in Markdown: figures of each choice, and the verdict."""
    lines = [
        "| choice | reward (nats) | regret against the oracle | share of the gap from best fixed to oracle |",
        "|---|---|---|---|",
    ]
    for label, row in labelled_choices(result):
        low, high = row["confidence_interval"]
        less, more = row["regret_interval"]
        cells = [label, f"{row['reward']:.4f} ({low:.4f} to {high:.4f})"]
        cells.append(f"{row['regret']:.4f} ({less:.4f} to {more:.4f})")
        if row["share_of_gap"] is None:
            cells.append("no gap")
        else:
            below, above = row["share_of_gap_interval"]
            cells.append(f"{row['share_of_gap']:.1%} ({below:.1%} to {above:.1%})")
        lines.append(f"| {' | '.join(cells)} |")
    prompts, images = result["prompts"]["held_out"], result["images"]["held_out"]
    note = (
        f"Algorithm {result['algorithm']}, skip weight {result['skip_weight']:g}, bonus {result['bonus']}, "
        f"observation {result['observation']}; {prompts} held-out prompts of {images} images; in brackets "
        "95 % intervals, bootstrapped over images."
    )
    return "\n".join([*lines, "", note, "", result["verdict"], ""])


def labelled_choices(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return label and figures of each choice: the saved policy, the mean of all seeds, then the others."""
    seeds = result["seeds"]
    choices = []
    for name, row in result["reward"].items():
        if row is None:
            continue
        label = name.replace("_", " ") + (f" ({row['insert_layer']})" if "insert_layer" in row else "")
        choices.append((f"policy (seed {seeds['saved']})" if name == "policy" else label, row))
        if name == "policy" and len(seeds["each"]) > 1:
            choices.append((f"policy, mean of {len(seeds['each'])} seeds", seeds["pooled"]))
    return choices
