"""Trains a layer policy on a reward table and observations, with any of the algorithms.

Equal arguments give bit-identical policies, whatever ran before in the process and however often training was
killed and continued.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from stable_baselines3.common.logger import Logger
from tqdm import tqdm

from deepinsert.controller.policy.layer_policy import LayerPolicy
from deepinsert.controller.policy.policy_record import Network
from deepinsert.controller.policy.sb3_files import network_of_model
from deepinsert.controller.policy.table_means import fields_of_table
from deepinsert.envs.observations import Normaliser, Observation
from deepinsert.envs.rewards.table import Bonus, RewardTable
from deepinsert.envs.skip_weights import SkipWeights
from deepinsert.envs.vector_env import InsertLayerVecEnv

from .algorithms import NUM_ENVS, STEPS, make_model
from .full_information import train_full_information
from .training_job import TrainingJob
from .training_log import EpisodeMeans, TrainingCallback, TrainingLog
from .training_state import StateFile, restore_model

LABELS = {"ppo": "PPO", "a2c": "A2C", "dqn": "DQN", "full-info": "full information"}


def train_policy(
    table: RewardTable,
    observations: ArrayLike,
    *,
    skip_weight: float = 0.5,
    skip_weights: SkipWeights | tuple[float, float] | None = None,
    bonus: Bonus = "depth",
    algorithm: str = "ppo",
    steps: int | None = None,
    seed: int = 0,
    log_folder: Path | None = None,
    state: Path | None = None,
    state_seconds: float = 1.0,
    observation: Observation | None = None,
    backbone: tuple[str, str] = ("none", "none"),
) -> LayerPolicy:
    """Train a layer policy on the P prompts of `table`, with `observations` (P, D) of them.

    Args:
        table: the reward table; missing losses are computed.
        observations: what the policy observes of each prompt, before normalisation.
        skip_weight: the policy's default λ.
        skip_weights: the range of λ to train for; by default `skip_weight` alone.
        bonus: the kind of skip bonus.
        algorithm: "ppo", "a2c", "dqn" or "full-info".
        steps: the number of training episodes; by default the algorithm's in `STEPS`.
        seed: the seed of the network and of all sampling.
        log_folder: receives `progress.csv` and TensorBoard events.
        state: the file that training is saved to and continued from.
        state_seconds: the least time between two saved states, in seconds.
        observation: describes `observations`.
        backbone: name and fingerprint of the backbone that the policy belongs to.

    Returns:
        The policy, not yet compared with others: its `training.advantage` is None.

    Raises:
        ValueError: for an unknown algorithm, a skip weight outside the range, or the `state` of another
            training.
    """
    if algorithm not in STEPS:
        raise ValueError(f"algorithm {algorithm!r}: choose one of {', '.join(STEPS)}")
    weights = SkipWeights.of(skip_weight if skip_weights is None else skip_weights)
    skip_weight = weights.check(skip_weight)
    normaliser = Normaliser.fit(observations)
    env = make_env(table, normaliser(observations), weights, bonus, algorithm, seed)
    steps = STEPS[algorithm] if steps is None else steps
    state_file = StateFile(state, training_identity(env, algorithm, steps, seed), state_seconds)
    job = TrainingJob(algorithm, env, steps, seed, TrainingLog(log_folder), state_file)
    return LayerPolicy(
        **fields_of_table(table, skip_weight, bonus),
        skip_weights=weights,
        algorithm=algorithm,
        observation=observation or Observation(),
        normaliser=normaliser,
        network=train_network(job),
        backbone_name=backbone[0],
        backbone_fingerprint=backbone[1],
        seed=seed,
    )


def make_env(
    table: RewardTable,
    observations: NDArray[np.float32],
    skip_weights: SkipWeights,
    bonus: Bonus,
    algorithm: str,
    seed: int,
) -> InsertLayerVecEnv:
    """Create the environments that `algorithm` trains on, after filling the table.

    Args:
        table: the rewards of P prompts.
        observations: normalised observations (P, D) of the prompts.
        skip_weights: the range that λ is drawn from.
        bonus: the kind of skip bonus.
        algorithm: decides the number of parallel environments.
        seed: the seed of the order of prompts and of λ.
    """
    table.fill()
    return InsertLayerVecEnv(
        table, observations, num_envs=NUM_ENVS[algorithm], skip_weight=skip_weights, bonus=bonus, seed=seed
    )


def train_network(job: TrainingJob) -> Network:
    """Train the network from observation to logits, continuing from the saved state of `job`."""
    saved_state = job.state.load()
    job.log.restore(saved_state["rows"] if saved_state is not None else [])
    try:
        if saved_state is not None and "network" in saved_state:
            finished: Network = saved_state["network"]
            return finished
        with isolated_random_state(), episode_bar(job) as bar:
            train = train_full_information if job.algorithm == "full-info" else train_with_sb3
            network = train(job, saved_state, bar)
        job.state.save({"network": network, "rows": job.log.rows})
        return network
    finally:
        job.log.close()


def train_with_sb3(job: TrainingJob, saved_state: Any, bar: tqdm[Any]) -> Network:
    """Train a network with stable-baselines3, continuing from `saved_state` if it is not None."""
    model = make_model(job.algorithm, job.env, job.seed)
    model.set_logger(Logger(None, []))  # rows go to `job.log` instead
    means = EpisodeMeans()
    if saved_state is not None:
        restore_model(model, saved_state["model"])
        means = EpisodeMeans(saved_state["means"])
    bar.update(min(model.num_timesteps, job.steps))
    callback = TrainingCallback(job.log, job.state, means, bar)
    never: Any = None
    model.learn(
        max(0, job.steps - model.num_timesteps),
        callback=callback,
        log_interval=never,
        reset_num_timesteps=saved_state is None,
    )
    callback.finish()
    network = network_of_model(model).layers
    if job.algorithm != "dqn":
        return network
    weight, bias = network[-1]
    temperature = greedy_value_error(network, job.env)
    return (*network[:-1], (weight / temperature, bias / temperature))


def greedy_value_error(network: Network, env: InsertLayerVecEnv) -> float:
    """Return the error of DQN's action values at the layers that they choose, in nats.

    It is the root mean square over the prompts of the table and three skip weights, at least 0.001. Action
    values divided by it are logits: layers whose values differ by less than the error are about equally
    probable.
    """
    rows, errors = np.arange(len(env.table)), []
    for skip_weight in np.linspace(env.skip_weights.low, env.skip_weights.high, 3):
        hidden = torch.from_numpy(env.observe(rows, np.full(len(rows), skip_weight)))
        for weight, bias in network[:-1]:
            hidden = torch.tanh(torch.nn.functional.linear(hidden, weight, bias))
        values = torch.nn.functional.linear(hidden, *network[-1]).numpy()
        rewards = skip_weight * env.bonuses - env.table.losses
        columns = values.argmax(axis=1)
        errors.append(values[rows, columns] - (rewards[rows, columns] - rewards[:, 0]))
    return max(1e-3, float(np.sqrt(np.mean(np.square(errors)))))


def training_identity(env: InsertLayerVecEnv, algorithm: str, steps: int, seed: int) -> dict[str, Any]:
    """Return all that the bits of a trained network depend on: data, options, seed and versions."""
    return {
        "algorithm": algorithm,
        "steps": steps,
        "seed": seed,
        "skip_weights": [env.skip_weights.low, env.skip_weights.high],
        "losses": _hash(env.table.losses),
        "bonuses": _hash(env.bonuses),
        "observations": _hash(env.observations),
        "versions": json.dumps(
            {name: importlib.metadata.version(name) for name in ("torch", "numpy", "stable-baselines3")}
        ),
    }


@contextmanager
def isolated_random_state() -> Iterator[None]:
    """Run a block on one thread and restore the random state of Python, NumPy and torch afterwards.

    Stable-baselines3 seeds all three globally. On one thread sums have the same order on every machine, and
    networks this small train fastest.
    """
    python, numpy_state, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            random.setstate(python)
            np.random.set_state(numpy_state)


@contextmanager
def episode_bar(job: TrainingJob) -> Iterator[tqdm[Any]]:
    """Show a progress bar over the episodes of `job` on stderr, with the remaining time."""
    seconds = 0.5 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=job.steps,
        desc=f"policy ({LABELS[job.algorithm]}, seed {job.seed})",
        mininterval=seconds,
        unit=" episodes",
        dynamic_ncols=True,
    ) as bar:
        yield bar


def _hash(values: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]
