"""The model card of a variant: its insert layer, data, recipe and results, and how to load it.

The classes of huggingface_hub write it, so that the Hub can read its metadata. It contains no paths of this
machine, because cards are published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from deepinsert.controller.runs.atomic_files import atomic_file
from deepinsert.controller.runs.manifest import CARD
from deepinsert.controller.tables import markdown_table

PAPER = "https://arxiv.org/abs/2504.19327"
TASK = "image-text-to-text"
BEGIN, END = "<!-- results -->", "<!-- end -->"
LOCAL_SOURCE = "."  # the folder that the snippets load from until the card is published
NO_RESULTS = (
    "The variant is not evaluated yet: `deepinsert evaluate --variants RUN_FOLDER` fills in this table."
)
HIDDEN_OPTIONS = ("out", "device", "data", "image_root", "backbone", "save_every", "max_bad", "report_to")
"""Options that do not affect the trained weights, or that the card shows elsewhere."""
HIDDEN_PREFIXES = ("push_", "hub_")

BODY = """\
# {name}

{model} with **multimodal tokens inserted at {where} of {num_layers}**, finetuned with that insertion
({method}).

[DeepInsert]({paper}) (Choraria et al., 2025): image, audio or molecule tokens skip the first decoder layers;
text runs through all of them.
{meaning}
The class and the names of the weights are those of the stock model; `{config}` contains the insert layer.

## How to load

{loading}

## Training data

| | |
|---|---|
| file | `{data_name}` |
| SHA-256 | `{data_sha256}` |
| records | {records:,} used, {skipped:,} skipped because they are broken or lack their image |
| share of the file | {percent:g} % |
| sources | {sources} |

## Recipe

{recipe}

The training loss at the end is **{train_loss:.4f}** nats per answer token, after {steps:,} optimiser steps.
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

backbone = load_backbone("{source}")  # model and processor, with the insertion installed
print(backbone.insert_layer)
print(backbone.generate([Prompt.from_question("What is shown?", "image.png")]))
```

or with transformers; `deep_insert` reads the insert layer from `config.json`:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
from deepinsert import deep_insert

model = deep_insert(AutoModelForImageTextToText.from_pretrained("{source}"))
processor = AutoProcessor.from_pretrained("{source}")
```

The checkpoint also loads without `deep_insert`. Multimodal tokens then run through every layer, for which it
was not trained.
"""

LOAD_ADAPTER = """\
```python
from deepinsert import load_backbone

backbone = load_backbone("{source}")  # base model with the adapter merged, and the insertion installed
print(backbone.insert_layer)
```

or with PEFT on a loaded base model:

```python
from deepinsert import load_backbone
from peft import PeftModel

base = load_backbone("{base}", insert_layer={insert_layer})
model = PeftModel.from_pretrained(base.model, "{source}")
```
"""


@dataclass(frozen=True)
class CardFacts:
    """The content of a card.

    `options` are the options of the finetuning, `result` is its `result.json`, `sources` counts the records
    of each source, and `versions` maps packages to their versions.
    """

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


def write_card(folder: Path, facts: CardFacts, adapter: bool = False) -> None:
    """Write `README.md` for a checkpoint, or with `adapter` for an adapter, to `folder`."""
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
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card_body(facts, adapter)}")
    save(card, folder / CARD)


def card_body(facts: CardFacts, adapter: bool) -> str:
    """Return the card's Markdown."""
    options, result = facts.options, facts.result
    model_names = {"tiny": "The tiny backbone of DeepInsert", None: "An unpublished model"}
    base = facts.backbone if facts.backbone == "tiny" else base_of(facts, adapter)
    fixed = isinstance(facts.insert_layer, int)
    loading = (LOAD_ADAPTER if adapter else LOAD_CHECKPOINT).format(
        source=LOCAL_SOURCE, base=base or "BASE_MODEL", insert_layer=facts.insert_layer if fixed else 0
    )
    return BODY.format(
        name=facts.name,
        model=model_names.get(base, f"`{base}`"),
        where=f"decoder layer {facts.insert_layer}" if fixed else "any decoder layer",
        num_layers=facts.num_layers,
        method=options["method"],
        paper=PAPER,
        meaning=layer_meaning(facts),
        config="deepinsert.json" if adapter else "config.json",
        loading=loading.strip(),
        data_name=facts.data_name,
        data_sha256=facts.data_sha256,
        records=sum(facts.sources.values()),
        skipped=len(result.get("skipped", ())),
        percent=100 * options["fraction"],
        sources=", ".join(f"{name or 'text'} {count:,}" for name, count in facts.sources.items()) or "-",
        recipe=markdown_table(("option", "value"), recipe_rows(options, result)),
        train_loss=result["train_loss"],
        steps=result["steps"],
        trainable=result["trainable_parameters"],
        parameters=result["parameters"],
        begin=BEGIN,
        no_results=NO_RESULTS,
        end=END,
        versions=markdown_table(("package", "version"), sorted(facts.versions.items())),
    )


