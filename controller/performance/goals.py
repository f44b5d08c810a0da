"""What the project sets out to reach, and how a measured row stands to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OVERHEAD = 1.01
PREFILL_KEPT = 0.95
TRAINING_KEPT = 0.90
ROWS_OVER_IDEAL = 1.05


@dataclass(frozen=True)
class Verdict:
    """A goal in words, and whether it was `met`, `missed`, or lies `within noise`: inside the quartiles."""

    goal: str
    state: str


def verdict(case: str, part: str, row: Mapping[str, Any]) -> Verdict | None:
    """How one row of a cell stands to its goal; None where there is none."""
    found = most_time(case, part, row)
    if found is None:
        return None
    most, words = found
    low, high = row["time_ratio_quartiles"]
    if row["time_ratio"] <= most:
        return Verdict(words, "met")
    return Verdict(words, "within noise" if low <= most <= high else "missed")


def most_time(case: str, part: str, row: Mapping[str, Any]) -> tuple[float, str] | None:
    """The largest time ratio that meets the row's goal, and the goal in words."""
    layer, ideal = row["insert_layer"], row["ideal_ratio"]
    if layer is None or part == "step" or case in ("ragged", "mixed"):
        return None
    if case == "rows" and not isinstance(layer, int):
        return ROWS_OVER_IDEAL * ideal, "at most 5 % over the rows' mean ideal"
    if layer == 0:
        return OVERHEAD, "overhead at most 1 %"
    if part == "decode":
        return 1.0, "no slower than stock"
    kept = TRAINING_KEPT if part == "forward_backward" else PREFILL_KEPT
    if row["saving_kept"] is None:
        return None
    return 1 - kept * (1 - ideal), f"keeps at least {kept:.0%}"
