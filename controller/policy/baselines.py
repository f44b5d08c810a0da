"""What a layer policy is judged by: the simple choices it has to beat, on prompts it has not seen.

All rewards are exact, since the reward table knows what every layer of every prompt would have earned.
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
"""A layer is deep enough for the supervised gate while its loss is at most this share above layer 0's."""
FEW_IMAGES = 20
NO_GAP = 1e-4
"""Nats between the best fixed layer and the oracle under which there is nothing to choose."""
PAPER_MEAN_DEPTH = 0.14
"""Mean depth of the paper's policy on LLaVA-1.5-7B (Appendix D)."""

FloatArray = NDArray[np.float64]
Columns = NDArray[np.int64]


def best_fixed_column(rewards: FloatArray) -> int:
    """Column of `rewards` (P, K) with the highest mean; the shallowest of equals."""
    return int(rewards.mean(axis=0).argmax())


def nearest_neighbour_columns(
    observations: ArrayLike, rewards: FloatArray, queries: ArrayLike, neighbours: int = NEIGHBOURS
) -> Columns:
    """For each of `queries` (Q, D), the column with the highest mean reward among the nearest prompts.

    `observations` (P, D) and `rewards` (P, K) are the training prompts'; at most `neighbours` of them vote.
    """
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=min(neighbours, len(rewards))).fit(np.asarray(observations))
    nearest = index.kneighbors(np.asarray(queries), return_distance=False)
    return rewards[nearest].mean(axis=1).argmax(axis=1)


def ridge_columns(observations: ArrayLike, rewards: FloatArray, queries: ArrayLike) -> Columns:
    """For each of `queries` (Q, D), the column whose reward a linear regression expects to be highest.

    Regresses what each layer of the training prompts earns beyond the prompt's mean, which no choice
    changes; leave-one-out errors choose the penalty.
    """
    from sklearn.linear_model import RidgeCV

    relative = rewards - rewards.mean(axis=1, keepdims=True)
    model = RidgeCV(alphas=RIDGE_PENALTIES).fit(np.asarray(observations, dtype=np.float64), relative)
    expected = model.predict(np.asarray(queries, dtype=np.float64))
    return expected.reshape(len(expected), -1).argmax(axis=1)


