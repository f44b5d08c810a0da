"""What a policy trades at each skip weight, and the skip weight that meets a budget.

A policy trained over a range of skip weights is a curve from low loss to few FLOPs. Users ask for a point of
it by a compute budget or by a tolerated loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .outcomes import FrontierPoint
from .table_means import frontier_point, mean_at

if TYPE_CHECKING:
    from deepinsert.envs.rewards.table import Bonus, RewardTable
    from deepinsert.envs.skip_weights import SkipWeights

POINTS = 13
ORACLE_POINTS = 33

Columns = NDArray[np.int64]
Chooser = Callable[[float], Columns]
"""Returns the column (P) that a policy chooses for each prompt of a table at a skip weight."""


def measure_frontier(
    table: RewardTable, choose: Chooser, skip_weights: SkipWeights, bonus: Bonus
) -> tuple[FrontierPoint, ...]:
    """Return a policy's mean loss, FLOPs and reward on `table` at a grid over `skip_weights`.

    Prompts held out from training show what to expect of other prompts. One skip weight gives one point.
    """
    return tuple(
        frontier_point(table, choose(weight), weight, bonus)
        for weight in skip_weight_grid(skip_weights.low, skip_weights.high)
    )


def skip_weight_grid(low: float, high: float, points: int = POINTS) -> list[float]:
    """Return `points` skip weights from `low` to `high`; one if they are equal.

    The grid is denser at small weights, where a small increase changes the chosen layers most.
    """
    if low == high:
        return [float(low)]
    steps = np.linspace(0, 1, points) ** 2
    return [*(low + (high - low) * steps[:-1]).tolist(), float(high)]


def check_candidates(table: RewardTable, insert_layers: Sequence[int], num_layers: int) -> None:
    """Raise `ValueError` unless the candidates of `table` are a policy's `insert_layers` of `num_layers`."""
    if tuple(table.insert_layers) != tuple(insert_layers) or table.num_layers != num_layers:
        raise ValueError(
            f"the table holds insert layers {list(table.insert_layers)} of {table.num_layers}, the policy "
            f"chooses among {list(insert_layers)} of {num_layers}: give a table of these"
        )


def skip_weight_for_flops(points: Sequence[FrontierPoint], flops_ratio: float) -> float:
    """Return the smallest skip weight whose mean FLOPs ratio is at most `flops_ratio`.

    Raises:
        ValueError: if the budget is not in (0, 1], if no point meets it, or if FLOPs are unknown.
    """
    if not 0 < flops_ratio <= 1:
        raise ValueError(f"flops_ratio {flops_ratio!r}: give a ratio above 0 and at most 1, such as 0.75")
    ratios = [(point.skip_weight, point.flops_ratio) for point in points if point.flops_ratio is not None]
    if not ratios:
        raise ValueError("flops_ratio: this policy was trained without FLOPs; ask by skip weight instead")
    weights = [weight for weight, ratio in ratios if ratio <= flops_ratio]
    if not weights:
        weight, ratio = min(ratios, key=lambda pair: (pair[1], pair[0]))
        raise ValueError(
            f"flops_ratio {flops_ratio!r}: the least this policy reaches is {ratio:.4f}, at skip weight "
            f"{weight:g}; ask for that, or train over a range that goes further"
        )
    return min(weights)


def skip_weight_for_loss(points: Sequence[FrontierPoint], max_loss_increase: float) -> float:
    """Return the largest skip weight whose mean loss is at most `max_loss_increase` nats above layer 0's.

    Raises:
        ValueError: if the tolerance is negative or not finite, if no point meets it, or if the loss at insert
            layer 0 is unknown.
    """
    if not (np.isfinite(max_loss_increase) and max_loss_increase >= 0):
        raise ValueError(f"max_loss_increase {max_loss_increase!r}: give nats of at least 0, such as 0.02")
    increases = [
        (point.skip_weight, point.loss_increase) for point in points if point.loss_increase is not None
    ]
    if not increases:
        raise ValueError(
            "max_loss_increase: insert layer 0 is no candidate of this policy; ask by skip weight instead"
        )
    weights = [weight for weight, increase in increases if increase <= max_loss_increase]
    if not weights:
        weight, increase = min(increases, key=lambda pair: (pair[1], pair[0]))
        raise ValueError(
            f"max_loss_increase {max_loss_increase!r}: the least this policy reaches is {increase:.4f} nats, "
            f"at skip weight {weight:g}; ask for that, or train over a range that begins lower"
        )
    return max(weights)


def pareto_curves(
    table: RewardTable,
    choose: Chooser,
    skip_weights: SkipWeights,
    bonus: Bonus,
    *,
    fixed_skip_weight: float,
    skip_weight: float | None = None,
) -> dict[str, Any] | None:
    """Return loss, accuracy and FLOPs ratio of a policy, of every fixed layer and of the oracle.

    The oracle chooses each prompt's best layer, at skip weights from 0 to far beyond the policy's.

    Args:
        table: P prompts, usually held out from training.
        choose: the policy's choices on them.
        skip_weights: the policy's range, over which a grid is measured.
        bonus: the policy's kind of skip bonus.
        fixed_skip_weight: λ in the reward of the fixed layers.
        skip_weight: one more λ at which the policy is measured.

    Returns:
        `prompts` (P) and the curves `policy`, `fixed` and `oracle`, each a list of means over the prompts;
        `accuracy` is None if it is not known. None if the table does not contain FLOPs.
    """
    if table.known_flops_ratio is None:
        return None
    weights = set(skip_weight_grid(skip_weights.low, skip_weights.high))
    weights |= set() if skip_weight is None else {float(skip_weight)}
    oracle_weights = skip_weight_grid(0.0, 4 * max(skip_weights.high, 0.25), ORACLE_POINTS)
    return {
        "prompts": len(table),
        "policy": [_curve_point(table, choose(weight), weight, bonus) for weight in sorted(weights)],
        "fixed": [
            _fixed_point(table, column, fixed_skip_weight, bonus)
            for column in range(len(table.insert_layers))
        ],
        "oracle": [
            _curve_point(table, table.rewards(weight, bonus).argmax(axis=1), weight, bonus)
            for weight in oracle_weights
        ],
    }


def _curve_point(table: RewardTable, columns: Columns, skip_weight: float, bonus: Bonus) -> dict[str, Any]:
    point = asdict(frontier_point(table, columns, skip_weight, bonus))
    return point | {"accuracy": mean_at(table, columns)["accuracy"]}


def _fixed_point(table: RewardTable, column: int, skip_weight: float, bonus: Bonus) -> dict[str, Any]:
    point = _curve_point(table, np.full(len(table), column), skip_weight, bonus)
    del point["skip_weight"]
    return {"insert_layer": table.insert_layers[column], **point}
