"""The model card of a variant: what it is, what it was trained on and how, how to load it, how well it does.

Written by huggingface_hub's own classes, so that the Hub reads its metadata. Paths of this machine stay out
of it: a card is made to be published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from deepinsert.controller.runs.atomic_files import atomic_file
from deepinsert.controller.runs.manifest import CARD

PAPER = "https://arxiv.org/abs/2504.19327"
TASK = "image-text-to-text"
BEGIN, END = "<!-- results -->", "<!-- end -->"
HERE = "."  # what the snippets load until the card is published
NO_RESULTS = "Not evaluated yet: `deepinsert evaluate --variants RUN_FOLDER` fills in this table."
# Options that say where a run goes or how it is stored, not what it finds.
UNTOLD = ("out", "device", "data", "image_root", "backbone", "save_every", "max_bad", "report_to")
UNTOLD_PREFIXES = ("push_", "hub_")

BODY = """\
# {name}

{model} with **multimodal tokens inserted at {where} of {num_layers}**, finetuned with that insertion
({method}).

[DeepInsert]({paper}) (Choraria et al., 2025): image, audio or molecule tokens skip the first decoder layers;
text runs through all of them.
{meaning}
The class and the names of the weights are the stock model's; the insert layer is in `{config}`.

## How to load

{loading}

## Training data

| | |
|---|---|
| file | `{data_name}` |
| SHA-256 | `{data_sha256}` |
| records | {records:,} used, {skipped:,} left out as broken or without their image |
| share of the file | {percent:g} % |
| sources | {sources} |

## Recipe

{recipe}

Training loss at the end: **{train_loss:.4f}** nats per answer token, after {steps:,} optimiser steps;
{trainable:,} of {parameters:,} weights were trained.

## Results

{begin}
{no_results}
{end}

## Made with

{versions}
"""

LOAD_CHECKPOINT = """\
```python
from deepinsert import Prompt, load_backbone

backbone = load_backbone("{source}")  # model and processor, the insertion installed
print(backbone.insert_layer)
print(backbone.generate([Prompt.from_question("What is shown?", "image.png")]))
```

or with transformers alone, where `deep_insert` reads the insert layer from `config.json`:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
from deepinsert import deep_insert

model = deep_insert(AutoModelForImageTextToText.from_pretrained("{source}"))
processor = AutoProcessor.from_pretrained("{source}")
```

Without `deep_insert` it loads too, and multimodal tokens then run through every layer, which it was not
trained for.
"""

LOAD_ADAPTER = """\
```python
from deepinsert import load_backbone

backbone = load_backbone("{source}")  # base model, adapter merged into it, insertion installed
print(backbone.insert_layer)
```

or with PEFT on a base model in hand:

```python
from deepinsert import load_backbone
from peft import PeftModel

