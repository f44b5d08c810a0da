"""The same environment for stable-baselines3, many prompts at a time.

One class steps every sub-environment with array operations and runs the backbone on whole blocks, where a
`DummyVecEnv` of `InsertLayerEnv` would ask for one prompt after the other.
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

from .insert_layer_env import check_prompt
from .observations import LIMIT, check_observations
from .skip_weights import SkipWeights


class InsertLayerVecEnv(VecEnv):
    """`num_envs` copies of `InsertLayerEnv` on one reward table, in stable-baselines3's vector interface.

    `observations` (P, hidden) are normalised already; they are clipped to [-10, 10]. Rewards that the table
    does not know are computed when needed, in its blocks. `table` may be a folder with a complete table.

    `skip_weight` is one λ, or the two ends of a range: every episode then draws its own λ, and its features
    (`SkipWeights.feature`) follow the prompt's in the observation.

    With `relative_to_layer_0` a reward is reduced by that of the same prompt at layer 0 (at the shallowest
    candidate where layer 0 is none). This subtracts a constant from each prompt, so no optimum moves, but
    the prompts' difficulty, which no action changes, no longer drowns what an action does.

    Each info holds `prompt`, `prompt_id`, `skip_weight`, `insert_layer`, `loss` (nats), `bonus` (in [0, 1])
    and `reward`, the reward before that shift, beside stable-baselines3's `terminal_observation` and
    `TimeLimit.truncated`.

    All sub-environments draw from one generator: the same `seed` gives the same prompts in the same order.
    `seed(s)` takes effect at the next `reset`. `get_state` and `set_state` carry the generator, the prompts
    in play and their λ, for a resume that is equal to the last bit.
    """

    render_mode: str | None = None  # the base class asks for it before it is set

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
        self.num_envs = num_envs  # get_attr, which the base class calls, needs it
        self._rng = np.random.default_rng(seed)
        self._prompts: NDArray[np.int64] = np.zeros(num_envs, dtype=np.int64)
        self._weights: NDArray[np.float64] = np.full(num_envs, self.skip_weights.low)
        self._actions: NDArray[np.int64] | None = None
        super().__init__(
            num_envs,
            spaces.Box(
                -LIMIT,
                LIMIT,
                (self.observations.shape[1] + self.skip_weights.features,),
                np.float32,
            ),
            spaces.Discrete(len(self.insert_layers)),
        )

    def reset(self) -> NDArray[np.float32]:
        """New prompts for every sub-environment; observations (num_envs, hidden), with F more for a range.

        `set_options({"prompt": i, "skip_weight": λ})` before it chooses a sub-environment's first episode.
        """
        if self._seeds[0] is not None:
            self._rng = np.random.default_rng([seed for seed in self._seeds if seed is not None])
        self._draw()
        for index, options in enumerate(self._options):
            if options.get("prompt") is not None:
                self._prompts[index] = check_prompt(options["prompt"], len(self.table))
            if options.get("skip_weight") is not None:
                self._weights[index] = self.skip_weights.check(options["skip_weight"])
        self._reset_seeds()
        self._reset_options()
        self._actions = None
        return self._start()

    def step_async(self, actions: NDArray[np.int64]) -> None:
        """Take one action (num_envs,) for each prompt in play."""
        actions = np.asarray(actions)
        known = (actions >= 0) & (actions < len(self.insert_layers))
        if actions.shape != (self.num_envs,) or not known.all():
            raise ValueError(
                f"actions {actions!r}: expected {self.num_envs} indices below {len(self.insert_layers)}"
            )
        self._actions = actions.astype(np.int64)

    def step_wait(
        self,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Rewards of the actions taken, and the next prompts' observations: every step ends an episode."""
        if self._actions is None:
            raise RuntimeError("step_wait() without step_async()")
        prompts, weights, columns, self._actions = self._prompts, self._weights, self._actions, None
        loss, bonus, reward = self._rewards(prompts, weights, columns)
        paid = reward
        if self.relative_to_layer_0:
            paid = reward - self._rewards(prompts, weights, np.zeros_like(columns))[2]
        final = self.observe(prompts, weights)
        infos = [
            {
                "prompt": int(prompt),
                "prompt_id": self.table.prompt_ids[prompt],
                "skip_weight": float(weights[index]),
                "insert_layer": int(self.insert_layers[column]),
                "loss": float(loss[index]),
                "bonus": float(bonus[index]),
                "reward": float(reward[index]),
                "terminal_observation": final[index],
                "TimeLimit.truncated": False,
            }
            for index, (prompt, column) in enumerate(zip(prompts, columns, strict=True))
        ]
        self._draw()
        done = np.ones(self.num_envs, dtype=np.bool_)
        return self._start(), paid.astype(np.float32), done, infos

    def observe(self, prompts: NDArray[np.int64], skip_weights: NDArray[np.float64]) -> NDArray[np.float32]:
        """Observations (n, hidden + F) of the prompts (n,) under the skip weights (n,)."""
        seen = self.observations[prompts]
        if self.skip_weights.single:
            return seen
        return np.concatenate([seen, self.skip_weights.feature(skip_weights)], axis=1)

    def get_state(self) -> dict[str, Any]:
        """Generator, prompts in play and their λ, fit for JSON; take it between two steps."""
        return {
            "rng": self._rng.bit_generator.state,
            "prompts": self._prompts.tolist(),
            "skip_weights": self._weights.tolist(),
        }

    def set_state(self, state: dict[str, Any]) -> NDArray[np.float32]:
        """Continue where `get_state` was called. Returns the observations of the prompts in play."""
        prompts = [check_prompt(prompt, len(self.table)) for prompt in state["prompts"]]
        weights = [self.skip_weights.check(weight) for weight in state["skip_weights"]]
        if not len(prompts) == len(weights) == self.num_envs:
            raise ValueError(f"the state holds {len(prompts)} prompts in play, not {self.num_envs}")
        self._rng.bit_generator.state = state["rng"]
        self._prompts = np.array(prompts, dtype=np.int64)
        self._weights = np.array(weights)
        self._actions = None
        return self.observe(self._prompts, self._weights)

    def _draw(self) -> None:
        self._prompts = self._rng.integers(len(self.table), size=self.num_envs)
        self._weights = self.skip_weights.draw(self._rng, self.num_envs)

    def _start(self) -> NDArray[np.float32]:
        """Observations of the prompts in play, whose infos are set."""
        self.reset_infos = [
            {"prompt": int(prompt), "skip_weight": float(weight)}
            for prompt, weight in zip(self._prompts, self._weights, strict=True)
        ]
        return self.observe(self._prompts, self._weights)

    def _rewards(
        self, prompts: NDArray[np.int64], weights: NDArray[np.float64], columns: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        self.table.compute(prompts, columns)
        loss, bonus = self.table.losses[prompts, columns], self.bonuses[prompts, columns]
        return loss, bonus, -loss + weights * bonus

    def close(self) -> None:
        """Add the rewards computed since the last time to the table's folder, where it has one."""
        self.table.flush()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The attribute, which all sub-environments share, once for each of `indices`."""
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of all sub-environments; `ValueError` for some of them, since they share it."""
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise ValueError(
                f"{attr_name}: the sub-environments share their attributes, set it for all of them"
            )
        setattr(self, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Not available: there are no single environments to call."""
        raise NotImplementedError(
            f"{method_name}: InsertLayerVecEnv has no single environments to call a method of"
        )

    def env_is_wrapped(
        self, wrapper_class: type[gymnasium.Wrapper], indices: VecEnvIndices = None
    ) -> list[bool]:
        """False for each of `indices`."""
        return [False for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[np.ndarray | None]:
        """None for each sub-environment: a prompt has no rendering."""
        return [None] * self.num_envs
