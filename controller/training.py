"""`train-policy`: the reward table of a data set, PPO on it, and an honest judgement on held-out prompts.

The paper trains its policy with PPO and shows one reward curve (Figure 9); here the same curve is drawn,
and the policy stands beside the choices it has to beat.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from tqdm import tqdm

from backbones import load_backbone
from envs.instructions import split_by_image
from envs.observations import Normaliser, Observation, prompt_embeddings
from envs.rewards import Bonus, RewardTable
from envs.skip_weights import SkipWeights
from envs.vector_env import InsertLayerVecEnv

from .baselines import PAPER_MEAN_DEPTH, judge, nearest_neighbour_columns
from .data import image_prompts
from .options import TrainPolicyOptions, check, parse_layers
from .plots import policy_rewards
from .policy import LayerPolicy, Network, Training
from .runs import read_result, start_run, write_result
from .statistics import Interval

if TYPE_CHECKING:
    from envs.prompts import Prompt

NUM_ENVS = 256
ROLLOUT = 2048
TABLE = "table"


def run(options: TrainPolicyOptions) -> dict[str, Any]:
    """Train a policy, judge it on held-out images, and write everything to the run folder.

    Writes `table/` (the reward table, which a killed run is continued from), `policy.json` with
    `policy.safetensors`, `progress.csv`, TensorBoard events, `policy_rewards.png` and `result.json`. A
    finished run is not repeated. Raises `ValueError` where an option cannot be used or the data leave nothing
    to train on or to judge by, `DatasetError` where they cannot be read.
    """
    check(options)
    out = start_run(options)
    if (out / "result.json").is_file():
        result = read_result(out)
        print(summary(result))
        return result
    train, held_out, text_only = split_prompts(options)
    backbone = load_backbone(options.backbone, device=options.device, dtype=options.dtype)
    layers = parse_layers(options.insert_layers, backbone.num_layers)
    table = RewardTable(backbone, [*train, *held_out], layers, folder=out / TABLE)
    table.fill(progress=True)
    observations = prompt_embeddings(backbone, [*train, *held_out], options.batch_size)
    seen = np.arange(len(table)) < len(train)
    policy = train_policy(
        table.subset(seen),
        observations[seen],
        skip_weight=options.skip_weight,
        bonus=options.bonus,
        steps=options.steps,
        seed=options.seed,
        log_folder=out,
        backbone=(backbone.name, backbone.fingerprint),
    )
    judgement = judge_policy(policy, table, observations, seen)
    advantage = judgement["difference"]["policy_minus_best_fixed"]
    interval = Interval(advantage["reward"], *advantage["confidence_interval"])
    policy = replace(policy, training=replace(policy.training, advantage=interval))
    policy.save(out)
    policy_rewards(out / "progress.csv", out / "policy_rewards.png")
    result = {
        "skip_weight": options.skip_weight,
        "bonus": options.bonus,
        "insert_layers": layers,
        "num_layers": backbone.num_layers,
        "prompts": {"train": len(train), "held_out": len(held_out), "text_only_left_out": text_only},
        "images": {
            "train": len({prompt.image_key for prompt in train}),
            "held_out": len({prompt.image_key for prompt in held_out}),
        },
        "steps": options.steps,
        **judgement,
    }
    write_result(out, result)
    print(summary(result))
    return read_result(out)


def split_prompts(options: TrainPolicyOptions) -> tuple[list[Prompt], list[Prompt], int]:
    """Training prompts, held-out prompts, and the number left out because no image goes with them."""
    prompts, text_only = image_prompts(options)
    train, held_out = split_by_image(prompts, options.held_out, options.seed)
    if not train or not held_out:
        raise ValueError(
            f"--data {options.data}: {len(prompts)} prompts with images give {len(train)} to train on and "
            f"{len(held_out)} to judge by; use more data (--fraction, --sources) or another --held-out than "
            f"{options.held_out}"
        )
    return list(train), list(held_out), text_only


def summary(result: dict[str, Any]) -> str:
    """The judgement as a short table: mean reward of each choice on held-out prompts."""
    lines = [f"{'held-out reward':<24}{'mean':>9}   95 % interval"]
    for name, row in result["reward"].items():
        if row is not None:
            low, high = row["confidence_interval"]
            label = name.replace("_", " ") + (f" ({row['insert_layer']})" if "insert_layer" in row else "")
            lines.append(f"{label:<24}{row['reward']:>9.4f}   {low:.4f} to {high:.4f}")
    depth = f"mean insert layer {result['mean_insert_layer']:.2f}, depth {result['mean_depth']:.2f}"
    return "\n".join([*lines, f"{depth} (paper: {result['paper_mean_depth']})", result["verdict"]])


def train_policy(
    table: RewardTable,
    observations: ArrayLike,
    *,
    skip_weight: float = 0.5,
    bonus: Bonus = "depth",
    steps: int = 40_000,
    seed: int = 0,
    log_folder: Path | None = None,
    backbone: tuple[str, str] = ("none", "none"),
) -> LayerPolicy:
    """A layer policy trained by PPO on the P prompts of `table` and their embeddings `observations` (P, D).

    The same arguments give the same policy, bit for bit. With `log_folder`, `progress.csv` and TensorBoard
    events are written there. `backbone` is the name and fingerprint that the policy is tied to. The
    policy's `training.advantage` is None until somebody judges it.
    """
    normaliser = Normaliser.fit(observations)
    with isolated_random_state():
        env = InsertLayerVecEnv(
            table,
            normaliser(observations),
            num_envs=NUM_ENVS,
            skip_weight=skip_weight,
            bonus=bonus,
            seed=seed,
        )
        model = ppo(env, seed)
        model.set_logger(configure_logger(log_folder))
        model.learn(steps, callback=RewardLog(skip_weight, steps), log_interval=1)
    return LayerPolicy(
        insert_layers=table.insert_layers,
        num_layers=table.num_layers,
        skip_weights=SkipWeights(skip_weight, skip_weight),
        skip_weight=skip_weight,
        bonus=bonus,
        algorithm="ppo",
        observation=Observation(),
        normaliser=normaliser,
        network=network_of(model),
        backbone_name=backbone[0],
        backbone_fingerprint=backbone[1],
        table_digest=table.digest,
        seed=seed,
        training=Training.from_table(table, skip_weight, bonus),
    )


def ppo(env: InsertLayerVecEnv, seed: int) -> PPO:
    """PPO with settings that work for one-step episodes.

    Nothing follows an action, so gamma is 0. A rollout of 2,048 prompts is used for 40 gradient steps, or
    fewer where the policy has moved far (`target_kl`). Weight decay keeps a policy that sees a few hundred
    prompts from learning their noise by heart: without it, what it gains on training prompts that have
    nothing to tell apart it loses on others.
    """
    return PPO(
        "MlpPolicy",
        env,
        learning_rate=lambda left: 2e-4 + 1.8e-3 * left,  # `left` falls from 1 to 0
        n_steps=ROLLOUT // NUM_ENVS,
        batch_size=512,
        n_epochs=10,
        gamma=0.0,
        gae_lambda=1.0,
        ent_coef=0.005,
        target_kl=0.03,
        policy_kwargs={
            "net_arch": [64, 64],
            "activation_fn": torch.nn.Tanh,
            "optimizer_class": torch.optim.AdamW,
            "optimizer_kwargs": {"weight_decay": 3.0},
        },
        seed=seed,
        device="cpu",
    )


def network_of(model: PPO) -> Network:
    """Weights and biases of the actor's linear layers, from observation to logits."""
    actor = [*model.policy.mlp_extractor.policy_net, model.policy.action_net]
    return tuple(
        (module.weight.detach().clone(), module.bias.detach().clone())
        for module in actor
        if isinstance(module, torch.nn.Linear)
    )


