"""The layer policy: a small MLP that maps a prompt's observation and a skip weight to an insert layer.

It is stored as `policy.safetensors` and `policy.json` alone. Both are checked field by field when they are
read, so that a policy from an unknown source can be loaded without running any code from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from deepinsert.envs.observations import Normaliser, Observation
from deepinsert.envs.rewards.table import Bonus
from deepinsert.envs.skip_weights import SkipWeights

from .frontier import (
    check_candidates,
    measure_frontier,
    pareto_curves,
    skip_weight_for_flops,
    skip_weight_for_loss,
)
from .outcomes import Expectation, FrontierPoint, Recommendation
from .policy_files import read_policy, write_policy
from .policy_record import Activation, PolicyRecord
from .sb3_files import network_of_model, read_network
from .table_means import fields_of_table

if TYPE_CHECKING:
    from PIL.Image import Image

    from deepinsert.backbones import Backbone
    from deepinsert.envs.prompts import Prompt
    from deepinsert.envs.rewards.table import RewardTable

__all__ = ["LayerPolicy", "prompt_flops_ratio"]

FloatArray = NDArray[np.float32]

ACTIVATION_FUNCTIONS = {"tanh": torch.tanh, "relu": torch.relu}


@dataclass(frozen=True, eq=False)
class LayerPolicy(PolicyRecord):
    """Chooses one of K candidate insert layers per prompt of one backbone, at a skip weight λ.

    The fields are those of `PolicyRecord`, and `backbone`: if it is None, the backbone is loaded by
    `backbone_name` when it is first needed. In shapes, P counts prompts and D the numbers observed of each.
    """

    backbone: Backbone | None = field(default=None, repr=False)

    def probabilities(self, observations: ArrayLike, skip_weight: ArrayLike | None = None) -> FloatArray:
        """Return the probability (P, K) of every candidate for `observations` (P, D).

        `skip_weight` is one λ for all prompts or one per prompt (P); by default the policy's own.

        Raises:
            ValueError: for observations of another shape or with a value that is not finite, and for a skip
                weight outside the range that the policy was trained for.
        """
        values = np.asarray(observations, dtype=np.float32)
        width = len(self.normaliser.mean)
        if values.ndim != 2 or values.shape[1] != width:
            raise ValueError(f"observations of shape {values.shape}: this policy takes (prompts, {width})")
        if not np.isfinite(values).all():
            raise ValueError("observations contain a value that is not finite")
        features = self.skip_weights.features_of(self._skip_weight_per_prompt(skip_weight, len(values)))
        hidden = torch.from_numpy(np.concatenate([self.normaliser(values), features], axis=1))
        activation = ACTIVATION_FUNCTIONS[self.activation]
        with torch.inference_mode():
            for weight, bias in self.network[:-1]:
                hidden = activation(torch.nn.functional.linear(hidden, weight, bias))
            logits = torch.nn.functional.linear(hidden, *self.network[-1])
            probabilities: FloatArray = torch.distributions.Categorical(logits=logits).probs.numpy()
            return probabilities

    def columns(self, observations: ArrayLike, skip_weight: ArrayLike | None = None) -> NDArray[np.int64]:
        """Return the index (P) into `insert_layers` of the most probable candidate; see `probabilities`."""
        columns: NDArray[np.int64] = self.probabilities(observations, skip_weight).argmax(axis=1)
        return columns

    def act(self, observations: ArrayLike, skip_weight: ArrayLike | None = None) -> NDArray[np.int64]:
        """Return the most probable insert layer (P); see `probabilities`."""
        return np.array(self.insert_layers)[self.columns(observations, skip_weight)]

    def _skip_weight_per_prompt(self, skip_weight: ArrayLike | None, prompts: int) -> NDArray[np.float64]:
        """Return λ of each prompt (P) after checking that all of them are in the range."""
        weights = np.asarray(self.skip_weight if skip_weight is None else skip_weight, dtype=np.float64)
        if weights.shape not in ((), (prompts,)):
            raise ValueError(f"skip_weight of shape {weights.shape}: give one number, or one for each prompt")
        for weight in np.unique(weights):
            self.skip_weights.check(float(weight))
        return np.broadcast_to(weights, prompts)

    def resolve_skip_weight(
        self,
        skip_weight: float | None = None,
        flops_ratio: float | None = None,
        max_loss_increase: float | None = None,
    ) -> float:
        """Return the λ for at most one wish; without any, the policy's own λ.

        Args:
            skip_weight: λ itself.
            flops_ratio: asks for the smallest λ whose mean prefill FLOPs are at most this share of insert
                layer 0's.
            max_loss_increase: asks for the largest λ whose mean loss is at most this many nats above insert
                layer 0's.

        Means are those of the frontier, measured on held-out prompts.

        Raises:
            ValueError: for more than one wish, for a wish that cannot be met (the error names the nearest one
                that can), and for a budget if the policy was trained for one λ or has no frontier.
        """
        wishes = dict(skip_weight=skip_weight, flops_ratio=flops_ratio, max_loss_increase=max_loss_increase)
        names = [name for name, value in wishes.items() if value is not None]
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} exclude each other: give one of them")
        if skip_weight is not None:
            return self.skip_weights.check(skip_weight)
        if not names:
            return self.skip_weight
        if self.skip_weights.single:
            raise ValueError(
                f"{names[0]}: this policy was trained for skip weight {self.skip_weight:g} alone; train one "
                "over a range of skip weights to ask for a budget"
            )
        points = self.training.frontier
        if not points:
            raise ValueError(f"{names[0]}: this policy was not measured over its skip weights; ask for one")
        if flops_ratio is not None:
            return skip_weight_for_flops(points, flops_ratio)
        assert max_loss_increase is not None
        return skip_weight_for_loss(points, max_loss_increase)

    def layers(
        self, backbone: Backbone, prompts: Sequence[Prompt], skip_weight: float | None = None
    ) -> list[int]:
        """Return the most probable insert layer of each prompt (P) at λ; `Backbone.generate` calls this.

        Raises:
            ValueError: if the policy was trained on another backbone.
        """
        self._check_fingerprint(backbone)
        layers: list[int] = self.act(self.observation(backbone, prompts), skip_weight).tolist()
        return layers

    def recommend(
        self,
        question: str,
        image: str | Path | Image | None = None,
        *,
        skip_weight: float | None = None,
        flops_ratio: float | None = None,
        max_loss_increase: float | None = None,
    ) -> Recommendation:
        """Recommend an insert layer for one question about an image (a path or an open picture) or none.

        Takes at most one of `skip_weight`, `flops_ratio` and `max_loss_increase`; see `resolve_skip_weight`.
        """
        from deepinsert.envs.prompts import Prompt

        weight = self.resolve_skip_weight(skip_weight, flops_ratio, max_loss_increase)
        return self.recommend_prompts([Prompt.from_question(question, image)], weight)[0]

    def recommend_prompts(
        self, prompts: Sequence[Prompt], skip_weight: float | None = None
    ) -> list[Recommendation]:
        """Recommend an insert layer per prompt at λ; the prompts' answers are ignored."""
        backbone = self.checked_backbone()
        weight = self.resolve_skip_weight(skip_weight)
        rows = self.probabilities(self.observation(backbone, prompts), weight)
        recommendations = []
        for prompt, row in zip(prompts, rows, strict=True):
            column = int(row.argmax())
            layer = self.insert_layers[column]
            expectation = Expectation(
                self.training.loss[column],
                self.training.loss_increase(self.insert_layers, column),
                prompt_flops_ratio(backbone, prompt, layer),
                layer / self.num_layers,
            )
            by_layer = dict(zip(self.insert_layers, row.tolist(), strict=True))
            recommendations.append(Recommendation(layer, float(row[column]), by_layer, expectation, weight))
        return recommendations

    def checked_backbone(self) -> Backbone:
        """Return the backbone of this policy, which is loaded at the first call if `backbone` is None.

        Raises:
            ValueError: if its weights are not those that the policy was trained on.
        """
        self._check_fingerprint(self._given_or_loaded_backbone)
        return self._given_or_loaded_backbone

    @cached_property
    def _given_or_loaded_backbone(self) -> Backbone:
        if self.backbone is not None:
            return self.backbone
        from deepinsert.backbones import load_backbone

        return load_backbone(self.backbone_name)

    def _check_fingerprint(self, backbone: Backbone) -> None:
        if backbone.fingerprint != self.backbone_fingerprint:
            raise ValueError(
                f"the policy was trained on backbone {self.backbone_name!r} ({self.backbone_fingerprint}), "
                f"not on {backbone.name!r} ({backbone.fingerprint}): give the backbone it was "
                "trained on, in the same precision, or train a policy for this one"
            )

    def mean_rewards(self, skip_weight: float | None = None) -> NDArray[np.float64] | None:
        """Return the mean reward (K) of the training prompts at λ in nats; None if the bonus is not known."""
        depths = np.array(self.insert_layers) / self.num_layers
        bonus = self.training.mean_bonus(self.bonus, depths)
        if bonus is None:
            return None
        weight = self.skip_weight if skip_weight is None else skip_weight
        return -np.array(self.training.loss) + weight * bonus

    def measure_frontier(self, table: RewardTable, observations: ArrayLike) -> tuple[FrontierPoint, ...]:
        """Return the policy's means at a grid over its skip weights; see `frontier.measure_frontier`.

        `observations` (P, D) are those of the table's prompts.

        Raises:
            ValueError: if the table has other candidates than the policy.
        """
        check_candidates(table, self.insert_layers, self.num_layers)
        return measure_frontier(
            table, lambda weight: self.columns(observations, weight), self.skip_weights, self.bonus
        )

    def with_frontier(self, table: RewardTable, observations: ArrayLike) -> LayerPolicy:
        """Return this policy with a frontier in its `training`; see `measure_frontier`."""
        points = self.measure_frontier(table, observations)
        return replace(self, training=replace(self.training, frontier=points))

    def pareto_curves(
        self, table: RewardTable, observations: ArrayLike, skip_weight: float | None = None
    ) -> dict[str, Any] | None:
        """Return the curves of `frontier.pareto_curves` for the prompts of `table`.

        `observations` (P, D) are those of the table's prompts, `skip_weight` is one more λ to measure at.

        Raises:
            ValueError: if the table has other candidates than the policy.
        """
        check_candidates(table, self.insert_layers, self.num_layers)
        return pareto_curves(
            table,
            lambda weight: self.columns(observations, weight),
            self.skip_weights,
            self.bonus,
            fixed_skip_weight=self.skip_weight,
            skip_weight=skip_weight,
        )

    def save(self, folder: str | Path) -> None:
        """Write `policy.safetensors` and `policy.json` into `folder`."""
        write_policy(self, folder)

    @classmethod
    def load(cls, folder: str | Path, backbone: Backbone | None = None) -> LayerPolicy:
        """Load a policy from a run folder of train-policy or another folder with its two files.

        No code from the files is run.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if their content is not a layer policy; the error names file and field.
        """
        return cls(**vars(read_policy(folder)), backbone=backbone)

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
        activation: Activation | None = None,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> LayerPolicy:
        """Convert a policy that was trained with stable-baselines3's PPO, A2C or DQN.

        Args:
            model: the algorithm, or the path of the zip that it was saved to; no code from the zip is run.
            table: the reward table that the model's rewards came from.
            normaliser: the statistics that its environment normalised observations with.
            backbone: the backbone that the table belongs to.
            skip_weights: the range of λ, or the one λ, that it was trained for.
            observations: those of the table's prompts (P, D), before normalisation. With them the policy
                can be asked for budgets, which are unbiased if the prompts were held out from training.
            skip_weight: the default λ; by default the largest.
            bonus: the kind of skip bonus.
            observation: describes `observations`.
            activation: needed if the zip does not name it.
            temperature: divides DQN's action values, which makes them logits.
            seed: the seed of its training.

        Raises:
            ValueError: for a network that is not an MLP from these observations to these candidates.
        """
        weights = SkipWeights.of(skip_weights)
        weight = weights.high if skip_weight is None else weights.check(skip_weight)
        read_model = read_network if isinstance(model, (str, Path)) else network_of_model
        network = read_model(model, activation)
        network.check_shape(len(normaliser.mean) + weights.num_features, len(table.insert_layers))
        policy = cls(
            **fields_of_table(table, weight, bonus),
            skip_weights=weights,
            algorithm="sb3",
            observation=observation or Observation(),
            normaliser=normaliser,
            network=network.logit_layers(temperature),
            backbone_name=backbone.name,
            backbone_fingerprint=backbone.fingerprint,
            seed=seed,
            activation=network.activation,
            backbone=backbone,
        )
        return policy if observations is None else policy.with_frontier(table, observations)


def prompt_flops_ratio(backbone: Backbone, prompt: Prompt, insert_layer: int) -> float:
    """Return the prefill FLOPs of one prompt, without its answer, relative to insert layer 0."""
    from deepinsert.backbones import CostModel
    from deepinsert.envs.prompts import encode

    ids = encode(backbone.processor, [prompt], with_answers=False)["input_ids"]
    multimodal = int(torch.isin(ids, torch.tensor(sorted(backbone.placeholder_ids))).sum())
    return CostModel.from_model(backbone.model).flops_ratio(
        ids.numel() - multimodal, multimodal, insert_layer, images=len(prompt.images), logits_to_keep=1
    )
