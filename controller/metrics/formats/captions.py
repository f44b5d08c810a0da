"""COCO's captions_val2014.json, ChEBI-20's test.txt, and captions of one's own in LLaVA's JSON."""

from __future__ import annotations

from pathlib import Path

from deepinsert.controller.metrics.contract import Example
from deepinsert.envs.data.instructions import load_instructions
from deepinsert.envs.data.media import DatasetError
from deepinsert.envs.prompts import ImageRef, prompts_from

from .question_prompts import ask, root_of
from .records import by_key, read_record, read_table

CAPTION = "Provide a one-sentence caption for the provided image."
DESCRIBE = "Describe the molecule."


def read_coco(data: Path, image_root: Path | None) -> list[Example]:
    """Examples of captions_val2014.json: one for each image that has captions.

    Images lie in the image root, or in val2014/ there.
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
        raise DatasetError(f"{data}: no caption in it; is the file cut off?")
    root = root_of(data, image_root, "val2014", "val2017")
    return [
        Example(
            ask(
                name, "coco-captions", CAPTION,
                (ImageRef(root, images[name].text("file_name"), images[name].where),), texts[0], name,
            ),
            tuple(texts),
        )
        for name, texts in captions.items()
    ]  # fmt: skip


def read_chebi20(data: Path, image_root: Path | None) -> list[Example]:
    """Examples of test.txt: CID, SMILES and description, tab-separated. Ids are the CIDs."""
    rows = by_key(read_table(data, "\t", ("CID", "SMILES", "description"), quoted=False), "CID")
    return [
        Example(
            ask(name, "chebi20", f"{row.text('SMILES')}\n{DESCRIBE}", (), row.text("description")),
            (row.text("description"),),
            {"smiles": row.text("SMILES")},
        )
        for name, row in rows.items()
    ]


def read_own(data: Path, image_root: Path | None) -> list[Example]:
    """Examples of instructions in LLaVA's JSON whose answers are captions."""
    prompts = prompts_from(load_instructions(data, image_root), per="turn")
    return [Example(prompt, (prompt.answer,)) for prompt in prompts]
