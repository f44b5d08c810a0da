"""`train-policy`: the reward table of a data set, PPO on it, and an honest judgement on held-out prompts.

The paper trains its policy with PPO and shows one reward curve (Figure 9); here the same curve is drawn,
and the policy stands beside the choices it has to beat.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backbones import load_backbone
from envs.instructions import split_by_image
from envs.observations import prompt_embeddings
from envs.rewards import RewardTable

from .baselines import PAPER_MEAN_DEPTH, judge, nearest_neighbour_columns
from .data import image_prompts
from .learning import train_policy
from .options import TrainPolicyOptions, check, parse_layers
from .plots import policy_rewards
from .policy import LayerPolicy
from .runs import progress, read_result, start_run, write_result
from .statistics import Interval

if TYPE_CHECKING:
    from envs.prompts import Prompt

TABLE = "table.npz"
SAVE_SECONDS = 10.0
"""At most so much work is lost when the command is killed."""


def run(options: TrainPolicyOptions) -> dict[str, Any]:
    """Train a policy, judge it on held-out images, and write everything to the run folder.

    Writes `table.npz` (the reward table, which a killed run is continued from), `policy.json` with
    `policy.safetensors`, `progress.csv`, TensorBoard events, `policy_rewards.png` and `result.json`. A
    finished run is not repeated. Raises `ValueError` where an option cannot be used or the data leave nothing
    to train on or to judge by, `DatasetError` where they cannot be read.
    """
    check(options)
    out = start_run(options)
    if (out / "result.json").is_file():
        result = read_result(out)
        print(summary(result))
        return result
    train, held_out, text_only = split_prompts(options)
    backbone = load_backbone(options.backbone, device=options.device, dtype=options.dtype)
    layers = parse_layers(options.insert_layers, backbone.num_layers)
    table = RewardTable(backbone, [*train, *held_out], layers, options.batch_size)
    fill_table(table, out / TABLE)
    observations = prompt_embeddings(backbone, [*train, *held_out], options.batch_size)
    seen = np.arange(len(table)) < len(train)
    policy = train_policy(
        table.subset(seen),
        observations[seen],
        skip_weight=options.skip_weight,
        bonus=options.bonus,
        steps=options.steps,
        seed=options.seed,
        log_folder=out,
        backbone=(backbone.name, backbone.fingerprint),
    )
    judgement = judge_policy(policy, table, observations, seen)
    advantage = judgement["difference"]["policy_minus_best_fixed"]
    interval = Interval(advantage["reward"], *advantage["confidence_interval"])
    policy = replace(policy, training=replace(policy.training, advantage=interval))
    policy.save(out)
    policy_rewards(out / "progress.csv", out / "policy_rewards.png")
    result = {
        "skip_weight": options.skip_weight,
        "bonus": options.bonus,
        "insert_layers": layers,
        "num_layers": backbone.num_layers,
        "prompts": {"train": len(train), "held_out": len(held_out), "text_only_left_out": text_only},
        "images": {
            "train": len({prompt.image_key for prompt in train}),
            "held_out": len({prompt.image_key for prompt in held_out}),
        },
        "steps": options.steps,
        **judgement,
    }
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


def fill_table(table: RewardTable, path: Path) -> None:
    """Compute what is missing of losses and FLOPs, going on from what `path` holds and saving there."""
    if path.is_file():
        table.restore(path)
    saved = time.monotonic()
    for _ in progress(table.fill_by_block(), "reward table", total=table.missing_blocks()):
        if time.monotonic() - saved > SAVE_SECONDS:
            table.save(path)
            saved = time.monotonic()
    _ = table.flops
    table.save(path)


def summary(result: dict[str, Any]) -> str:
    """The judgement as a short table: mean reward of each choice on held-out prompts."""
    lines = [f"{'held-out reward':<24}{'mean':>9}   95 % interval"]
    for name, row in result["reward"].items():
        if row is not None:
            low, high = row["confidence_interval"]
            label = name.replace("_", " ") + (f" ({row['insert_layer']})" if "insert_layer" in row else "")
            lines.append(f"{label:<24}{row['reward']:>9.4f}   {low:.4f} to {high:.4f}")
    depth = f"mean insert layer {result['mean_insert_layer']:.2f}, depth {result['mean_depth']:.2f}"
    return "\n".join([*lines, f"{depth} (paper: {result['paper_mean_depth']})", result["verdict"]])


def judge_policy(
    policy: LayerPolicy, table: RewardTable, observations: np.ndarray, train: np.ndarray
) -> dict[str, Any]:
    """The policy's most probable layers beside simple choices, on the prompts where the mask `train` (P) is
    False; see `baselines.judge`."""
    rewards = table.rewards(policy.skip_weight, policy.bonus)
    seen, queries = policy.normaliser(observations[train]), policy.normaliser(observations[~train])
    chosen = policy.columns(observations[~train])
    layers = np.array(policy.insert_layers)[chosen]
    return {
        "mean_insert_layer": float(layers.mean()),
        "mean_depth": float(layers.mean()) / policy.num_layers,
        "paper_mean_depth": PAPER_MEAN_DEPTH,
        "histogram": {str(layer): int((layers == layer).sum()) for layer in policy.insert_layers},
        **judge(
            chosen,
            nearest_neighbour_columns(seen, rewards[train], queries),
            rewards[train],
            rewards[~train],
            policy.insert_layers,
            [key for key, used in zip(table.image_keys, train, strict=True) if not used],
        ),
        "training": policy.training,
    }
