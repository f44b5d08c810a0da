"""From a reward table and observations to a layer policy, by any of the algorithms.

The same arguments give the same policy, bit for bit, whatever ran before in the process and however often
training was killed on the way.
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

from deepinsert.controller.policy.layer_policy import LayerPolicy, Network, Training
from deepinsert.controller.policy.sb3_files import network_of_model
from deepinsert.envs.observations import Normaliser, Observation
from deepinsert.envs.rewards.table import Bonus, RewardTable
from deepinsert.envs.skip_weights import SkipWeights
from deepinsert.envs.vector_env import InsertLayerVecEnv

from .algorithms import NUM_ENVS, STEPS, make_model
from .full_information import train_full_information
from .training_log import Means, TrainingCallback, TrainingLog
from .training_state import StateFile, restore_model

NEVER: Any = None
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
    """A layer policy trained on the P prompts of `table`, seen as `observations` (P, D).

    `algorithm` is "ppo", "a2c", "dqn" or "full-info"; it plays `steps` episodes (by default as many as it
    needs). The policy is trained for the range `skip_weights`, by default `skip_weight` alone, and answers
    for `skip_weight` where it is asked for nothing else. `observation` says what `observations` are. With
    `log_folder`, `progress.csv` and TensorBoard events are written there. With `state`, what training goes
    on from is kept in that file about every `state_seconds`, and taken up from it. `backbone` is the name
    and fingerprint that the policy is tied to. `training.advantage` is None until somebody judges the policy.

    Raises `ValueError` for an algorithm that is not there, a skip weight outside the range, and a `state` of
    another training.
    """
    if algorithm not in STEPS:
        raise ValueError(f"algorithm {algorithm!r}: choose one of {', '.join(STEPS)}")
    weights = SkipWeights.of(skip_weight if skip_weights is None else skip_weights)
    skip_weight = weights.check(skip_weight)
    normaliser = Normaliser.fit(observations)
    table.fill()
    env = InsertLayerVecEnv(
        table,
        normaliser(observations),
        num_envs=NUM_ENVS[algorithm],
        skip_weight=weights,
        bonus=bonus,
        seed=seed,
    )
    steps = STEPS[algorithm] if steps is None else steps
    identity = training_identity(env, algorithm, steps, seed)
    network = learn(
        algorithm, env, steps, seed, TrainingLog(log_folder), StateFile(state, identity, state_seconds)
    )
    return LayerPolicy(
        insert_layers=table.insert_layers,
        num_layers=table.num_layers,
        skip_weights=weights,
        skip_weight=skip_weight,
        bonus=bonus,
        algorithm=algorithm,
        observation=observation or Observation(),
        normaliser=normaliser,
        network=network,
        backbone_name=backbone[0],
        backbone_fingerprint=backbone[1],
        table_digest=table.digest,
        seed=seed,
        training=Training.from_table(table, skip_weight, bonus),
    )


def learn(
    algorithm: str, env: InsertLayerVecEnv, steps: int, seed: int, log: TrainingLog, state: StateFile
) -> Network:
    """The network that `algorithm` learns on `env`, from observation to logits, going on from `state`."""
    saved = state.load()
    log.restore(saved["rows"] if saved is not None else [])
    try:
        if saved is not None and "network" in saved:
            return saved["network"]
        with isolated_random_state(), progress_bar(algorithm, steps, seed) as bar:
            if algorithm == "full-info":
                network = train_full_information(env, steps, seed, log, state, saved, bar)
            else:
                network = learn_by_trying(algorithm, env, steps, seed, log, state, saved, bar)
        state.save({"network": network, "rows": log.rows})
        return network
    finally:
        log.close()


def learn_by_trying(
    algorithm: str,
    env: InsertLayerVecEnv,
    steps: int,
    seed: int,
    log: TrainingLog,
    state: StateFile,
    saved: Any,
    bar: tqdm[Any],
) -> Network:
    """As `learn`, with a model of stable-baselines3."""
    model = make_model(algorithm, env, seed)
    model.set_logger(Logger(None, []))  # rows go to `log`
    means = Means()
    if saved is not None:
        restore_model(model, saved["model"])
        means = Means(saved["means"])
    bar.update(min(model.num_timesteps, steps))
    callback = TrainingCallback(log, state, means, bar)
    model.learn(
        max(0, steps - model.num_timesteps),
        callback=callback,
        log_interval=NEVER,
        reset_num_timesteps=saved is None,
    )
    callback.finish()
    network = network_of_model(model).layers
    if algorithm != "dqn":
        return network
    weight, bias = network[-1]
    temperature = greedy_error(network, env)
    return (*network[:-1], (weight / temperature, bias / temperature))


def greedy_error(network: Network, env: InsertLayerVecEnv) -> float:
    """How wrong action values are, in nats, about the layers they choose: root mean square over the prompts
    of the table and three skip weights.

    Divided by it, action values are logits: layers whose values differ by less than the error are about
    equally probable.
    """
    rows, errors = np.arange(len(env.table)), []
    for weight in np.linspace(env.skip_weights.low, env.skip_weights.high, 3):
        hidden = torch.from_numpy(env.observe(rows, np.full(len(rows), weight)))
        for matrix, bias in network[:-1]:
            hidden = torch.tanh(torch.nn.functional.linear(hidden, matrix, bias))
        values = torch.nn.functional.linear(hidden, *network[-1]).numpy()
        rewards = weight * env.bonuses - env.table.losses
        columns = values.argmax(axis=1)
        errors.append(values[rows, columns] - (rewards[rows, columns] - rewards[:, 0]))
    return max(1e-3, float(np.sqrt(np.mean(np.square(errors)))))


def training_identity(env: InsertLayerVecEnv, algorithm: str, steps: int, seed: int) -> dict[str, Any]:
    """What decides the bits of a training: data, options, seed, versions of what computes."""
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
    """A block that may seed Python, NumPy and torch as it likes, on one thread, and leaves no trace.

    SB3 seeds all three globally. One thread makes sums come in one order whatever the machine, and is the
    quickest for networks this small.
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
def progress_bar(algorithm: str, steps: int, seed: int) -> Iterator[tqdm[Any]]:
    """A bar on stderr with the time left."""
    seconds = 0.5 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=steps,
        desc=f"policy ({LABELS[algorithm]}, seed {seed})",
        mininterval=seconds,
        unit=" episodes",
        dynamic_ncols=True,
    ) as bar:
        yield bar


def _hash(values: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]
