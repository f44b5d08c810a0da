"""FLOPs and tokens, per tile, of the connector between an image tower and the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .module_costs import RowCost, linear_flops, row_cost

CONNECTOR_NAMES = ("multi_modal_projector", "connector")


@dataclass(frozen=True)
class Connector:
    """The number of tokens that a connector makes of one tile, and its FLOPs."""

    tokens: int
    flops: int


def connector_of(model: PreTrainedModel, patches: int, rows: int, width: int) -> Connector | None:
    """Count the connector behind an image tower; None where its kind is unknown.

    Args:
        model: the stock model.
        patches: patches per tile.
        rows: rows that the tower returns per tile: the patches, and a class token where there is one.
        width: numbers per row.
    """
    qformer: Any = find_module(model, "qformer")
    if qformer is not None:
        return _query_former(model, qformer, rows)
    candidates = (find_module(model, name) for name in CONNECTOR_NAMES)
    connector: Any = next((module for module in candidates if module is not None), None)
    if connector is None:
        return None
    if hasattr(connector, "cross_attn"):
        return _cross_attention(connector, rows, width)
    if hasattr(connector, "mm_input_projection_weight"):  # Gemma 3 averages patches, then applies one matrix
        tokens = connector.tokens_per_side**2
        return Connector(tokens, tokens * 2 * connector.mm_input_projection_weight.numel())
    return _linear(model, connector, patches, rows, width)


def _linear(
    model: PreTrainedModel, connector: nn.Module, patches: int, rows: int, width: int
) -> Connector | None:
    """Count linear layers applied per token; a token may be several neighbouring patches concatenated."""
    linears = [part for part in connector.modules() if isinstance(part, nn.Linear)]
    linear_weights = sum(part.weight.numel() for part in linears)
    matrix_weights = sum(weight.numel() for weight in connector.parameters() if weight.dim() > 1)
    has_pooling = any("Pool" in type(part).__name__ for part in connector.modules())
    if not linears or linear_weights != matrix_weights or has_pooling:
        return None
    layers = getattr(model.config, "vision_feature_layer", None)
    features = width * (len(layers) if isinstance(layers, (list, tuple)) else 1)
    drops_class = getattr(model.config, "vision_feature_select_strategy", "default") == "default"
    patches_per_token, rest = divmod(linears[0].in_features, features)
    if rest or not patches_per_token:
        return None
    tokens = (patches if drops_class else rows) // patches_per_token
    return Connector(tokens, tokens * linear_flops([connector]))


def _cross_attention(connector: Any, rows: int, width: int) -> Connector | None:
    """Count Aria's connector: learned queries read the tower's rows by one attention, then a small MLP."""
    queries = connector.patch_to_query_dict.get(rows)
    if queries is None:
        return None
    attention = connector.cross_attn
    # `nn.MultiheadAttention` projects the outputs of q_proj, k_proj and v_proj a second time.
    per_query = linear_flops([attention.q_proj, attention.linear, connector.feed_forward]) + 4 * width**2
    per_row = linear_flops([attention.k_proj, attention.v_proj]) + 4 * width**2
    return Connector(queries, queries * per_query + rows * per_row + 4 * queries * rows * width)


def _query_former(model: Any, qformer: Any, rows: int) -> Connector | None:
    """Count BLIP-2's Q-Former: layers over learned queries, of which some read the tower's rows.

    InstructBLIP's Q-Former reads text as well and is not counted.
    """
    projection = find_module(model, "language_projection")
    if projection is None or getattr(qformer.config, "use_qformer_text_input", True):
        return None
    queries = model.config.num_query_tokens
    flops = queries * linear_flops([projection])
    for layer in qformer.encoder.layer:
        flops += row_cost(layer.attention).flops(queries)
        flops += queries * linear_flops([layer.intermediate_query, layer.output_query])
        if layer.has_cross_attention:
            cross = layer.crossattention
            key_value_flops = linear_flops([cross.attention.key, cross.attention.value])
            per_pair = row_cost(cross).per_pair
            flops += RowCost(linear_flops([cross]) - key_value_flops, 0).flops(queries)
            flops += rows * key_value_flops + queries * rows * per_pair
    return Connector(queries, flops)


def find_module(model: nn.Module, name: str) -> nn.Module | None:
    """Return the first submodule whose last name is `name`; None without one."""
    return next((module for path, module in model.named_modules() if path.split(".")[-1] == name), None)
