"""The baselines that a layer policy has to beat, and its comparison with them on held-out prompts.

All rewards are exact, since the reward table contains the loss of every layer of every prompt.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepinsert.controller.statistics import Interval, mean_interval, paired_interval, ratio_interval

NEIGHBOURS = 15
RIDGE_PENALTIES = np.logspace(0, 6, 13)
GATE_TOLERANCE = 0.03
"""The supervised gate accepts layers whose loss is at most this share above layer 0's."""
FEW_IMAGES = 20
"""A comparison on fewer images is reported as weak."""
NO_GAP = 1e-4
"""Below this gap in nats between best fixed layer and oracle, the layers are treated as equally good."""
PAPER_MEAN_DEPTH = 0.14
"""Mean depth of the paper's policy on LLaVA-1.5-7B (Appendix D)."""

FloatArray = NDArray[np.float64]
Columns = NDArray[np.int64]


def best_fixed_column(rewards: FloatArray) -> int:
    """Return the column of `rewards` (P, K) with the highest mean; of equal ones the shallowest."""
    return int(rewards.mean(axis=0).argmax())


def nearest_neighbour_columns(
    observations: ArrayLike, rewards: FloatArray, queries: ArrayLike, neighbours: int = NEIGHBOURS
) -> Columns:
    """Choose for each of `queries` (Q, D) the column with the highest mean reward of the nearest prompts.

    Args:
        observations: the training prompts' observations (P, D).
        rewards: their rewards (P, K).
        queries: the observations to choose for.
        neighbours: the number of nearest training prompts, at most P of them.

    Returns:
        The columns (Q).
    """
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=min(neighbours, len(rewards))).fit(np.asarray(observations))
    nearest = index.kneighbors(np.asarray(queries), return_distance=False)
    columns: Columns = rewards[nearest].mean(axis=1).argmax(axis=1)
    return columns


def ridge_columns(observations: ArrayLike, rewards: FloatArray, queries: ArrayLike) -> Columns:
    """Choose for each of `queries` (Q, D) the column with the highest reward predicted by ridge regression.

    The target is each layer's reward minus the prompt's mean reward, on the training prompts' `observations`
    (P, D) and `rewards` (P, K). Leave-one-out errors choose the penalty.
    """
    from sklearn.linear_model import RidgeCV

    relative = rewards - rewards.mean(axis=1, keepdims=True)
    model = RidgeCV(alphas=RIDGE_PENALTIES).fit(np.asarray(observations, dtype=np.float64), relative)
    expected = model.predict(np.asarray(queries, dtype=np.float64))
    columns: Columns = expected.reshape(len(expected), -1).argmax(axis=1)
    return columns


