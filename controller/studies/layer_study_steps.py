"""The steps of the layer study: options of the commands that it runs, and the split of its data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

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
from deepinsert.controller.prompt_selection import read_data
from deepinsert.controller.runs.atomic_files import write_json
from deepinsert.envs.data.instructions import InstructionData, split_by_image

FEWEST_LAYERS = 3
"""Two layers have only two rankings."""
SHARED_MODELS = ("random", "distilled", "longer")
"""Models that are finetuned for all depths at once."""

StepOptions = TypeVar("StepOptions", bound=RunOptions)


@dataclass(frozen=True)
class LayerStudy:
    """The plan of a layer study.

    Attributes:
        options: the options of the study.
        layers: the insert layers (K).
        num_layers: the number of decoder layers N.
        train: the instruction file of the training records.
        held_out: the instruction file of the held-out records.
    """

    options: LayerStudyOptions
    layers: tuple[int, ...]
    num_layers: int
    train: Path
    held_out: Path

    @classmethod
    def prepare(cls, options: LayerStudyOptions) -> LayerStudy:
        """Split the data by image, write both parts, and return the study.

        Raises:
            ValueError: there are too few layers or records.
        """
        backbone = load_backbone(options.backbone, device="cpu", dtype=options.dtype)
        layers = parse_layers(options.insert_layers, backbone.num_layers)
        if len(layers) < FEWEST_LAYERS:
            raise ValueError(
                f"--insert-layers {options.insert_layers!r}: give at least {FEWEST_LAYERS} layers to rank"
            )
        train, held_out = write_split(options)
        return cls(options, layers, backbone.num_layers, train, held_out)

    def folder(self, step: str) -> Path:
        """Return the run folder of a step."""
        return Path(self.options.out) / step

    @property
    def layer_list(self) -> str:
        """The layers as text for `--insert-layers`."""
        return ",".join(map(str, self.layers))

    @property
    def shared_models(self) -> list[str]:
        """The names of the models for all depths that the options select."""
        options = self.options
        is_selected = (options.random, options.distillation > 0, options.longer is not None)
        return [name for name, selected in zip(SHARED_MODELS, is_selected, strict=True) if selected]

    def first_steps(self) -> dict[str, RunOptions]:
        """Return the options of the steps that need only the data.

        The longest step comes first, so that the last ones to end are short.
        """
        steps: dict[str, RunOptions] = {
            name: self.finetuning(name, "random") for name in reversed(self.shared_models)
        }
        for layer in self.layers:
            steps[f"finetune-{layer}"] = self.finetuning(f"finetune-{layer}", layer)
        steps["train-policy"] = self.policy()
        steps["sweep"] = self.sweep()
        return steps

    def sweep(self) -> SweepOptions:
        """Return the options of the sweep over the held-out records."""
        return self._step_options(SweepOptions, "sweep", data=self.held_out, insert_layers=self.layer_list)

    def finetuning(self, name: str, insert_layer: int | Literal["random"]) -> FinetuneOptions:
        """Return the options of one finetuning.

        All have the same data, seed and batches, and the same number of steps except for `longer`.
        """
        options = self.options
        depths: dict[str, Any] = {"insert_layers": self.layer_list} if insert_layer == "random" else {}
        if name == "distilled":
            depths["distillation"] = options.distillation
        return self._step_options(
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
        """Return the options of the policy whose expectation is compared.

        It is trained by the exact gradient on the rewards of the training images.
        """
        weights = parse_skip_weight_list(self.options.skip_weights)
        least, most = (np.format_float_positional(weight, trim="-") for weight in (weights[0], weights[-1]))
        return self._step_options(
            TrainPolicyOptions,
            "train-policy",
            data=self.train,
            fraction=self.options.policy_fraction,
            algorithm="full-info",
            insert_layers=self.layer_list,
            skip_weight=weights[len(weights) // 2],
            skip_weight_range="none" if len(weights) == 1 else f"{least}-{most}",
            seeds=1,
        )

    def evaluations(self) -> dict[str, EvaluateOptions]:
        """Return the options of the evaluations of all variants on the held-out images.

        Times are not compared, so one repeat is enough.
        """
        common: dict[str, Any] = {
            "data": self.held_out,
            "max_new_tokens": self.options.max_new_tokens,
            "timing_repeats": 1,
        }
        variants = tuple(self.folder(f"finetune-{layer}") for layer in self.layers)
        name = "evaluate-finetuned"
        steps = {name: self._step_options(EvaluateOptions, name, variants=variants, **common)}
        for model in self.shared_models:
            name, backbone = f"evaluate-{model}", str(self.folder(model) / "checkpoint")
            steps[name] = self._step_options(
                EvaluateOptions, name, backbone=backbone, insert_layers=self.layer_list, **common
            )
        return steps

    def read_held_out(self) -> InstructionData:
        """Read the held-out records."""
        return read_data(self._step_options(SweepOptions, "sweep", data=self.held_out))

    def _step_options(self, options_class: type[StepOptions], name: str, **fields: Any) -> StepOptions:
        """Return the options of the command of a step, which writes to a folder of its own.

        Args:
            options_class: the class of the command's options.
            name: the step.
            fields: options that differ from those of the study.
        """
        common = {field: getattr(self.options, field) for field in BackboneOptions.__dataclass_fields__}
        common |= {"seed": self.options.seed, "max_bad": self.options.max_bad}
        arguments = {**common, "image_root": image_root(self.options), **fields}
        return options_class(out=self.folder(name), **arguments)


def write_split(options: LayerStudyOptions) -> tuple[Path, Path]:
    """Write training records and held-out records, divided by image, as two instruction files.

    Records without an image do not depend on the layer: they are trained on and not held out. Files that
    exist are kept.

    Raises:
        ValueError: one part has no record about an image.
    """
    train, held_out = (Path(options.out) / "data" / f"{part}.json" for part in ("train", "held_out"))
    if not (train.is_file() and held_out.is_file()):
        data = read_data(options)
        training_records, other_records = split_by_image(data, options.held_out, options.seed)
        held_out_records = [record for record in other_records if record.images]
        if not held_out_records or not any(record.images for record in training_records):
            raise ValueError(
                f"--data {options.data}: {len(data)} records give {len(training_records)} to train on and "
                f"{len(held_out_records)} about held-out images; use more data, or another --held-out than "
                f"{options.held_out}"
            )
        records = raw_records(options.data)
        write_json(train, [records[record.index] for record in training_records])
        write_json(held_out, [records[record.index] for record in held_out_records])
    return train, held_out


def raw_records(path: Path) -> list[Any]:
    """Return the records of an instruction file unchanged: a list, or one object per line."""
    text = path.read_text("utf-8-sig")
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    records: list[Any] = json.loads(text)
    return records


def image_root(options: LayerStudyOptions) -> Path:
    """Return the folder below which the images of the data file are."""
    return Path(options.data).parent if options.image_root is None else options.image_root
