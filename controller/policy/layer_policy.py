"""The layer policy: a small MLP from what is observed of a prompt, and a skip weight, to an insert layer.

It is stored as `policy.safetensors` and `policy.json` alone, both checked field by field when read, so that
a policy from somewhere else can be loaded without running any code from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from deepinsert.controller.runs.folder import versions
from deepinsert.envs.observations import Normaliser, Observation
from deepinsert.envs.rewards.table import Bonus
from deepinsert.envs.skip_weights import SkipWeights

from .expectations import Expected, Training
from .frontier import frontier, skip_weight_for_flops, skip_weight_for_loss
from .policy_files import read_policy, write_policy
from .sb3_files import network_of_model, read_network

if TYPE_CHECKING:
    from PIL.Image import Image

    from deepinsert.backbones import Backbone
    from deepinsert.envs.prompts import Prompt
    from deepinsert.envs.rewards.table import RewardTable

__all__ = ["Expected", "LayerPolicy", "Network", "Recommendation", "Training", "prompt_flops_ratio"]

FloatArray = NDArray[np.float32]
Network = tuple[tuple[torch.Tensor, torch.Tensor], ...]

ACTIVATION_FUNCTIONS = {"tanh": torch.tanh, "relu": torch.relu}


@dataclass(frozen=True)
class Recommendation:
    """A layer for one prompt at `skip_weight`. `probability` is the policy's own for `insert_layer`,
    `probabilities` for every candidate."""

    insert_layer: int
    probability: float
    probabilities: dict[int, float]
    expected: Expected
    skip_weight: float


@dataclass(eq=False)
class LayerPolicy:
    """Chooses one of the candidates `insert_layers` (K) for each prompt of one backbone, at a skip weight λ.

    `skip_weights` is the range of λ it was trained for, `skip_weight` the one asked for where nothing else is
    said. `observation` says what is observed of a prompt (P, D), `normaliser` is applied to that here.
    `network` holds weight (out, in) and bias (out) of each linear layer, `activation` between them; it takes
    the D normalised observations and, for a range, the features of λ, and gives K logits. `table_digest`
    names the reward table it was trained on. `backbone` may be left out: it is then loaded by `backbone_name`
    when first needed.
    """

    insert_layers: tuple[int, ...]
    num_layers: int
    skip_weights: SkipWeights
    skip_weight: float
    bonus: Bonus
    algorithm: str
    observation: Observation
    normaliser: Normaliser
    network: Network
    backbone_name: str
    backbone_fingerprint: str
    table_digest: str
    seed: int
    training: Training
    activation: Literal["tanh", "relu"] = "tanh"
    versions: dict[str, str] = field(default_factory=versions, repr=False)
    backbone: Backbone | None = field(default=None, repr=False)

    def probabilities(self, observations: ArrayLike, skip_weight: ArrayLike | None = None) -> FloatArray:
        """Probability (P, K) of every candidate for each observation (P, D) at λ, one for all or (P,).

        Raises `ValueError` for observations of another shape or with a value that is not finite, and for a
        skip weight outside the range the policy was trained for.
        """
        values = np.asarray(observations, dtype=np.float32)
        width = len(self.normaliser.mean)
        if values.ndim != 2 or values.shape[1] != width:
            raise ValueError(f"observations of shape {values.shape}: this policy takes (prompts, {width})")
        if not np.isfinite(values).all():
            raise ValueError("observations hold a value that is not finite")
        features = self.skip_weights.feature(self._skip_weights(skip_weight, len(values)))
        hidden = torch.from_numpy(np.concatenate([self.normaliser(values), features], axis=1))
        activation = ACTIVATION_FUNCTIONS[self.activation]
        with torch.inference_mode():
            for weight, bias in self.network[:-1]:
                hidden = activation(torch.nn.functional.linear(hidden, weight, bias))
            logits = torch.nn.functional.linear(hidden, *self.network[-1])
            return torch.distributions.Categorical(logits=logits).probs.numpy()

    def columns(self, observations: ArrayLike, skip_weight: ArrayLike | None = None) -> NDArray[np.int64]:
        """Index (P) into `insert_layers` of the most probable candidate at λ."""
        return self.probabilities(observations, skip_weight).argmax(axis=1)

    def act(self, observations: ArrayLike, skip_weight: ArrayLike | None = None) -> NDArray[np.int64]:
        """The most probable insert layer (P) for each observation (P, D) at λ."""
        return np.array(self.insert_layers)[self.columns(observations, skip_weight)]

    def _skip_weights(self, skip_weight: ArrayLike | None, prompts: int) -> NDArray[np.float64]:
        """λ of each prompt (P), all of them in the range."""
        asked = np.asarray(self.skip_weight if skip_weight is None else skip_weight, dtype=np.float64)
        if asked.shape not in ((), (prompts,)):
            raise ValueError(f"skip_weight of shape {asked.shape}: give one number, or one for each prompt")
        for value in np.unique(asked):
            self.skip_weights.check(float(value))
        return np.broadcast_to(asked, prompts)

    def asked_skip_weight(
        self,
        skip_weight: float | None = None,
        flops_ratio: float | None = None,
        max_loss_increase: float | None = None,
    ) -> float:
        """The λ that one of three wishes means: itself, the smallest that keeps mean prefill FLOPs within
        `flops_ratio` of insert layer 0's, or the largest that keeps the mean loss within `max_loss_increase`
        nats of it, both as measured on held-out prompts; the policy's own λ without a wish.

        Raises `ValueError` for more than one wish, for one that cannot be met, naming the nearest that can,
        and for a budget asked of a policy for one λ.
        """
        wishes = dict(skip_weight=skip_weight, flops_ratio=flops_ratio, max_loss_increase=max_loss_increase)
        named = [name for name, value in wishes.items() if value is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} exclude each other: give one of them")
        if skip_weight is not None:
            return self.skip_weights.check(skip_weight)
        if not named:
            return self.skip_weight
        if self.skip_weights.single:
            raise ValueError(
                f"{named[0]}: this policy knows skip weight {self.skip_weight:g} alone; train one over a "
                "range of skip weights to ask for a budget"
            )
        points = self.training.frontier
        if not points:
            raise ValueError(f"{named[0]}: this policy was not measured over its skip weights; ask for one")
        if flops_ratio is not None:
            return skip_weight_for_flops(points, flops_ratio)
        assert max_loss_increase is not None
        return skip_weight_for_loss(points, max_loss_increase)

    def layers(
        self, backbone: Backbone, prompts: Sequence[Prompt], skip_weight: float | None = None
    ) -> list[int]:
        """The most probable insert layer of each prompt (P) at λ, as `Backbone.generate` asks for it.

        Raises `ValueError` for another backbone than the policy was trained on.
        """
        replace(self, backbone=backbone).checked_backbone()
        return self.act(self.observation(backbone, prompts), skip_weight).tolist()

    def recommend(
        self,
        question: str,
        image: str | Path | Image | None = None,
        *,
        skip_weight: float | None = None,
        flops_ratio: float | None = None,
        max_loss_increase: float | None = None,
    ) -> Recommendation:
        """An insert layer for one question, about an image (a path or an open picture) or none.

        At most one of `skip_weight`, `flops_ratio` and `max_loss_increase`, see `asked_skip_weight`.
        """
        from deepinsert.envs.prompts import Prompt

        weight = self.asked_skip_weight(skip_weight, flops_ratio, max_loss_increase)
        return self.recommend_prompts([Prompt.from_question(question, image)], weight)[0]

    def recommend_prompts(
        self, prompts: Sequence[Prompt], skip_weight: float | None = None
    ) -> list[Recommendation]:
        """An insert layer for each prompt at λ; their answers, if any, are not looked at."""
        backbone = self.checked_backbone()
        weight = self.asked_skip_weight(skip_weight)
        rows = self.probabilities(self.observation(backbone, prompts), weight)
        found = []
        for prompt, row in zip(prompts, rows, strict=True):
            column = int(row.argmax())
            layer = self.insert_layers[column]
            expected = Expected(
                self.training.loss[column],
                self.training.loss_increase(self.insert_layers, column),
                prompt_flops_ratio(backbone, prompt, layer),
                layer / self.num_layers,
            )
            by_layer = dict(zip(self.insert_layers, row.tolist(), strict=True))
            found.append(Recommendation(layer, float(row[column]), by_layer, expected, weight))
        return found

    def checked_backbone(self) -> Backbone:
        """The backbone this policy belongs to, loaded where none was given.

        Raises `ValueError` where its weights are not those the policy was trained on.
        """
        if self.backbone is None:
            from deepinsert.backbones import load_backbone

            self.backbone = load_backbone(self.backbone_name)
        if self.backbone.fingerprint != self.backbone_fingerprint:
            raise ValueError(
                f"the policy was trained on backbone {self.backbone_name!r} ({self.backbone_fingerprint}), "
                f"not on {self.backbone.name!r} ({self.backbone.fingerprint}): give the backbone it was "
                "trained on, in the same precision, or train a policy for this one"
            )
        return self.backbone

    def mean_rewards(self, skip_weight: float | None = None) -> NDArray[np.float64] | None:
        """Mean reward (K) of the training prompts at each candidate and λ; None without its bonus."""
        depths = np.array(self.insert_layers) / self.num_layers
        bonus = self.training.mean_bonus(self.bonus, depths)
        if bonus is None:
            return None
        weight = self.skip_weight if skip_weight is None else skip_weight
        return -np.array(self.training.loss) + weight * bonus

    def save(self, folder: str | Path) -> None:
        """Write `policy.safetensors` and `policy.json` into `folder`."""
        write_policy(self, folder)

    @classmethod
    def load(cls, folder: str | Path, backbone: Backbone | None = None) -> LayerPolicy:
        """The policy in a run folder of train-policy, or in any folder with its two files.

        Runs nothing from them. Raises `FileNotFoundError` where one is absent and `ValueError`, naming file
        and field, where their content is not a layer policy.
        """
        return cls(**read_policy(folder), backbone=backbone)

    @classmethod
    def from_sb3(
        cls,
        model: Any,
        *,
        table: RewardTable,
        normaliser: Normaliser,
        backbone: Backbone,
        skip_weights: SkipWeights | float | tuple[float, float],
        observations: ArrayLike | None = None,
        skip_weight: float | None = None,
        bonus: Bonus = "depth",
        observation: Observation | None = None,
        activation: Literal["tanh", "relu"] | None = None,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> LayerPolicy:
        """The layer policy that somebody trained with Stable-Baselines3's PPO, A2C or DQN.

        `model` is the algorithm, or the path of the zip it was saved to; of a zip only the network's tensors
        are read and nothing is run. `table` is what its rewards came from, `normaliser` what its environment
        applied, `skip_weights` the range or the one λ it was trained for. With `observations` (P, D) of the
        table's prompts, before `normaliser`, budgets can be asked for; a table of prompts held out from
        training makes them honest. `activation` is needed where the zip does not name it, `temperature`
        divides DQN's action values to make them logits.

        Raises `ValueError` for a network that is not an MLP from these observations to these candidates.
        """
        skip_weights = SkipWeights.of(skip_weights)
        read = read_network if isinstance(model, (str, Path)) else network_of_model
        found = read(model, activation)
        weight = skip_weights.high if skip_weight is None else skip_weights.check(skip_weight)
        layers = list(found.layers)
        if found.action_values:
            layers[-1] = (layers[-1][0] / temperature, layers[-1][1] / temperature)
        wanted = (len(normaliser.mean) + skip_weights.feature([weight]).shape[1], len(table.insert_layers))
        got = (layers[0][0].shape[1], layers[-1][0].shape[0])
        if got != wanted:
            raise ValueError(
                f"this network takes {got[0]} numbers to {got[1]} actions; the normaliser, the skip weights "
                f"and the table make {wanted[0]} and {wanted[1]}: give those it was trained with"
            )
        policy = cls(
            insert_layers=tuple(table.insert_layers),
            num_layers=table.num_layers,
            skip_weights=skip_weights,
            skip_weight=weight,
            bonus=bonus,
            algorithm="sb3",
            observation=observation or Observation(),
            normaliser=normaliser,
            network=tuple(layers),
            backbone_name=backbone.name,
            backbone_fingerprint=backbone.fingerprint,
            table_digest=table.digest,
            seed=seed,
            training=Training.from_table(table, weight, bonus),
            activation=found.activation,
            backbone=backbone,
        )
        if observations is not None:
            points = frontier(policy, table, observations)
            policy.training = replace(policy.training, frontier=points)
        return policy


def prompt_flops_ratio(backbone: Backbone, prompt: Prompt, insert_layer: int) -> float:
    """Prefill FLOPs of one prompt, without its answer, at `insert_layer` against insert layer 0."""
    from deepinsert.backbones import CostModel
    from deepinsert.envs.prompts import encode

    ids = encode(backbone.processor, [prompt], with_answers=False)["input_ids"]
    multimodal = int(torch.isin(ids, torch.tensor(sorted(backbone.placeholder_ids))).sum())
    return CostModel.from_model(backbone.model).flops_ratio(
        ids.numel() - multimodal, multimodal, insert_layer, images=len(prompt.images), logits_to_keep=1
    )
