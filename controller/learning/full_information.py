"""Trains a policy network by the exact policy gradient, with every layer's reward from the reward table.

PPO, A2C and DQN try one layer of a prompt per episode. Here each step follows the exact gradient of the
expected reward, the sum over k of π(k | x) r(x, k), on a minibatch of prompts x.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from deepinsert.controller.policy.policy_record import Network
from deepinsert.envs.vector_env import InsertLayerVecEnv

from .algorithms import HIDDEN
from .training_job import TrainingJob
from .training_log import EPISODES_PER_ROW, EpisodeMeans

BATCH = 512
LEARNING_RATE = (3e-3, 3e-4)
ENTROPY = (0.3, 0.05)
"""Weight of the entropy bonus at the start and at the end, for rewards with a standard deviation of 1 over
the layers. It falls slowly, since a policy that settles early on the best fixed layer has no gradient left
that leads away from it."""
WEIGHT_DECAY = 1.0
MAX_GRADIENT_NORM = 0.5


class FullInformationTrainer:
    """Trains an MLP with tanh by AdamW on `steps` prompts drawn from the reward table of `env`."""

    def __init__(self, env: InsertLayerVecEnv, steps: int, seed: int) -> None:
        env.table.fill()
        self.env = env
        self.losses = env.table.losses
        self.layers = env.insert_layers.astype(np.float64)
        self.batches = max(1, -(-steps // BATCH))
        self.batch = 0
        self.scale = reward_deviation(env)
        self.rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        width = env.observations.shape[1] + env.skip_weights.num_features
        self.net = make_mlp(width, len(self.layers))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), weight_decay=WEIGHT_DECAY)

    def step(self, means: EpisodeMeans) -> None:
        """Take one gradient step on the next minibatch and add its expected rewards to `means`."""
        fraction = self.batch / self.batches
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE[1] + (LEARNING_RATE[0] - LEARNING_RATE[1]) * (1 - fraction)
        entropy_weight = ENTROPY[0] * (ENTROPY[1] / ENTROPY[0]) ** fraction
        prompts = self.rng.integers(len(self.losses), size=BATCH)
        weights = self.env.skip_weights.draw(self.rng, BATCH)
        losses, bonuses = self.losses[prompts], weights[:, None] * self.env.bonuses[prompts]
        rewards = bonuses - losses
        advantages = (rewards - rewards.mean(axis=1, keepdims=True)) / self.scale
        observations = torch.from_numpy(self.env.observe(prompts, weights))
        log_probabilities = torch.log_softmax(self.net(observations), dim=1)
        probabilities = log_probabilities.exp()
        gain = (probabilities * torch.from_numpy(advantages).float()).sum(dim=1)
        entropy = -(probabilities * log_probabilities).sum(dim=1)
        self.optimizer.zero_grad()
        (-(gain + entropy_weight * entropy).mean()).backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.batch += 1
        shares = probabilities.detach().numpy()
        means.add((shares * losses).sum(axis=1), (shares * bonuses).sum(axis=1), shares @ self.layers)

    def get_state(self) -> dict[str, Any]:
        """Return all that training continues from."""
        return {
            "batch": self.batch,
            "rng": self.rng.bit_generator.state,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a state that `get_state` returned."""
        self.batch = state["batch"]
        self.rng.bit_generator.state = state["rng"]
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])

    def network(self) -> Network:
        """Return a copy of the linear layers."""
        return tuple(
            (module.weight.detach().clone(), module.bias.detach().clone())
            for module in self.net
            if isinstance(module, torch.nn.Linear)
        )


def train_full_information(job: TrainingJob, saved_state: Any, bar: tqdm[Any]) -> Network:
    """Train a network on `job`, continuing from `saved_state` if it is not None; `bar` counts prompts."""
    trainer = FullInformationTrainer(job.env, job.steps, job.seed)
    means = EpisodeMeans()
    if saved_state is not None:
        trainer.set_state(saved_state["trainer"])
        means = EpisodeMeans(saved_state["means"])
    bar.update(min(trainer.batch * BATCH, bar.total))
    while trainer.batch < trainer.batches:
        trainer.step(means)
        bar.update(min(BATCH, bar.total - bar.n))
        if means.episodes >= 10 * EPISODES_PER_ROW:
            job.log.add(means.row(trainer.batch * BATCH))
        if job.state.due():
            job.state.save({"trainer": trainer.get_state(), "means": means.sums, "rows": job.log.rows})
    if means.episodes:
        job.log.add(means.row(trainer.batch * BATCH))
    return trainer.network()


def make_mlp(inputs: int, outputs: int) -> torch.nn.Sequential:
    """Create the network of stable-baselines3: orthogonal weights, almost uniform outputs at first."""
    modules: list[torch.nn.Module] = []
    for width in (*HIDDEN, outputs):
        linear = torch.nn.Linear(inputs, width)
        torch.nn.init.orthogonal_(linear.weight, 0.01 if len(modules) == 2 * len(HIDDEN) else 2**0.5)
        torch.nn.init.zeros_(linear.bias)
        modules += [linear, torch.nn.Tanh()]
        inputs = width
    return torch.nn.Sequential(*modules[:-1])


def reward_deviation(env: InsertLayerVecEnv) -> float:
    """Return the mean standard deviation, in nats, of a prompt's rewards over the candidate layers.

    It averages over the range of skip weights, and is 1 where all layers have the same reward.
    """
    weights = np.linspace(env.skip_weights.low, env.skip_weights.high, 5)
    deviations = [(weight * env.bonuses - env.table.losses).std(axis=1).mean() for weight in weights]
    mean = float(np.mean(deviations))
    return mean if mean > 0 else 1.0
