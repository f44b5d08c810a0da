"""Table 1 of results written by hand: its columns, averages and errors."""

from pathlib import Path
from typing import Any

import pytest

from deepinsert.controller.evaluation.evaluation_pictures import figure1
from deepinsert.controller.evaluation.table1 import markdown, table1

MACHINE = {"cpu": "a processor", "cores": 2, "ram_gib": 8.0, "gpu": None}


def variant(name: str, score: float, **fields: Any) -> dict[str, Any]:
    layer = fields.pop("insert_layer", 0)
    return {
        "name": name,
        "path": None,
        "insert_layer": layer,
        "num_layers": 8,
        "score": score,
        "score_interval": [score - 1, score + 1],
        "score_difference_interval": [0.0, 0.0],
        "unit": "F1",
        "significance": None,
        "prefill_ms": 100.0 - 10 * (layer or 0),
        "time_ratio": 1 - 0.1 * (layer or 0),
        "decode_time_ratio": 1.0,
        "flops_ratio": 1 - 0.12 * (layer or 0),
        "kv_cache_bytes": 1000 - 110 * (layer or 0),
        "batch_size": 4,
        **fields,
    }


def result(name: str, *variants: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "benchmark": {"name": name},
        "variants": list(variants),
        "baseline": variants[0]["name"],
        "prompts": 50,
        "run": "run",
        "timing": {"machine": MACHINE},
        **fields,
    }


POPE = result(
    "pope",
    variant("base", 86.0),
    variant("four", 80.0, insert_layer=4, significance={"p_value": 0.01}),
    variant("six", 85.0, insert_layer=6, score_difference_interval=[-2.0, -0.5]),
)


def test_a_row_holds_scores_average_and_costs() -> None:
    table = table1([POPE, result("gqa", *(variant(row["name"], 60.0) for row in POPE["variants"][:1]))])
    assert [column["name"] for column in table["columns"]] == ["pope", "gqa"]
    base, four, six = table["rows"]
    assert base["average"] == 73.0 and four["average"] is None and four["scores"][1] is None
    assert [row["scores"][0]["significant"] for row in table["rows"]] == [False, True, True]
    assert four["scores"][0]["p_value"] == 0.01 and six["scores"][0]["p_value"] is None
    assert four["time_ratio"] == pytest.approx(0.6) and four["kv_cache_ratio"] == pytest.approx(0.56)
    text = markdown(table).splitlines()
    assert text[0].startswith("| variant | insert layer | pope (F1) | gqa (F1) | average | prefill (ms) |")
    assert text[2] == "| base | 0 | 86.0 | 60.0 | 73.0 | 100.0 | 1.000 | 1.000 | 1.000 |"
    assert text[3] == "| four | 4 | 80.0* | - | - | 60.0 | 0.600 | 0.520 | 0.560 |"


def test_mme_is_shown_and_not_averaged() -> None:
    points = [variant(row["name"], 1500.0, unit="perception score") for row in POPE["variants"][:1]]
    table = table1([result("pope", *POPE["variants"][:1]), result("mme", *points)])
    assert table["rows"][0]["average"] == 86.0 and table["rows"][0]["scores"][1]["score"] == 1500.0
    assert [column["averaged"] for column in table["columns"]] == [True, False]
    alone = table1([result("mme", *points)])
    assert alone["rows"][0]["average"] == 1500.0, "a single benchmark's average is its score"


def test_figure_1_shows_policies_too_and_may_be_empty(tmp_path: Path) -> None:
    chosen = variant("policy", 84.0, insert_layer=None, mean_insert_layer=2.5, skip_weight=0.5)
    table = table1([result("pope", *POPE["variants"], chosen)])
    assert table["rows"][-1]["kind"] == "policy" and "mean 2.50" in markdown(table)
    figure1(table, tmp_path / "some.png")
    figure1({**table, "rows": []}, tmp_path / "none.png")
    assert (tmp_path / "some.png").stat().st_size > (tmp_path / "none.png").stat().st_size


def test_results_of_different_variants_are_refused() -> None:
    other = result("gqa", variant("four", 1.0, insert_layer=4), variant("base", 2.0))
    with pytest.raises(ValueError, match=r"different baselines \(base, four\)"):
        table1([POPE, other])
    with pytest.raises(ValueError, match="variant 'four' has insert layers"):
        table1([POPE, result("gqa", variant("base", 1.0), variant("four", 1.0, insert_layer=3))])