def gate_columns(observations: ArrayLike, losses: FloatArray, queries: ArrayLike) -> Columns:
    """For each of `queries` (Q, D), what a classifier trained by supervision takes for the deepest layer
    whose loss stays within 3 % of layer 0's (after DyVTE).

    `losses` (P, K) are the training prompts', in nats; their first column is the shallowest candidate, which
    stands for layer 0 where that is none. Knows nothing of the skip weight.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    kept = losses <= (1 + GATE_TOLERANCE) * losses[:, :1]
    deepest = losses.shape[1] - 1 - kept[:, ::-1].argmax(axis=1)
    if len(np.unique(deepest)) == 1:
        return np.full(len(np.asarray(queries)), deepest[0], dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a gate that is nearly there is a gate
        model = LogisticRegression(C=0.1, max_iter=300).fit(np.asarray(observations), deepest)
    return model.predict(np.asarray(queries)).astype(np.int64)


def simple_choices(
    observations: ArrayLike, rewards: FloatArray, losses: FloatArray, queries: ArrayLike
) -> dict[str, Columns]:
    """The columns that each simple method, fitted to the training prompts, chooses for `queries`."""
    return {
        "nearest_neighbours": nearest_neighbour_columns(observations, rewards, queries),
        "ridge": ridge_columns(observations, rewards, queries),
        "supervised_gate": gate_columns(observations, losses, queries),
    }


def judge(
    chosen: Mapping[int, Columns],
    simple: Mapping[str, Columns],
    train_rewards: FloatArray,
    rewards: FloatArray,
    insert_layers: Sequence[int],
    images: Sequence[Hashable],
) -> dict[str, Any]:
    """Policies beside the simple choices, on held-out prompts.

    `chosen` gives for each seed the columns (Q) of `rewards` (Q, K) that its policy chose, the saved policy's
    first, `simple` those of other methods; `train_rewards` (P, K) choose the best fixed layer; `images` (Q)
    cluster every bootstrap. Returns

    - `reward`: for each choice `reward`, its `regret` against the oracle and its `share_of_gap` of the way
      from the best fixed layer to the oracle (None where there is none), each with its 95 % interval;
    - `seeds`: the same for each seed's policy, and `pooled`, for the mean of all seeds of each prompt;
    - `difference`: the saved policy minus each other choice, paired;
    - `share_of_gap` and its `share_of_gap_interval`, of the saved policy, and a `verdict` on it.
    """
    rows = np.arange(len(rewards))
    fixed = best_fixed_column(train_rewards)
    oracle, best_fixed = rewards.max(axis=1), rewards[:, fixed]
    of_seed = {seed: rewards[rows, columns] for seed, columns in chosen.items()}
    saved = next(iter(chosen))
    others = {
        "best_fixed": best_fixed,
        "layer_0": rewards[:, list(insert_layers).index(0)] if 0 in insert_layers else None,
        **{name: rewards[rows, columns] for name, columns in simple.items()},
        "uniform": rewards.mean(axis=1),
    }

    def row(values: FloatArray) -> dict[str, Any]:
        return account(values, best_fixed, oracle, images)

    earned = {"policy": of_seed[saved], **others, "oracle": oracle}
    reward: dict[str, Any] = {
        name: None if values is None else row(values) for name, values in earned.items()
    }
    reward["best_fixed"]["insert_layer"] = insert_layers[fixed]
    advantage = paired_interval(of_seed[saved], best_fixed, images)
    return {
        "reward": reward,
        "seeds": {
            "saved": saved,
            "each": [{"seed": seed, **row(values)} for seed, values in of_seed.items()],
            "pooled": row(np.mean(list(of_seed.values()), axis=0)),
        },
        "difference": {
            f"policy_minus_{name}": described(paired_interval(of_seed[saved], values, images))
            for name, values in others.items()
            if values is not None
        },
        "share_of_gap": reward["policy"]["share_of_gap"],
        "share_of_gap_interval": reward["policy"]["share_of_gap_interval"],
        "verdict": verdict(
            advantage,
            insert_layers[fixed],
            bool((chosen[saved] == fixed).all()),
            len(set(images)),
            gap=float((oracle - best_fixed).mean()),
        ),
    }


def account(
    values: FloatArray, best_fixed: FloatArray, oracle: FloatArray, images: Sequence[Hashable]
) -> dict[str, Any]:
    """Reward, regret and share of the gap of a choice that earned `values` (Q), each with its interval."""
    regret = paired_interval(oracle, values, images)
    share = None
    if (oracle - best_fixed).mean() > NO_GAP:
        share = ratio_interval(values - best_fixed, oracle - best_fixed, images)
    return {
        **described(mean_interval(values, images)),
        "regret": regret.mean,
        "regret_interval": [regret.low, regret.high],
        "share_of_gap": None if share is None else share.mean,
        "share_of_gap_interval": None if share is None else [share.low, share.high],
    }


def verdict(
    advantage: Interval, best_fixed: int, always: bool, images: int, gap: float = float("inf")
) -> str:
    """One sentence on whether the policy (minus the best fixed layer: `advantage`) was worth it.

    `always` says that the policy chose that layer for every prompt; `images` counts the held-out images;
    `gap` is what the oracle earns beyond the best fixed layer, in nats.
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
            f"On held-out prompts the best fixed layer {best_fixed} is as good: the policy's reward cannot "
            f"be told from its ({figures})"
        )
    if gap <= NO_GAP:
        sentence += f"; not even an oracle would earn more than the fixed layer ({gap:+.4f} nats)"
    few = f"; with only {images} held-out images this says little" if images < FEW_IMAGES else ""
    return sentence + few + "."


def described(interval: Interval) -> dict[str, Any]:
    """`interval` as results write it."""
    return {"reward": interval.mean, "confidence_interval": [interval.low, interval.high]}
