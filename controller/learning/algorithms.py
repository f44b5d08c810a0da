"""PPO, A2C and DQN of stable-baselines3, set up for episodes of one step, and the network they learn.

Nothing follows an action, so gamma is 0 everywhere. Weight decay keeps a policy that sees a few hundred
prompts from learning their noise by heart: without it, what it gains on training prompts that have nothing to
tell apart it loses on others.
"""

from __future__ import annotations

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
"""Episodes that each algorithm plays unless told otherwise; for full-info, prompts looked at."""

NUM_ENVS = {"ppo": 256, "a2c": 128, "dqn": 256, "full-info": 1}
HIDDEN = (64, 64)
TRIED = ("prompts", "weights", "actions", "rewards", "dones")
"""What a replay buffer keeps of each episode."""


def make_model(name: str, env: InsertLayerVecEnv, seed: int) -> BaseAlgorithm:
    """A fresh model of algorithm `name` ("ppo", "a2c" or "dqn") on `env`."""
    return {"ppo": ppo, "a2c": a2c, "dqn": dqn}[name](env, seed)


def falling(high: float, low: float) -> Any:
    """A learning rate that falls from `high` to `low` in a straight line."""
    return lambda left: low + (high - low) * left  # `left` falls from 1 to 0


def policy_arguments(weight_decay: float) -> dict[str, Any]:
    """The same network for every algorithm, under AdamW."""
    return {
        "net_arch": list(HIDDEN),
        "activation_fn": torch.nn.Tanh,
        "optimizer_class": torch.optim.AdamW,
        "optimizer_kwargs": {"weight_decay": weight_decay},
    }


def ppo(env: InsertLayerVecEnv, seed: int) -> PPO:
    """PPO: a rollout of 2,048 prompts is used for 40 gradient steps, or fewer where the policy has moved far
    (`target_kl`)."""
    return PPO(
        "MlpPolicy",
        env,
        learning_rate=falling(2e-3, 2e-4),
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
    """A2C: one gradient step for each 128 prompts, so many small rollouts. Normalised advantages keep its
    step the same size whatever the losses' scale, as in PPO."""
    return A2C(
        "MlpPolicy",
        env,
        learning_rate=falling(4e-3, 4e-4),
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
    """DQN: with gamma 0 a regression of each layer's reward on what has been tried, kept whole.

    Three blocks in ten explore to the end, since the greedy layer alone says nothing about its neighbours.
    """
    return DQN(
        "MlpPolicy",
        env,
        learning_rate=falling(2e-3, 2e-4),
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
    """Remembers which prompt was played instead of its observation, which the environment knows.

    A few bytes for each episode: nothing that was tried needs to be forgotten, and a saved state stays small.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = False,
        *,
        env: InsertLayerVecEnv,
    ) -> None:
        nothing = spaces.Box(0, 1, (0,), np.float32)
        super().__init__(buffer_size, nothing, action_space, device, n_envs, False, False)
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
        """Keep what the infos say was played."""
        self.prompts[self.pos] = [info["prompt"] for info in infos]
        self.weights[self.pos] = [info["skip_weight"] for info in infos]
        super().add(obs[:, :0], next_obs[:, :0], action, reward, done, infos)

    def get_state(self) -> dict[str, Any]:
        """What was tried so far."""
        filled = self.buffer_size if self.full else self.pos
        arrays = {name: getattr(self, name)[:filled] for name in TRIED}
        return {**arrays, "pos": self.pos, "full": self.full}

    def set_state(self, state: dict[str, Any]) -> None:
        """Remember what `get_state` told."""
        self.pos, self.full = state["pos"], state["full"]
        for name in TRIED:
            getattr(self, name)[: len(state[name])] = state[name]

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> ReplayBufferSamples:
        columns = np.random.randint(0, self.n_envs, size=len(batch_inds))
        seen = self.to_torch(
            self.env.observe(self.prompts[batch_inds, columns], self.weights[batch_inds, columns])
        )
        return ReplayBufferSamples(
            observations=seen,
            actions=self.to_torch(self.actions[batch_inds, columns]),
            next_observations=seen,  # of a finished episode: not looked at
            dones=self.to_torch(self.dones[batch_inds, columns].reshape(-1, 1)),
            rewards=self.to_torch(self.rewards[batch_inds, columns].reshape(-1, 1)),
        )
