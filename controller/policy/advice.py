"""The advice for a data set: one layer to finetune at, how sure that is, and what each prompt would take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepinsert.controller.statistics import Interval, mean_interval, paired_interval
from deepinsert.envs.prompts import Prompt
from deepinsert.envs.rewards.table import RewardTable

from .baselines import FEW_IMAGES, PAPER_MEAN_DEPTH
from .expectations import mean_at
from .fixed_layer import WIDE, FixedLayer, caveat, choose_fixed_layer, named
from .frontier import check_candidates, pareto
from .layer_policy import LayerPolicy

BY_TABLE = "reward table"
HELD_OUT = "policy on held-out prompts, fixed layers on training prompts"
BY_MEAN = "mean of the policy's layers"


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
    """The one layer to finetune at for these prompts, and the layer of each prompt, at λ `skip_weight`.

    The policy chooses per prompt, a finetuned variant has one layer. With `table`, the reward table of just
    these prompts, that is the best fixed layer on it, since this is what a variant gets. Without, as in the
    paper (Appendix D: mean depth 0.14, so 4.5 of 32 layers, and variants at 4), it is the candidate nearest
    to the mean of the per-prompt layers, the shallower of two: a mean needs no answers, so it can be taken on
    data that nobody has labelled. `chosen_by` says which. `confidence_interval` then spans the layers that
    cannot be told from the best one, or is the mean's; both 95 %, by bootstrap over images.

    The policy is judged against that layer on the prompts of the mask `held_out` (P), which it was not
    trained on; on all of them where that is None.
    """
    weight = policy.asked_skip_weight(skip_weight)
    observations = policy.observation(policy.checked_backbone(), prompts, batch_size)
    probabilities = policy.probabilities(observations, weight)
    columns = probabilities.argmax(axis=1)
    layers = np.array(policy.insert_layers)[columns]
    images = [prompt.image_key for prompt in prompts]
    mean = mean_interval(layers, images, seed=seed)
    depth = np.array(mean) / policy.num_layers
    result: dict[str, Any] = {
        "skip_weight": weight,
        "mean_insert_layer": mean.mean,
        "mean_interval": [mean.low, mean.high],
        "mean_depth": depth[0],
        "mean_depth_interval": depth[1:],
        "paper_mean_depth": PAPER_MEAN_DEPTH,
        "insert_layers": policy.insert_layers,
        "num_layers": policy.num_layers,
        "prompts": {"used": len(prompts)},
        "images": len(set(images)),
        "histogram": histogram([prompt.source for prompt in prompts], layers, policy.insert_layers),
        "per_prompt": [
            per_prompt(prompt, int(layer), float(row[column]))
            for prompt, layer, row, column in zip(prompts, layers, probabilities, columns, strict=True)
        ],
    }
    if table is None:
        return result | by_mean(policy, mean, weight, len(set(images)))
    check_candidates(policy, table)
    judged = np.ones(len(prompts), dtype=bool) if held_out is None or not held_out.any() else held_out
    fixed = choose_fixed_layer(table.rewards(weight, policy.bonus), images, seed=seed)
    where = f"the {judged.sum()} held-out ones of these prompts" if not judged.all() else "these prompts"
    result |= by_table(policy, table, fixed, weight)
    result |= policy_beside(table, columns, judged, fixed, policy, weight, images, where)
    curves = pareto(policy, table.subset(judged), observations[judged], weight)
    result["pareto"] = None if curves is None else {"of": where, **curves}
    return result


def by_mean(policy: LayerPolicy, mean: Interval, skip_weight: float, images: int) -> dict[str, Any]:
    """The layer nearest to the policy's mean, and what the training prompts say of it."""
    layer = nearest_candidate(policy.insert_layers, mean.mean)
    doubts = []
    if images < FEW_IMAGES:
        doubts.append(f"with only {images} images the mean of the policy's layers says little")
    elif mean.high - mean.low > WIDE * policy.num_layers:
        doubts.append(f"{images} images leave the mean between layers {mean.low:.1f} and {mean.high:.1f}")
    advantage = policy.training.advantage
    if advantage is not None and advantage.low <= 0:
        doubts.append("on held-out prompts, choosing a layer for each did not beat the best fixed layer")
    return {
        "insert_layer": layer,
        "chosen_by": BY_MEAN,
        "confidence_interval": [mean.low, mean.high],
        "undecided": None,
        "picked": None,
        "difference": None,
        "images_needed": None,
        "expected": expected(policy, layer, skip_weight),
        "best_fixed": training_best(policy, skip_weight),
        "policy": None,
        "pareto": training_pareto(policy),
        "verdict": f"{policy_sentence(policy, skip_weight)}{mean_sentence(policy, layer, skip_weight)}",
        "caveat": sentence(doubts),
    }


