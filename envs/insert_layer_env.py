"""The Gymnasium environment in which a policy learns an insert layer for each prompt (paper, section 3.3)."""

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


class InsertLayerEnv(gymnasium.Env[NDArray[np.float32], np.int64]):
    r"""Choose the decoder layer at which a prompt's multimodal tokens enter a frozen model.

    ## Description
    An episode is one prompt and one decision. The agent sees the prompt's text, picks an
    insert layer, and is paid for how well the frozen backbone then predicts the reference answer and for
    how many layers the multimodal tokens skipped. Nothing of the backbone changes, so the same prompt and
    layer always give the same reward: a contextual bandit (DeepInsert, arXiv 2504.19327, section 3).

    ## Action Space
    `Discrete(K)`: action `k` means insert layer `insert_layers[k]` of the `K` candidates.
    With `insert_layers="all"` these are layers 0 to N-1 of a backbone with N decoder layers. Insert layer 0
    is the stock model.

    ## Observation Space
    `Box(-10, 10, (hidden,), float32)`: the mean of the backbone's frozen input
    embeddings over the prompt's text tokens (chat template included; no placeholder, no answer, no
    padding), normalised feature by feature with the frozen statistics of `normaliser` and clipped to 10
    standard deviations. Where `skip_weight` is a range, 16 features of the episode's $\lambda$ in [-1, 1]
    follow (`SkipWeights.feature`).

    ## Rewards
    $r = -loss + \lambda \cdot bonus$, where *loss* is the mean next-token negative
    log-likelihood over the answer's tokens in nats, $\lambda$ is `skip_weight`, and *bonus* in [0, 1] is

    - `"depth"`: $L / N$, the share of layers skipped (the paper's);
    - `"flops"`: $1 - F(L) / F(0)$, the share of the prompt's prefill FLOPs saved, clipped to [0, 1];
    - `"time"`: the share of prefill time saved, as measured, for a table whose `times` are known.

    The bonus has no unit, so $\lambda$ is in nats: `skip_weight=0.5` gives up half a nat of loss for
    skipping every layer. Rewards are looked up in a `RewardTable`, which computes them when first needed.
    With a range, $\lambda$ is drawn anew for each episode, and one policy learns every trade in it.

    ## Starting State
    A prompt drawn uniformly at random with the environment's seeded generator,
    independently of earlier episodes; with a range of skip weights, then a $\lambda$, drawn denser
    where it is small.

    ## Episode End
    Every episode terminates after its one step; none is truncated. The terminal observation
    is the prompt's own.

    ## Arguments
    Either a backbone and prompts:

    ```python
    import deepinsert  # registers the environment
    env = gymnasium.make("DeepInsert/InsertLayer-v0", backbone=backbone, prompts=prompts, skip_weight=0.5)
    ```

    where `table=` may name the folder of a sweep: what it knows is taken over, what is computed is added;
    or a reward table, or the folder of a complete one, with observations (P, hidden) that are ready:
    `table=..., observations=...`.

    - `insert_layers`: "all", or the candidates in ascending order (with a backbone; a table has its own);
    - `skip_weight`: $\lambda$, at least 0, or the two ends of a range such as `(0, 2)`;
    - `bonus`: "depth", "flops" or "time";
    - `normaliser`: applied to the observations. By default fitted to the prompts' embeddings; with a table,
      observations are taken as they come, clipped;
    - `observation`: what is observed of a prompt (with a backbone), by default its input embeddings;
    - `batch_size`: prompts observed at a time (with a backbone).

    ## Reset Options
    `reset(options={"prompt": i})` starts with prompt `i`, 0 to P-1, and draws none;
    `"skip_weight"` likewise chooses $\lambda$.

    ## Seeding
    `reset(seed=s)` restarts the sequence of prompts and skip weights: the same seed gives the same
    episodes, whatever the actions.

    ## Info
    `reset`: `prompt` (its index), `prompt_id` and `skip_weight`. `step`: these, and `insert_layer`, `loss`
    (nats), `bonus` (in [0, 1], without $\lambda$).

    ## Version History
    * v0: initial version.
    """

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
            raise TypeError("give either backbone and prompts, or table and observations")
        if backbone is not None and prompts is not None:
            if isinstance(table, RewardTable):
                raise TypeError(
                    "a table in memory goes with observations; beside a backbone, give its folder"
                )
            table = RewardTable(backbone, prompts, insert_layers, folder=table)
            observations = (observation or Observation())(backbone, prompts, batch_size)
            normaliser = normaliser or Normaliser.fit(observations)
        elif insert_layers != "all":
            raise TypeError("a table has its own insert_layers: leave the argument out")
        elif isinstance(table, (str, Path)):
            table = RewardTable.load(table)
        if table is None or observations is None:
            raise TypeError("give either backbone and prompts, or table and observations")
        self.table = table
        self.normaliser = normaliser
        self.observations = check_observations(
            observations if normaliser is None else normaliser(observations), len(table)
        )
        self.insert_layers = table.insert_layers
        self.skip_weights = SkipWeights.of(skip_weight)
        self.bonuses = table.bonus(bonus)
        self.render_mode = render_mode
        width = self.observations.shape[1] + self.skip_weights.features
        self.observation_space = spaces.Box(-LIMIT, LIMIT, (width,), np.float32)
        self.action_space = spaces.Discrete(len(self.insert_layers))
        self._prompt: int | None = None
        self._weight = self.skip_weights.low

    @property
    def spec(self) -> EnvSpec | None:  # type: ignore[override]
        """How `gymnasium.make` built this environment."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        # Wrappers deep-copy the spec, arguments included, whenever it is read; ours would copy a whole model.
        if spec is not None:
            spec.kwargs = _Shared(spec.kwargs)
        self._spec = spec

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode: the observation of a prompt, and its name."""
        super().reset(seed=seed)
        options = options or {}
        if options.get("prompt") is None:
            self._prompt = int(self.np_random.integers(len(self.table)))
        else:
            self._prompt = check_prompt(options["prompt"], len(self.table))
        if options.get("skip_weight") is None:
            self._weight = float(self.skip_weights.draw(self.np_random, 1)[0])
        else:
            self._weight = self.skip_weights.check(options["skip_weight"])
        return self._observe(self._prompt), self._info(self._prompt)

    def step(self, action: np.int64 | int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Insert at `insert_layers[action]`, and be rewarded. The episode ends."""
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
        return np.concatenate([self.observations[prompt], self.skip_weights.feature([self._weight])[0]])

    def close(self) -> None:
        """Add the rewards computed since the last time to the table's folder, where it has one."""
        self.table.flush()

    def _info(self, prompt: int) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "prompt_id": self.table.prompt_ids[prompt],
            "skip_weight": self._weight,
        }


class _Shared(dict[str, Any]):
    """Arguments that a deep copy refers to instead of copying."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return _Shared(self)


def check_prompt(index: object, num_prompts: int) -> int:
    """`index` as a prompt's index; `ValueError` where there is no such prompt."""
    if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or not 0 <= index < num_prompts:
        raise ValueError(f"options['prompt'] {index!r}: give the index of a prompt, 0 to {num_prompts - 1}")
    return int(index)
