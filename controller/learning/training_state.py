"""Everything that training goes on from after the process was killed, in one file without code.

Saving a stable-baselines3 model is not enough: the generators of Python, NumPy and torch, the prompts in
play, the counters that schedules hang on and what was tried so far are state too. With all of it, a training
that was killed ends in the same bits as one that was not.
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

from deepinsert.controller.runs.folder import replacing

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
"""Attributes of a stable-baselines3 model that change while it learns; each algorithm has some of them."""


class StateFile:
    """The state of one training in `path`, written at most every `seconds`; None keeps no state.

    `identity` says what decides the result (data, options, seed, versions). A state of another identity is
    refused, since going on from it would give a policy that no single training gives.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any], seconds: float = 1.0) -> None:
        self.path = path
        self.identity = json.loads(json.dumps(identity))
        self.seconds = seconds
        self._saved = time.monotonic()

    def due(self) -> bool:
        """Whether the last state is old enough to write another."""
        return self.path is not None and time.monotonic() - self._saved >= self.seconds

    def save(self, content: Any) -> None:
        """Write `content` (numbers, texts, arrays, tensors, nested as one likes), atomically."""
        if self.path is None:
            return
        tensors: dict[str, torch.Tensor] = {}
        header = {"format": FORMAT, "identity": self.identity, "content": _pack(content, tensors)}
        text = json.dumps(header)
        data = safetensors.torch.save(tensors, metadata={"state": text, "sha256": _digest(text, tensors)})
        with replacing(self.path) as temporary:
            temporary.write_bytes(data)
        self._saved = time.monotonic()

    def load(self) -> Any:
        """The content saved last; None where there is none.

        Raises `ValueError` for a file that is no whole state, or of another training.
        """
        if self.path is None:
            return None
        for unfinished in self.path.parent.glob(f".{self.path.name}.*.tmp"):
            unfinished.unlink(missing_ok=True)  # of a process that was killed while it wrote
        if not self.path.is_file():
            return None
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
            text = metadata["state"]
            if metadata["sha256"] != _digest(text, tensors):
                raise ValueError("its checksum does not fit")
            header = json.loads(text)
            content = _unpack(header["content"], tensors)
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path}: not a state of training ({error}); remove it to train anew"
            ) from None
        known = header.get("identity", {})
        for name in sorted(known.keys() | self.identity.keys()):
            if known.get(name) != self.identity.get(name):
                raise ValueError(
                    f"{self.path}: belongs to a training with {name} {known.get(name)}, not "
                    f"{self.identity.get(name)}; remove it to train anew"
                )
        return content


def random_state() -> dict[str, Any]:
    """The global generators of Python, NumPy and torch."""
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the global generators where `random_state` found them."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])


def model_state(model: BaseAlgorithm) -> dict[str, Any]:
    """All that a PPO, A2C or DQN model on an `InsertLayerVecEnv` goes on from, between two rollouts."""
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
    """Put a fresh model of the same algorithm and environment where `model_state` found it."""
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
    """`value` in JSON's types, arrays moved to `tensors`; every container is tagged with its kind."""
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
    raise TypeError(f"{type(value).__name__}: not something a state of training holds")


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
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
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors, key=int):
        found.update(tensors[name].numpy().tobytes())
    return found.hexdigest()
