"""Runs the tests that must hold under every version of transformers, and writes `docs/versions.md`.

    python tests/versions/matrix.py             the versions of DAILY
    python tests/versions/matrix.py --every     every minor release
    python tests/versions/matrix.py --oldest    the oldest one, core tests only; nothing is written
    python tests/versions/matrix.py 5.24.0      one version
    python tests/versions/matrix.py --here      the versions of torch, Python and transformers in use

A run replaces the entry of the same versions in `docs/versions.json`. The page shows all entries.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from environments import ROOT, environment
from page import page

EVERY = (
    *("5.0.0", "5.1.0", "5.2.0", "5.3.0", "5.4.0", "5.5.4", "5.6.2", "5.7.0", "5.8.1", "5.9.0", "5.10.4"),
    *("5.11.0", "5.12.1", "5.13.1", "5.14.1", "5.15.1", "5.16.1", "5.17.0", "5.18.0", "5.19.0", "5.20.2"),
    *("5.21.1", "5.22.2", "5.23.0", "5.24.0"),
)
"""The last release of each minor version, which `--every` runs."""

DAILY = ("5.0.0", "5.4.0", "5.8.1", "5.12.1", "5.16.1", "5.20.2", "5.22.2", "5.23.0", "5.24.0")
CORE = (
    "tests/backbones/test_insertion.py",
    "tests/backbones/test_decoding.py",
    "tests/backbones/test_model_inputs.py",
    "tests/backbones/test_model_tools.py",
    "tests/backbones/test_caches.py",
    "tests/versions",
)
EXACT = (
    *CORE,
    "tests/backbones/test_models.py",
    "tests/backbones/test_recurrent.py",
    "tests/backbones/test_generate.py",
    "tests/backbones/test_loading.py",
    "tests/backbones/test_tiny.py",
)
PIPELINE = (
    "tests/envs/test_prompts.py",
    "tests/envs/test_rewards.py",
    "tests/controller/policy/test_sweep.py",
    "tests/controller/finetuning/test_finetune.py",
    "tests/controller/evaluation/test_evaluate.py",
)
RESULTS, PAGE = ROOT / "docs" / "versions.json", ROOT / "docs" / "versions.md"


def run(surroundings: dict[str, str], files: tuple[str, ...]) -> dict[str, object]:
    """Run the tests in `files`; return the counts, the families, and the reasons of skipped tests.

    `surroundings` are the environment variables, which choose the version of transformers.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-n", "2", "--dist", "worksteal", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
        command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", *files]
        settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, env=surroundings | settings, cwd=ROOT, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes: Counter[str] = Counter()
    families: dict[str, bool] = {}
    reasons: dict[str, set[str]] = {}
    for case in cases:
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcome = {"failure": "failed", "error": "failed"}.get(kinds[0], kinds[0]) if kinds else "passed"
        outcomes[outcome] += 1
        family = re.match(r"test_reference\[(.+)-(left|right)\]", case.attrib["name"])
        if family:
            families[family[1]] = outcome == "passed"
        for child in case:
            text = child.attrib.get("message", "")
            if child.tag == "skipped" and text.startswith("transformers "):
                subject = case.attrib["name"].partition("[")[2].rstrip("]") or case.attrib["name"]
                subject = re.sub(r"-(left|right|one layer|layer per row)$", "", subject)
                reasons.setdefault(text.partition(": ")[2], set()).add(subject)
    return {
        "passed": outcomes["passed"],
        "failed": outcomes["failed"],
        "skipped": outcomes["skipped"],
        "families": sum(families.values()),
        "reasons": {reason: sorted(names) for reason, names in sorted(reasons.items())},
        "torch": version("torch").partition("+")[0],
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def main() -> int:
    """Run the versions of the command line; return 0 if no test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("versions", nargs="*")
    parser.add_argument("--every", action="store_true", help="run every minor release")
    parser.add_argument("--oldest", action="store_true", help="run the core tests under the oldest version")
    parser.add_argument("--here", action="store_true", help="run the installed versions")
    options = parser.parse_args()
    if options.oldest:
        return int(run(environment(EVERY[0]), (*CORE, *PIPELINE))["failed"] != 0)
    versions = options.versions or (EVERY if options.every else DAILY)
    failed = 0
    for name in [version("transformers")] if options.here else versions:
        print(f"transformers {name}", flush=True)
        surroundings = {**os.environ, "PYTHONPATH": str(ROOT)} if options.here else environment(name)
        result = {"transformers": name} | run(surroundings, (*EXACT, *PIPELINE))
        results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
        results[f"{name}, torch {result['torch']}, Python {result['python']}"] = result
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", "utf-8")
        PAGE.write_text(page(list(results.values())), "utf-8")
        failed += int(result["failed"])
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())
