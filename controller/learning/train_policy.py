"""`train-policy`: the reward table of a data set, layer policies on it, and an honest judgement on held-out
prompts.

The paper trains its policy with PPO and shows one reward curve (Figure 9); here the same curve is drawn,
and the policy stands beside the choices it has to beat.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepinsert.backbones import load_backbone
from deepinsert.controller.option_checks import check, parse_layers, parse_observation, parse_skip_weights
from deepinsert.controller.options import TrainPolicyOptions
from deepinsert.controller.policy.baselines import PAPER_MEAN_DEPTH, judge, simple_choices
from deepinsert.controller.policy.frontier import frontier
from deepinsert.controller.policy.layer_policy import LayerPolicy
from deepinsert.controller.policy.policy_files import HELD_OUT
from deepinsert.controller.policy.policy_pictures import policy_rewards
from deepinsert.controller.prompt_selection import image_prompts
from deepinsert.controller.runs.folder import (
    read_result,
    replacing,
    start_run,
    write_json,
    write_result,
)
from deepinsert.controller.statistics import Interval
from deepinsert.envs.data.instructions import split_by_image
from deepinsert.envs.observations import Observation
from deepinsert.envs.rewards.table import RewardTable

from .algorithms import STEPS
from .fitting import isolated_random_state, train_policy

if TYPE_CHECKING:
    from deepinsert.backbones import Backbone
    from deepinsert.envs.prompts import Prompt

__all__ = ["isolated_random_state", "judge_policy", "run", "train_policy"]

TABLE = "table"
STATES = "training"
TIMES = "times.json"


def run(options: TrainPolicyOptions) -> dict[str, Any]:
    """Train policies of several seeds, judge them on held-out images, and write everything to the run folder.

    Writes `table/` (the reward table, unless `--table` names another), `policy.json` with
    `policy.safetensors`, the policy of the first seed (choosing the best by its held-out reward would make
    that reward a lie), `progress.csv`, TensorBoard events, `policy_rewards.png`, `judgement.md` and
    `result.json`. What a killed run had computed and learned is continued from. A finished run is not
    repeated. Raises `ValueError` where an option cannot be used or the data leave nothing to train on or to
    judge by, `DatasetError` where they cannot be read.
    """
    check(options)
    out = start_run(options)
    if (out / "result.json").is_file():
        result = read_result(out)
        print(summary(result))
        return result
    train, held_out, text_only = split_prompts(options)
    prompts = [*train, *held_out]
    backbone = load_backbone(options.backbone, device=options.device, dtype=options.dtype)
    table = reward_table(options, backbone, prompts)
    observation = Observation(parse_observation(options.observation), options.observe_image)
    observations = observation(backbone, prompts, options.batch_size)
    seen = np.arange(len(table)) < len(train)
    policies = train_seeds(options, backbone, table.subset(seen), observations[seen], observation)
    judgement = judge_policies(policies, table, observations, seen)
    saved = policies[options.seed]
    advantage = judgement["difference"]["policy_minus_best_fixed"]
    saved.training = replace(
        saved.training,
        advantage=Interval(advantage["reward"], *advantage["confidence_interval"]),
        frontier=frontier(saved, table.subset(~seen), observations[~seen]),
    )
    saved.table_digest = table.digest
    unseen = [key for key, trained_on in zip(table.prompt_keys, seen, strict=True) if not trained_on]
    write_json(out / HELD_OUT, {"prompt_keys": unseen})
    saved.save(out)
    policy_rewards(out / "progress.csv", out / "policy_rewards.png")
    result = {
        "algorithm": options.algorithm,
        "skip_weight": options.skip_weight,
        "skip_weight_range": [saved.skip_weights.low, saved.skip_weights.high],
        "bonus": options.bonus,
        "observation": observation.name,
        "insert_layers": table.insert_layers,
        "num_layers": backbone.num_layers,
        "prompts": {"train": len(train), "held_out": len(held_out), "text_only_left_out": text_only},
        "images": {
            "train": len({prompt.image_key for prompt in train}),
            "held_out": len({prompt.image_key for prompt in held_out}),
        },
        "steps": STEPS[options.algorithm] if options.steps is None else options.steps,
        **judgement,
        "training": saved.training,
    }
    with replacing(out / "judgement.md") as temporary:
        temporary.write_text(judgement_table(result), "utf-8")
    write_result(out, result)
    print(summary(result))
    return read_result(out)


def split_prompts(options: TrainPolicyOptions) -> tuple[list[Prompt], list[Prompt], int]:
    """Training prompts, held-out prompts, and the number left out because no image goes with them."""
    prompts, text_only = image_prompts(options)
    train, held_out = split_by_image(prompts, options.held_out, options.seed)
    if not train or not held_out:
        raise ValueError(
            f"--data {options.data}: {len(prompts)} prompts with images give {len(train)} to train on and "
            f"{len(held_out)} to judge by; use more data (--fraction, --sources) or another --held-out than "
            f"{options.held_out}"
        )
    return list(train), list(held_out), text_only


def reward_table(options: TrainPolicyOptions, backbone: Backbone, prompts: list[Prompt]) -> RewardTable:
    """The table of all prompts, filled; for a bonus of time with the times measured in the first start."""
    layers = parse_layers(options.insert_layers, backbone.num_layers)
    folder = options.out / TABLE if options.table is None else options.table
    table = RewardTable(backbone, prompts, layers, batch_tokens=options.batch_tokens, folder=folder)
    table.fill(progress=True)
    if options.bonus == "time":
        from deepinsert.envs.rewards.time_bonus import measure_times

        path = Path(options.out) / TIMES
        if not path.is_file():
            write_json(path, measure_times(backbone, prompts, layers, options.batch_size, seed=options.seed))
        table.times = np.array(json.loads(path.read_text("utf-8"))["ratios"])
    return table


def train_seeds(
    options: TrainPolicyOptions,
    backbone: Backbone,
    table: RewardTable,
    observations: NDArray[np.float32],
    observation: Observation,
) -> dict[int, LayerPolicy]:
    """A policy for each seed. A seed that has finished is not trained again; the first one's log goes to the
    run folder, the others' to folders beneath."""
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