def training_pareto(policy: LayerPolicy) -> dict[str, Any] | None:
    """`pareto` from what training knew: the policy on held-out prompts, fixed layers on training prompts.

    Only increases against insert layer 0 can be compared between the two. No oracle is known. None where
    the policy was not measured over its skip weights, or without insert layer 0 or FLOPs.
    """
    points = [asdict(point) | {"accuracy": None} for point in policy.training.frontier]
    unknown = any(point["loss_increase"] is None or point["flops_ratio"] is None for point in points)
    if not points or unknown or policy.training.flops_ratio is None:
        return None
    fixed = [
        {"insert_layer": layer, "accuracy": None, **expected(policy, layer, policy.skip_weight)}
        for layer in policy.insert_layers
    ]
    return {"of": HELD_OUT, "prompts": None, "policy": points, "fixed": fixed, "oracle": None}


def by_table(
    policy: LayerPolicy, table: RewardTable, fixed: FixedLayer, skip_weight: float
) -> dict[str, Any]:
    """The best fixed layer of these prompts, and the layers that cannot be told from it."""
    layers = policy.insert_layers
    undecided = [layers[column] for column in fixed.undecided]
    rewards = table.rewards(skip_weight, policy.bonus).mean(axis=0)
    return {
        "insert_layer": layers[fixed.column],
        "chosen_by": BY_TABLE,
        "confidence_interval": [undecided[0], undecided[-1]],
        "undecided": undecided,
        "picked": dict(zip(layers, fixed.picked, strict=True)) if fixed.picked else None,
        "difference": {
            layer: {"reward": found.mean, "confidence_interval": finite(found)}
            for layer, found in zip(layers, fixed.difference, strict=True)
        },
        "images_needed": fixed.images_needed,
        "expected": mean_at(table, fixed.column)
        | {"reward": rewards[fixed.column], "depth": layers[fixed.column] / policy.num_layers},
        "best_fixed": training_best(policy, skip_weight),
    }


def policy_beside(
    table: RewardTable,
    columns: NDArray[np.int64],
    judged: NDArray[np.bool_],
    fixed: FixedLayer,
    policy: LayerPolicy,
    skip_weight: float,
    images: Sequence[str],
    where: str,
) -> dict[str, Any]:
    """The policy's choices against the fixed layer on the prompts of the mask `judged`, and what to say."""
    rows = np.arange(len(table))
    rewards = table.rewards(skip_weight, policy.bonus)
    earned, other = rewards[rows, columns][judged], rewards[judged, fixed.column]
    clusters = [key for key, used in zip(images, judged, strict=True) if used]
    advantage = paired_interval(earned, other, clusters)
    layer = policy.insert_layers[fixed.column]
    undecided = [policy.insert_layers[column] for column in fixed.undecided]
    told = (
        f"the {len(table)} prompts do not tell it from {named([x for x in undecided if x != layer])}"
        if len(undecided) > 1
        else "every other one earned less"
    )
    figures = f"{advantage.mean:+.4f}, 95 % interval {advantage.low:+.4f} to {advantage.high:+.4f}"
    doubts = [text for text in [caveat(fixed, policy.insert_layers, policy.num_layers)] if text]
    if (columns[judged] == fixed.column).all():
        beside = f"On {where} the policy chooses it for every prompt."
        doubts.append(f"choosing a layer for each prompt comes to the same as insert layer {layer} for all")
    elif advantage.low > 0 and len(set(clusters)) > 1:
        beside = f"On {where}, choosing a layer for each prompt earned more ({figures})."
        if len(set(clusters)) < FEW_IMAGES <= fixed.images:
            doubts.append(
                f"that choosing a layer for each prompt earns more rests on {len(set(clusters))} images, "
                "which says little"
            )
    else:
        beside = f"On {where}, choosing a layer for each prompt did not beat it ({figures})."
        doubts.append(
            f"choosing a layer for each prompt did not beat insert layer {layer} for all, so one fixed layer "
            "is as good"
        )
    return {
        "policy": mean_at(table, columns)
        | {
            "reward": rewards[rows, columns].mean(),
            "minus_fixed": {"reward": advantage.mean, "confidence_interval": finite(advantage)},
            "judged_on": {"prompts": int(judged.sum()), "images": len(set(clusters)), "of": where},
        },
        "verdict": f"Insert layer {layer} earned the most on average, and {told}. {beside}",
        "caveat": sentence(doubts),
    }