def gate_columns(observations: ArrayLike, losses: FloatArray, queries: ArrayLike) -> Columns:
    """Predict for each of `queries` (Q, D) the deepest layer whose loss is within 3 % of layer 0's.

    A supervised classifier predicts it, as in DyVTE; the skip weight has no influence. `observations` (P, D)
    and `losses` (P, K, nats) are the training prompts'. The first column of `losses`, the shallowest
    candidate, replaces layer 0 if that is no candidate.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    acceptable = losses <= (1 + GATE_TOLERANCE) * losses[:, :1]
    deepest = losses.shape[1] - 1 - acceptable[:, ::-1].argmax(axis=1)
    if len(np.unique(deepest)) == 1:
        return np.full(len(np.asarray(queries)), deepest[0], dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # an unconverged fit is good enough here
        model = LogisticRegression(C=0.1, max_iter=300).fit(np.asarray(observations), deepest)
    columns: Columns = model.predict(np.asarray(queries)).astype(np.int64)
    return columns


def baseline_columns(
    observations: ArrayLike, rewards: FloatArray, losses: FloatArray, queries: ArrayLike
) -> dict[str, Columns]:
    """Return the columns (Q) that each fitted baseline chooses for `queries` (Q, D).

    Args:
        observations: the training prompts' observations (P, D).
        rewards: their rewards (P, K).
        losses: their losses (P, K) in nats.
        queries: the held-out prompts' observations.
    """
    return {
        "nearest_neighbours": nearest_neighbour_columns(observations, rewards, queries),
        "ridge": ridge_columns(observations, rewards, queries),
        "supervised_gate": gate_columns(observations, losses, queries),
    }


def compare_with_baselines(
    columns_by_seed: Mapping[int, Columns],
    baselines: Mapping[str, Columns],
    train_rewards: FloatArray,
    rewards: FloatArray,
    insert_layers: Sequence[int],
    images: Sequence[Hashable],
) -> dict[str, Any]:
    """Compare policies with baselines on Q held-out prompts.

    Args:
        columns_by_seed: the columns (Q) of `rewards` that each seed's policy chose; the first is the policy
            that is saved.
        baselines: the columns (Q) that each fitted baseline chose.
        train_rewards: the training prompts' rewards (P, K), which decide the best fixed layer.
        rewards: the held-out prompts' rewards (Q, K).
        insert_layers: the candidates (K).
        images: the image of each held-out prompt (Q), the clusters of every bootstrap.

    Returns:
        `reward`: per choice its `reward`, its `regret` against the oracle, and its `share_of_gap` between
        best fixed layer and oracle (None if there is no gap), each with its 95 % interval. `seeds`: the same
        per seed's policy and, as `pooled`, for the mean of all seeds per prompt. `difference`: the saved
        policy minus each other choice, paired. `share_of_gap`, `share_of_gap_interval` and `verdict` of the
        saved policy.
    """
    rows = np.arange(len(rewards))
    fixed = best_fixed_column(train_rewards)
    best_fixed, oracle = rewards[:, fixed], rewards.max(axis=1)
    rewards_by_seed = {seed: rewards[rows, columns] for seed, columns in columns_by_seed.items()}
    saved_seed = next(iter(columns_by_seed))
    saved = rewards_by_seed[saved_seed]
    others = {
        "best_fixed": best_fixed,
        "layer_0": rewards[:, list(insert_layers).index(0)] if 0 in insert_layers else None,
        **{name: rewards[rows, columns] for name, columns in baselines.items()},
        "uniform": rewards.mean(axis=1),
    }
    reward = _describe_choices({"policy": saved, **others, "oracle": oracle}, best_fixed, oracle, images)
    reward["best_fixed"]["insert_layer"] = insert_layers[fixed]
    return {
        "reward": reward,
        "seeds": _describe_seeds(rewards_by_seed, best_fixed, oracle, images),
        "difference": {
            f"policy_minus_{name}": interval_fields(paired_interval(saved, values, images))
            for name, values in others.items()
            if values is not None
        },
        "share_of_gap": reward["policy"]["share_of_gap"],
        "share_of_gap_interval": reward["policy"]["share_of_gap_interval"],
        "verdict": verdict(
            paired_interval(saved, best_fixed, images),
            insert_layers[fixed],
            always=bool((columns_by_seed[saved_seed] == fixed).all()),
            images=len(set(images)),
            gap=float((oracle - best_fixed).mean()),
        ),
    }


def _describe_choices(
    choices: Mapping[str, FloatArray | None],
    best_fixed: FloatArray,
    oracle: FloatArray,
    images: Sequence[Hashable],
) -> dict[str, Any]:
    return {
        name: None if values is None else describe_choice(values, best_fixed, oracle, images)
        for name, values in choices.items()
    }


def _describe_seeds(
    rewards_by_seed: Mapping[int, FloatArray],
    best_fixed: FloatArray,
    oracle: FloatArray,
    images: Sequence[Hashable],
) -> dict[str, Any]:
    pooled = np.mean(list(rewards_by_seed.values()), axis=0)
    return {
        "saved": next(iter(rewards_by_seed)),
        "each": [
            {"seed": seed, **describe_choice(values, best_fixed, oracle, images)}
            for seed, values in rewards_by_seed.items()
        ],
        "pooled": describe_choice(pooled, best_fixed, oracle, images),
    }


def describe_choice(
    values: FloatArray, best_fixed: FloatArray, oracle: FloatArray, images: Sequence[Hashable]
) -> dict[str, Any]:
    """Return reward, regret and share of the gap of one way to choose, each with its 95 % interval.

    Args:
        values: the rewards (Q) of its choices.
        best_fixed: the rewards (Q) of the best fixed layer.
        oracle: the rewards (Q) of each prompt's best layer.
        images: the image of each prompt (Q).
    """
    regret = paired_interval(oracle, values, images)
    share = None
    if (oracle - best_fixed).mean() > NO_GAP:
        share = ratio_interval(values - best_fixed, oracle - best_fixed, images)
    return {
        **interval_fields(mean_interval(values, images)),
        "regret": regret.mean,
        "regret_interval": [regret.low, regret.high],
        "share_of_gap": None if share is None else share.mean,
        "share_of_gap_interval": None if share is None else [share.low, share.high],
    }


def verdict(
    advantage: Interval, best_fixed: int, *, always: bool, images: int, gap: float = float("inf")
) -> str:
    """Return one sentence on whether the policy is better than the best fixed layer.

    Args:
        advantage: the policy's reward minus that of the best fixed layer, in nats.
        best_fixed: the best fixed layer.
        always: whether the policy chose that layer for every prompt.
        images: the number of held-out images.
        gap: the oracle's mean reward minus that of the best fixed layer, in nats.
    """
    figures = f"{advantage.mean:+.4f}, 95 % interval {advantage.low:+.4f} to {advantage.high:+.4f}"
    if always:
        sentence = (
            f"The policy chooses insert layer {best_fixed}, the best fixed layer, for every held-out prompt"
        )
    elif advantage.low > 0:
        sentence = (
            f"On held-out prompts the policy earns more than the best fixed layer {best_fixed} ({figures})"
        )
    elif advantage.high < 0:
        sentence = (
            f"On held-out prompts the policy earns less than the best fixed layer {best_fixed} ({figures}): "
            "use the fixed layer"
        )
    else:
        sentence = (
            f"On held-out prompts the best fixed layer {best_fixed} is as good: the policy's reward does not "
            f"differ significantly from its reward ({figures})"
        )
    if gap <= NO_GAP:
        sentence += f"; not even an oracle would earn more than the fixed layer ({gap:+.4f} nats)"
    few = f"; with only {images} held-out images this says little" if images < FEW_IMAGES else ""
    return sentence + few + "."


def interval_fields(interval: Interval) -> dict[str, Any]:
    """Return a reward's `interval` with the keys of `result.json`."""
    return {"reward": interval.mean, "confidence_interval": [interval.low, interval.high]}
