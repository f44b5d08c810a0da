"""The layer policy: a small MLP from a prompt's text embedding to an insert layer.

It is stored as `policy.safetensors` and `policy.json` alone, both checked field by field when read, so that
a policy from somewhere else can be loaded without running any code from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from envs.observations import Normaliser, prompt_embeddings

from .policy_files import WEIGHTS, Fields, read_description, read_tensors, write_policy_files
from .runs import versions
from .statistics import Interval

if TYPE_CHECKING:
    from PIL.Image import Image

    from backbones import Backbone
    from envs.prompts import Prompt

FORMAT = 1
MAX_LAYERS = 4096
MAX_WIDTH = 2**20

FloatArray = NDArray[np.float32]
Network = tuple[tuple[torch.Tensor, torch.Tensor], ...]


@dataclass(frozen=True)
class Training:
    """What training found out, for telling what to expect of a layer.

    `loss` (K) is the mean over the training prompts at each candidate in nats, `flops_ratio` (K) their mean
    prefill FLOPs against insert layer 0 (None where the table did not know them), `best_fixed` the candidate
    with the highest mean reward on them. `advantage` is the policy's mean reward on held-out prompts minus
    that of `best_fixed`, with its 95 % interval; None before it was judged.
    """

    prompts: int
    loss: tuple[float, ...]
    flops_ratio: tuple[float, ...] | None
    best_fixed: int
    advantage: Interval | None


@dataclass(frozen=True)
class Expected:
    """What to expect of an insert layer: mean `loss` of the training prompts there (nats), this prompt's
    prefill FLOPs against insert layer 0, and `depth` L / N."""

    loss: float
    flops_ratio: float
    depth: float


@dataclass(frozen=True)
class Recommendation:
    """A layer for one prompt. `probability` is the policy's own for `insert_layer`, `probabilities` for every
    candidate."""

    insert_layer: int
    probability: float
    probabilities: dict[int, float]
    expected: Expected


@dataclass(eq=False)
class LayerPolicy:
    """Chooses one of the candidates `insert_layers` (K) for each prompt of one backbone.

    `network` holds weight (out, in) and bias (out) of each linear layer, tanh between them; the last gives K
    logits. Observations are prompt embeddings (P, D) as `envs.observations.prompt_embeddings` gives them;
    `normaliser` is applied here. `backbone` may be left out: it is then loaded by `backbone_name` when first
    needed.
    """

    insert_layers: tuple[int, ...]
    num_layers: int
    skip_weight: float
    bonus: Literal["depth", "flops"]
    normaliser: Normaliser
    network: Network
    backbone_name: str
    backbone_fingerprint: str
    seed: int
    training: Training
    versions: dict[str, str] = field(default_factory=versions, repr=False)
    backbone: Backbone | None = field(default=None, repr=False)

    def probabilities(self, observations: ArrayLike) -> FloatArray:
        """Probability (P, K) of every candidate for each prompt embedding (P, D).

        Raises `ValueError` for observations of another shape or with a value that is not finite.
        """
        values = np.asarray(observations, dtype=np.float32)
        width = len(self.normaliser.mean)
        if values.ndim != 2 or values.shape[1] != width:
            raise ValueError(f"observations of shape {values.shape}: this policy takes (prompts, {width})")
        if not np.isfinite(values).all():
            raise ValueError("observations hold a value that is not finite")
        hidden = torch.from_numpy(np.ascontiguousarray(self.normaliser(values)))
        with torch.inference_mode():
            for weight, bias in self.network[:-1]:
                hidden = torch.tanh(torch.nn.functional.linear(hidden, weight, bias))
            logits = torch.nn.functional.linear(hidden, *self.network[-1])
            return torch.distributions.Categorical(logits=logits).probs.numpy()

    def columns(self, observations: ArrayLike) -> NDArray[np.int64]:
        """Index (P) into `insert_layers` of the most probable candidate."""
        return self.probabilities(observations).argmax(axis=1)

    def act(self, observations: ArrayLike) -> NDArray[np.int64]:
        """The most probable insert layer (P) for each prompt embedding (P, D)."""
        return np.array(self.insert_layers)[self.columns(observations)]

    def layers(
        self, backbone: Backbone, prompts: Sequence[Prompt], skip_weight: float | None = None
    ) -> list[int]:
        """The most probable insert layer of each prompt (P), as `Backbone.generate` asks for it.

        Raises `ValueError` for another backbone than the policy was trained on.
        """
        if skip_weight not in (None, self.skip_weight):
            raise ValueError(
                f"skip weight {skip_weight}: this policy was trained for {self.skip_weight} alone"
            )
        replace(self, backbone=backbone).checked_backbone()
        return self.act(prompt_embeddings(backbone, prompts)).tolist()

    def recommend(self, question: str, image: str | Path | Image | None = None) -> Recommendation:
        """An insert layer for one question, about an image (a path or an open picture) or none."""
        from envs.prompts import Prompt

        return self.recommend_prompts([Prompt.from_question(question, image)])[0]

    def recommend_prompts(self, prompts: Sequence[Prompt]) -> list[Recommendation]:
        """An insert layer for each prompt; their answers, if any, are not looked at."""
        backbone = self.checked_backbone()
        found = []
        for prompt, row in zip(
            prompts, self.probabilities(prompt_embeddings(backbone, prompts)), strict=True
        ):
            column = int(row.argmax())
            layer = self.insert_layers[column]
            expected = Expected(
                self.training.loss[column],
                prompt_flops_ratio(backbone, prompt, layer),
                layer / self.num_layers,
            )
            by_layer = dict(zip(self.insert_layers, row.tolist(), strict=True))
            found.append(Recommendation(layer, float(row[column]), by_layer, expected))
        return found

    def checked_backbone(self) -> Backbone:
        """The backbone this policy belongs to, loaded where none was given.

        Raises `ValueError` where its weights are not those the policy was trained on.
        """
        if self.backbone is None:
            from backbones import load_backbone

            self.backbone = load_backbone(self.backbone_name)
        if self.backbone.fingerprint != self.backbone_fingerprint:
            raise ValueError(
                f"the policy was trained on backbone {self.backbone_name!r} ({self.backbone_fingerprint}), "
                f"not on {self.backbone.name!r} ({self.backbone.fingerprint}): give the backbone it was "
                "trained on, in the same precision, or train a policy for this one"
            )
        return self.backbone

    def mean_rewards(self) -> NDArray[np.float64] | None:
        """Mean reward (K) of the training prompts at each candidate; None where it needs unknown FLOPs."""
        if self.bonus == "depth":
            bonus = np.array(self.insert_layers) / self.num_layers
        elif self.training.flops_ratio is not None:
            bonus = 1 - np.array(self.training.flops_ratio)
        else:
            return None
        return -np.array(self.training.loss) + self.skip_weight * bonus

    def save(self, folder: str | Path) -> None:
        """Write `policy.safetensors` and `policy.json` into `folder`."""
        training = self.training
        description = {
            "format": FORMAT,
            "insert_layers": self.insert_layers,
            "num_layers": self.num_layers,
            "skip_weight": self.skip_weight,
            "bonus": self.bonus,
            "backbone": {"name": self.backbone_name, "fingerprint": self.backbone_fingerprint},
            "network": {
                "observation": len(self.normaliser.mean),
                "hidden": [len(bias) for _, bias in self.network[:-1]],
                "activation": "tanh",
            },
            "training": {
                "prompts": training.prompts,
                "loss": training.loss,
                "flops_ratio": training.flops_ratio,
                "best_fixed": training.best_fixed,
                "advantage": training.advantage,
            },
            "seed": self.seed,
            "versions": self.versions,
        }
        tensors = {"normaliser.mean": self.normaliser.mean, "normaliser.std": self.normaliser.std}
        for index, (weight, bias) in enumerate(self.network):
            tensors[f"network.{index}.weight"] = weight.numpy()
            tensors[f"network.{index}.bias"] = bias.numpy()
        write_policy_files(folder, description, tensors)

    @classmethod
    def load(cls, folder: str | Path, backbone: Backbone | None = None) -> LayerPolicy:
        """The policy in a run folder of train-policy, or in any folder with its two files.

        Runs nothing from them. Raises `FileNotFoundError` where one is absent and `ValueError`, naming file
        and field, where their content is not a layer policy.
        """
        fields = read_description(folder)
        fields.integer("format", FORMAT, FORMAT)
        num_layers = fields.integer("num_layers", 1, MAX_LAYERS)
        layers = fields.integers("insert_layers", 0, num_layers, num_layers + 1)
        if list(layers) != sorted(set(layers)):
            raise ValueError(f"{fields.path}: field 'insert_layers' {list(layers)} is not ascending")
        identity = fields.object("backbone")
        name, fingerprint = identity.text("name", 4096), identity.text("fingerprint")
        identity.finish()
        network = fields.object("network")
        width = network.integer("observation", 1, MAX_WIDTH)
        hidden = network.integers("hidden", 1, MAX_WIDTH, 16)
        network.choice("activation", "tanh")
        network.finish()
        policy = dict(
            skip_weight=fields.number("skip_weight", low=0, high=1e9),
            bonus=cast(Any, fields.choice("bonus", "depth", "flops")),
            seed=fields.integer("seed", -(2**63), 2**63),
            versions=fields.texts("versions"),
            training=_training(fields.object("training"), layers),
        )
        digest = fields.text("weights_sha256", 64)
        fields.finish()
        tensors = read_tensors(folder, _shapes(width, (*hidden, len(layers))), digest)
        if not (tensors["normaliser.std"] > 0).all():
            raise ValueError(f"{Path(folder) / WEIGHTS}: tensor 'normaliser.std' holds a value of 0 or less")
        return cls(
            insert_layers=layers,
            num_layers=num_layers,
            normaliser=Normaliser(tensors["normaliser.mean"], tensors["normaliser.std"]),
            network=tuple(
                (
                    torch.from_numpy(tensors[f"network.{index}.weight"]),
                    torch.from_numpy(tensors[f"network.{index}.bias"]),
                )
                for index in range(len(hidden) + 1)
            ),
            backbone_name=name,
            backbone_fingerprint=fingerprint,
            backbone=backbone,
            **policy,
        )


def prompt_flops_ratio(backbone: Backbone, prompt: Prompt, insert_layer: int) -> float:
    """Prefill FLOPs of one prompt, without its answer, at `insert_layer` against insert layer 0."""
    from backbones import CostModel
    from envs.prompts import encode

    ids = encode(backbone.processor, [prompt], with_answers=False)["input_ids"]
    multimodal = int(torch.isin(ids, torch.tensor(sorted(backbone.placeholder_ids))).sum())
    return CostModel.from_model(backbone.model).flops_ratio(
        ids.numel() - multimodal, multimodal, insert_layer, images=len(prompt.images), logits_to_keep=1
    )


def _training(fields: Fields, layers: tuple[int, ...]) -> Training:
    prompts = fields.integer("prompts", 1, 2**63)
    loss = fields.numbers("loss", len(layers), low=0)
    ratios = None if fields.is_null("flops_ratio") else fields.numbers("flops_ratio", len(layers), low=0)
    best_fixed = fields.integer("best_fixed", 0, layers[-1])
    if best_fixed not in layers:
        raise ValueError(f"{fields.path}: field 'training.best_fixed' {best_fixed} is not one of {layers}")
    advantage = None if fields.is_null("advantage") else Interval(*fields.numbers("advantage", 3))
    fields.finish()
    return Training(prompts, loss, ratios, best_fixed, advantage)


def _shapes(width: int, outputs: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of a network from `width` observations through layers with `outputs` units."""
    shapes: dict[str, tuple[int, ...]] = {"normaliser.mean": (width,), "normaliser.std": (width,)}
    for index, (inputs, units) in enumerate(zip((width, *outputs), outputs, strict=False)):
        shapes[f"network.{index}.weight"] = (units, inputs)
        shapes[f"network.{index}.bias"] = (units,)
    return shapes
