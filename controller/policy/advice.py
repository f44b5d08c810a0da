"""The figures of an advice for a data set: one layer to finetune at, its uncertainty, each prompt's layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepinsert.controller.statistics import Interval, mean_interval, paired_interval
from deepinsert.envs.prompts import Prompt
from deepinsert.envs.rewards.table import RewardTable

from .baselines import PAPER_MEAN_DEPTH
from .fixed_layer import FixedLayer, choose_fixed_layer
from .frontier import check_candidates
from .layer_policy import LayerPolicy
from .outcomes import FixedLayerComparison
from .sentences import mean_caveat, mean_sentence, policy_sentence, table_caveat, table_verdict
from .table_means import mean_at

BY_TABLE = "reward table"
BY_MEAN = "mean of the policy's layers"
HELD_OUT = "policy on held-out prompts, fixed layers on training prompts"


@dataclass(frozen=True, eq=False)
class PolicyChoices:
    """A policy's probabilities (P, K) of its candidates for `prompts` (P) at `skip_weight`.

    `observations` (P, D) are what the policy observes of them.
    """

    policy: LayerPolicy
    skip_weight: float
    prompts: Sequence[Prompt]
    observations: NDArray[np.float32]
    probabilities: NDArray[np.float32]

    @cached_property
    def columns(self) -> NDArray[np.int64]:
        """Index (P) of each prompt's most probable candidate."""
        columns: NDArray[np.int64] = self.probabilities.argmax(axis=1)
        return columns

    @cached_property
    def layers(self) -> NDArray[np.int64]:
        """Each prompt's most probable insert layer (P)."""
        layers: NDArray[np.int64] = np.array(self.policy.insert_layers)[self.columns]
        return layers

    @cached_property
    def images(self) -> list[str]:
        """Key (P) of each prompt's images."""
        return [prompt.image_key for prompt in self.prompts]


