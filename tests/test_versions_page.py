"""`docs/versions.md` and what the package says of itself are one."""

from __future__ import annotations

import json
from pathlib import Path

from deepinsert.backbones.compat import versions

DOCS = Path(__file__).parents[1] / "docs"


def test_the_versions_that_count_as_tried_are_those_of_the_page():
    runs = json.loads((DOCS / "versions.json").read_text()).values()
    right = [run for run in runs if run["failed"] == 0]
    assert set(versions.TRIED_TRANSFORMERS) == {run["transformers"] for run in right}
    assert set(versions.TRIED_TORCH) == {run["torch"] for run in right}
    rows = (DOCS / "versions.md").read_text()
    assert all(f"| {run['transformers']} | {run['torch']} | {run['python']} |" in rows for run in runs)
