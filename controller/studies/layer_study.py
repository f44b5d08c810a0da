"""`deepinsert layer-study`: finetune at every insert layer, and set what the frozen model said beside it.

The paper trusts the frozen model's reward to say which variant will be best. Here each layer's variant is
made, all are judged on the same held-out images, and the ranks are compared.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from deepinsert.backbones import load_backbone
from deepinsert.controller.option_checks import parse_layers, parse_skip_weight_list
from deepinsert.controller.options import (
    BackboneOptions,
    EvaluateOptions,
    FinetuneOptions,
    LayerStudyOptions,
    RunOptions,
    SweepOptions,
    TrainPolicyOptions,
)
from deepinsert.controller.policy.layer_policy import LayerPolicy
from deepinsert.controller.prompt_selection import read_data
from deepinsert.controller.runs.atomic_files import atomic_file, to_json, write_json
from deepinsert.controller.runs.command import run_command
from deepinsert.controller.runs.machine import machine_facts
from deepinsert.envs.data.instructions import InstructionData, split_by_image
from deepinsert.envs.prompts import Prompt, prompts_from
from deepinsert.envs.rewards.table import RewardTable

from .jobs import play
from .layer_study_page import page, plot
from .rank_agreement import DataAndSamples, choice, correlations, interval

FloatArray = NDArray[np.float64]

StepOptions = TypeVar("StepOptions", bound=RunOptions)

FREE = ("jobs", "batch_tokens")
FEWEST_LAYERS = 3  # two can only be ranked alike or not
SHARED = ("random", "distilled", "longer")


def run(options: LayerStudyOptions) -> dict[str, Any]:
    """Play every step that is not done, each in a folder of its own, and write `layer_study.md`,
    `layer_study.png` and `result.json`; return the result.

    The same command again continues a study that was cut off, and costs nothing when it has finished. Raises
    `ValueError` where the folder holds another study, or for options that cannot be used; `DatasetError` for
    data that cannot.
    """
    return run_command(options, partial(study_layers, options), page, free=FREE)


def study_layers(options: LayerStudyOptions, out: Path) -> dict[str, Any]:
    """Run the steps, write `layer_study.md` and `layer_study.png`, and return the result."""
    study = Study.prepared(options)
    results = play(study.first_steps(), options.jobs, out / "logs")
    results |= play(study.evaluations(), options.jobs, out / "logs")
    result: dict[str, Any] = to_json(study.result(results))
    plot(result, out / "layer_study.png")
    with atomic_file(out / "layer_study.md") as temporary:
        temporary.write_text(page(result), "utf-8")
    return result


@dataclass
class Study:
    """A study's folder, its insert layers (K), and the files of instructions it is made of."""

    options: LayerStudyOptions
    layers: tuple[int, ...]
    num_layers: int
    train: Path
    held_out: Path

    @classmethod
    def prepared(cls, options: LayerStudyOptions) -> Study:
        """The study with its data written, divided by image."""
        backbone = load_backbone(options.backbone, device="cpu", dtype=options.dtype)
        layers = parse_layers(options.insert_layers, backbone.num_layers)
        if len(layers) < FEWEST_LAYERS:
            raise ValueError(
                f"--insert-layers {options.insert_layers!r}: give at least {FEWEST_LAYERS} layers to rank"
            )
        train, held_out = write_split(options)
        return cls(options, layers, backbone.num_layers, train, held_out)

    def folder(self, step: str) -> Path:
        """The run folder of a step."""
        return Path(self.options.out) / step

    @property
    def listed(self) -> str:
        """The layers as `--insert-layers` takes them."""
        return ",".join(map(str, self.layers))

    @property
    def shared(self) -> list[str]:
        """Names of the models for all depths."""
        options = self.options
        wanted = (options.random, options.distillation > 0, options.longer is not None)
        return [name for name, asked in zip(SHARED, wanted, strict=True) if asked]

    def step(self, kind: type[StepOptions], name: str, **own: Any) -> StepOptions:
        """Options of the command of a step, which writes to a folder of its own."""
        common = {field: getattr(self.options, field) for field in BackboneOptions.__dataclass_fields__}
        common |= {"seed": self.options.seed, "max_bad": self.options.max_bad}
        arguments = {**common, "image_root": image_root(self.options), **own}
        return kind(out=self.folder(name), **arguments)

    def first_steps(self) -> dict[str, Any]:
        """What needs nothing but the data: the longest first, so that the last to end are short."""
        steps: dict[str, Any] = {name: self.finetune(name, "random") for name in reversed(self.shared)}
        steps |= {f"finetune-{layer}": self.finetune(f"finetune-{layer}", layer) for layer in self.layers}
        steps["train-policy"] = self.policy()
        steps["sweep"] = self.step(SweepOptions, "sweep", data=self.held_out, insert_layers=self.listed)
        return steps

    def finetune(self, name: str, insert_layer: int | Literal["random"]) -> FinetuneOptions:
        """A variant; all have the same data, seed and batches, and but for `longer` as many steps."""
        options = self.options
        depths: dict[str, Any] = {"insert_layers": self.listed} if insert_layer == "random" else {}
        if name == "distilled":
            depths["distillation"] = options.distillation
        return self.step(
            FinetuneOptions,
            name,
            data=self.train,
            insert_layer=insert_layer,
            method=options.method,
            learning_rate=options.learning_rate,
            steps=options.longer if name == "longer" else options.steps,
            gradient_accumulation=1,
            save_every=options.save_every,
            **depths,
        )

    def policy(self) -> TrainPolicyOptions:
        """The policy whose expectation is compared: the exact gradient over the training images' rewards."""
        weights = parse_skip_weight_list(self.options.skip_weights)
        least, most = (np.format_float_positional(weight, trim="-") for weight in (weights[0], weights[-1]))
        span = "none" if len(weights) == 1 else f"{least}-{most}"
        return self.step(
            TrainPolicyOptions,
            "train-policy",
            data=self.train,
            fraction=self.options.policy_fraction,
            algorithm="full-info",
            insert_layers=self.listed,
            skip_weight=weights[len(weights) // 2],
            skip_weight_range=span,
            seeds=1,
        )

    def evaluations(self) -> dict[str, Any]:
        """Every variant on the held-out images; times are not compared, so one repeat is enough."""
        own: dict[str, Any] = {
            "data": self.held_out,
            "max_new_tokens": self.options.max_new_tokens,
            "timing_repeats": 1,
        }
        folders = tuple(self.folder(f"finetune-{layer}") for layer in self.layers)
        steps = {
            "evaluate-finetuned": self.step(EvaluateOptions, "evaluate-finetuned", variants=folders, **own)
        }
        for name in self.shared:
            checkpoint = {"backbone": str(self.folder(name) / "checkpoint"), "insert_layers": self.listed}
            steps[f"evaluate-{name}"] = self.step(EvaluateOptions, f"evaluate-{name}", **own, **checkpoint)
        return steps

    def result(self, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Everything the study found."""
        prompts = prompts_from(read_held_out(self), per="turn")
        figures = self.figures(prompts)
        bootstrap = DataAndSamples([prompt.image_key for prompt in prompts], seed=self.options.seed)
        means = {name: bootstrap.means(values) for name, values in figures.items()}
        policy = LayerPolicy.load(self.folder("train-policy"))
        expected = np.array(policy.training.loss)
        flops = [row["flops_ratio"] for row in results["sweep"]["by_layer"]]
        weights = parse_skip_weight_list(self.options.skip_weights)
        steps = {name: step for name, step in results.items() if "train_loss" in step}
        return {
            "insert_layers": list(self.layers),
            "num_layers": self.num_layers,
            "prompts": len(prompts),
            "images": len({prompt.image_key for prompt in prompts}),
            "training_prompts": results[f"finetune-{self.layers[0]}"]["prompts"],
            "policy_prompts": policy.training.prompts,
            "finetuning": {
                "method": self.options.method,
                "learning_rate": next(iter(steps.values()))["learning_rate"],
                "steps": self.options.steps,
                "batch_size": self.options.batch_size,
                "seconds": {name: step["seconds"] for name, step in steps.items()},
                "longer": self.options.longer,
                "distillation": self.options.distillation,
            },
            "by_layer": [
                {"insert_layer": layer, "depth": layer / self.num_layers, "flops_ratio": flops[column]}
                | {"expected_loss": float(expected[column])}
                | {name: mean_of(mean[:, column]) for name, mean in means.items()}
                for column, layer in enumerate(self.layers)
            ],
            "rank_correlations": self.rank_correlations(means, expected),
            "by_skip_weight": [self.at_skip_weight(means, expected, weight) for weight in weights],
            "shared": self.shared_beside(means),
            "machine": machine_facts(),
        }

    def figures(self, prompts: Sequence[Prompt]) -> dict[str, FloatArray]:
        """Loss and accuracy (P, K) of each held-out prompt at each layer, by what was judged."""
        table = RewardTable.load(self.folder("sweep") / "table", self.layers)
        rows = {name: row for row, name in enumerate(table.prompt_ids)}
        order = [rows[prompt.id] for prompt in prompts]
        figures = {"zero_shot_loss": table.losses[order], "zero_shot_accuracy": table.correct[order]}
        names = [f"finetune-{layer}" for layer in self.layers]
        figures |= self.predicted("finetuned", names, prompts)
        for name in self.shared:
            figures |= self.predicted(name, [f"fixed:{layer}" for layer in self.layers], prompts)
        return figures

    def predicted(
        self, kind: str, variants: Sequence[str], prompts: Sequence[Prompt]
    ) -> dict[str, FloatArray]:
        """Loss and accuracy (P, K) that evaluate wrote of its variants (K)."""
        found: dict[str, list[list[float]]] = {"loss": [], "correct": []}
        for variant in variants:
            path = self.folder(f"evaluate-{kind}") / "predictions" / f"{variant.replace(':', '-')}.jsonl"
            rows = {row["id"]: row for row in map(json.loads, path.read_text("utf-8").strip().split("\n"))}
            for name, columns in found.items():
                columns.append([float(rows[prompt.id][name]) for prompt in prompts])
        return {
            f"{kind}_loss": np.array(found["loss"]).T,
            f"{kind}_accuracy": np.array(found["correct"]).T,
        }

    def rank_correlations(self, means: dict[str, FloatArray], expected: FloatArray) -> dict[str, Any]:
        """How each figure that costs no finetuning ranks the layers against finetuned loss and accuracy."""
        predictors = {
            "zero_shot_reward": -means["zero_shot_loss"],
            "zero_shot_accuracy": means["zero_shot_accuracy"],
            "policy_expectation": np.broadcast_to(-expected, means["zero_shot_loss"].shape),
        }
        truths = {"accuracy": means["finetuned_accuracy"], "reward": -means["finetuned_loss"]}
        return {
            predictor: {truth: correlations(values, true) for truth, true in truths.items()}
            for predictor, values in predictors.items()
        }

    def at_skip_weight(
        self, means: dict[str, FloatArray], expected: FloatArray, weight: float
    ) -> dict[str, Any]:
        """The layer that a skip weight picks before finetuning, and what it loses after it."""
        bonus = weight * np.array(self.layers) / self.num_layers
        truth = bonus - means["finetuned_loss"]
        zero_shot = bonus - means["zero_shot_loss"]
        told = {"zero_shot": zero_shot, "policy": np.broadcast_to(bonus - expected, zero_shot.shape)}
        found: dict[str, Any] = {"skip_weight": weight}
        for name, predicted in told.items():
            chosen = choice(predicted, truth)
            accuracy = means["finetuned_accuracy"]
            lost = accuracy[:, chosen["best"]] - accuracy[:, chosen["picked"]]
            found[name] = {
                **chosen,
                "picked": self.layers[chosen["picked"]],
                "best": self.layers[chosen["best"]],
                "accuracy_lost": mean_of(lost),
                "rank_correlation": correlations(predicted, truth),
            }
        return found

    def shared_beside(self, means: dict[str, FloatArray]) -> dict[str, Any]:
        """Accuracy of each model for all depths minus the separately finetuned variants', by layer."""
        beside = {}
        for name in self.shared:
            difference = means[f"{name}_accuracy"] - means["finetuned_accuracy"]
            beside[name] = {
                "accuracy_difference": [mean_of(column) for column in difference.T],
                "least": float(difference[0].min()),
                "mean": mean_of(difference.mean(axis=1)),
            }
        return beside


def mean_of(values: FloatArray) -> dict[str, Any]:
    """A mean and its interval, of the data and its draws (1 + samples)."""
    return {"mean": float(values[0]), "interval": interval(values[1:])}


def write_split(options: LayerStudyOptions) -> tuple[Path, Path]:
    """The records about images for training, and those held out, as files of instructions.

    Records without an image mean no layer: they are trained on and not judged.
    """
    train, held_out = (Path(options.out) / "data" / f"{part}.json" for part in ("train", "held_out"))
    if not (train.is_file() and held_out.is_file()):
        data = read_data(options)
        seen, unseen = split_by_image(data, options.held_out, options.seed)
        judged = [record for record in unseen if record.images]
        if not judged or not any(record.images for record in seen):
            raise ValueError(
                f"--data {options.data}: {len(data)} records give {len(seen)} to train on and {len(judged)} "
                f"about images to judge by; use more data, or another --held-out than {options.held_out}"
            )
        written = raw_records(options.data)
        write_json(train, [written[record.index] for record in seen])
        write_json(held_out, [written[record.index] for record in judged])
    return train, held_out


def raw_records(path: Path) -> list[Any]:
    """The records of an instruction file as they are written: a list, or one object a line."""
    text = path.read_text("utf-8-sig")
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    records: list[Any] = json.loads(text)
    return records


def read_held_out(study: Study) -> InstructionData:
    """The held-out records."""
    return read_data(study.step(SweepOptions, "sweep", data=study.held_out))


def image_root(options: LayerStudyOptions) -> Path:
    """The folder below which the images of the data file lie."""
    return Path(options.data).parent if options.image_root is None else options.image_root
