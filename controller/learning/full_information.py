"""The policy gradient without sampling: the reward table knows what every layer of a prompt would have paid.

PPO, A2C and DQN try one layer of a prompt at a time. Here each step follows the exact gradient of the
expected reward, sum over k of π(k | x) r(x, k), on a minibatch of prompts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from deepinsert.controller.policy.layer_policy import Network
from deepinsert.envs.vector_env import InsertLayerVecEnv

from .algorithms import HIDDEN
from .training_log import ROW, Means, TrainingLog
from .training_state import StateFile

BATCH = 512
LEARNING_RATE = (3e-3, 3e-4)
ENTROPY = (0.3, 0.05)
"""Weight of the entropy bonus at the start and at the end, where rewards deviate by 1 over the layers. It
falls slowly: a policy that settles on the best fixed layer early has no gradient left to leave it by."""
WEIGHT_DECAY = 1.0
LARGEST_GRADIENT = 0.5


class FullInformation:
    """An MLP with tanh under AdamW, and the generator that draws its minibatches."""

    def __init__(self, env: InsertLayerVecEnv, steps: int, seed: int) -> None:
        env.table.fill()
        self.env = env
        self.losses = env.table.losses
        self.layers = env.insert_layers.astype(np.float64)
        self.batches = max(1, -(-steps // BATCH))
        self.batch = 0
        self.scale = deviation(env)
        self.rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        width = env.observations.shape[1] + env.skip_weights.features
        self.net = mlp(width, len(self.layers))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), weight_decay=WEIGHT_DECAY)

    def step(self, means: Means) -> None:
        """One gradient step on the next minibatch."""
        done = self.batch / self.batches
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE[1] + (LEARNING_RATE[0] - LEARNING_RATE[1]) * (1 - done)
        entropy_weight = ENTROPY[0] * (ENTROPY[1] / ENTROPY[0]) ** done
        prompts = self.rng.integers(len(self.losses), size=BATCH)
        weights = self.env.skip_weights.draw(self.rng, BATCH)
        losses, bonuses = self.losses[prompts], weights[:, None] * self.env.bonuses[prompts]
        rewards = bonuses - losses
        relative = (rewards - rewards.mean(axis=1, keepdims=True)) / self.scale
        seen = torch.from_numpy(self.env.observe(prompts, weights))
        log_chances = torch.log_softmax(self.net(seen), dim=1)
        chances = log_chances.exp()
        gain = (chances * torch.from_numpy(relative).float()).sum(dim=1)
        entropy = -(chances * log_chances).sum(dim=1)
        self.optimizer.zero_grad()
        (-(gain + entropy_weight * entropy).mean()).backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), LARGEST_GRADIENT)
        self.optimizer.step()
        self.batch += 1
        known = chances.detach().numpy()
        means.add((known * losses).sum(axis=1), (known * bonuses).sum(axis=1), known @ self.layers)

    def get_state(self) -> dict[str, Any]:
        """All that training goes on from."""
        return {
            "batch": self.batch,
            "rng": self.rng.bit_generator.state,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where `get_state` was called."""
        self.batch = state["batch"]
        self.rng.bit_generator.state = state["rng"]
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])


def train_full_information(
    env: InsertLayerVecEnv,
    steps: int,
    seed: int,
    log: TrainingLog,
    state: StateFile,
    saved: Any,
    bar: tqdm[Any],
) -> Network:
    """The network that `steps` looks at prompts of `env`'s table give, going on from `saved` (or None)."""
    trainer = FullInformation(env, steps, seed)
    means = Means()
    if saved is not None:
        trainer.set_state(saved["trainer"])
        means = Means(saved["means"])
    bar.update(min(trainer.batch * BATCH, bar.total))
    while trainer.batch < trainer.batches:
        trainer.step(means)
        bar.update(min(BATCH, bar.total - bar.n))
        if means.sums[0] >= 10 * ROW:
            log.add(means.row(trainer.batch * BATCH))
        if state.due():
            state.save({"trainer": trainer.get_state(), "means": means.sums, "rows": log.rows})
    if means.sums[0]:
        log.add(means.row(trainer.batch * BATCH))
    return tuple(
        (module.weight.detach().clone(), module.bias.detach().clone())
        for module in trainer.net
        if isinstance(module, torch.nn.Linear)
    )


def mlp(inputs: int, outputs: int) -> torch.nn.Sequential:
    """The network that stable-baselines3 makes: orthogonal weights, nearly uniform at first."""
    modules: list[torch.nn.Module] = []
    for width in (*HIDDEN, outputs):
        linear = torch.nn.Linear(inputs, width)
        torch.nn.init.orthogonal_(linear.weight, 0.01 if len(modules) == 2 * len(HIDDEN) else 2**0.5)
        torch.nn.init.zeros_(linear.bias)
        modules += [linear, torch.nn.Tanh()]
        inputs = width
    return torch.nn.Sequential(*modules[:-1])


def deviation(env: InsertLayerVecEnv) -> float:
    """Typical deviation of a prompt's rewards over the layers, over the range of skip weights; 1 where all
    layers pay the same."""
    ends = np.linspace(env.skip_weights.low, env.skip_weights.high, 5)
    found = np.mean([(weight * env.bonuses - env.table.losses).std(axis=1).mean() for weight in ends])
    return float(found) if found > 0 else 1.0
