"""Makes an lmms-eval task of a user's questions in LLaVA's JSON: a folder for `--include_path`.

The task asks the same questions as `deepinsert evaluate`, with the earlier turns as context, and scores
answers by the same exact match, so both give the same accuracy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepinsert.controller.metrics.rules.exact_match import exact_match
from deepinsert.controller.runs.atomic_files import atomic_file
from deepinsert.envs.data.instructions import load_instructions
from deepinsert.envs.prompts import prompts_from

TASK = "instructions"
YAML = f"""\
task: {{name}}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: questions.parquet
test_split: test
output_type: generate_until
doc_to_messages: !function {__name__}.messages
doc_to_visual: !function {__name__}.visuals
doc_to_text: !function {__name__}.text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {{max_new_tokens}}
  until: []
process_results: !function {__name__}.score
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@dataclass(kw_only=True)
class TaskOptions:
    """Make an lmms-eval task of instructions in LLaVA's JSON, with their images."""

    data: Path
    """Instructions in LLaVA's JSON."""
    out: Path
    """Folder to create; give it to lmms_eval as --include_path."""
    image_root: Path | None = None
    """Folder that image paths are relative to; by default the folder of the data file."""
    name: str = TASK
    """Name of the task in --tasks."""
    max_new_tokens: int = 32
    """Longest answer to generate."""


def write_task(options: TaskOptions) -> Path:
    """Write the task's YAML, and its questions with their images as Parquet. Return the folder.

    Raises:
        DatasetError: the data cannot be used.
        ImportError: `datasets`, which lmms-eval needs, is not installed.
    """
    from datasets import Dataset, Features, Image, List, Value

    prompts = prompts_from(load_instructions(options.data, options.image_root), per="turn")
    columns = {
        "id": [prompt.id for prompt in prompts],
        "source": [prompt.source for prompt in prompts],
        "question": [prompt.question for prompt in prompts],
        "answer": [prompt.answer for prompt in prompts],
        "messages": [json.dumps(prompt.messages[:-1]) for prompt in prompts],
        "images": [prompt.load_images() for prompt in prompts],
    }
    types: dict[str, Any] = dict.fromkeys(columns, Value("string"))
    data = Dataset.from_dict(columns, Features(types | {"images": List(Image())}))
    options.out.mkdir(parents=True, exist_ok=True)
    with atomic_file(options.out / "questions.parquet") as temporary:
        data.to_parquet(str(temporary))
    with atomic_file(options.out / f"{options.name}.yaml") as temporary:
        temporary.write_text(YAML.format(name=options.name, max_new_tokens=options.max_new_tokens), "utf-8")
    return options.out


def messages(doc: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a question as lmms-eval's chat messages: the conversation up to it, with images in place."""
    images = iter(doc["images"])
    return [
        {
            **message,
            "content": [
                {"type": "image", "url": next(images)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in json.loads(doc["messages"])
    ]


def visuals(doc: Mapping[str, Any]) -> list[Any]:
    """Return the images of a question."""
    return list(doc["images"])


def text(doc: Mapping[str, Any]) -> str:
    """Return the text of a question."""
    return str(doc["question"])


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return the score that lmms-eval averages: 1 for a right answer, 0 for a wrong one."""
    return {"exact_match": float(exact_match(results[0], doc["answer"]))}
