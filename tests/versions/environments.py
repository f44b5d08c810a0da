"""Other versions of transformers beside the environment: a folder each, which goes first on the path.

Only what a version needs and the environment does not satisfy lies in its folder: transformers itself, and
for older ones `huggingface_hub`, `tokenizers` and the HTTP client of their time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-versions"


def environment(version: str) -> dict[str, str]:
    """The variables of a process that imports this version of transformers, installed if it is not yet."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed(version)), str(ROOT)])}


def installed(version: str) -> Path:
    """The folder that holds transformers `version` and what it needs; pip fills it the first time."""
    target = FOLDER / f"transformers-{version}"
    if not (target / "complete").exists():
        _install(target, [f"transformers=={version}"])
        while missing := sorted(set(_unsatisfied(target))):
            _install(target, missing)
        (target / "complete").touch()
    return target


def _install(target: Path, requirements: list[str]) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-compile", "--upgrade", "--target", str(target)]
    # The constraints of the environment are what another version is not bound to.
    subprocess.run([*pip, *options, *requirements], check=True, cwd=ROOT)


def _unsatisfied(target: Path) -> Iterator[str]:
    """Requirements of what lies in `target` that neither it nor the environment satisfies."""
    here = _by_name(target)
    there = {canonicalize_name(found.metadata["Name"]): found for found in distributions()} | here
    for distribution in here.values():
        for text in distribution.requires or []:
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            found = there.get(canonicalize_name(requirement.name))
            if found is None or not requirement.specifier.contains(found.version, prereleases=True):
                yield f"{requirement.name}{requirement.specifier}"


def _by_name(target: Path) -> dict[str, Distribution]:
    return {canonicalize_name(found.metadata["Name"]): found for found in distributions(path=[str(target)])}
