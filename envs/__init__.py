"""Instruction data, prompts, rewards and the environment in which a layer policy learns.

Importing this package registers `DeepInsert/InsertLayer-v0`; torch is imported with the first class asked
for.
"""

from importlib import import_module
from typing import Any

from .registration import register_envs

PUBLIC = {
    "DatasetError": "data.media",
    "InstructionData": "data.instructions",
    "Record": "data.instructions",
    "Turn": "data.instructions",
    "load_instructions": "data.instructions",
    "split_by_image": "data.instructions",
    "Prompt": "prompts",
    "answer_loss": "prompts",
    "encode": "prompts",
    "prompts_from": "prompts",
    "Normaliser": "observations",
    "Observation": "observations",
    "prompt_embeddings": "observations",
    "RewardTable": "rewards.table",
    "SkipWeights": "skip_weights",
    "Times": "rewards.time_bonus",
    "measure_times": "rewards.time_bonus",
    "InsertLayerEnv": "insert_layer_env",
    "InsertLayerVecEnv": "vector_env",
}

__all__ = ["register_envs", *PUBLIC]

register_envs()


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
