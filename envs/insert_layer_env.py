"""The Gymnasium environment in which a policy learns an insert layer per prompt (paper, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from numpy.typing import ArrayLike, NDArray

from deepinsert.envs.rewards.table import Bonus, RewardTable

from .observations import LIMIT, Normaliser, Observation, check_observations
from .skip_weights import SkipWeights

if TYPE_CHECKING:
    from deepinsert.backbones import Backbone

    from .prompts import Prompt


_ARGUMENTS = "give either backbone and prompts, or table and observations"


class InsertLayerEnv(gymnasium.Env[NDArray[np.float32], np.int64]):
    r"""Choose the decoder layer at which a prompt's multimodal tokens enter a frozen model.

    ## Description
    An episode is one prompt and one decision. The agent observes the prompt's text and chooses an insert
    layer. The reward grows with the likelihood of the reference answer under the frozen backbone, and with
    the number of layers that the multimodal tokens skip. The backbone does not change, so the same prompt and
    layer always give the same reward: the task is a contextual bandit (DeepInsert, arXiv 2504.19327,
    section 3).

    ## Action Space
    `Discrete(K)`: action `k` is insert layer `insert_layers[k]`, one of K candidates. With
    `insert_layers="all"`, the candidates are layers 0 to N-1 of a backbone with N decoder layers. Insert
    layer 0 is the stock model.

    ## Observation Space
    `Box(-10, 10, (D,), float32)`: the mean of the backbone's frozen input embeddings over the prompt's text
    tokens (with the chat template; without placeholders, answer and padding), normalised per feature with the
    frozen statistics of `normaliser` and clipped to 10 standard deviations. Where `skip_weight` is a range,
    16 features of the episode's $\lambda$ in [-1, 1] follow (`SkipWeights.features_of`).

    ## Rewards
    $r = -loss + \lambda \cdot bonus$, where *loss* is the mean next-token negative log-likelihood over the
    answer's tokens in nats, $\lambda$ is `skip_weight`, and *bonus* in [0, 1] is

    - `"depth"`: $L / N$, the share of layers skipped (as in the paper);
    - `"flops"`: $1 - F(L) / F(0)$, the share of the prompt's prefill FLOPs saved, clipped to [0, 1];
    - `"time"`: the measured share of prefill time saved, for a table with `times`.

    The bonus has no unit, so $\lambda$ is in nats: `skip_weight=0.5` gives up half a nat of loss for skipping
    all layers. Rewards come from a `RewardTable`, which computes them when they are first needed. With a
    range, each episode draws its $\lambda$, and one policy learns all trade-offs in the range.

    ## Starting State
    The environment's seeded generator draws a prompt uniformly, independently of earlier episodes. With a
    range of skip weights, it then draws a $\lambda$, more densely where $\lambda$ is small.

    ## Episode End
    Every episode terminates after one step, and none is truncated. The terminal observation equals the first.

    ## Arguments
    Give either a backbone and prompts:

    ```python
    import deepinsert  # registers the environment
    env = gymnasium.make("DeepInsert/InsertLayer-v0", backbone=backbone, prompts=prompts, skip_weight=0.5)
    ```

    or a reward table and observations: `table=..., observations=...`. Other combinations raise `TypeError`.

    ## Reset Options
    `reset(options={"prompt": i})` starts with prompt `i`, 0 to P-1, instead of a random one;
    `"skip_weight"` likewise sets $\lambda$.

    ## Seeding
    `reset(seed=s)` restarts the sequence of prompts and skip weights: the same seed gives the same episodes,
    whatever the actions.

    ## Info
    `reset` returns `prompt` (its index), `prompt_id` and `skip_weight`. `step` returns these as well as
    `insert_layer`, `loss` (nats) and `bonus` (in [0, 1], without $\lambda$).

    ## Version History
    * v0: initial version.

    Args:
        backbone: The frozen model.
        prompts: The prompts (P) of the episodes.
        table: With a backbone, the folder of a sweep: its rewards are used, and new rewards are added to it.
            Otherwise a reward table, or the folder of a complete one.
        observations: Observations (P, D) of a table's prompts.
        normaliser: Normalises the observations. With a backbone, the default is fitted to the observations of
            the prompts; with a table, the default is clipping only.
        insert_layers: The candidates in ascending order, or "all" (with a backbone; a table has its own).
        skip_weight: $\lambda$, at least 0, or the two ends of a range such as `(0, 2)`.
        bonus: "depth", "flops" or "time".
        observation: The part of a prompt to observe (with a backbone), by default the input embeddings.
        batch_size: Prompts observed at a time (with a backbone).
        render_mode: Accepted for Gymnasium's helpers; there is nothing to render.
    """

    # Gymnasium declares `metadata` as an instance variable, though it is one value per class.
    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}  # type: ignore[misc]
    _spec: EnvSpec | None = None

    def __init__(
        self,
        backbone: Backbone | None = None,
        prompts: Sequence[Prompt] | None = None,
        *,
        table: RewardTable | str | Path | None = None,
        observations: ArrayLike | None = None,
        normaliser: Normaliser | None = None,
        insert_layers: Sequence[int] | Literal["all"] = "all",
        skip_weight: float | tuple[float, float] | SkipWeights = 0.5,
        bonus: Bonus = "depth",
        observation: Observation | None = None,
        batch_size: int = 32,
        render_mode: str | None = None,
    ) -> None:
        if (backbone is None) != (prompts is None) or (backbone is None) == (observations is None):
            raise TypeError(_ARGUMENTS)
        if backbone is not None and prompts is not None:
            if isinstance(table, RewardTable):
                raise TypeError(
                    "a table in memory goes with observations; beside a backbone, give its folder"
                )
            table = RewardTable(backbone, prompts, insert_layers, folder=table)
            observations = (observation or Observation())(backbone, prompts, batch_size)
            normaliser = normaliser or Normaliser.fit(observations)
        else:
            table = _existing_table(table, insert_layers)
        if observations is None:
            raise TypeError(_ARGUMENTS)
        self.table = table
        self.normaliser = normaliser
        self.observations = check_observations(
            observations if normaliser is None else normaliser(observations), len(table)
        )
        self.insert_layers = table.insert_layers
        self.skip_weights = SkipWeights.of(skip_weight)
        self.bonuses = table.bonus(bonus)
        self.render_mode = render_mode
        width = self.observations.shape[1] + self.skip_weights.num_features
        self.observation_space = spaces.Box(-LIMIT, LIMIT, (width,), np.float32)
        self.action_space = spaces.Discrete(len(self.insert_layers))
        self._prompt: int | None = None
        self._weight = self.skip_weights.low

    @property
    def spec(self) -> EnvSpec | None:
        """The specification by which `gymnasium.make` created this environment."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        # Wrappers deep-copy the spec whenever it is read; its arguments may include a whole model.
        if spec is not None:
            spec.kwargs = _Shared(spec.kwargs)
        self._spec = spec

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode; returns the prompt's observation and the infos `prompt` and `prompt_id`.

        Raises `ValueError` for a prompt or skip weight in `options` that does not exist or is out of range.
        """
        super().reset(seed=seed)
        options = options or {}
        if options.get("prompt") is None:
            self._prompt = int(self.np_random.integers(len(self.table)))
        else:
            self._prompt = check_prompt_index(options["prompt"], len(self.table))
        if options.get("skip_weight") is None:
            self._weight = float(self.skip_weights.draw(self.np_random, 1)[0])
        else:
            self._weight = self.skip_weights.check(options["skip_weight"])
        return self._observe(self._prompt), self._info(self._prompt)

    def step(self, action: np.int64 | int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Insert at `insert_layers[action]`, which ends the episode.

        Returns observation, reward, True (terminated), False (truncated) and infos. Raises `ResetNeeded`
        before a `reset`, and `ValueError` for an action outside the action space.
        """
        if self._prompt is None:
            raise gymnasium.error.ResetNeeded("the episode is over: call reset() before step()")
        if not self.action_space.contains(action):
            raise ValueError(
                f"action {action!r} is not one of the {len(self.insert_layers)} candidate layers"
            )
        prompt, column, self._prompt = self._prompt, int(action), None
        loss = self.table.loss(prompt, column)
        bonus = float(self.bonuses[prompt, column])
        info = self._info(prompt) | {"insert_layer": self.insert_layers[column], "loss": loss, "bonus": bonus}
        return self._observe(prompt), -loss + self._weight * bonus, True, False, info

    def _observe(self, prompt: int) -> NDArray[np.float32]:
        """The observation of a prompt under the episode's skip weight: float32 (D + F,)."""
        return np.concatenate([self.observations[prompt], self.skip_weights.features_of([self._weight])[0]])

    def close(self) -> None:
        """Write newly computed rewards to the table's folder, where it has one."""
        self.table.flush()

    def _info(self, prompt: int) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "prompt_id": self.table.prompt_ids[prompt],
            "skip_weight": self._weight,
        }


def _existing_table(
    table: RewardTable | str | Path | None, insert_layers: Sequence[int] | Literal["all"]
) -> RewardTable:
    """The reward table itself or from its folder; `TypeError` where the arguments do not go together."""
    if insert_layers != "all":
        raise TypeError("a table has its own insert_layers: leave the argument out")
    if table is None:
        raise TypeError(_ARGUMENTS)
    return table if isinstance(table, RewardTable) else RewardTable.load(table)


class _Shared(dict[str, Any]):
    """Arguments that a deep copy shares with the original."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return _Shared(self)


def check_prompt_index(index: object, num_prompts: int) -> int:
    """Return `index` as an int; `ValueError` where there is no such prompt."""
    if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or not 0 <= index < num_prompts:
        raise ValueError(f"options['prompt'] {index!r}: give the index of a prompt, 0 to {num_prompts - 1}")
    return int(index)
