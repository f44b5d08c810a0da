"""DeepInsert on stock multimodal models: the variable-depth forward, its costs, and loading."""

from deepinsert.backbones.costs.cost_model import CostModel, eq5_flops
from deepinsert.backbones.mechanism.insertion import (
    deep_insert,
    insert_at,
    insert_layer_of,
    remove_deep_insert,
    set_insert_layer,
)

from .errors import UnsupportedCacheError, UnsupportedModelError, UntriedVersionError
from .loading import Backbone, load_backbone

__all__ = [
    "Backbone",
    "CostModel",
    "UnsupportedCacheError",
    "UnsupportedModelError",
    "UntriedVersionError",
    "deep_insert",
    "eq5_flops",
    "insert_at",
    "insert_layer_of",
    "load_backbone",
    "remove_deep_insert",
    "set_insert_layer",
]