base = load_backbone("{base}", insert_layer={insert_layer})
model = PeftModel.from_pretrained(base.model, "{source}")
```
"""


@dataclass(frozen=True)
class Facts:
    """What a card tells. `options` are the finetuning's, `result` its result.json, `sources` the records of
    each, `versions` those of the packages."""

    name: str
    backbone: str
    insert_layer: Any
    num_layers: int
    data_name: str
    data_sha256: str
    sources: Mapping[str, int]
    options: Mapping[str, Any]
    result: Mapping[str, Any]
    versions: Mapping[str, str]


def write_card(folder: Path, facts: Facts, adapter: bool = False) -> None:
    """Write `README.md` of a checkpoint, or of an adapter, to `folder`."""
    base = base_of(facts, adapter)
    relation: dict[str, Any] = {"base_model_relation": "adapter" if adapter else "finetune"} if base else {}
    data = ModelCardData(
        base_model=base,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=TASK,
        tags=["deepinsert", *(["lora"] if adapter else []), f"arxiv:{PAPER.rpartition('/')[2]}"],
        datasets=[dataset_id(facts.data_name)],
        model_name=facts.name,
        **relation,
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body(facts, adapter)}")
    save(card, folder / CARD)


def body(facts: Facts, adapter: bool) -> str:
    """The card's Markdown."""
    options, result = facts.options, facts.result
    base = facts.backbone if facts.backbone == "tiny" else base_of(facts, adapter)
    fixed = isinstance(facts.insert_layer, int)
    loading = (LOAD_ADAPTER if adapter else LOAD_CHECKPOINT).format(
        source=HERE, base=base or "BASE_MODEL", insert_layer=facts.insert_layer if fixed else 0
    )
    return BODY.format(
        name=facts.name,
        model={"tiny": "The tiny backbone of DeepInsert", None: "A model of its author's"}.get(
            base, f"`{base}`"
        ),
        where=f"decoder layer {facts.insert_layer}" if fixed else "any decoder layer",
        num_layers=facts.num_layers,
        method=options["method"],
        paper=PAPER,
        meaning=meaning(facts),
        config="deepinsert.json" if adapter else "config.json",
        loading=loading.strip(),
        data_name=facts.data_name,
        data_sha256=facts.data_sha256,
        records=sum(facts.sources.values()),
        skipped=len(result.get("skipped", ())),
        percent=100 * options["fraction"],
        sources=", ".join(f"{name or 'text'} {count:,}" for name, count in facts.sources.items()) or "-",
        recipe=table(("option", "value"), recipe_rows(options, result)),
        train_loss=result["train_loss"],
        steps=result["steps"],
        trainable=result["trainable_parameters"],
        parameters=result["parameters"],
        begin=BEGIN,
        no_results=NO_RESULTS,
        end=END,
        versions=table(("package", "version"), sorted(facts.versions.items())),
    )


def meaning(facts: Facts) -> str:
    """What the insert layer spares, in a sentence."""
    layer = facts.insert_layer
    if not isinstance(layer, int):
        return "In training the layer was drawn anew for each example, so any of them may be asked for."
    if layer == 0:
        return "Layer 0 is the baseline: nothing is skipped."
    if layer == facts.num_layers:
        return "Here they never enter: the model answers from the text alone."
    return f"Here they skip {layer} of {facts.num_layers} layers, in the prefill and in the KV cache."


def recipe_rows(options: Mapping[str, Any], result: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Each option that shapes the result, with what its default came to where the run found that out."""
    idle = () if options["method"].endswith("lora") else ("lora_rank", "lora_dropout")
    if options["insert_layer"] != "random":
        idle = (*idle, "insert_layers", "layer_distribution", "distillation")
    rows = []
    for name, value in options.items():
        if name in (*UNTOLD, *idle) or name.startswith(UNTOLD_PREFIXES):
            continue
        value = result.get(name, value) if value is None else value
        is_path = isinstance(value, Path) or (name == "layer_distribution" and Path(value).is_absolute())
        value = Path(value).name if is_path else value
        rows.append((f"`--{name.replace('_', '-')}`", value if value not in (None, "", ()) else "by default"))
    return rows


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    cells = [[str(cell).replace("|", r"\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(heads), ["---"] * len(heads), *cells])


def update_results(
    folder: Path, markdown_table: str, metrics: Mapping[str, float], dataset: str = "held-out questions"
) -> list[Path]:
    """Put an evaluation's table and metrics into the cards of a run folder, or of one checkpoint's folder.

    The table replaces what stands between the marks of the results, `metrics` the metadata's `model-index`;
    whatever else a user wrote stays. Returns the cards changed; a card without the marks is left alone.
    """
    cards = [path / CARD for path in (folder, folder / "checkpoint", folder / "adapter")]
    changed = []
    for path in cards:
        if not path.is_file():
            continue
        card = ModelCard.load(path, ignore_metadata_errors=True)
        before, begin, rest = card.text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            continue
        card.text = f"{before}{BEGIN}\n{markdown_table.strip()}\n{END}{after}"
        card.data.model_name = card.data.model_name or folder.name
        card.data.eval_results = [
            EvalResult(
                task_type=TASK,
                dataset_type=dataset_id(dataset),
                dataset_name=dataset,
                metric_type=name,
                metric_value=round(float(value), 6),
            )
            for name, value in metrics.items()
        ]
        save(card, path)
        changed.append(path)
    return changed


def published_as(text: str, repository: str, subfolder: str = "") -> str:
    """The card's `text` with snippets that load from the Hub instead of the folder they lie in."""
    source = f'"{repository}"' + (f', subfolder="{subfolder}"' if subfolder else "")
    return re.sub(rf'((?:load_backbone|from_pretrained)\([\w., ]*)"{re.escape(HERE)}"', rf"\1{source}", text)


def save(card: ModelCard, path: Path) -> None:
    """Write a card, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(str(card), "utf-8")


def base_of(facts: Facts, adapter: bool) -> str | None:
    """The base model's id on the Hub, None where there is none. An adapter fits the very weights that it was
    trained on, not those that they in turn were finetuned from."""
    return None if adapter and Path(facts.backbone).exists() else published_base(facts.backbone)


def published_base(backbone: str) -> str | None:
    """The base model's id on the Hub: `--backbone` itself, or what the card in that folder names; None where
    there is none, as for the tiny backbone."""
    card = Path(backbone) / CARD
    if card.is_file():
        base = ModelCard.load(card, ignore_metadata_errors=True).data.base_model
        return base[0] if isinstance(base, list) and base else base or None
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", backbone) is not None
    return backbone if is_id and not Path(backbone).exists() else None


def dataset_id(name: str) -> str:
    """A name as the Hub's metadata allows it: letters, digits, dots, dashes."""
    return re.sub(r"[^\w.-]+", "-", Path(name).stem).strip("-.") or "data"
