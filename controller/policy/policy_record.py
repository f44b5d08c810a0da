"""The plain fields of a layer policy: what its files contain, without any behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from deepinsert.controller.runs.machine import package_versions
from deepinsert.envs.observations import Normaliser, Observation
from deepinsert.envs.rewards.table import Bonus
from deepinsert.envs.skip_weights import SkipWeights

from .outcomes import TrainingSummary

Network = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""Weight (out, in) and bias (out) of each linear layer, float32."""
Activation = Literal["tanh", "relu"]


@dataclass(frozen=True, eq=False)
class PolicyRecord:
    """The fields of a layer policy, which chooses among K candidate layers.

    Attributes:
        insert_layers: the candidates (K), ascending.
        num_layers: N, the decoder layers of the backbone.
        skip_weights: the range of skip weights λ that the policy was trained for.
        skip_weight: the default λ.
        bonus: the kind of skip bonus.
        algorithm: the algorithm that trained it.
        observation: what the policy observes of a prompt (D numbers).
        normaliser: statistics that normalise observations (D).
        network: the linear layers of an MLP from the D normalised observations and, for a range of λ, the
            features of λ, to K logits.
        backbone_name: the backbone's path or hub id.
        backbone_fingerprint: identifies the backbone's weights.
        table_digest: identifies the reward table that the policy was trained on.
        seed: the seed of its training.
        training: what is known from training.
        activation: the function between the linear layers.
        versions: the versions of the software that trained it.
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
    training: TrainingSummary
    activation: Activation = "tanh"
    versions: dict[str, str] = field(default_factory=package_versions, repr=False)
