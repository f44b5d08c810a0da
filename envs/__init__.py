"""Instruction data, prompts, rewards and the environment in which a layer policy learns.

Importing this package registers `DeepInsert/InsertLayer-v0` and loads no torch: a public name loads its
module when it is first used.
"""

from typing import TYPE_CHECKING

from .lazy_names import lazy_attributes
from .registration import register_envs

_MODULE_OF = {
    "DatasetError": "data.media",
    "InsertLayerEnv": "insert_layer_env",
    "InsertLayerVecEnv": "vector_env",
    "InstructionData": "data.instructions",
    "Normaliser": "observations",
    "Observation": "observations",
    "Prompt": "prompts",
    "Record": "data.instructions",
    "RewardTable": "rewards.table",
    "SkipWeights": "skip_weights",
    "Times": "rewards.time_bonus",
    "Turn": "data.instructions",
    "answer_loss": "prompts",
    "encode": "prompts",
    "load_instructions": "data.instructions",
    "measure_times": "rewards.time_bonus",
    "prompt_embeddings": "observations",
    "prompts_from": "prompts",
    "split_by_image": "data.instructions",
}

__all__ = ["register_envs", *_MODULE_OF]

register_envs()

if TYPE_CHECKING:
    # `as` marks a name as public for type checkers, which do not evaluate `__all__` above.
    from .data.instructions import InstructionData as InstructionData
    from .data.instructions import Record as Record
    from .data.instructions import Turn as Turn
    from .data.instructions import load_instructions as load_instructions
    from .data.instructions import split_by_image as split_by_image
    from .data.media import DatasetError as DatasetError
    from .insert_layer_env import InsertLayerEnv as InsertLayerEnv
    from .observations import Normaliser as Normaliser
    from .observations import Observation as Observation
    from .observations import prompt_embeddings as prompt_embeddings
    from .prompts import Prompt as Prompt
    from .prompts import answer_loss as answer_loss
    from .prompts import encode as encode
    from .prompts import prompts_from as prompts_from
    from .rewards.table import RewardTable as RewardTable
    from .rewards.time_bonus import Times as Times
    from .rewards.time_bonus import measure_times as measure_times
    from .skip_weights import SkipWeights as SkipWeights
    from .vector_env import InsertLayerVecEnv as InsertLayerVecEnv
else:
    __getattr__ = lazy_attributes(__name__, _MODULE_OF)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
