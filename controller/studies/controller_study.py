"""The controller on one data set from end to end: runs of every command, and the figures of its page.

The page shows what the commands wrote, so that no figure in it is typed by hand.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from deepinsert.backbones import load_backbone
from deepinsert.controller.evaluation.evaluate import run as run_evaluate
from deepinsert.controller.evaluation.evaluation_summary import summary as evaluate_summary
from deepinsert.controller.learning.train_policy import run as run_training
from deepinsert.controller.learning.train_policy import split_prompts
from deepinsert.controller.option_checks import check
from deepinsert.controller.options import (
    BackboneOptions,
    DataOptions,
    EvaluateOptions,
    RecommendOptions,
    RunOptions,
    SweepOptions,
    TrainPolicyOptions,
)
from deepinsert.controller.policy.recommend import run as run_recommend
from deepinsert.controller.policy.recommend import summary as recommend_summary
from deepinsert.controller.policy.sweep import run as run_sweep
from deepinsert.controller.policy.sweep_figures import summary as sweep_summary
from deepinsert.controller.prompt_selection import read_data
from deepinsert.controller.runs.atomic_files import atomic_file, write_json
from deepinsert.controller.runs.folder import read_result, start_run, write_result
from deepinsert.controller.runs.machine import describe_machine, machine_facts
from deepinsert.envs.observations import Observation
from deepinsert.envs.prompts import Prompt
from deepinsert.envs.rewards.table import RewardTable

from .ablation import ObservationAblationOptions
from .ablation import run as run_ablation
from .lambda_study import study as lambda_study

ALGORITHMS = ("ppo", "a2c", "dqn", "full-info")
STEP_OF_PICTURE = {
    "sweep": "sweep",
    "policy_rewards": "train-policy-ppo",
    "recommend": "recommend",
    "pareto": "recommend",
    "evaluate": "evaluate",
}
"""The pictures of the page, and the step that draws each."""

Options = TypeVar("Options", bound=RunOptions)


@dataclass(kw_only=True)
class ControllerStudyOptions(RunOptions, BackboneOptions, DataOptions):
    """Sweep, policies of every algorithm, ablations, recommendation and evaluation on one data set."""

    skip_weight: float = 0.5
    """Weight λ of the skip bonus at which policies are compared."""
    seeds: int = 5
    """Policies of each algorithm."""
    bench: Path | None = None
    """Run folder of benchmarks/reward_table.py whose table goes into the document."""
    page: Path = Path("docs/controller.md")
    """Page whose marked blocks are filled. Pictures are written to the folder of the same name beside it."""


@dataclass
class Study:
    """The study's folder, and the results of its finished steps by name."""

    options: ControllerStudyOptions
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def folder(self, step: str) -> Path:
        """Return the run folder of a step."""
        return Path(self.options.out) / step

    def play(
        self,
        step: str,
        command: Callable[[Options], dict[str, Any]],
        options_class: type[Options],
        **fields: Any,
    ) -> None:
        """Run a command in the folder of its step; a finished one is not repeated.

        Args:
            step: the name of the step.
            command: the function `run` of the command.
            options_class: the class of its options.
            fields: options that differ from those of the study.
        """
        common = {
            name: getattr(self.options, name)
            for name in (*BackboneOptions.__dataclass_fields__, *DataOptions.__dataclass_fields__, "seed")
        }
        print(f"\n== {step}", flush=True)
        self.results[step] = command(options_class(out=self.folder(step), **common | fields))


def run(options: ControllerStudyOptions) -> dict[str, Any]:
    """Run every step that is not finished, write the page and `result.json`, and return the results by step.

    The same command continues an interrupted study.
    """
    check(options)
    out = start_run(options, ("bench", "page"))
    study = Study(options)
    table = out / "table"
    study.play("sweep", run_sweep, SweepOptions, table=table, agreement=True)
    fields = {"table": table, "skip_weight": options.skip_weight, "seeds": options.seeds}
    for algorithm in ALGORITHMS:
        study.play(
            f"train-policy-{algorithm}", run_training, TrainPolicyOptions, **fields, algorithm=algorithm
        )
    study.play("ablation", run_ablation, ObservationAblationOptions, **fields, algorithm="full-info")
    policy = study.folder("train-policy-ppo")
    study.play("recommend", run_recommend, RecommendOptions, policy=policy, table=table)
    best = study.results["train-policy-ppo"]["reward"]["best_fixed"]["insert_layer"]
    layers = ",".join(map(str, sorted({0, best})))
    held_out = {"data": held_out_file(options), "image_root": image_root(options), "fraction": 1.0}
    study.play("evaluate", run_evaluate, EvaluateOptions, policy=policy, insert_layers=layers, **held_out)
    study.results["weights"] = compare_skip_weights(options, table)
    write_page(study, options.page)
    result = {"steps": study.results, "machine": machine_facts()}
    write_result(out, result)
    return result


