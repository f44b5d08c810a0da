"""What `evaluate` judges: a model, and the layer at which each prompt's multimodal tokens enter it."""

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
    """A model to judge at the insert layers (P,) of P prompts.

    `path` is the run folder of finetune or, with a `policy`, which chose the layers, of train-policy; None
    for `--backbone` at one layer. `skip_weight` is what the policy was asked for.
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
        """One insert layer for all `prompts`, by default the one in force."""
        layer = backbone.insert_layer if insert_layer is None else insert_layer
        return cls(name, path, backbone, np.full(prompts, layer))

    @property
    def insert_layer(self) -> int | None:
        """The layer of all prompts; None where a policy chooses."""
        return int(self.insert_layers[0]) if self.policy is None else None


def load_variants(options: EvaluateOptions, prompts: Sequence[Prompt]) -> list[Variant]:
    """The variants that the options name, the baseline first: finetuned ones, then `--backbone` at fixed
    layers, then the policy on it. `--backbone` as it is, where nothing else would be the baseline.

    Raises `ValueError` for a folder that is not of a finished finetune, a layer that the backbone does not
    have, a policy of another backbone, checkpoints of several precisions, and two variants of one name.
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
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--variants: {twice[0]!r} is the name of another variant too; rename that folder")
    return variants


def check_precision(variants: Sequence[Variant]) -> None:
    """Raises `ValueError` for models of several precisions, whose times do not compare."""
    names = {str(variant.backbone.model.dtype).removeprefix("torch."): variant.name for variant in variants}
    if len(names) > 1:
        told = ", ".join(f"{name} is {dtype}" for dtype, name in names.items())
        raise ValueError(f"--variants: {told}; their times do not compare: give one --dtype for all")


def finetuned_variants(options: EvaluateOptions, prompts: int) -> list[Variant]:
    """The variants in `--variants`, each at the insert layer it was finetuned for."""
    found = []
    for name, folder in zip(variant_names(options.variants), options.variants, strict=True):
        checkpoint = folder / "checkpoint"
        if not (folder / "result.json").is_file() or not (checkpoint / "config.json").is_file():
            raise ValueError(
                f"--variants {folder}: not the folder of a finished finetune (it needs result.json and "
                "checkpoint/); run finetune with that --out, the same command continues a run cut off"
            )
        check_complete(checkpoint)
        backbone = load_backbone(checkpoint, device=options.device, dtype=options.dtype)
        found.append(Variant.fixed(name, folder, backbone, prompts))
    return found


def policy_variant(
    folder: Path, backbone: Backbone, prompts: Sequence[Prompt], skip_weight: float | None = None
) -> Variant:
    """The policy in `folder` on the backbone it was trained on, asked for the layer of each prompt."""
    policy = LayerPolicy.load(folder, backbone)
    layers = np.array(policy.layers(backbone, prompts, skip_weight))
    asked = policy.skip_weight if skip_weight is None else skip_weight
    return Variant("policy", folder, backbone, layers, policy, asked)


def variant_names(folders: Sequence[Path], option: str = "--variants") -> list[str]:
    """A short name for each folder: its own, with as many of its parents' as make all names different."""
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"{option} {' '.join(map(str, folders))}: a folder is given twice")
    longest = max((len(path.parts) for path in resolved), default=1)
    for depth in range(1, longest + 1):
        names = ["-".join(part.strip("/") for part in path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"{option} {' '.join(map(str, folders))}: no names tell these folders apart")