def nearest_candidate(insert_layers: Sequence[int], mean: float) -> int:
    """The candidate nearest to `mean`; the shallower of two equally near."""
    return min(insert_layers, key=lambda layer: (abs(layer - mean), layer))


def expected(policy: LayerPolicy, insert_layer: int, skip_weight: float) -> dict[str, float | None]:
    """Means over the policy's training prompts at one layer: loss in nats, FLOPs ratio, reward; and depth."""
    column = policy.insert_layers.index(insert_layer)
    ratios, rewards = policy.training.flops_ratio, policy.mean_rewards(skip_weight)
    return {
        "loss": policy.training.loss[column],
        "loss_increase": policy.training.loss_increase(policy.insert_layers, column),
        "flops_ratio": None if ratios is None else ratios[column],
        "reward": None if rewards is None else float(rewards[column]),
        "depth": insert_layer / policy.num_layers,
    }


def training_best(policy: LayerPolicy, skip_weight: float) -> dict[str, Any] | None:
    """The best fixed layer of the training prompts at λ; None where their bonus is not known."""
    rewards = policy.mean_rewards(skip_weight)
    if rewards is None:
        return None
    layer = policy.insert_layers[int(rewards.argmax())]
    return {"insert_layer": layer, **expected(policy, layer, skip_weight)}


def histogram(
    sources: Sequence[str], layers: NDArray[np.int64], insert_layers: Sequence[int]
) -> dict[str, dict[str, int]]:
    """For each source, how many prompts chose each candidate."""
    counts = Counter(zip(sources, layers.tolist(), strict=True))
    return {
        source: {str(layer): counts[source, layer] for layer in insert_layers}
        for source in sorted(set(sources))
    }


def per_prompt(prompt: Prompt, insert_layer: int, probability: float) -> dict[str, Any]:
    """One prompt's line in the result."""
    return {
        "id": prompt.id,
        "source": prompt.source,
        "insert_layer": insert_layer,
        "probability": probability,
    }


def policy_sentence(policy: LayerPolicy, skip_weight: float) -> str:
    """Whether asking per prompt was worth it on held-out prompts, at the skip weight it was judged at."""
    best, advantage = policy.training.best_fixed, policy.training.advantage
    if advantage is None:
        return "This policy was not judged on held-out prompts."
    figures = f"{advantage.mean:+.4f}, 95 % interval {advantage.low:+.4f} to {advantage.high:+.4f}"
    at = "" if skip_weight == policy.skip_weight else f" at skip weight {policy.skip_weight:g}"
    if advantage.low > 0:
        return (
            f"On held-out prompts{at}, choosing a layer for each prompt earned more than the best fixed "
            f"layer, {best} ({figures})."
        )
    return (
        f"On held-out prompts{at}, choosing a layer for each prompt did not beat the best fixed layer, "
        f"{best} ({figures}): one fixed layer is as good."
    )


def mean_sentence(policy: LayerPolicy, insert_layer: int, skip_weight: float) -> str:
    """Whether the training prompts would have chosen another layer than the mean's; empty if not."""
    rewards = policy.mean_rewards(skip_weight)
    if rewards is None:
        return ""
    column = int(rewards.argmax())
    if policy.insert_layers[column] == insert_layer:
        return ""
    lost = rewards[column] - rewards[policy.insert_layers.index(insert_layer)]
    return (
        f" On the training prompts insert layer {policy.insert_layers[column]} earned {lost:.4f} more on "
        f"average than {insert_layer}, the layer nearest to the policy's mean."
    )


def sentence(doubts: Sequence[str]) -> str | None:
    """One sentence of all that speaks against relying on the advice; None where nothing does."""
    if not doubts:
        return None
    text = "; ".join(doubts)
    return f"{text[0].upper()}{text[1:]}."


def finite(interval: Interval) -> list[float | None]:
    """The ends of `interval` for JSON, which knows no infinity: None stands for it."""
    return [end if np.isfinite(end) else None for end in (interval.low, interval.high)]
