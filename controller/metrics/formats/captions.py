"""COCO's captions_val2014.json, ChEBI-20's test.txt, and captions of a user's own in LLaVA's JSON."""

from __future__ import annotations

from pathlib import Path

from deepinsert.controller.metrics.contract import Example
from deepinsert.envs.data.instructions import load_instructions
from deepinsert.envs.data.media import DatasetError
from deepinsert.envs.prompts import ImageRef, prompts_from

from .question_prompts import image_root_of, question_prompt
from .records import by_key, read_record, read_table

CAPTION = "Provide a one-sentence caption for the provided image."
DESCRIBE = "Describe the molecule."


def read_coco(data: Path, image_root: Path | None) -> list[Example]:
    """Read captions_val2014.json: one example per image with captions.

    Images are in the image root, or in val2014/ below it.
    """
    record = read_record(data)
    images = by_key(record.rows("images"), "id")
    captions: dict[str, list[str]] = {}
    for row in record.rows("annotations"):
        name = row.text("image_id")
        if name not in images:
            row.fault("image_id", f"{name} is not among the images")
        captions.setdefault(name, []).append(row.text("caption"))
    if not captions:
        raise DatasetError(f"{data}: there is no caption in it; is the file cut off?")
    root = image_root_of(data, image_root, "val2014", "val2017")
    examples = []
    for name, texts in captions.items():
        image = ImageRef(root, images[name].text("file_name"), images[name].origin)
        prompt = question_prompt(name, "coco-captions", CAPTION, (image,), texts[0], name)
        examples.append(Example(prompt, tuple(texts)))
    return examples


def read_chebi20(data: Path, image_root: Path | None) -> list[Example]:
    """Read test.txt: CID, SMILES and description, separated by tabs. Ids are the CIDs."""
    rows = by_key(read_table(data, "\t", ("CID", "SMILES", "description"), quoted=False), "CID")
    examples = []
    for name, row in rows.items():
        smiles, description = row.text("SMILES"), row.text("description")
        prompt = question_prompt(name, "chebi20", f"{smiles}\n{DESCRIBE}", (), description)
        examples.append(Example(prompt, (description,), {"smiles": smiles}))
    return examples


def read_instruction_captions(data: Path, image_root: Path | None) -> list[Example]:
    """Read instructions in LLaVA's JSON whose answers are captions."""
    prompts = prompts_from(load_instructions(data, image_root), per="turn")
    return [Example(prompt, (prompt.answer,)) for prompt in prompts]
