"""What is written under one version of transformers is read under another, with the same numbers.

Both versions must be installed beside the environment, as `make test-oldest` and `make test-versions` do; the
tests run under the oldest.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from environments import FOLDER, ROOT, environment

from deepinsert.backbones.compat.versions import TRIED_TRANSFORMERS

OLDEST, NEWEST = TRIED_TRANSFORMERS[0], TRIED_TRANSFORMERS[-1]
SCRIPT = Path(__file__).parent / "exchange.py"

pytestmark = pytest.mark.skipif(
    transformers.__version__ != OLDEST or not (FOLDER / f"transformers-{OLDEST}" / "complete").is_file(),
    reason=f"needs transformers {OLDEST}, as `make test-oldest` installs it",
)


def run(version: str, job: str, *places: Path) -> Any:
    surroundings = environment(version) | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), job, *map(str, places)]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize(("writes", "reads"), [(OLDEST, NEWEST), (NEWEST, OLDEST)])
def test_both_read_what_either_wrote(writes, reads, rendered_data, tmp_path):
    run(writes, "write", rendered_data, tmp_path)
    here, there = (run(version, "read", rendered_data, tmp_path) for version in (writes, reads))
    for part in ("checkpoint", "adapter", "policy", "table"):
        assert not isinstance(here[part], str), here[part]
        np.testing.assert_allclose(_numbers(there[part]), _numbers(here[part]), atol=1e-5)
    assert here["adapter"][0] == here["checkpoint"][0] == 3


def _numbers(entry: Any) -> np.ndarray:
    """The numbers in nested lists, in their order."""
    if not isinstance(entry, list):
        return np.array([entry], dtype=float)
    return np.concatenate([_numbers(each) for each in entry])
