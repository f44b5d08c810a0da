"""The evaluation that the tests of a module share; each module names its own options."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deepinsert.controller.evaluation import evaluate
from deepinsert.controller.options import EvaluateOptions


@pytest.fixture(scope="module")
def result(options: EvaluateOptions) -> dict[str, Any]:
    evaluate.run(options)
    return json.loads((options.out / "result.json").read_text())
