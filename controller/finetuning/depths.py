"""Random insert layers for one model of all depths: each row of a batch draws a layer, anew in each epoch.

The draw is uniform or follows a layer policy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepinsert.backbones import Backbone
from deepinsert.controller.option_checks import parse_layers
from deepinsert.controller.options import FinetuneOptions
from deepinsert.controller.policy.layer_policy import LayerPolicy
from deepinsert.envs.prompts import Prompt

UNIFORM = "uniform"
TRAINED_LAYERS = "trained_layers"
"""The entry of `config.json` and `result.json` that lists the layers that a model was trained for."""
STEP_STREAM = 1
"""Separates the random numbers of whole steps from those of rows."""


@dataclass(eq=False)
class DepthSampler:
    """Draws one of K candidate insert layers for each of P prompts in each epoch.

    A draw depends only on the seed, the epoch and the prompt's position in the data: not on the batch, on the
    number of processes, or on where a run was continued.

    Args:
        candidates: the K insert layers.
        multimodal: (P,), whether a prompt has multimodal tokens. The others stay at layer 0, because their
            logits do not depend on the layer.
        seed: decides the draws.
        probabilities: (P, K), of each candidate for each prompt; None makes all equally likely.
        distillation: the weight of the loss towards the model's own answers at layer 0, from 0 to 1.
        source: where the probabilities come from, for the identity of a run.

    Raises:
        ValueError: there is no candidate, a candidate is negative, the shape of `probabilities` does not fit,
            or `distillation` is out of range.
    """

    candidates: tuple[int, ...]
    multimodal: NDArray[np.bool_]
    seed: int = 0
    probabilities: NDArray[np.float64] | None = None
    distillation: float = 0.0
    source: str = UNIFORM
    _layers_by_epoch: dict[int, NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.candidates or min(self.candidates) < 0:
            raise ValueError(f"insert layers {self.candidates}: give at least one, each 0 or above")
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"--distillation {self.distillation}: give a weight between 0 and 1")
        shape = (len(self.multimodal), len(self.candidates))
        if self.probabilities is not None and self.probabilities.shape != shape:
            raise ValueError(
                f"probabilities of shape {self.probabilities.shape} for {shape[0]} prompts and {shape[1]} "
                "candidates: give a row for each prompt"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What the draws depend on, for the manifest of a checkpoint."""
        return {"trained layers": list(self.candidates), "layer distribution": self.source}

    def layers(self, epoch: int) -> NDArray[np.int64]:
        """Return the insert layer (P,) of every prompt in one epoch."""
        if epoch not in self._layers_by_epoch:
            uniforms = np.random.default_rng([self.seed, epoch]).random(len(self.multimodal))
            layers = np.array(self.candidates)[self._columns(uniforms, self.probabilities)]
            self._layers_by_epoch = {epoch: np.where(self.multimodal, layers, 0)}
        return self._layers_by_epoch[epoch]

    def layers_of_rows(self, positions: Sequence[int], epoch: int) -> list[int]:
        """Return the insert layers of the B prompts at `positions`."""
        layers: list[int] = self.layers(epoch)[np.asarray(positions, dtype=np.int64)].tolist()
        return layers

    def layer_of_step(self, step: int) -> int:
        """Return one insert layer for all rows of an optimiser step, the same in every process.

        It serves sharded weights: processes gather the weights of each decoder layer together, so they must
        call each layer equally often.
        """
        uniform = np.random.default_rng([self.seed, step, STEP_STREAM]).random(1)
        mean_probabilities = None
        if self.probabilities is not None:
            rows = self.probabilities[self.multimodal] if self.multimodal.any() else self.probabilities
            mean_probabilities = rows.mean(axis=0, keepdims=True)
        return int(self.candidates[int(self._columns(uniform, mean_probabilities)[0])])

    def _columns(
        self, uniforms: NDArray[np.float64], probabilities: NDArray[np.float64] | None
    ) -> NDArray[np.int64]:
        """Map random numbers (n,) in [0, 1) to columns (n,) by inverting the cumulative distribution."""
        last = len(self.candidates) - 1
        if probabilities is None:
            return np.minimum((uniforms * len(self.candidates)).astype(np.int64), last)
        cumulative = probabilities.cumsum(axis=1)
        # The last sum may be below 1 by a rounding error.
        is_above = uniforms[:, None] >= cumulative / cumulative[:, -1:]
        columns: NDArray[np.int64] = np.minimum(is_above.sum(axis=1), last)
        return columns


def make_depths(
    options: FinetuneOptions, backbone: Backbone, prompts: Sequence[Prompt]
) -> DepthSampler | None:
    """Return the sampler of `--insert-layer random` for these prompts, or None for a fixed layer.

    A policy's probabilities are computed once per prompt, before training changes the backbone.

    Raises:
        ValueError: the backbone does not have a layer, the policy belongs to another backbone, or no prompt
            has
            an image.
    """
    if options.insert_layer != "random":
        return None
    multimodal = np.array([bool(prompt.images) for prompt in prompts])
    if not multimodal.any():
        raise ValueError(
            f"--insert-layer random: none of the {len(prompts)} records of {options.data} has an image, and "
            "text alone enters at layer 0"
        )
    if options.layer_distribution == UNIFORM:
        candidates = parse_layers(options.insert_layers, backbone.num_layers)
        return DepthSampler(candidates, multimodal, options.seed, distillation=options.distillation)
    folder = Path(options.layer_distribution)
    policy = LayerPolicy.load(folder, backbone)
    policy.checked_backbone()
    probabilities = np.full((len(prompts), len(policy.insert_layers)), 1 / len(policy.insert_layers))
    image_prompts = [prompt for prompt in prompts if prompt.images]
    observations = policy.observation(backbone, image_prompts, options.batch_size)
    probabilities[multimodal] = policy.probabilities(observations)
    return DepthSampler(
        policy.insert_layers,
        multimodal,
        options.seed,
        probabilities,
        options.distillation,
        source=policy_digest(folder),
    )


def fixed_layer(options: FinetuneOptions) -> int:
    """Return the insert layer that is installed on the model and written to its checkpoint."""
    return 0 if options.insert_layer == "random" else options.insert_layer


def record_depths(backbone: Backbone, depths: DepthSampler | None) -> None:
    """Write the layers that the model is trained for to its configuration.

    The configuration becomes part of the checkpoint. The layers of an earlier training are removed.
    """
    trained_layers = {TRAINED_LAYERS: list(depths.candidates)} if depths else {}
    backbone.model.config.deepinsert = {"insert_layer": backbone.insert_layer, **trained_layers}


def recorded_layers(backbone: Backbone) -> dict[str, Any]:
    """Return what `record_depths` wrote, as an entry of `result.json`; it is empty for a fixed layer."""
    record = backbone.model.config.deepinsert
    return {TRAINED_LAYERS: record[TRAINED_LAYERS]} if TRAINED_LAYERS in record else {}


def policy_digest(folder: Path) -> str:
    """Return 16 hex digits over the files of a policy."""
    digest = hashlib.sha256()
    for name in ("policy.json", "policy.safetensors"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]
