"""The project's goals for measured times, and whether a measured row meets its goal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OVERHEAD = 1.01
"""Largest time ratio at insert layer 0."""
PREFILL_KEPT = 0.95
"""Smallest share of the possible saving that a prefill keeps."""
TRAINING_KEPT = 0.90
"""Smallest share of the possible saving that forward and backward of a training step keep."""
ROWS_OVER_IDEAL = 1.05
"""Largest time of rows with different layers, as a multiple of what the FLOPs allow."""


@dataclass(frozen=True)
class Verdict:
    """A goal in words, and whether it is `met`, `missed`, or lies `within noise`: inside the quartiles."""

    goal: str
    state: str


def verdict(case: str, part: str, row: Mapping[str, Any]) -> Verdict | None:
    """Compare one row of a cell with its goal; None if it has no goal."""
    goal = time_goal(case, part, row)
    if goal is None:
        return None
    largest_ratio, words = goal
    low, high = row["time_ratio_quartiles"]
    if row["time_ratio"] <= largest_ratio:
        return Verdict(words, "met")
    return Verdict(words, "within noise" if low <= largest_ratio <= high else "missed")


def time_goal(case: str, part: str, row: Mapping[str, Any]) -> tuple[float, str] | None:
    """Return the largest time ratio that meets the row's goal, and the goal in words; None without a goal."""
    layer, ideal = row["insert_layer"], row["ideal_ratio"]
    if layer is None or part == "step" or case in ("ragged", "mixed"):
        return None
    if case == "rows" and not isinstance(layer, int):
        return ROWS_OVER_IDEAL * ideal, "at most 5 % over the rows' mean ideal"
    if layer == 0:
        return OVERHEAD, "overhead at most 1 %"
    if part == "decode":
        return 1.0, "no slower than stock"
    least_share = TRAINING_KEPT if part == "forward_backward" else PREFILL_KEPT
    if row["saving_kept"] is None:
        return None
    return 1 - least_share * (1 - ideal), f"keeps at least {least_share:.0%}"
