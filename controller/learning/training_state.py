"""Saves and restores the complete state of a training in one safetensors file, which cannot contain code.

A stable-baselines3 model is only part of that state: the random generators of Python, NumPy and torch, the
environments' current prompts, the counters that schedules depend on and the replay buffer belong to it too.
With all of them, a training that was killed and continued gives the same bits as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from deepinsert.controller.runs.atomic_files import atomic_file

from .algorithms import PromptReplayBuffer

FORMAT = 1
COUNTERS = (
    "num_timesteps",
    "_n_updates",
    "_episode_num",
    "_n_calls",
    "exploration_rate",
    "_current_progress_remaining",
)
"""Attributes of a stable-baselines3 model that change in training; each algorithm has some of them."""


class StateFile:
    """The file in `path` with the state of one training.

    Args:
        path: the file; with None, nothing is saved or loaded.
        identity: all that the result depends on (data, options, seed, versions). A state with another
            identity is refused, since continuing from it would give a policy that no single training gives.
        seconds: the least time between two states, in seconds.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any], seconds: float = 1.0) -> None:
        self.path = path
        self.identity = json.loads(json.dumps(identity))
        self.seconds = seconds
        self._saved = time.monotonic()

    def due(self) -> bool:
        """Return whether at least `seconds` have passed since the last state was written."""
        return self.path is not None and time.monotonic() - self._saved >= self.seconds

    def save(self, content: Any) -> None:
        """Write `content` atomically: numbers, strings, arrays and tensors in dicts, lists and tuples."""
        if self.path is None:
            return
        tensors: dict[str, torch.Tensor] = {}
        header = {"format": FORMAT, "identity": self.identity, "content": _pack(content, tensors)}
        text = json.dumps(header)
        data = safetensors.torch.save(tensors, metadata={"state": text, "sha256": _digest(text, tensors)})
        with atomic_file(self.path) as temporary:
            temporary.write_bytes(data)
        self._saved = time.monotonic()

    def load(self) -> Any:
        """Return the content that was saved last, or None if there is none.

        Raises:
            ValueError: if the file is damaged or belongs to another training.
        """
        if self.path is None:
            return None
        for unfinished in self.path.parent.glob(f".{self.path.name}.*.tmp"):
            unfinished.unlink(missing_ok=True)  # left by a process that was killed while it wrote
        if not self.path.is_file():
            return None
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - file is no dict
            text = metadata["state"]
            if metadata["sha256"] != _digest(text, tensors):
                raise ValueError("its checksum does not match")
            header = json.loads(text)
            content = _unpack(header["content"], tensors)
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path} is not a training state ({error}); remove it to train from the beginning"
            ) from None
        self._check_identity(header.get("identity", {}))
        return content

    def _check_identity(self, saved_identity: dict[str, Any]) -> None:
        for name in sorted(saved_identity.keys() | self.identity.keys()):
            if saved_identity.get(name) != self.identity.get(name):
                raise ValueError(
                    f"{self.path} belongs to a training with {name} {saved_identity.get(name)}, not "
                    f"{self.identity.get(name)}; remove it to train from the beginning"
                )


def random_state() -> dict[str, Any]:
    """Return the state of the global random generators of Python, NumPy and torch."""
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore the global random generators from what `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])


def model_state(model: BaseAlgorithm) -> dict[str, Any]:
    """Return the complete state of an SB3 model on an `InsertLayerVecEnv`, between two rollouts."""
    env: Any = model.env
    state = {
        "policy": model.policy.state_dict(),
        "optimizer": model.policy.optimizer.state_dict(),
        "counters": {name: getattr(model, name) for name in COUNTERS if hasattr(model, name)},
        "episode_starts": model._last_episode_starts,
        "action_space": model.action_space.np_random.bit_generator.state,
        "env": env.get_state(),
        "logger": dict(model.logger.name_to_value),
        "random": random_state(),
    }
    buffer = getattr(model, "replay_buffer", None)
    if isinstance(buffer, PromptReplayBuffer):
        state["tried"] = buffer.get_state()
    return state


def restore_model(model: BaseAlgorithm, state: dict[str, Any]) -> None:
    """Restore a state of `model_state` into a new model of the same algorithm and environment."""
    env: Any = model.env
    model.policy.load_state_dict(state["policy"])
    model.policy.optimizer.load_state_dict(state["optimizer"])
    for name, value in state["counters"].items():
        setattr(model, name, value)
    model._last_episode_starts = state["episode_starts"]
    model.action_space.np_random.bit_generator.state = state["action_space"]
    model._last_obs = env.set_state(state["env"])
    model.logger.name_to_value.update(state["logger"])
    buffer = getattr(model, "replay_buffer", None)
    if isinstance(buffer, PromptReplayBuffer):
        buffer.set_state(state["tried"])
    restore_random_state(state["random"])


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return `value` in JSON types; arrays move to `tensors`, and every container is tagged with its kind."""
    name = str(len(tensors))
    if isinstance(value, np.ndarray):
        tensors[name] = torch.from_numpy(value.copy())
        return {"array": name}
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_pack(item, tensors) for item in value]}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(f"a training state cannot contain a {type(value).__name__}")


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Invert `_pack`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_unpack(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    return tensors[content].numpy() if kind == "array" else tensors[content]


def _digest(text: str, tensors: dict[str, torch.Tensor]) -> str:
    checksum = hashlib.sha256(text.encode())
    for name in sorted(tensors, key=int):
        checksum.update(tensors[name].numpy().tobytes())
    return checksum.hexdigest()
