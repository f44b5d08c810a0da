"""Variants that `evaluate` compares: a model, and the insert layer of each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepinsert.backbones import Backbone, load_backbone
from deepinsert.controller.option_checks import parse_layers
from deepinsert.controller.options import EvaluateOptions
from deepinsert.controller.policy.layer_policy import LayerPolicy
from deepinsert.controller.runs.manifest import check_complete
from deepinsert.envs.prompts import Prompt


@dataclass(frozen=True)
class Variant:
    """A model that is evaluated at the insert layers (P) of P prompts.

    Attributes:
        name: the name in results; it is unique.
        path: the run folder of finetune, or of train-policy for a variant with a policy; None for
            `--backbone` at one layer.
        backbone: the model.
        insert_layers: the insert layer of each prompt (P).
        policy: the policy that chose the layers, if there is one.
        skip_weight: the skip weight λ at which the policy chose the layers.
    """

    name: str
    path: Path | None
    backbone: Backbone
    insert_layers: NDArray[np.int64]
    policy: LayerPolicy | None = None
    skip_weight: float | None = None

    @classmethod
    def fixed(
        cls, name: str, path: Path | None, backbone: Backbone, prompts: int, insert_layer: int | None = None
    ) -> Variant:
        """Return a variant with one insert layer for all prompts.

        Args:
            name: the name in results.
            path: the run folder of finetune, or None.
            backbone: the model.
            prompts: the number of prompts P.
            insert_layer: the insert layer; by default the current one of the backbone.
        """
        layer = backbone.insert_layer if insert_layer is None else insert_layer
        return cls(name, path, backbone, np.full(prompts, layer))

    @property
    def insert_layer(self) -> int | None:
        """The insert layer of all prompts; None if a policy chooses."""
        return int(self.insert_layers[0]) if self.policy is None else None


def load_variants(options: EvaluateOptions, prompts: Sequence[Prompt]) -> list[Variant]:
    """Load the variants that the options name; the first one is the baseline.

    They are finetuned variants, then `--backbone` at fixed layers, then the policy on `--backbone`. Without
    the first two, `--backbone` at its own layer is the baseline.

    Raises:
        ValueError: a folder does not hold a finished finetune, the backbone does not have a layer, a policy
            belongs to another backbone, checkpoints differ in precision, or two variants have the same name.
    """
    variants = finetuned_variants(options, len(prompts))
    check_precision(variants)
    if not variants or options.insert_layers is not None or options.policy is not None:
        backbone = load_backbone(options.backbone, device=options.device, dtype=options.dtype)
        if options.insert_layers is not None:
            layers = parse_layers(options.insert_layers, backbone.num_layers)
            variants += [
                Variant.fixed(f"fixed:{layer}", None, backbone, len(prompts), layer) for layer in layers
            ]
        elif not variants:
            variants = [Variant.fixed(Path(options.backbone).name, None, backbone, len(prompts))]
        if options.policy is not None:
            variants.append(policy_variant(options.policy, backbone, prompts, options.skip_weight))
    names = [variant.name for variant in variants]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"--variants: {repeated[0]!r} is the name of another variant too; rename that folder"
        )
    return variants


def check_precision(variants: Sequence[Variant]) -> None:
    """Raise `ValueError` for models of several precisions, because their times are not comparable."""
    names = {str(variant.backbone.model.dtype).removeprefix("torch."): variant.name for variant in variants}
    if len(names) > 1:
        precisions = ", ".join(f"{name} is {dtype}" for dtype, name in names.items())
        raise ValueError(
            f"--variants: {precisions}; their times are not comparable: give one --dtype for all"
        )


def finetuned_variants(options: EvaluateOptions, prompts: int) -> list[Variant]:
    """Load the variants in `--variants`, each at the insert layer of its finetuning."""
    variants = []
    for name, folder in zip(variant_names(options.variants), options.variants, strict=True):
        checkpoint = folder / "checkpoint"
        if not (folder / "result.json").is_file() or not (checkpoint / "config.json").is_file():
            raise ValueError(
                f"--variants {folder}: the folder does not hold a finished finetune, with result.json and "
                "checkpoint/; run finetune with that --out, which also continues an interrupted run"
            )
        check_complete(checkpoint)
        backbone = load_backbone(checkpoint, device=options.device, dtype=options.dtype)
        variants.append(Variant.fixed(name, folder, backbone, prompts))
    return variants


def policy_variant(
    folder: Path, backbone: Backbone, prompts: Sequence[Prompt], skip_weight: float | None = None
) -> Variant:
    """Return a variant whose layers a policy chooses.

    Args:
        folder: the run folder of train-policy.
        backbone: the backbone of the policy.
        prompts: the prompts (P).
        skip_weight: the skip weight λ; by default that of the policy.
    """
    policy = LayerPolicy.load(folder, backbone)
    layers = np.array(policy.layers(backbone, prompts, skip_weight))
    weight = policy.skip_weight if skip_weight is None else skip_weight
    return Variant("policy", folder, backbone, layers, policy, weight)


def variant_names(folders: Sequence[Path], option: str = "--variants") -> list[str]:
    """Return a short name per folder: its own, with as many parents as make all names different.

    Raises:
        ValueError: a folder occurs twice; the message names the `option`.
    """
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"{option} {' '.join(map(str, folders))}: a folder is named twice")
    longest = max((len(path.parts) for path in resolved), default=1)
    for depth in range(1, longest + 1):
        names = ["-".join(part.strip("/") for part in path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"{option} {' '.join(map(str, folders))}: no names distinguish these folders")