class RewardLog(BaseCallback):
    """Logs each rollout's mean reward and its two parts, and shows how far training is.

    `reward/total` = `reward/performance` (mean of -loss, nats) + `reward/bonus` (mean of λ · bonus), for
    layers drawn from the policy; `policy/insert_layer` is their mean. The reward that PPO sees is relative to
    layer 0; these are not.
    """

    def __init__(self, skip_weight: float, steps: int) -> None:
        super().__init__()
        self.skip_weight = skip_weight
        self.bar = tqdm(
            total=steps, desc="policy (PPO)", mininterval=1.0, unit=" episodes", dynamic_ncols=True
        )
        self.episodes: list[tuple[float, float, int]] = []

    def _on_step(self) -> bool:
        infos = self.locals["infos"]
        self.episodes += [(info["loss"], info["bonus"], info["insert_layer"]) for info in infos]
        self.bar.update(min(len(infos), self.bar.total - self.bar.n))
        return True

    def _on_rollout_end(self) -> None:
        loss, bonus, layer = np.mean(self.episodes, axis=0)
        self.episodes.clear()
        self.logger.record("reward/total", -loss + self.skip_weight * bonus)
        self.logger.record("reward/performance", -loss)
        self.logger.record("reward/bonus", self.skip_weight * bonus)
        self.logger.record("policy/insert_layer", layer)

    def _on_training_end(self) -> None:
        self.bar.close()


def configure_logger(folder: Path | None) -> Any:
    """SB3's logger, writing `progress.csv` and TensorBoard events to `folder`; silent without one."""
    if folder is None:
        return configure(None, [])
    for events in folder.glob("events.out.tfevents.*"):
        events.unlink()  # of an earlier start of this run, which TensorBoard would draw over this one
    return configure(str(folder), ["csv", "tensorboard"])


def judge_policy(
    policy: LayerPolicy, table: RewardTable, observations: np.ndarray, train: np.ndarray
) -> dict[str, Any]:
    """The policy's most probable layers beside simple choices, on the prompts where the mask `train` (P) is
    False; see `baselines.judge`."""
    rewards = table.rewards(policy.skip_weight, policy.bonus)
    seen, queries = policy.normaliser(observations[train]), policy.normaliser(observations[~train])
    chosen = policy.columns(observations[~train])
    layers = np.array(policy.insert_layers)[chosen]
    return {
        "mean_insert_layer": float(layers.mean()),
        "mean_depth": float(layers.mean()) / policy.num_layers,
        "paper_mean_depth": PAPER_MEAN_DEPTH,
        "histogram": {str(layer): int((layers == layer).sum()) for layer in policy.insert_layers},
        **judge(
            chosen,
            nearest_neighbour_columns(seen, rewards[train], queries),
            rewards[train],
            rewards[~train],
            policy.insert_layers,
            [key for key, used in zip(table.image_keys, train, strict=True) if not used],
        ),
        "training": policy.training,
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
