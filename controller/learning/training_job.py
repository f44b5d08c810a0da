"""One training of a policy network: the settings and files that all algorithms share."""

from __future__ import annotations

from dataclasses import dataclass

from deepinsert.envs.vector_env import InsertLayerVecEnv

from .training_log import TrainingLog
from .training_state import StateFile


@dataclass(frozen=True)
class TrainingJob:
    """What every algorithm needs to train a policy network.

    `algorithm` ("ppo", "a2c", "dqn" or "full-info") trains on `env` for `steps` episodes (for full-info,
    prompts drawn) with `seed`. It adds rows to `log` and saves its state to `state`.
    """

    algorithm: str
    env: InsertLayerVecEnv
    steps: int
    seed: int
    log: TrainingLog
    state: StateFile
