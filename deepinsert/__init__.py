"""DeepInsert: learn at which decoder layer multimodal tokens should enter a multimodal language model.

The packages `deepinsert.backbones`, `deepinsert.envs` and `deepinsert.controller` lie in the folders of those
names at the top of the repository. Importing this package registers `DeepInsert/InsertLayer-v0` with
Gymnasium and loads no torch: a public name loads its package when it is first used.
"""

from typing import TYPE_CHECKING

from .envs.lazy_names import lazy_attributes
from .envs.registration import register_envs

__version__ = "0.1.0"

_MODULE_OF = {
    "Backbone": "backbones",
    "CostModel": "backbones",
    "DatasetError": "envs",
    "InsertLayerEnv": "envs",
    "InsertLayerVecEnv": "envs",
    "LayerPolicy": "controller.policy",
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

__all__ = ["__version__", "register_envs", *_MODULE_OF]

if TYPE_CHECKING:
    # `as` marks a name as public for type checkers, which do not evaluate `__all__` above.
    from .backbones import Backbone as Backbone
    from .backbones import CostModel as CostModel
    from .backbones import UnsupportedCacheError as UnsupportedCacheError
    from .backbones import UnsupportedModelError as UnsupportedModelError
    from .backbones import UntriedVersionError as UntriedVersionError
    from .backbones import deep_insert as deep_insert
    from .backbones import insert_at as insert_at
    from .backbones import insert_layer_of as insert_layer_of
    from .backbones import load_backbone as load_backbone
    from .backbones import remove_deep_insert as remove_deep_insert
    from .backbones import set_insert_layer as set_insert_layer
    from .controller.policy import LayerPolicy as LayerPolicy
    from .envs import DatasetError as DatasetError
    from .envs import InsertLayerEnv as InsertLayerEnv
    from .envs import InsertLayerVecEnv as InsertLayerVecEnv
    from .envs import Prompt as Prompt
    from .envs import RewardTable as RewardTable
    from .envs import load_instructions as load_instructions
    from .envs import prompts_from as prompts_from

else:
    __getattr__ = lazy_attributes(__name__, _MODULE_OF)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
