"""The controller on one data set from end to end: every command's run, and the figures of its page.

The page holds what the commands wrote, so that no figure in it is typed by hand.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
PICTURES = ("sweep", "policy_rewards", "recommend", "pareto", "evaluate")


@dataclass(kw_only=True)
class ControllerStudyOptions(RunOptions, BackboneOptions, DataOptions):
    """Sweep, policies of every algorithm, ablations, recommendation and evaluation on one data set."""

    skip_weight: float = 0.5
    """Weight λ of the skip bonus that policies are judged at."""
    seeds: int = 5
    """Policies of each algorithm."""
    bench: Path | None = None
    """Run folder of benchmarks/reward_table.py whose table goes into the document."""
    page: Path = Path("docs/controller.md")
    """Page whose marked blocks are filled; pictures go to a folder beside it of the same name."""


@dataclass
class Study:
    """The study's folder, and the results of its steps so far."""

    options: ControllerStudyOptions
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def folder(self, step: str) -> Path:
        """The run folder of a step."""
        return Path(self.options.out) / step

    def play(self, step: str, command: Callable[[Any], dict[str, Any]], kind: Any, **own: Any) -> None:
        """Run a command in a folder of its own; what is finished is read."""
        common = {
            name: getattr(self.options, name)
            for name in (*BackboneOptions.__dataclass_fields__, *DataOptions.__dataclass_fields__, "seed")
        }
        print(f"\n== {step}", flush=True)
        self.results[step] = command(kind(out=self.folder(step), **common | own))


def run(options: ControllerStudyOptions) -> dict[str, Any]:
    """Play every step that is not done, write the document, `result.json`, and return the results by step.

    The same command again continues a run that was cut off.
    """
    check(options)
    out = start_run(options, ("bench", "page"))
    study = Study(options)
    table = out / "table"
    study.play("sweep", run_sweep, SweepOptions, table=table, agreement=True)
    shared = {"table": table, "skip_weight": options.skip_weight, "seeds": options.seeds}
    for algorithm in ALGORITHMS:
        own = shared | {"algorithm": algorithm}
        study.play(f"train-policy-{algorithm}", run_training, TrainPolicyOptions, **own)
    study.play("ablation", run_ablation, ObservationAblationOptions, **shared, algorithm="full-info")
    policy = study.folder("train-policy-ppo")
    study.play("recommend", run_recommend, RecommendOptions, policy=policy, table=table)
    best = study.results["train-policy-ppo"]["reward"]["best_fixed"]["insert_layer"]
    layers = ",".join(map(str, sorted({0, best})))
    unseen = {"data": held_out_file(options), "image_root": image_root(options), "fraction": 1.0}
    study.play("evaluate", run_evaluate, EvaluateOptions, policy=policy, insert_layers=layers, **unseen)
    study.results["weights"] = weights(options, table)
    write_page(study, options.page)
    result = {"steps": study.results, "machine": machine_facts()}
    write_result(out, result)
    return result


def split(options: ControllerStudyOptions) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts that every policy of the study is trained on, and those it is judged by."""
    own = {name: getattr(options, name) for name in (*DataOptions.__dataclass_fields__, "out", "seed")}
    train, held_out, _ = split_prompts(TrainPolicyOptions(**own))
    return train, held_out


def held_out_file(options: ControllerStudyOptions) -> Path:
    """The records about the images that no policy was trained on, as a file of instructions."""
    path = Path(options.out) / "held_out" / "instructions.json"
    if not path.is_file():
        images = {prompt.image_key for prompt in split(options)[1]}
        records = json.loads(options.data.read_text("utf-8"))
        write_json(path, [records[own.index] for own in read_data(options) if own.image_key in images])
    return path


def image_root(options: ControllerStudyOptions) -> Path:
    """The folder below which the images of the data file lie."""
    return options.data.parent if options.image_root is None else options.image_root


def weights(options: ControllerStudyOptions, folder: Path) -> dict[str, Any]:
    """One policy for a range of skip weights beside policies for one each, on the study's split."""
    out = Path(options.out) / "weights"
    if not (out / "result.json").is_file():
        print("\n== weights", flush=True)
        train, held_out = split(options)
        prompts = [*train, *held_out]
        backbone = load_backbone(options.backbone, device=options.device, dtype=options.dtype)
        table = RewardTable(backbone, prompts, folder=folder)
        seen = np.arange(len(prompts)) < len(train)
        views = Observation()(backbone, prompts)
        high = 2 * options.skip_weight
        found = lambda_study(table, views, seen, skip_weights=(0.0, high), seed=options.seed)
        write_result(out, found)
    return read_result(out)


def write_page(study: Study, page: Path) -> None:
    """Fill the blocks of `page` marked as `<!-- sweep -->` to `<!-- end -->`, and copy the pictures.

    Raises `ValueError` for a page with a block that nothing fills.
    """
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    places = {"sweep": "sweep", "policy_rewards": "train-policy-ppo", "evaluate": "evaluate"}
    for picture in PICTURES:
        with atomic_file(folder / f"{picture}.png") as temporary:
            found = study.folder(places.get(picture, "recommend")) / f"{picture}.png"
            shutil.copyfile(found, temporary)
    filled = blocks(study)

    def fill(block: re.Match[str]) -> str:
        name = block["name"]
        if name not in filled:
            raise ValueError(f"{page}: block {name!r} is none of {', '.join(filled)}")
        if filled[name] is None:
            return block[0]
        return f"<!-- {name} -->\n{filled[name]}\n<!-- end -->"

    text = re.sub(r"<!-- (?P<name>\S+) -->\n.*?<!-- end -->", fill, page.read_text("utf-8"), flags=re.DOTALL)
    with atomic_file(page) as temporary:
        temporary.write_text(text, "utf-8")


def blocks(study: Study) -> dict[str, str | None]:
    """Everything on the page that was computed; None stays as it is."""
    options, results, bench = study.options, study.results, study.options.bench
    prompts = results["train-policy-ppo"]["prompts"]
    of = f"{Path(options.data).parent.name}, {options.fraction:.0%} of the records"
    return {
        "data": f"{of}: {prompts['train']} training prompts and {prompts['held_out']} held out, with other "
        f"images. Machine: {describe_machine(machine_facts())}.",
        "sweep": fenced(sweep_summary(results["sweep"])),
        "ablation": (study.folder("ablation") / "ablation.md").read_text("utf-8").strip(),
        "weights": f"{results['weights']['markdown'].strip()}\n\nThe largest loss of the one policy is "
        f"{results['weights']['least']:+.1%}.",
        "recommend": fenced(recommend_summary(results["recommend"])),
        "evaluate": fenced(evaluate_summary(results["evaluate"])),
        "bench": None if bench is None else (bench / "table.md").read_text("utf-8").strip(),
        **{algorithm: judgement(study, algorithm) for algorithm in ALGORITHMS},
    }


def fenced(text: str) -> str:
    """Text as a block of code."""
    return f"```text\n{text}\n```"


def judgement(study: Study, algorithm: str) -> str:
    """What train-policy wrote of its policies."""
    return (study.folder(f"train-policy-{algorithm}") / "judgement.md").read_text("utf-8").strip()
