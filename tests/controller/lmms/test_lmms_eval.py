"""lmms-eval gives our backbones the scores of `deepinsert evaluate`; these tests need lmms-eval."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lmms_eval")

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.tasks import TaskManager

from deepinsert.backbones import Backbone
from deepinsert.controller.evaluation import evaluate
from deepinsert.controller.lmms.lmms_model import DeepInsertChat
from deepinsert.controller.lmms.plugin import MODEL, manifest
from deepinsert.controller.lmms.questions import GenerationSettings, simple_prompt
from deepinsert.controller.lmms.task import TASK, TaskOptions, write_task
from deepinsert.controller.options import EvaluateOptions
from deepinsert.controller.policy.layer_policy import LayerPolicy
from deepinsert.envs.data.instructions import load_instructions
from deepinsert.envs.prompts import Prompt, encode, prompts_from

LAYER = 5
COLOURS = ("red", "green", "blue", "yellow")
CHOICE = f"""\
task: choice
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {{questions}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function deepinsert.controller.lmms.task.visuals
doc_to_text: !function deepinsert.controller.lmms.task.text
doc_to_choice: {json.dumps(COLOURS)}
doc_to_target: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def task(rendered_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_task(
        TaskOptions(data=rendered_data, out=tmp_path_factory.mktemp("task"), max_new_tokens=6)
    )
    (folder / "choice.yaml").write_text(CHOICE.format(questions=folder / "questions.parquet"))
    return folder


@pytest.fixture(scope="module")
def evaluation(rendered_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The accuracy of `deepinsert evaluate` on the same questions, and its predictions by id."""
    out = tmp_path_factory.mktemp("evaluation")
    options = EvaluateOptions(
        out=out,
        data=rendered_data,
        insert_layers=str(LAYER),
        batch_size=16,
        max_new_tokens=6,
        timing_repeats=1,
        device="cpu",
    )
    result = evaluate.run(options)
    (path,) = (out / "predictions").iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    predictions = {row["id"]: row["prediction"] for row in rows}
    return {"accuracy": result["variants"][0]["accuracy"], "predictions": predictions}


def run_lmms_eval(task: Path, name: str = TASK, **arguments: Any) -> dict[str, Any]:
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    manager = TaskManager(include_path=str(task), include_defaults=False, model_name=MODEL)
    arguments = {"model_args": f"pretrained=tiny,insert_layer={LAYER}", "batch_size": 8} | arguments
    return simple_evaluate(
        model=MODEL, tasks=[name], task_manager=manager, device="cpu", log_samples=True, **arguments
    )


@pytest.mark.parametrize("batch_size", [1, 7])
def test_accuracy_and_answers_are_those_of_evaluate(
    task: Path, evaluation: dict[str, Any], batch_size: int
) -> None:
    report = run_lmms_eval(task, batch_size=batch_size)
    assert 0.2 < evaluation["accuracy"] < 1
    assert report["results"][TASK]["exact_match,none"] == pytest.approx(evaluation["accuracy"])
    predictions = {row["doc"]["id"]: row["filtered_resps"][0] for row in report["samples"][TASK]}
    assert predictions == evaluation["predictions"]


def test_the_insert_layer_reaches_the_model(task: Path, evaluation: dict[str, Any]) -> None:
    report = run_lmms_eval(task, model_args="pretrained=tiny,insert_layer=8", batch_size=32)
    assert report["results"][TASK]["exact_match,none"] < evaluation["accuracy"] - 0.1


def test_multiple_choice_takes_the_answer_with_the_smallest_loss(
    task: Path, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    # lmms-eval's cache inspects each response.
    report = run_lmms_eval(task, "choice", force_simple=True, limit=6, use_cache=str(tmp_path / "cache"))
    for row in report["samples"]["choice"]:
        losses = []
        for colour in COLOURS:
            prompt = simple_prompt("x", row["doc"]["question"], stored_images(task, row["doc_id"]), colour)
            with torch.no_grad(), tiny_backbone.insert_at(LAYER):
                losses.append(tiny_backbone.model(**encode(tiny_backbone.processor, [prompt])).loss.item())
        assert [float(response[0][0]) for response in row["resps"]] == pytest.approx(losses, abs=1e-4)
        assert row["acc"] == float(np.argmin(losses) == 0)


def stored_images(task: Path, row: int) -> list[Image.Image]:
    from datasets import load_dataset

    files = str(task / "questions.parquet")
    return load_dataset("parquet", data_files={"test": files})["test"][row]["images"]


def test_stop_strings_and_several_images_work(tiny_backbone: Backbone) -> None:
    model = DeepInsertChat(batch_size=4, device="cpu")
    images = [Image.new("RGB", (64, 64), colour) for colour in ("white", "gray")]
    prompts = [
        simple_prompt("a", "Describe the image.", images[:1]),
        simple_prompt("b", "Are these alike?", images),
        Prompt.from_question("What is 1 + 1?"),
    ]
    whole = model.answer(prompts, GenerationSettings.from_task({"max_new_tokens": 12}))
    plain = tiny_backbone.generate(prompts, max_new_tokens=12)
    assert [text for text, _ in whole] == plain
    stop = plain[0][2:4]
    stopped = model.answer(prompts, GenerationSettings.from_task({"max_new_tokens": 12, "until": [stop]}))
    assert [text for text, _ in stopped] == [text.split(stop)[0].strip() for text in plain]
    assert stopped[0][1] < whole[0][1]


def test_a_policy_chooses_each_questions_layer(
    tiny_backbone: Backbone, rendered_data: Path, save_policy: Callable[..., Path], tmp_path: Path
) -> None:
    prompts = [prompt for prompt in prompts_from(load_instructions(rendered_data)) if prompt.images][:16]
    folder = save_policy(tiny_backbone, prompts, tmp_path)
    model = DeepInsertChat(policy=str(folder), skip_weight=1.0, device="cpu", batch_size=4)
    layers = LayerPolicy.load(folder).layers(tiny_backbone, prompts, 1.0)
    assert len(set(layers)) > 2 and model.layers(prompts) == layers
    answers = [text for text, _ in model.answer(prompts, GenerationSettings.from_task({"max_new_tokens": 6}))]
    assert answers == tiny_backbone.generate(prompts, insert_layer=layers, max_new_tokens=6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "runs/x", "insert_layer": 3}, "both policy=runs/x and insert_layer=3"),
        ({"skip_weight": 0.5}, "give policy= too"),
        ({"batch_size": "auto"}, "--batch_size auto: give a number"),
        ({"insert_layer": 9}, "9"),
    ],
)
def test_invalid_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepInsertChat(device="cpu", **arguments)


def test_unsupported_requests_are_errors() -> None:
    model = DeepInsertChat(device="cpu")

    class Request:
        task_name = "some_task"
        args = ("", "red")

    with pytest.raises(NotImplementedError, match="some_task: rounds"):
        model.generate_until_multi_round([Request()])
    with pytest.raises(ValueError, match="some_task: acc_mutual_info"):
        model.loglikelihood([Request()])


@pytest.mark.skipif(MODEL not in entry_points(group="lmms_eval.models").names, reason="not installed")
def test_the_command_in_the_documentation(task: Path, evaluation: dict[str, Any], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lmms_eval", "--model", MODEL, "--tasks", TASK, "--device", "cpu"]
    command += ["--model_args", f"pretrained=tiny,insert_layer={LAYER}", "--batch_size", "16"]
    command += ["--include_path", str(task), "--output_path", str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    (path,) = tmp_path.rglob("*results.json")
    accuracy = json.loads(path.read_text())["results"][TASK]["exact_match,none"]
    assert accuracy == pytest.approx(evaluation["accuracy"]), process.stderr
