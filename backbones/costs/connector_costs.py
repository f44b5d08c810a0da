"""FLOPs of what stands between an image tower and the decoder, for one tile, and the tokens that it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .module_costs import RowCost, linear_flops, row_cost

NAMES = ("multi_modal_projector", "connector")


@dataclass(frozen=True)
class Connector:
    """What one tile costs after the tower, and the tokens it becomes."""

    tokens: int
    flops: int


def connector_of(model: PreTrainedModel, patches: int, rows: int, width: int) -> Connector | None:
    """The connector behind a tower that gives `rows` rows of `width` numbers, `patches` of them patches.

    None where its kind is not known.
    """
    qformer: Any = find_module(model, "qformer")
    if qformer is not None:
        return _query_former(model, qformer, rows)
    found = (find_module(model, name) for name in NAMES)
    connector: Any = next((module for module in found if module is not None), None)
    if connector is None:
        return None
    if hasattr(connector, "cross_attn"):
        return _cross_attention(connector, rows, width)
    if hasattr(connector, "mm_input_projection_weight"):  # Gemma 3 averages patches, then one matrix
        tokens = connector.tokens_per_side**2
        return Connector(tokens, tokens * 2 * connector.mm_input_projection_weight.numel())
    return _linear(model, connector, patches, rows, width)


def _linear(
    model: PreTrainedModel, connector: nn.Module, patches: int, rows: int, width: int
) -> Connector | None:
    """Linear layers over each token; a token may be several neighbouring patches put side by side."""
    linears = [part for part in connector.modules() if isinstance(part, nn.Linear)]
    weights = sum(part.weight.numel() for part in linears)
    matrices = sum(weight.numel() for weight in connector.parameters() if weight.dim() > 1)
    pools = any("Pool" in type(part).__name__ for part in connector.modules())
    if not linears or weights != matrices or pools:
        return None
    chosen = getattr(model.config, "vision_feature_layer", None)
    features = width * (len(chosen) if isinstance(chosen, (list, tuple)) else 1)
    dropped = getattr(model.config, "vision_feature_select_strategy", "default") == "default"
    side_by_side, rest = divmod(linears[0].in_features, features)
    if rest or not side_by_side:
        return None
    tokens = (patches if dropped else rows) // side_by_side
    return Connector(tokens, tokens * linear_flops([connector]))


def _cross_attention(connector: Any, rows: int, width: int) -> Connector | None:
    """Aria: learned queries read the tower's rows through one attention, then a small MLP."""
    queries = connector.patch_to_query_dict.get(rows)
    if queries is None:
        return None
    attention = connector.cross_attn
    # `nn.MultiheadAttention` projects once more what q_proj, k_proj and v_proj gave.
    of_queries = linear_flops([attention.q_proj, attention.linear, connector.feed_forward]) + 4 * width**2
    of_rows = linear_flops([attention.k_proj, attention.v_proj]) + 4 * width**2
    return Connector(queries, queries * of_queries + rows * of_rows + 4 * queries * rows * width)


def _query_former(model: Any, qformer: Any, rows: int) -> Connector | None:
    """BLIP-2: layers over learned queries; some read the tower's rows. InstructBLIP's also read text."""
    projection = find_module(model, "language_projection")
    if projection is None or getattr(qformer.config, "use_qformer_text_input", True):
        return None
    queries = model.config.num_query_tokens
    flops = queries * linear_flops([projection])
    for layer in qformer.encoder.layer:
        flops += row_cost(layer.attention).flops(queries)
        flops += queries * linear_flops([layer.intermediate_query, layer.output_query])
        if layer.has_cross_attention:
            inner = layer.crossattention
            read = linear_flops([inner.attention.key, inner.attention.value])
            pairs = row_cost(inner).per_pair
            flops += RowCost(linear_flops([inner]) - read, 0).flops(queries) + rows * read
            flops += queries * rows * pairs
    return Connector(queries, flops)


def find_module(model: nn.Module, name: str) -> nn.Module | None:
    """The first module whose last name is `name`."""
    return next((module for path, module in model.named_modules() if path.split(".")[-1] == name), None)
