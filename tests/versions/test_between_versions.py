"""Files written under one version of transformers are read under another, with the same numbers.

Both versions must be installed beside the environment, as `make test-oldest` and `make test-versions` do. The
tests run under the oldest version.
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
    """Run `exchange.py` under a version of transformers, and return the JSON of its last line."""
    surroundings = environment(version) | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), job, *map(str, places)]
    process = subprocess.run(command, env=surroundings, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize(("writes", "reads"), [(OLDEST, NEWEST), (NEWEST, OLDEST)])
def test_each_version_reads_the_files_of_the_other(writes, reads, rendered_data, tmp_path):
    run(writes, "write", rendered_data, tmp_path)
    results, other_results = (run(version, "read", rendered_data, tmp_path) for version in (writes, reads))
    for part in ("checkpoint", "adapter", "policy", "table"):
        assert not isinstance(results[part], str), results[part]
        np.testing.assert_allclose(_numbers(other_results[part]), _numbers(results[part]), atol=1e-5)
    assert results["adapter"][0] == results["checkpoint"][0] == 3


def _numbers(entry: Any) -> np.ndarray:
    """Return the numbers in nested lists, in their order."""
    if not isinstance(entry, list):
        return np.array([entry], dtype=float)
    return np.concatenate([_numbers(each) for each in entry])