def advise(
    policy: LayerPolicy,
    prompts: Sequence[Prompt],
    *,
    skip_weight: float | None = None,
    table: RewardTable | None = None,
    held_out: NDArray[np.bool_] | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Recommend one layer to finetune at for P prompts, and a layer per prompt.

    The policy chooses a layer per prompt; a finetuned variant has one layer. With a reward table, that is the
    best fixed layer on it, since its mean reward is what a variant gets. Without a table it is, as in the
    paper (Appendix D: mean depth 0.14, so 4.5 of 32 layers, and variants at 4), the candidate nearest to the
    mean of the per-prompt layers, the shallower of two: the mean needs no answers, so it can be computed for
    unlabelled data. `chosen_by` in the result names the method. `confidence_interval` (95 %, bootstrap over
    images) spans the layers that are not significantly different from the best one, or is that of the mean.

    Args:
        policy: the policy to ask.
        prompts: the data set.
        skip_weight: λ; by default the policy's own.
        table: the reward table of exactly these prompts, in their order.
        held_out: the mask (P) of the prompts that the policy was not trained on, on which it is compared with
            the fixed layer; by default all prompts.
        batch_size: prompts observed at once.
        seed: the seed of the bootstrap.

    Returns:
        The fields of `result.json`.
    """
    weight = policy.resolve_skip_weight(skip_weight)
    observations = policy.observation(policy.checked_backbone(), prompts, batch_size)
    choices = PolicyChoices(policy, weight, prompts, observations, policy.probabilities(observations, weight))
    mean = mean_interval(choices.layers, choices.images, seed=seed)
    result = describe_choices(choices, mean)
    if table is None:
        return result | advise_by_mean(choices, mean)
    check_candidates(table, policy.insert_layers, policy.num_layers)
    if held_out is None or not held_out.any():
        held_out = np.ones(len(prompts), dtype=bool)
    return result | advise_by_table(choices, table, held_out, seed)


def describe_choices(choices: PolicyChoices, mean: Interval) -> dict[str, Any]:
    """Return the result fields about the layer of each prompt, and their `mean`."""
    policy, prompts = choices.policy, choices.prompts
    depth = np.array(mean) / policy.num_layers
    chosen = choices.probabilities[np.arange(len(prompts)), choices.columns]
    return {
        "skip_weight": choices.skip_weight,
        "mean_insert_layer": mean.mean,
        "mean_interval": [mean.low, mean.high],
        "mean_depth": depth[0],
        "mean_depth_interval": depth[1:],
        "paper_mean_depth": PAPER_MEAN_DEPTH,
        "insert_layers": policy.insert_layers,
        "num_layers": policy.num_layers,
        "prompts": {"used": len(prompts)},
        "images": len(set(choices.images)),
        "histogram": histogram([prompt.source for prompt in prompts], choices.layers, policy.insert_layers),
        "per_prompt": [
            describe_prompt(prompt, int(layer), float(probability))
            for prompt, layer, probability in zip(prompts, choices.layers, chosen, strict=True)
        ],
    }


def advise_by_mean(choices: PolicyChoices, mean: Interval) -> dict[str, Any]:
    """Recommend the candidate nearest to `mean`, the mean of the policy's layers, without a reward table."""
    policy, weight = choices.policy, choices.skip_weight
    layer = nearest_candidate(policy.insert_layers, mean.mean)
    return {
        "insert_layer": layer,
        "chosen_by": BY_MEAN,
        "confidence_interval": [mean.low, mean.high],
        "undecided": None,
        "picked": None,
        "difference": None,
        "images_needed": None,
        "expected": training_means(policy, layer, weight),
        "best_fixed": best_training_layer(policy, weight),
        "policy": None,
        "pareto": training_pareto(policy),
        "verdict": f"{policy_sentence(policy, weight)}{mean_sentence(policy, layer, weight)}",
        "caveat": mean_caveat(policy, mean, len(set(choices.images))),
    }


def advise_by_table(
    choices: PolicyChoices, table: RewardTable, held_out: NDArray[np.bool_], seed: int
) -> dict[str, Any]:
    """Recommend the best fixed layer of the prompts, and compare the policy with it.

    Args:
        choices: the policy's choices for P prompts.
        table: the prompts' rewards.
        held_out: the mask (P) of the prompts for the comparison.
        seed: the seed of the bootstrap.
    """
    policy = choices.policy
    rewards = table.rewards(choices.skip_weight, policy.bonus)
    fixed = choose_fixed_layer(rewards, choices.images, seed=seed)
    layer = policy.insert_layers[fixed.column]
    undecided = [policy.insert_layers[column] for column in fixed.undecided]
    comparison = compare_with_fixed(choices, rewards, fixed.column, held_out)
    curves = policy.pareto_curves(table.subset(held_out), choices.observations[held_out], choices.skip_weight)
    return {
        **describe_fixed_layer(policy, fixed),
        "expected": mean_at(table, fixed.column)
        | {"reward": rewards.mean(axis=0)[fixed.column], "depth": layer / policy.num_layers},
        "best_fixed": best_training_layer(policy, choices.skip_weight),
        "policy": mean_at(table, choices.columns)
        | {
            "reward": rewards[np.arange(len(table)), choices.columns].mean(),
            "minus_fixed": {
                "reward": comparison.advantage.mean,
                "confidence_interval": finite_ends(comparison.advantage),
            },
            "judged_on": {
                "prompts": comparison.prompts,
                "images": comparison.images,
                "of": comparison.prompt_set,
            },
        },
        "verdict": table_verdict(layer, undecided, len(table), comparison),
        "caveat": table_caveat(fixed, policy.insert_layers, policy.num_layers, comparison),
        "pareto": None if curves is None else {"of": comparison.prompt_set, **curves},
    }


def describe_fixed_layer(policy: LayerPolicy, fixed: FixedLayer) -> dict[str, Any]:
    """Return the result fields about the best fixed layer and its distance from the other candidates."""
    layers = policy.insert_layers
    undecided = [layers[column] for column in fixed.undecided]
    return {
        "insert_layer": layers[fixed.column],
        "chosen_by": BY_TABLE,
        "confidence_interval": [undecided[0], undecided[-1]],
        "undecided": undecided,
        "picked": dict(zip(layers, fixed.best_shares, strict=True)) if fixed.best_shares else None,
        "difference": {
            layer: {"reward": interval.mean, "confidence_interval": finite_ends(interval)}
            for layer, interval in zip(layers, fixed.difference, strict=True)
        },
        "images_needed": fixed.images_needed,
    }


def compare_with_fixed(
    choices: PolicyChoices, rewards: NDArray[np.float64], column: int, held_out: NDArray[np.bool_]
) -> FixedLayerComparison:
    """Compare the policy's choices with one fixed layer on held-out prompts.

    Args:
        choices: the policy's choices for P prompts.
        rewards: the prompts' rewards (P, K).
        column: the index of the fixed layer.
        held_out: the mask (P) of the prompts to compare on.
    """
    policy_rewards = rewards[np.arange(len(rewards)), choices.columns][held_out]
    images = [key for key, chosen in zip(choices.images, held_out, strict=True) if chosen]
    prompts = int(held_out.sum())
    return FixedLayerComparison(
        advantage=paired_interval(policy_rewards, rewards[held_out, column], images),
        always=bool((choices.columns[held_out] == column).all()),
        prompts=prompts,
        images=len(set(images)),
        prompt_set="these prompts" if held_out.all() else f"the {prompts} held-out ones of these prompts",
    )


def training_pareto(policy: LayerPolicy) -> dict[str, Any] | None:
    """Return the curves of `frontier.pareto_curves` that are known from training.

    The policy's curve is of held-out prompts, that of the fixed layers of training prompts.
    Only increases relative to insert layer 0 are comparable between the two. The oracle is None. The result
    is None if the policy was not measured over its skip weights, or without insert layer 0 or FLOPs.
    """
    points = [asdict(point) | {"accuracy": None} for point in policy.training.frontier]
    unknown = any(point["loss_increase"] is None or point["flops_ratio"] is None for point in points)
    if not points or unknown or policy.training.flops_ratio is None:
        return None
    fixed = [
        {"insert_layer": layer, "accuracy": None, **training_means(policy, layer, policy.skip_weight)}
        for layer in policy.insert_layers
    ]
    return {"of": HELD_OUT, "prompts": None, "policy": points, "fixed": fixed, "oracle": None}


def nearest_candidate(insert_layers: Sequence[int], mean: float) -> int:
    """Return the candidate nearest to `mean`; the shallower of two equally near."""
    return min(insert_layers, key=lambda layer: (abs(layer - mean), layer))


def training_means(policy: LayerPolicy, insert_layer: int, skip_weight: float) -> dict[str, float | None]:
    """Return means over the policy's training prompts at one layer: loss and reward in nats, FLOPs, depth."""
    column = policy.insert_layers.index(insert_layer)
    ratios, rewards = policy.training.flops_ratio, policy.mean_rewards(skip_weight)
    return {
        "loss": policy.training.loss[column],
        "loss_increase": policy.training.loss_increase(policy.insert_layers, column),
        "flops_ratio": None if ratios is None else ratios[column],
        "reward": None if rewards is None else float(rewards[column]),
        "depth": insert_layer / policy.num_layers,
    }


def best_training_layer(policy: LayerPolicy, skip_weight: float) -> dict[str, Any] | None:
    """Return the best fixed layer of the training prompts at λ; None if their bonus is not known."""
    rewards = policy.mean_rewards(skip_weight)
    if rewards is None:
        return None
    layer = policy.insert_layers[int(rewards.argmax())]
    return {"insert_layer": layer, **training_means(policy, layer, skip_weight)}


def histogram(
    sources: Sequence[str], layers: NDArray[np.int64], insert_layers: Sequence[int]
) -> dict[str, dict[str, int]]:
    """Count per source how many of its prompts chose each candidate; `sources` and `layers` have length P."""
    counts = Counter(zip(sources, layers.tolist(), strict=True))
    return {
        source: {str(layer): counts[source, layer] for layer in insert_layers}
        for source in sorted(set(sources))
    }


def describe_prompt(prompt: Prompt, insert_layer: int, probability: float) -> dict[str, Any]:
    """Return one prompt's entry in the result."""
    return {
        "id": prompt.id,
        "source": prompt.source,
        "insert_layer": insert_layer,
        "probability": probability,
    }


def finite_ends(interval: Interval) -> list[float | None]:
    """Return the ends of `interval` for JSON, with None for infinity."""
    return [end if np.isfinite(end) else None for end in (interval.low, interval.high)]
