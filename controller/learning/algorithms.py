"""Configures stable-baselines3's PPO, A2C and DQN for one-step episodes, with one network for all of them.

An episode ends after its only action, so gamma is 0 everywhere. Weight decay keeps a policy that is trained
on a few hundred prompts from memorising their noise: without it, the policy overfits where the observations
do not predict the best layer, and loses on held-out prompts what it gains on training prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from deepinsert.envs.vector_env import InsertLayerVecEnv

STEPS = {"ppo": 60_000, "a2c": 100_000, "dqn": 60_000, "full-info": 400_000}
"""Default number of training episodes per algorithm; for full-info, the number of prompts drawn."""

NUM_ENVS = {"ppo": 256, "a2c": 128, "dqn": 256, "full-info": 1}
"""Number of environments that each algorithm steps in parallel."""
HIDDEN = (64, 64)
"""Units of the policy network's hidden layers."""
BUFFER_ARRAYS = ("prompts", "weights", "actions", "rewards", "dones")
"""Arrays of the replay buffer that a saved training state contains."""


def make_model(name: str, env: InsertLayerVecEnv, seed: int) -> BaseAlgorithm:
    """Create an untrained model of algorithm `name` ("ppo", "a2c" or "dqn") on `env`."""
    return {"ppo": ppo, "a2c": a2c, "dqn": dqn}[name](env, seed)


def linear_schedule(high: float, low: float) -> Callable[[float], float]:
    """Return a learning-rate schedule that falls linearly from `high` to `low`.

    Stable-baselines3 calls it with the remaining share of training, which falls from 1 to 0.
    """
    return lambda remaining: low + (high - low) * remaining


def policy_arguments(weight_decay: float) -> dict[str, Any]:
    """Return the policy arguments that all algorithms share: an MLP with tanh, trained by AdamW."""
    return {
        "net_arch": list(HIDDEN),
        "activation_fn": torch.nn.Tanh,
        "optimizer_class": torch.optim.AdamW,
        "optimizer_kwargs": {"weight_decay": weight_decay},
    }


def ppo(env: InsertLayerVecEnv, seed: int) -> PPO:
    """Create a PPO model.

    It takes 40 gradient steps per rollout of 2,048 prompts, or fewer when the policy has changed by more than
    `target_kl`.
    """
    return PPO(
        "MlpPolicy",
        env,
        learning_rate=linear_schedule(2e-3, 2e-4),
        n_steps=2048 // env.num_envs,
        batch_size=512,
        n_epochs=10,
        gamma=0.0,
        gae_lambda=1.0,
        ent_coef=0.05,
        target_kl=0.03,
        policy_kwargs=policy_arguments(1.0),
        seed=seed,
        device="cpu",
    )


def a2c(env: InsertLayerVecEnv, seed: int) -> A2C:
    """Create an A2C model.

    It takes one gradient step per rollout of 128 prompts. Normalised advantages make its step size
    independent of the scale of the losses, as in PPO.
    """
    return A2C(
        "MlpPolicy",
        env,
        learning_rate=linear_schedule(4e-3, 4e-4),
        n_steps=1,
        gamma=0.0,
        gae_lambda=1.0,
        ent_coef=0.05,
        normalize_advantage=True,
        policy_kwargs=policy_arguments(0.5),
        seed=seed,
        device="cpu",
    )


def dqn(env: InsertLayerVecEnv, seed: int) -> DQN:
    """Create a DQN model.

    With gamma 0, DQN is a regression of each layer's reward on all episodes so far; the buffer never drops
    one. The exploration rate stays at 0.3 until the end, since the greedy layer's reward contains no
    information about its neighbours.
    """
    return DQN(
        "MlpPolicy",
        env,
        learning_rate=linear_schedule(2e-3, 2e-4),
        buffer_size=1_000_000,
        learning_starts=2048,
        batch_size=512,
        gamma=0.0,
        train_freq=1,
        gradient_steps=4,
        target_update_interval=env.num_envs,
        exploration_fraction=0.5,
        exploration_final_eps=0.3,
        replay_buffer_class=PromptReplayBuffer,
        replay_buffer_kwargs={"env": env},
        policy_kwargs=policy_arguments(0.5),
        seed=seed,
        device="cpu",
    )


class PromptReplayBuffer(ReplayBuffer):
    """Stores each episode's prompt index and skip weight; `env` recomputes the observation from them.

    An episode takes a few bytes, so that the buffer can hold every episode and a saved state stays small.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = False,
        *,
        env: InsertLayerVecEnv,
    ) -> None:
        empty_space = spaces.Box(0, 1, (0,), np.float32)
        super().__init__(buffer_size, empty_space, action_space, device, n_envs, False, False)
        self.env = env
        self.prompts = np.zeros((self.buffer_size, n_envs), dtype=np.int64)
        self.weights = np.zeros((self.buffer_size, n_envs), dtype=np.float64)

    def add(
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Store one episode per environment; `infos` contain its prompt index and skip weight."""
        self.prompts[self.pos] = [info["prompt"] for info in infos]
        self.weights[self.pos] = [info["skip_weight"] for info in infos]
        super().add(obs[:, :0], next_obs[:, :0], action, reward, done, infos)

    def get_state(self) -> dict[str, Any]:
        """Return the stored episodes and the write position."""
        filled = self.buffer_size if self.full else self.pos
        arrays = {name: getattr(self, name)[:filled] for name in BUFFER_ARRAYS}
        return {**arrays, "pos": self.pos, "full": self.full}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a state that `get_state` returned."""
        self.pos, self.full = state["pos"], state["full"]
        for name in BUFFER_ARRAYS:
            getattr(self, name)[: len(state[name])] = state[name]

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> ReplayBufferSamples:
        columns = np.random.randint(0, self.n_envs, size=len(batch_inds))
        observations = self.to_torch(
            self.env.observe(self.prompts[batch_inds, columns], self.weights[batch_inds, columns])
        )
        return ReplayBufferSamples(
            observations=observations,
            actions=self.to_torch(self.actions[batch_inds, columns]),
            next_observations=observations,  # ignored, since the episode is over
            dones=self.to_torch(self.dones[batch_inds, columns].reshape(-1, 1)),
            rewards=self.to_torch(self.rewards[batch_inds, columns].reshape(-1, 1)),
        )
