"""The insert-layer environment for stable-baselines3, with many prompts per step.

One class steps all sub-environments with array operations and runs the backbone on whole groups of prompts,
where a `DummyVecEnv` of `InsertLayerEnv` would run it on one prompt after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from deepinsert.envs.rewards.table import Bonus, RewardTable

from .insert_layer_env import check_prompt_index
from .observations import LIMIT, check_observations
from .skip_weights import SkipWeights


class InsertLayerVecEnv(VecEnv):
    """`num_envs` copies of `InsertLayerEnv` on one reward table, in stable-baselines3's vector interface.

    Rewards that the table lacks are computed when they are needed, in the table's groups. All
    sub-environments draw from one generator: the same `seed` gives the same prompts in the same order.
    `seed(s)` takes effect at the next `reset`. `get_state` and `set_state` carry the generator, the current
    prompts and their λ, so that a resumed run is bit-identical.

    Each info holds `prompt`, `prompt_id`, `skip_weight`, `insert_layer`, `loss` (nats), `bonus` (in [0, 1])
    and `reward` (before the shift of `relative_to_layer_0`), beside stable-baselines3's
    `terminal_observation` and `TimeLimit.truncated`.

    Args:
        table: A reward table, or the folder of a complete one.
        observations: Normalised observations (P, D) of the table's prompts, which are clipped to [-10, 10].
        num_envs: Number of sub-environments, at least 1.
        skip_weight: λ, or the two ends of a range; with a range, every episode draws its λ, and F features of
            it (`SkipWeights.features_of`) follow the prompt's in the observation.
        bonus: "depth", "flops" or "time".
        relative_to_layer_0: Whether to subtract from a reward that of the same prompt at layer 0 (or at the
            shallowest candidate without layer 0). This is a constant per prompt, so the optimum stays the
            same, but the prompts' difficulty no longer hides the effect of an action.
        seed: Seed of the generator.
    """

    render_mode: str | None = None  # The base class reads it before `__init__` sets it.

    def __init__(
        self,
        table: RewardTable | str | Path,
        observations: ArrayLike,
        num_envs: int = 64,
        skip_weight: float | tuple[float, float] | SkipWeights = 0.5,
        bonus: Bonus = "depth",
        relative_to_layer_0: bool = True,
        seed: int | None = 0,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs {num_envs!r}: give at least 1")
        self.render_mode = None
        self.table = table if isinstance(table, RewardTable) else RewardTable.load(table)
        self.observations = check_observations(observations, len(self.table))
        self.insert_layers = np.array(self.table.insert_layers)
        self.skip_weights = SkipWeights.of(skip_weight)
        self.bonuses = self.table.bonus(bonus)
        self.relative_to_layer_0 = relative_to_layer_0
        self.num_envs = num_envs  # The base class calls `get_attr`, which needs it.
        self._rng = np.random.default_rng(seed)
        self._prompts: NDArray[np.int64] = np.zeros(num_envs, dtype=np.int64)
        self._weights: NDArray[np.float64] = np.full(num_envs, self.skip_weights.low)
        self._actions: NDArray[np.int64] | None = None
        super().__init__(
            num_envs,
            spaces.Box(
                -LIMIT,
                LIMIT,
                (self.observations.shape[1] + self.skip_weights.num_features,),
                np.float32,
            ),
            spaces.Discrete(len(self.insert_layers)),
        )

    def reset(self) -> NDArray[np.float32]:
        """Draw a prompt per sub-environment; returns observations (num_envs, D + F).

        A preceding `set_options({"prompt": i, "skip_weight": λ})` sets the first episode instead.
        """
        if self._seeds[0] is not None:
            self._rng = np.random.default_rng([seed for seed in self._seeds if seed is not None])
        self._draw()
        for index, options in enumerate(self._options):
            if options.get("prompt") is not None:
                self._prompts[index] = check_prompt_index(options["prompt"], len(self.table))
            if options.get("skip_weight") is not None:
                self._weights[index] = self.skip_weights.check(options["skip_weight"])
        self._reset_seeds()
        self._reset_options()
        self._actions = None
        return self._begin_episodes()

    def step_async(self, actions: NDArray[np.int64]) -> None:
        """Set the actions (num_envs,) on the current prompts; `ValueError` for actions out of range."""
        actions = np.asarray(actions)
        in_range = (actions >= 0) & (actions < len(self.insert_layers))
        if actions.shape != (self.num_envs,) or not in_range.all():
            raise ValueError(
                f"actions {actions!r}: expected {self.num_envs} indices below {len(self.insert_layers)}"
            )
        self._actions = actions.astype(np.int64)

    def step_wait(
        self,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Return the next prompts' observations, rewards, dones and infos; every step ends an episode.

        Raises `RuntimeError` without a preceding `step_async`.
        """
        if self._actions is None:
            raise RuntimeError("step_wait() without step_async()")
        prompts, weights, columns, self._actions = self._prompts, self._weights, self._actions, None
        loss, bonus, reward = self._rewards(prompts, weights, columns)
        shifted_reward = reward
        if self.relative_to_layer_0:
            shifted_reward = reward - self._rewards(prompts, weights, np.zeros_like(columns))[2]
        terminal_observations = self.observe(prompts, weights)
        infos = [
            {
                "prompt": int(prompt),
                "prompt_id": self.table.prompt_ids[prompt],
                "skip_weight": float(weights[index]),
                "insert_layer": int(self.insert_layers[column]),
                "loss": float(loss[index]),
                "bonus": float(bonus[index]),
                "reward": float(reward[index]),
                "terminal_observation": terminal_observations[index],
                "TimeLimit.truncated": False,
            }
            for index, (prompt, column) in enumerate(zip(prompts, columns, strict=True))
        ]
        self._draw()
        dones = np.ones(self.num_envs, dtype=np.bool_)
        return self._begin_episodes(), shifted_reward.astype(np.float32), dones, infos

    def observe(self, prompts: NDArray[np.int64], skip_weights: NDArray[np.float64]) -> NDArray[np.float32]:
        """Observations (n, D + F) of the prompts (n,) under the skip weights (n,)."""
        observations = self.observations[prompts]
        if self.skip_weights.single:
            return observations
        return np.concatenate([observations, self.skip_weights.features_of(skip_weights)], axis=1)

    def get_state(self) -> dict[str, Any]:
        """Generator state, current prompts and their λ, as JSON values; call it between two steps."""
        return {
            "rng": self._rng.bit_generator.state,
            "prompts": self._prompts.tolist(),
            "skip_weights": self._weights.tolist(),
        }

    def set_state(self, state: dict[str, Any]) -> NDArray[np.float32]:
        """Continue from the state of `get_state`; returns the observations of the current prompts.

        Raises `ValueError` for a state of another number of sub-environments, and for prompts or skip weights
        that this environment does not have.
        """
        prompts = [check_prompt_index(prompt, len(self.table)) for prompt in state["prompts"]]
        weights = [self.skip_weights.check(weight) for weight in state["skip_weights"]]
        if not len(prompts) == len(weights) == self.num_envs:
            raise ValueError(f"the state holds {len(prompts)} prompts in play, not {self.num_envs}")
        self._rng.bit_generator.state = state["rng"]
        self._prompts = np.array(prompts, dtype=np.int64)
        self._weights = np.array(weights)
        self._actions = None
        return self.observe(self._prompts, self._weights)

    def _draw(self) -> None:
        """Draw the current prompts and their skip weights."""
        self._prompts = self._rng.integers(len(self.table), size=self.num_envs)
        self._weights = self.skip_weights.draw(self._rng, self.num_envs)

    def _begin_episodes(self) -> NDArray[np.float32]:
        """Set the infos of the current prompts, and return their observations."""
        self.reset_infos = [
            {"prompt": int(prompt), "skip_weight": float(weight)}
            for prompt, weight in zip(self._prompts, self._weights, strict=True)
        ]
        return self.observe(self._prompts, self._weights)

    def _rewards(
        self, prompts: NDArray[np.int64], weights: NDArray[np.float64], columns: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Losses (nats), bonuses and rewards, each (num_envs,); the table computes losses that it lacks."""
        self.table.compute(prompts, columns)
        loss, bonus = self.table.losses[prompts, columns], self.bonuses[prompts, columns]
        return loss, bonus, -loss + weights * bonus

    def close(self) -> None:
        """Write newly computed rewards to the table's folder, where it has one."""
        self.table.flush()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The attribute, which all sub-environments share, once per index in `indices`."""
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of all sub-environments; `ValueError` for a part of them, since they share it."""
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise ValueError(
                f"{attr_name}: the sub-environments share their attributes, set it for all of them"
            )
        setattr(self, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Raise `NotImplementedError`: there are no single environments to call."""
        raise NotImplementedError(
            f"{method_name}: InsertLayerVecEnv has no single environments to call a method of"
        )

    def env_is_wrapped(
        self, wrapper_class: type[gymnasium.Wrapper], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Return False per index in `indices`."""
        return [False for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Return None per sub-environment: there is nothing to render."""
        return [None] * self.num_envs
