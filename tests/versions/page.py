"""`docs/versions.md`, from what runs under several versions found."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

HEAD = """# Versions of transformers, torch and Python

Written by `make test-versions` from `docs/versions.json`. Each line is a run, on a CPU, of the exactness
tests of every model family and of reading, sweep, finetune and evaluate on the tiny backbone, with that
version of transformers installed beside the environment. PEFT, accelerate and the rest are those of
`constraints.txt`, or the newest that fit.

*Families*: of the {families} small models that the suite builds, those that this version has, whose stock
model works there, and whose logits are the reference's at every insert layer. What is skipped is listed
below.

| transformers | torch | Python | families | passed | failed | skipped |
|---|---|---|---|---|---|---|
"""

FOOT = """
## Other versions

Any other version from transformers 5.0 and torch 2.6 on is tried by a self-check before the first
insertion: a model of a few thousand weights, under a second, remembered per combination of versions in
`~/.cache/deepinsert/self_check.json`. Where a number is wrong, `deep_insert` raises `UntriedVersionError`,
which names what failed and the versions that work; it never goes on. `DEEPINSERT_SELF_CHECK=0` switches it
off.

With transformers 4.57 and older the import ends with one line. They lack the auto class for multimodal
models that the commands load with, and want `huggingface_hub` and `tokenizers` of their time.

## What depends on the version

- A static cache can skip tokens from transformers 5.4 on; before, it is refused by name.
- Models with recurrent layers (Qwen3.5, LFM2) work from 5.5 on; before, they bring caches of their own and
  are refused by name.
- Caches of 8 bits exist from 5.21 on.
- Checkpoints, adapters, policies and reward tables are read both ways between the oldest and the newest
  version, with the same numbers to 1e-5. Where a version does not know the names that another has given to
  weights, as 5.5 and older with CLIP towers of models that were built, not loaded, under 5.6 or later,
  `load_backbone` refuses the checkpoint; stock code would leave those weights random.

## What each version lacks, or gets wrong itself
"""


def page(runs: Sequence[dict[str, Any]]) -> str:
    """The page from the runs, as `matrix.run` returns them with their `transformers`."""
    ordered = sorted(runs, key=lambda run: (_number(run["transformers"]), _number(run["torch"])))
    rows = [
        "| {transformers} | {torch} | {python} | {families} | {passed} | {failed} | {skipped} |".format(**run)
        for run in ordered
    ]
    lines = [HEAD.format(families=max(run["families"] for run in runs)) + "\n".join(rows), FOOT]
    for run in reversed(ordered):
        lines.append("### transformers {transformers}, torch {torch}, Python {python}\n".format(**run))
        lines += [f"- {reason[:160]}: {_subjects(names)}" for reason, names in run["reasons"].items()]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _subjects(names: Sequence[str]) -> str:
    """Families and tests; parameters that are neither say nothing."""
    return ", ".join(name.removeprefix("test_") for name in names if re.search("[a-z]", name))


def _number(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]
