"""What a policy gives up and saves at each skip weight, and the skip weight that meets a wish.

A policy trained over a range of skip weights is a curve: less loss or fewer FLOPs. Users ask for a point of
it by a compute budget or by a tolerated loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from deepinsert.envs.rewards.table import Bonus, RewardTable

    from .layer_policy import LayerPolicy

POINTS = 13
ORACLE_POINTS = 33

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class FrontierPoint:
    """A policy at one skip weight: means over prompts at the layers it chooses.

    `loss` and `reward` are in nats; `loss_increase` is against insert layer 0 (None where that is no
    candidate), `flops_ratio` the prefill FLOPs against it (None where the table did not know them).
    """

    skip_weight: float
    loss: float
    loss_increase: float | None
    flops_ratio: float | None
    reward: float


def frontier(policy: LayerPolicy, table: RewardTable, observations: ArrayLike) -> tuple[FrontierPoint, ...]:
    """The policy at a grid over its skip weights, on the P prompts of `table` seen as `observations` (P, D).

    Prompts held out from training show what to expect of others. A policy for one skip weight gives one
    point. Raises `ValueError` for a table of other candidates than the policy's.
    """
    check_candidates(policy, table)
    return tuple(
        point(table, policy.columns(observations, weight), weight, policy.bonus)
        for weight in grid(policy.skip_weights.low, policy.skip_weights.high)
    )


def grid(low: float, high: float, points: int = POINTS) -> list[float]:
    """`points` skip weights from `low` to `high`, denser where they are small: there a little more buys the
    most layers."""
    if low == high:
        return [float(low)]
    steps = np.linspace(0, 1, points) ** 2
    return [*(low + (high - low) * steps[:-1]).tolist(), float(high)]


def point(table: RewardTable, columns: NDArray[np.int64], skip_weight: float, bonus: Bonus) -> FrontierPoint:
    """What choosing `columns` (P) gives on `table` at `skip_weight`."""
    rows = np.arange(len(table))
    loss = float(table.losses[rows, columns].mean())
    stock = stock_loss(table)
    ratios = flops_ratios(table)
    rewards = table.rewards(skip_weight, bonus)
    return FrontierPoint(
        skip_weight=float(skip_weight),
        loss=loss,
        loss_increase=None if stock is None else loss - stock,
        flops_ratio=None if ratios is None else float(ratios[rows, columns].mean()),
        reward=float(rewards[rows, columns].mean()),
    )


def stock_loss(table: RewardTable) -> float | None:
    """Mean loss at insert layer 0; None where it is no candidate."""
    return float(table.losses[:, 0].mean()) if table.insert_layers[0] == 0 else None


def flops_ratios(table: RewardTable) -> FloatArray | None:
    """The table's FLOPs ratios (P, K); None where it does not know them."""
    try:
        return table.flops_ratio
    except LookupError:
        return None


def check_candidates(policy: LayerPolicy, table: RewardTable) -> None:
    """Raise `ValueError` where `table` is not about the policy's candidates."""
    if tuple(table.insert_layers) != policy.insert_layers or table.num_layers != policy.num_layers:
        raise ValueError(
            f"the table holds insert layers {list(table.insert_layers)} of {table.num_layers}, the policy "
            f"chooses among {list(policy.insert_layers)} of {policy.num_layers}: give a table of these"
        )


def skip_weight_for_flops(points: Sequence[FrontierPoint], flops_ratio: float) -> float:
    """The smallest skip weight whose mean FLOPs ratio is at most `flops_ratio`.

    Raises `ValueError` for a budget that is no ratio, that no point reaches, or where FLOPs are unknown.
    """
    if not 0 < flops_ratio <= 1:
        raise ValueError(f"flops_ratio {flops_ratio!r}: give a ratio above 0 and at most 1, such as 0.75")
    known = [(item.skip_weight, item.flops_ratio) for item in points if item.flops_ratio is not None]
    if not known:
        raise ValueError("flops_ratio: this policy was trained without FLOPs; ask by skip weight instead")
    reached = [weight for weight, ratio in known if ratio <= flops_ratio]
    if not reached:
        weight, ratio = min(known, key=lambda pair: (pair[1], pair[0]))
        raise ValueError(
            f"flops_ratio {flops_ratio!r}: the least this policy reaches is {ratio:.4f}, at skip weight "
            f"{weight:g}; ask for that, or train over a range that goes further"
        )
    return min(reached)


def skip_weight_for_loss(points: Sequence[FrontierPoint], max_loss_increase: float) -> float:
    """The largest skip weight whose mean loss is at most `max_loss_increase` nats above insert layer 0's.

    Raises `ValueError` for a number that is not finite or negative, that no point keeps to, or where the
    loss at insert layer 0 is unknown.
    """
    if not (np.isfinite(max_loss_increase) and max_loss_increase >= 0):
        raise ValueError(f"max_loss_increase {max_loss_increase!r}: give nats of at least 0, such as 0.02")
    known = [(item.skip_weight, item.loss_increase) for item in points if item.loss_increase is not None]
    if not known:
        raise ValueError(
            "max_loss_increase: insert layer 0 is no candidate of this policy; ask by skip weight instead"
        )
    kept = [weight for weight, increase in known if increase <= max_loss_increase]
    if not kept:
        weight, increase = min(known, key=lambda pair: (pair[1], pair[0]))
        raise ValueError(
            f"max_loss_increase {max_loss_increase!r}: the least this policy reaches is {increase:.4f} nats, "
            f"at skip weight {weight:g}; ask for that, or train over a range that begins lower"
        )
    return max(kept)


def pareto(
    policy: LayerPolicy, table: RewardTable, observations: ArrayLike, skip_weight: float | None = None
) -> dict[str, Any] | None:
    """Loss, accuracy where it is known, and FLOPs ratio: of the policy at a grid over its skip weights and at
    `skip_weight`, of every fixed layer, and of the oracle, which chooses each prompt's best layer, from no
    skip weight to far beyond the policy's. Means over the P prompts of `table`; None where it does not know
    their FLOPs.
    """
    check_candidates(policy, table)
    if flops_ratios(table) is None:
        return None
    rows = np.arange(len(table))
    correct = known_correct(table)

    def describe(columns: NDArray[np.int64], skip_weight: float) -> dict[str, Any]:
        found = asdict(point(table, columns, skip_weight, policy.bonus))
        found["accuracy"] = None if correct is None else float(correct[rows, columns].mean())
        return found

    weights, asked = policy.skip_weights, [] if skip_weight is None else [float(skip_weight)]
    fixed = []
    for column, layer in enumerate(policy.insert_layers):
        found = describe(np.full(len(table), column), policy.skip_weight)
        fixed.append({"insert_layer": layer} | {name: found[name] for name in found if name != "skip_weight"})
    return {
        "prompts": len(table),
        "policy": [
            describe(policy.columns(observations, weight), weight)
            for weight in sorted({*grid(weights.low, weights.high), *asked})
        ],
        "fixed": fixed,
        "oracle": [
            describe(table.rewards(weight, policy.bonus).argmax(axis=1), weight)
            for weight in grid(0.0, 4 * max(weights.high, 0.25), ORACLE_POINTS)
        ],
    }


def known_correct(table: RewardTable) -> FloatArray | None:
    """Whether each answer is right (P, K), 1 or 0; None unless all of it is known."""
    return None if np.isnan(table.correct).any() else table.correct