def split(options: ControllerStudyOptions) -> tuple[list[Prompt], list[Prompt]]:
    """Return the training prompts of every policy of the study, and the held-out prompts."""
    fields = {name: getattr(options, name) for name in (*DataOptions.__dataclass_fields__, "out", "seed")}
    train, held_out, _ = split_prompts(TrainPolicyOptions(**fields))
    return train, held_out


def held_out_file(options: ControllerStudyOptions) -> Path:
    """Return an instruction file of the records about held-out images; write it first if it is missing."""
    path = Path(options.out) / "held_out" / "instructions.json"
    if not path.is_file():
        images = {prompt.image_key for prompt in split(options)[1]}
        records = json.loads(options.data.read_text("utf-8"))
        selected = [record for record in read_data(options) if record.image_key in images]
        write_json(path, [records[record.index] for record in selected])
    return path


def image_root(options: ControllerStudyOptions) -> Path:
    """Return the folder below which the images of the data file are."""
    return options.data.parent if options.image_root is None else options.image_root


def compare_skip_weights(options: ControllerStudyOptions, folder: Path) -> dict[str, Any]:
    """Compare one policy for a range of skip weights with policies for a single one, on the study's split.

    The result is read if the comparison has finished. `folder` holds the reward table.
    """
    out = Path(options.out) / "weights"
    if not (out / "result.json").is_file():
        print("\n== weights", flush=True)
        train, held_out = split(options)
        prompts = [*train, *held_out]
        backbone = load_backbone(options.backbone, device=options.device, dtype=options.dtype)
        table = RewardTable(backbone, prompts, folder=folder)
        in_training = np.arange(len(prompts)) < len(train)
        observations = Observation()(backbone, prompts)
        skip_weights = (0.0, 2 * options.skip_weight)
        result = lambda_study(table, observations, in_training, skip_weights=skip_weights, seed=options.seed)
        write_result(out, result)
    return read_result(out)


def write_page(study: Study, page: Path) -> None:
    """Fill the blocks of `page` marked as `<!-- sweep -->` to `<!-- end -->`, and copy the pictures.

    Raises:
        ValueError: the page has a block that the study does not fill.
    """
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for picture, step in STEP_OF_PICTURE.items():
        with atomic_file(folder / f"{picture}.png") as temporary:
            shutil.copyfile(study.folder(step) / f"{picture}.png", temporary)
    texts = blocks(study)

    def fill(block: re.Match[str]) -> str:
        name = block["name"]
        if name not in texts:
            raise ValueError(f"{page}: block {name!r} is none of {', '.join(texts)}")
        if texts[name] is None:
            return block[0]
        return f"<!-- {name} -->\n{texts[name]}\n<!-- end -->"

    text = re.sub(r"<!-- (?P<name>\S+) -->\n.*?<!-- end -->", fill, page.read_text("utf-8"), flags=re.DOTALL)
    with atomic_file(page) as temporary:
        temporary.write_text(text, "utf-8")


def blocks(study: Study) -> dict[str, str | None]:
    """Return the text of each block of the page; a block with None stays as it is."""
    options, results, bench = study.options, study.results, study.options.bench
    prompts = results["train-policy-ppo"]["prompts"]
    return {
        "data": f"{Path(options.data).parent.name}, {options.fraction:.0%} of the records: "
        f"{prompts['train']} training prompts and {prompts['held_out']} held-out prompts with other images. "
        f"Machine: {describe_machine(machine_facts())}.",
        "sweep": fenced(sweep_summary(results["sweep"])),
        "ablation": (study.folder("ablation") / "ablation.md").read_text("utf-8").strip(),
        "weights": f"{results['weights']['markdown'].strip()}\n\nThe largest loss of the one policy is "
        f"{results['weights']['least']:+.1%}.",
        "recommend": fenced(recommend_summary(results["recommend"])),
        "evaluate": fenced(evaluate_summary(results["evaluate"])),
        "bench": None if bench is None else (bench / "table.md").read_text("utf-8").strip(),
        **{algorithm: training_page(study, algorithm) for algorithm in ALGORITHMS},
    }


def fenced(text: str) -> str:
    """Return text as a block of code in Markdown."""
    return f"```text\n{text}\n```"


def training_page(study: Study, algorithm: str) -> str:
    """Return the comparison that train-policy wrote for the policies of an algorithm."""
    return (study.folder(f"train-policy-{algorithm}") / "judgement.md").read_text("utf-8").strip()
