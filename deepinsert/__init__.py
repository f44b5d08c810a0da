"""DeepInsert: learn at which decoder layer multimodal tokens should enter a multimodal language model.

The rooms `deepinsert.backbones`, `deepinsert.envs` and `deepinsert.controller` lie in the folders of those
names at the top of the repository. Importing this package registers `DeepInsert/InsertLayer-v0` with
Gymnasium and loads no torch; a public name loads what it needs when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .envs.registration import register_envs

if TYPE_CHECKING:
    from .backbones.costs.cost_model import CostModel
    from .backbones.errors import UnsupportedCacheError, UnsupportedModelError, UntriedVersionError
    from .backbones.loading import Backbone, load_backbone
    from .backbones.mechanism.insertion import (
        deep_insert,
        insert_at,
        insert_layer_of,
        remove_deep_insert,
        set_insert_layer,
    )
    from .controller.policy.layer_policy import LayerPolicy
    from .envs.data.instructions import load_instructions
    from .envs.data.media import DatasetError
    from .envs.insert_layer_env import InsertLayerEnv
    from .envs.prompts import Prompt, prompts_from
    from .envs.rewards.table import RewardTable
    from .envs.vector_env import InsertLayerVecEnv

__all__ = [
    "Backbone",
    "CostModel",
    "DatasetError",
    "InsertLayerEnv",
    "InsertLayerVecEnv",
    "LayerPolicy",
    "Prompt",
    "RewardTable",
    "UnsupportedCacheError",
    "UnsupportedModelError",
    "UntriedVersionError",
    "__version__",
    "deep_insert",
    "insert_at",
    "insert_layer_of",
    "load_backbone",
    "load_instructions",
    "prompts_from",
    "register_envs",
    "remove_deep_insert",
    "set_insert_layer",
]

_ROOM_OF = {
    "Backbone": "backbones",
    "CostModel": "backbones",
    "DatasetError": "envs",
    "InsertLayerEnv": "envs",
    "InsertLayerVecEnv": "envs",
    "LayerPolicy": "deepinsert.controller.policy",
    "Prompt": "envs",
    "RewardTable": "envs",
    "UnsupportedCacheError": "backbones",
    "UnsupportedModelError": "backbones",
    "UntriedVersionError": "backbones",
    "deep_insert": "backbones",
    "insert_at": "backbones",
    "insert_layer_of": "backbones",
    "load_backbone": "backbones",
    "load_instructions": "envs",
    "prompts_from": "envs",
    "remove_deep_insert": "backbones",
    "set_insert_layer": "backbones",
}

register_envs()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("deepinsert")
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ROOM_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
