"""Renders `docs/models.md` from the outcomes of a run of `test_models.py`."""

from __future__ import annotations

import inspect
from collections import defaultdict

import torch
import transformers
from transformers.models.auto import modeling_auto
from zoo import FAMILIES, REFUSED

from deepinsert.backbones import UnsupportedModelError, deep_insert

HEAD = """# Models

`make models` writes this page from a run of `tests/backbones/test_models.py` with transformers
{transformers} and torch {torch}. The run builds a small model of each type, with its real encoder, from its
configuration with random weights.

A supported type keeps these promises, in float32 on the CPU, with left and right padding:

- insert layer 0 gives the stock logits bit for bit
- every other layer gives, to 5e-5 of the largest, the logits of the stock model in which multimodal rows
  wait and no other row attends to them (`tests/backbones/reference.py`)
- with one insert layer per row, each row gets the logits that it gets alone
- generation with the cache gives the tokens of generation without it
- layers below the insert layer hold no multimodal key
- gradients equal the reference's
- a checkpoint saved and loaded by stock code has no missing and no unexpected key
- removal makes the model stock again

The same generic rules apply to a type that is not listed. It is refused if they do not find its decoder stack
or its multimodal tokens.
"""


def registered() -> dict[str, str]:
    """Return the multimodal model types of the installed transformers, with the class of each."""
    names = dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    names |= modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    return {kind: name if isinstance(name, str) else name[0] for kind, name in names.items()}


def type_of(name: str) -> str:
    """Return the model type of a family, such as `qwen2_vl` of `qwen2_vl-video`."""
    kinds = [kind for kind in registered() if name == kind or name.startswith(f"{kind}-")]
    return max(kinds, key=len, default=name)


def page(outcomes: dict[str, dict[str, str]]) -> str:
    """Return the page for `outcomes[family or refused type][test]`: "passed", "skipped" or "failed"."""
    families = defaultdict(list)
    for name in FAMILIES:
        families[type_of(name)].append(name)
    classes = registered()
    by_class = {kind_class: kind for kind, kind_class in classes.items() if kind in families}
    supported, refused, untried = [], [], []
    for kind in sorted(set(classes) | set(families) | set(REFUSED)):
        shared = by_class.get(classes.get(kind, ""))
        if kind in families:
            supported.append(_supported(kind, families[kind], outcomes))
        elif shared is not None:
            supported.append(f"| {kind} | as {shared} | the same class |")
        elif kind in REFUSED:
            refused.append(f"| {kind} | {_reason(kind)} |")
        else:
            untried.append(kind)
    lines = [
        HEAD.format(transformers=transformers.__version__, torch=torch.__version__.split("+")[0]),
        f"## Supported: {len(supported)}\n",
        "| model type | tried with | remarks |",
        "|---|---|---|",
        *supported,
        f"\n## Refused, with the reason: {len(refused)}\n",
        "| model type | reason |",
        "|---|---|",
        *refused,
    ]
    if untried:
        lines += [f"\n## Not tried: {len(untried)}\n", ", ".join(untried)]
    return "\n".join(lines) + "\n"


def _reason(kind: str) -> str:
    """Return the message with which a model type is refused."""
    try:
        deep_insert(REFUSED[kind].build(), 1)
    except UnsupportedModelError as error:
        return str(error).replace("|", "/")
    return "**not refused**"


def _modality(kind: str) -> str:
    """Return the modality of the family that is named like its model type."""
    model_class = getattr(transformers, registered().get(kind, ""), None)
    if model_class is None:
        return "audio" if FAMILIES[kind].build.__module__.endswith(("audio", "speech")) else "images"
    arguments = inspect.signature(model_class.forward).parameters
    return "images" if any("pixel_values" in name for name in arguments) else "audio"


def _supported(kind: str, names: list[str], outcomes: dict[str, dict[str, str]]) -> str:
    """Return the row of a supported model type, whose families are `names`."""
    remarks = []
    for name in names:
        family = FAMILIES[name]
        failed = sorted(test for test, outcome in outcomes[name].items() if outcome == "failed")
        label = f"{name.removeprefix(kind).strip('-')}: " if name != kind else ""
        remarks += [f"**{label}{test} failed**" for test in failed]
        if family.broken_in == transformers.__version__:
            remarks.append(
                f"{label}**not tried: the stock model fails in {family.broken_in}**, and works in older ones"
            )
        if family.remark and not any(family.remark in remark for remark in remarks):
            remarks.append(f"{label}{family.remark}")
        remarks += [f"{label}without {test.replace('_', ' ')}: {why}" for test, why in family.without.items()]
    variants = [name.removeprefix(kind).strip("-") for name in names if name != kind]
    tried = ", ".join(([_modality(kind)] if kind in names else []) + variants)
    return f"| {kind} | {tried} | {'; '.join(remark.rstrip('.') for remark in remarks)} |"