def layer_meaning(facts: CardFacts) -> str:
    """Return a sentence on what the insert layer saves."""
    layer = facts.insert_layer
    if not isinstance(layer, int):
        return "In training, each example drew its layer anew, so the model can be used at any layer."
    if layer == 0:
        return "Layer 0 is the baseline: nothing is skipped."
    if layer == facts.num_layers:
        return "Here they never enter, so the model answers from the text alone."
    return f"Here they skip {layer} of {facts.num_layers} layers, in the prefill and in the KV cache."


def recipe_rows(options: Mapping[str, Any], result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the options that affect the trained weights, with defaults as `result` resolved them."""
    idle: tuple[str, ...] = () if options["method"].endswith("lora") else ("lora_rank", "lora_dropout")
    if options["insert_layer"] != "random":
        idle = (*idle, "insert_layers", "layer_distribution", "distillation")
    rows = []
    for name, option in options.items():
        if name in (*HIDDEN_OPTIONS, *idle) or name.startswith(HIDDEN_PREFIXES):
            continue
        value: Any = result.get(name) if option is None else option
        is_path = isinstance(value, Path) or (name == "layer_distribution" and Path(value).is_absolute())
        value = Path(value).name if is_path else value
        cell = "by default" if value in (None, "", ()) else str(value)
        rows.append((f"`--{name.replace('_', '-')}`", cell))
    return rows


def update_results(
    folder: Path, results_table: str, metrics: Mapping[str, float], dataset: str = "held-out questions"
) -> list[Path]:
    """Put an evaluation's results into the cards of a run folder, or of one checkpoint's folder.

    The rest of a card stays as it is, and so do cards without the markers of the results.

    Args:
        folder: the run folder, or the folder of a checkpoint.
        results_table: replaces the text between the markers of the results.
        metrics: replaces the `model-index` of the metadata.
        dataset: the name of the data that the model was evaluated on.

    Returns:
        The cards that have changed.
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
        card.text = f"{before}{BEGIN}\n{results_table.strip()}\n{END}{after}"
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
    """Return the card's `text` with snippets that load from the Hub instead of the card's own folder."""
    source = f'"{repository}"' + (f', subfolder="{subfolder}"' if subfolder else "")
    return re.sub(
        rf'((?:load_backbone|from_pretrained)\([\w., ]*)"{re.escape(LOCAL_SOURCE)}"', rf"\1{source}", text
    )


def save(card: ModelCard, path: Path) -> None:
    """Write a card atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(str(card), "utf-8")


def base_of(facts: CardFacts, adapter: bool) -> str | None:
    """Return the base model's id on the Hub, or None if it has none.

    An adapter fits only the weights that it was trained on, so a local folder has no base model that it fits.
    """
    return None if adapter and Path(facts.backbone).exists() else published_base(facts.backbone)


def published_base(backbone: str) -> str | None:
    """Return the base model's id on the Hub, or None for models without one, such as the tiny backbone.

    It is `backbone` itself, or the id that the card in the folder `backbone` names.
    """
    card = Path(backbone) / CARD
    if card.is_file():
        base = ModelCard.load(card, ignore_metadata_errors=True).data.base_model
        return base[0] if isinstance(base, list) and base else base or None
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", backbone) is not None
    return backbone if is_id and not Path(backbone).exists() else None


def dataset_id(name: str) -> str:
    """Return a name that the Hub's metadata allows: letters, digits, dots and dashes."""
    return re.sub(r"[^\w.-]+", "-", Path(name).stem).strip("-.") or "data"
