"""The tiny backbone's model card, written from the figures of the run that made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepinsert.controller.runs.atomic_files import atomic_file
from deepinsert.controller.runs.machine import describe_machine
from deepinsert.controller.tables import markdown_table

from .figures import TEXT_KINDS

SHOWN_LAYERS = (0, 2, 4, 6, 7, 8)
"""Insert layers whose loss the card shows."""

HEADINGS = (
    "kind",
    "questions",
    "accuracy",
    "blank image",
    "deepest layer",
    "loss at 0, 2, 4, 6, 7, 8 (nats)",
)

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# The tiny backbone

This is a very small LLaVA. It reads 64 x 64 pictures of coloured shapes, written words and handwritten
digits, and answers short English questions about them. With it, DeepInsert can be tried, tested and taught on
a laptop's CPU without any download. It knows nothing else of the world.

```python
from deepinsert import load_backbone

backbone = load_backbone("tiny")
```

Without this project, use `LlavaForConditionalGeneration.from_pretrained` and `AutoProcessor.from_pretrained`.

## Architecture

The model is a stock `LlavaForConditionalGeneration` with {millions:.1f} million float32 weights: a CLIP
vision tower of 3 layers (patches of 8 x 8 pixels, 64 image tokens), a two-layer projector, and a Llama of 8
decoder layers; width 128 and 4 heads everywhere. The tokenizer is a byte-level BPE, so any text encodes. The
chat form is that of LLaVA-1.5: `USER: <image>\\nquestion ASSISTANT: answer</s>`.

## Data

`envs/data/rendering.py` renders all data from a seed, in LLaVA's instruction form: `coco/` (caption, color,
shape, size), `textvqa/` (one of 32 written words; a handwritten digit of scikit-learn; its place), `gqa/`
(counting, existence, place, relation), and questions without an image. A hash of the scene decides its side
of the split; the handwritten digits of the two sides are different samples.

## Recipe

`python scripts/pretrain_tiny.py --out DIR --seed {seed}` trains the model on one thread, in two stages:

1. Alignment: {alignment_steps} steps of 32 images, {alignment_minutes:.0f} minutes. Each image token learns
   to name what its patch shows (shape, word or digit; colour; size; which half of the image), by its cosine
   with the language model's input embeddings.
2. Language: {steps} steps, {language_minutes:.0f} minutes. A step has at most {per_step} questions, packed on
   {rows} images: at first about colours, shapes, words and digits, then about all but counting and relations,
   then about all. The vision tower is frozen.

Muon trains the matrices, AdamW the rest. **The insert layer is drawn at random in half of the language
steps**, layer `l` in proportion to (N - l)³. A model of this size that is trained at layer 0 alone is at
chance from layer 1 on; large pretrained models are not (paper, Table 5). So treat its curve below as a
property of this training, not as evidence about other models.

Machine: {machine}; it ran other work at the same time.

## Figures on held-out images

The table shows the exact match of the whole answer at insert layer 0, the same with a blank image, and the
loss at later insert layers without retraining. "Deepest layer" is the last insert layer up to which accuracy
stays within 5 points of layer 0 (8: the image never enters).

{table}

![Loss and accuracy by insert layer and kind](curves.png)

`figures.json` holds all figures, the options, the versions and the training history.
"""


def write_card(result: dict[str, Any], path: Path) -> None:
    """Write the model card to `path`, from the result of `pretraining.run`."""
    options, seconds = result["options"], result["seconds"]
    rows = options["shape_rows"] + options["text_rows"]
    text = CARD.format(
        millions=result["parameters"] / 1e6,
        seed=options["seed"],
        alignment_steps=options["alignment_steps"],
        alignment_minutes=seconds["alignment"] / 60,
        steps=options["steps"],
        language_minutes=seconds["language"] / 60,
        per_step=options["shape_rows"] * options["questions"] + options["text_rows"] * 5 + 8,
        rows=rows,
        machine=describe_machine(result["machine"]),
        table=_table(result),
    )
    with atomic_file(path) as temporary:
        temporary.write_text(text, "utf-8")


def _table(result: dict[str, Any]) -> str:
    """Return one row per kind of question, those without an image last."""
    kinds = sorted(result["accuracy"], key=lambda kind: (kind in TEXT_KINDS, kind))
    rows = [
        (
            kind,
            str(result["questions"][kind]),
            f"{result['accuracy'][kind][0]:.1%}",
            f"{result['blank_accuracy'][kind]:.1%}" if kind not in TEXT_KINDS else "no image",
            str(result["deepest_layer"][kind]),
            ", ".join(f"{result['loss'][kind][layer]:.2f}" for layer in SHOWN_LAYERS),
        )
        for kind in kinds
    ]
    return markdown_table(HEADINGS, rows, compact_rule=True)