def judge_policy(
    policy: LayerPolicy, table: RewardTable, observations: ArrayLike, train: NDArray[np.bool_]
) -> dict[str, Any]:
    """`judge_policies` for one policy."""
    return judge_policies({policy.seed: policy}, table, observations, train)


def judge_policies(
    policies: Mapping[int, LayerPolicy],
    table: RewardTable,
    observations: ArrayLike,
    train: NDArray[np.bool_],
) -> dict[str, Any]:
    """The policies' most probable layers beside simple choices, on the prompts where the mask `train` (P) is
    False; see `baselines.judge`. The first policy is the one that counts."""
    saved = next(iter(policies.values()))
    values = np.asarray(observations)
    rewards = table.rewards(saved.skip_weight, saved.bonus)
    chosen = {seed: policy.columns(values[~train]) for seed, policy in policies.items()}
    layers = {seed: np.array(saved.insert_layers)[columns] for seed, columns in chosen.items()}
    judgement = judge(
        chosen,
        simple_choices(
            saved.normaliser(values[train]),
            rewards[train],
            table.losses[train],
            saved.normaliser(values[~train]),
        ),
        rewards[train],
        rewards[~train],
        saved.insert_layers,
        [key for key, used in zip(table.image_keys, train, strict=True) if not used],
    )
    for row in judgement["seeds"]["each"]:
        row["mean_insert_layer"] = float(layers[row["seed"]].mean())
    first = layers[saved.seed]
    return {
        "mean_insert_layer": float(first.mean()),
        "mean_depth": float(first.mean()) / saved.num_layers,
        "paper_mean_depth": PAPER_MEAN_DEPTH,
        "histogram": {str(layer): int((first == layer).sum()) for layer in saved.insert_layers},
        **judgement,
        "training": saved.training,
    }


def summary(result: dict[str, Any]) -> str:
    """The judgement as a short table: mean reward of each choice on held-out prompts."""
    lines = [f"{'held-out reward':<28}{'mean':>9}   95 % interval       of the gap"]
    for label, row in choices(result):
        low, high = row["confidence_interval"]
        share = "" if row["share_of_gap"] is None else f"{row['share_of_gap']:>7.0%}"
        lines.append(f"{label:<28}{row['reward']:>9.4f}   {low:.4f} to {high:.4f}  {share}")
    depth = f"mean insert layer {result['mean_insert_layer']:.2f}, depth {result['mean_depth']:.2f}"
    return "\n".join([*lines, f"{depth} (paper: {result['paper_mean_depth']})", result["verdict"]])


def judgement_table(result: dict[str, Any]) -> str:
    """The judgement in Markdown: reward, regret and share of the gap of each choice, and the verdict."""
    lines = [
        "| choice | reward (nats) | regret against the oracle | share of the gap from best fixed to oracle |",
        "|---|---|---|---|",
    ]
    for label, row in choices(result):
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


def choices(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Each choice of a judgement with its label: the saved policy, the mean of all seeds, then the others."""
    seeds = result["seeds"]
    found = []
    for name, row in result["reward"].items():
        if row is None:
            continue
        label = name.replace("_", " ") + (f" ({row['insert_layer']})" if "insert_layer" in row else "")
        found.append((f"policy (seed {seeds['saved']})" if name == "policy" else label, row))
        if name == "policy" and len(seeds["each"]) > 1:
            found.append((f"policy, mean of {len(seeds['each'])} seeds", seeds["pooled"]))
    return found
