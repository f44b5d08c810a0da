"""Whether one policy for a range of skip weights is as good as policies trained for one of them each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepinsert.controller.learning.fitting import train_policy
from deepinsert.controller.policy.baselines import NO_GAP, best_fixed_column
from deepinsert.controller.statistics import Interval, paired_interval
from deepinsert.envs.rewards.table import Bonus, RewardTable


def study(
    table: RewardTable,
    observations: ArrayLike,
    train: NDArray[np.bool_],
    *,
    skip_weights: tuple[float, float] = (0.0, 1.0),
    at: Sequence[float] | None = None,
    algorithm: str = "ppo",
    bonus: Bonus = "depth",
    steps: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """One policy over `skip_weights` beside one policy for each λ of `at`, by default five, ends included.

    All are trained on the prompts of `table` (P), seen as `observations` (P, D), where the mask `train` is
    True, and judged where it is False. Returns `rows`, each with `skip_weight`; the mean rewards `range`,
    `single`, `best_fixed` and `oracle`; `relative`, the range policy's reward minus the single one's as a
    share of the latter's size, with the `interval` of the difference in nats, clustered by image; `least`,
    the lowest `relative`; and `markdown`, the rows as a table.
    """
    low, high = skip_weights
    values = np.asarray(observations)
    seen = table.subset(train)
    images = [key for key, used in zip(table.image_keys, train, strict=True) if not used]
    options: dict[str, Any] = dict(algorithm=algorithm, bonus=bonus, steps=steps, seed=seed)
    policy = train_policy(seen, values[train], skip_weight=high, skip_weights=skip_weights, **options)
    rows = []
    for weight in np.linspace(low, high, 5).tolist() if at is None else at:
        alone = train_policy(seen, values[train], skip_weight=weight, **options)
        rewards = table.rewards(weight, bonus)
        held_out = rewards[~train]
        prompts = np.arange(len(held_out))
        earned = held_out[prompts, policy.columns(values[~train], weight)]
        alone_earned = held_out[prompts, alone.columns(values[~train])]
        rows.append(
            _row(
                weight,
                paired_interval(earned, alone_earned, images),
                range=earned.mean(),
                single=alone_earned.mean(),
                best_fixed=held_out[:, best_fixed_column(rewards[train])].mean(),
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
    """The rows of a study as a Markdown table."""
    lines = [
        "| λ | one policy for the range | trained for this λ | best fixed | oracle | difference |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["interval"]
        lines.append(
            f"| {row['skip_weight']:g} | {row['range']:.4f} | {row['single']:.4f} | "
            f"{row['best_fixed']:.4f} | {row['oracle']:.4f} | "
            f"{row['relative']:+.1%} ({low:+.4f} to {high:+.4f} nats) |"
        )
    return "\n".join([*lines, ""])
