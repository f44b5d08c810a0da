"""Compares one policy for a range of skip weights with policies trained for a single one each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepinsert.controller.learning.fitting import train_policy
from deepinsert.controller.policy.baselines import NO_GAP, best_fixed_column
from deepinsert.controller.statistics import Interval, paired_interval
from deepinsert.controller.tables import markdown_table
from deepinsert.envs.rewards.table import Bonus, RewardTable

DEFAULT_WEIGHTS = 5
"""The number of skip weights that are compared by default, both ends of the range included."""


def study(
    table: RewardTable,
    observations: ArrayLike,
    in_training: NDArray[np.bool_],
    *,
    skip_weights: tuple[float, float] = (0.0, 1.0),
    at: Sequence[float] | None = None,
    algorithm: str = "ppo",
    bonus: Bonus = "depth",
    steps: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare a policy for a range of skip weights with one policy per skip weight, on held-out prompts.

    Args:
        table: the rewards of P prompts.
        observations: their observations (P, D).
        in_training: the mask (P) of the training prompts; the policies are compared on the others.
        skip_weights: the range of the first policy.
        at: the skip weights λ of the comparison; by default five over the range, its ends included.
        algorithm: the algorithm of all policies.
        bonus: the skip bonus.
        steps: the number of training steps; by default that of the algorithm.
        seed: the seed of all policies.

    Returns:
        `rows`, one per skip weight, each with `skip_weight`; the mean rewards `range`, `single`, `best_fixed`
        and `oracle`; `relative`, the reward of the range policy minus that of the single one, as a share of
        the size of the latter; and `interval`, that of the difference in nats, clustered by image. Further
        `least`, the lowest `relative`; `algorithm`; and `markdown`, the rows as a table.
    """
    low, high = skip_weights
    values = np.asarray(observations)
    training_table = table.subset(in_training)
    images = [key for key, training in zip(table.image_keys, in_training, strict=True) if not training]
    options: dict[str, Any] = dict(algorithm=algorithm, bonus=bonus, steps=steps, seed=seed)
    range_policy = train_policy(
        training_table, values[in_training], skip_weight=high, skip_weights=skip_weights, **options
    )
    rows = []
    for weight in np.linspace(low, high, DEFAULT_WEIGHTS).tolist() if at is None else at:
        single_policy = train_policy(training_table, values[in_training], skip_weight=weight, **options)
        rewards = table.rewards(weight, bonus)
        held_out = rewards[~in_training]
        prompts = np.arange(len(held_out))
        range_rewards = held_out[prompts, range_policy.columns(values[~in_training], weight)]
        single_rewards = held_out[prompts, single_policy.columns(values[~in_training])]
        rows.append(
            _row(
                weight,
                paired_interval(range_rewards, single_rewards, images),
                range=range_rewards.mean(),
                single=single_rewards.mean(),
                best_fixed=held_out[:, best_fixed_column(rewards[in_training])].mean(),
                oracle=held_out.max(axis=1).mean(),
            )
        )
    least = min(row["relative"] for row in rows)
    return {"rows": rows, "least": least, "algorithm": algorithm, "markdown": markdown(rows)}


def _row(weight: float, difference: Interval, **means: np.floating[Any]) -> dict[str, Any]:
    return {
        "skip_weight": float(weight),
        **{name: float(mean) for name, mean in means.items()},
        "relative": difference.mean / max(abs(float(means["single"])), NO_GAP),
        "interval": [difference.low, difference.high],
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Render the rows of a study as a Markdown table."""
    headings = ["λ", "one policy for the range", "trained for this λ", "best fixed", "oracle", "difference"]
    lines = []
    for row in rows:
        low, high = row["interval"]
        means = [f"{row[name]:.4f}" for name in ("range", "single", "best_fixed", "oracle")]
        difference = f"{row['relative']:+.1%} ({low:+.4f} to {high:+.4f} nats)"
        lines.append([f"{row['skip_weight']:g}", *means, difference])
    return markdown_table(headings, lines, compact_rule=True) + "\n"
