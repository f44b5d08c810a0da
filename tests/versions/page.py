"""Renders `docs/versions.md` from the results of the test runs under several versions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

HEAD = """# Versions of transformers, torch and Python

`make test-versions` writes this page from `docs/versions.json`. Each line is one run on a CPU: the exactness
tests of every model family, and reading, sweep, finetune and evaluate on the tiny backbone, with that
version of transformers installed beside the environment. PEFT, accelerate and the other packages have the
versions of `constraints.txt`, or the newest versions that fit.

The column *families* counts, among the {families} small models that the suite builds, the models that this
version has, whose stock model works, and whose logits equal the reference at every insert layer. The end of
this page lists what is skipped.

| transformers | torch | Python | families | passed | failed | skipped |
|---|---|---|---|---|---|---|
"""

FOOT = """
## Other versions

A self-check tries any other version from transformers 5.0 and torch 2.6 on before the first insertion. It
runs a model of a few thousand weights, takes less than a second, and remembers the combination of versions in
`~/.cache/deepinsert/self_check.json`. If a number is wrong, `deep_insert` raises `UntriedVersionError`, which
names the failed check and the versions that work, and inserts nothing. `DEEPINSERT_SELF_CHECK=0` switches the
self-check off.

With transformers 4.57 and older the import ends with one line. These versions lack the auto class with which
the commands load multimodal models, and they need older `huggingface_hub` and `tokenizers`.

## What depends on the version

- A static cache can skip tokens from transformers 5.4 on. Older versions refuse it by name.
- Models with recurrent layers (Qwen3.5, LFM2) work from 5.5 on. In older versions they use caches of their
  own and are refused by name.
- Caches of 8 bits exist from 5.21 on.
- Checkpoints, adapters, policies and reward tables are read both ways between the oldest and the newest
  version, with the same numbers to 1e-5. A version may not know the names of weights that another version
  wrote: 5.5 and older do not know those of CLIP towers that were built, not loaded, under 5.6 or later. Then
  `load_backbone` refuses the checkpoint, where stock code would leave these weights random.

## What the versions lack, and where their stock models fail

| transformers | why tests are skipped | model families and tests |
|---|---|---|
"""


def page(runs: Sequence[dict[str, Any]]) -> str:
    """Return the page for the runs, which `matrix.run` describes, with their version of `transformers`."""
    ordered = sorted(runs, key=lambda run: (_number(run["transformers"]), _number(run["torch"])))
    rows = [
        "| {transformers} | {torch} | {python} | {families} | {passed} | {failed} | {skipped} |".format(**run)
        for run in ordered
    ]
    head = HEAD.format(families=max(run["families"] for run in runs))
    return head + "\n".join(rows) + "\n" + FOOT + "\n".join(_skipped(ordered)) + "\n"


def _skipped(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return one row per reason and range of versions, the newest versions first."""
    versions = list(dict.fromkeys(run["transformers"] for run in runs))
    places: dict[tuple[str, str], set[int]] = {}
    for run in runs:
        for reason, names in run["reasons"].items():
            for name in names:
                if re.search("[a-z]", name):  # a parameter without letters names no family or test
                    cell = " ".join(reason[:160].replace("|", "\\|").split())
                    subject = cell, name.removeprefix("test_")
                    places.setdefault(subject, set()).add(versions.index(run["transformers"]))
    rows: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for (reason, name), places_of_subject in places.items():
        rows.setdefault((tuple(sorted(places_of_subject)), reason), []).append(name)
    return [
        f"| {_ranges(indices, versions)} | {reason} | {', '.join(sorted(names))} |"
        for (indices, reason), names in sorted(rows.items(), key=lambda row: (-row[0][0][-1], row[0]))
    ]


def _ranges(indices: Sequence[int], versions: Sequence[str]) -> str:
    """Write the versions at ascending `indices` as ranges, such as "5.0 to 5.4, 5.7"."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and ranges[-1][-1] == index - 1:
            ranges[-1].append(index)
        else:
            ranges.append([index])
    names = [version.rpartition(".")[0] for version in versions]
    return ", ".join(
        names[group[0]] if len(group) == 1 else f"{names[group[0]]} to {names[group[-1]]}" for group in ranges
    )


def _number(version: str) -> list[int]:
    """Return the parts of a version as numbers, for sorting."""
    return [int(part) for part in version.split(".")]
