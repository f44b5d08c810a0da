"""The tiny backbone's model card, written from the figures of the run that made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepinsert.controller.runs.atomic_files import atomic_file
from deepinsert.controller.runs.machine import describe_machine

from .figures import TEXT_KINDS

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# The tiny backbone

A real, very small LLaVA: it reads 64 x 64 pictures of coloured shapes, written words and handwritten
digits and answers short English questions about them. It exists so that DeepInsert can be tried, tested and
taught on a laptop's CPU without any download. It knows nothing else of the world.

```python
from deepinsert import load_backbone

backbone = load_backbone("tiny")
```

or, without this project, `LlavaForConditionalGeneration.from_pretrained` and `AutoProcessor.from_pretrained`.

## Architecture

A stock `LlavaForConditionalGeneration`, {millions:.1f} million float32 weights: a CLIP vision tower of 3
layers (patches of 8 x 8 pixels, 64 image tokens), a two-layer projector, a Llama of 8 decoder layers; width
128 and 4 heads everywhere. The tokenizer is a byte-level BPE, so any text encodes. Chat form of LLaVA-1.5:
`USER: <image>\\nquestion ASSISTANT: answer</s>`.

## Data

Everything is drawn by `envs/rendering.py` with a seed, in LLaVA's instruction form: `coco/` (caption, color,
shape, size), `textvqa/` (a written word of 32; a handwritten digit of scikit-learn's; its place), `gqa/`
(counting, existence, place, relation), and questions without an image. A hash of the scene decides which side
of the split it is on; the handwritten digits of the two sides are different samples.

## Recipe

`python scripts/pretrain_tiny.py --out DIR --seed {seed}`, on one thread:

1. Alignment, {alignment_steps} steps of 32 images, {alignment_minutes:.0f} minutes. Each image token learns
   to name what its patch shows (shape, word or digit; colour; size; which half of the image), by cosine with
   the language model's input embeddings.
2. Language, {steps} steps, {language_minutes:.0f} minutes. At most {per_step} questions a step, packed on
   {rows} images: colours, shapes, words and digits first, then all but counting and relations, then all. The
   vision tower is frozen.

Muon for the matrices, AdamW for the rest. **The insert layer is drawn at random in half of the language
steps**, layer `l` in proportion to (N - l)³. A model of this size trained at layer 0 alone is blind from
layer 1 on; large pretrained models are not (paper, Table 5). So treat its curve below as a property of this
training, not as evidence about other models.

Machine: {machine}; other work ran beside it.

## Figures on held-out images

Exact match of the whole answer at insert layer 0, the same with a blank image, and what a later insert layer
costs without retraining. "Bears" is the deepest insert layer up to which accuracy stays within 5 points of
layer 0 (8: the image never enters).

{table}

![Loss and accuracy by insert layer and kind](curves.png)

`figures.json` holds all of them, the options, the versions and the course of the training.
"""


def write_card(result: dict[str, Any], path: Path) -> None:
    """`result` is what `pretraining.run` returns."""
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
    lines = ["| kind | questions | accuracy | blank image | bears | loss at 0, 2, 4, 6, 7, 8 (nats) |"]
    lines.append("|---|---|---|---|---|---|")
    for kind in sorted(result["accuracy"], key=lambda kind: (kind in TEXT_KINDS, kind)):
        blank = f"{result['blank_accuracy'][kind]:.1%}" if kind not in TEXT_KINDS else "no image"
        losses = ", ".join(f"{result['loss'][kind][layer]:.2f}" for layer in (0, 2, 4, 6, 7, 8))
        lines.append(
            f"| {kind} | {result['questions'][kind]} | {result['accuracy'][kind][0]:.1%} | {blank} | "
            f"{result['deepest_layer'][kind]} | {losses} |"
        )
    return "\n".join(lines)
