"""FLOPs of an encoder and its projector, which run before any decoder layer, whatever the insert layer.

Kinds that most models use are counted from their modules; `measure_encoder` counts any kind by running it
once. A kind that is neither is estimated, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel

from deepinsert.backbones.families import find_stack, placeholder_token_ids

from .connector_costs import connector_of, find_module
from .module_costs import RowCost, attention_heads, convolution_flops, linear_flops, row_cost

Origin = Literal["counted", "measured", "estimated"]


class EncoderCost(Protocol):
    """FLOPs of encoder and projector for all images (or clips) of one prompt."""

    @property
    def origin(self) -> Origin:
        """Counted from the modules; measured on a batch; or only estimated from the number of weights."""

    def flops(self, multimodal: int, images: int) -> int: ...


@dataclass(frozen=True)
class TiledEncoder:
    """An encoder with a fixed input: CLIP and SigLIP towers on square tiles, Whisper-like ones on clips."""

    per_tile: int
    tokens_per_tile: int
    """Tokens that one tile becomes; of a clip, the most."""
    grids: tuple[tuple[int, int], ...] = ()
    """(tokens, tiles) of each grid that an image can be cut into, ascending (LLaVA-NeXT, OneVision)."""
    origin: Origin = "counted"

    def flops(self, multimodal: int, images: int) -> int:
        if self.grids:
            return self.per_tile * images * self.tiles(multimodal / max(images, 1))
        return self.per_tile * max(images, -(-multimodal // self.tokens_per_tile))

    def tiles(self, tokens: float) -> int:
        """Tiles of an image that became `tokens` tokens: the smallest grid that can hold them."""
        holding = [tiles for most, tiles in self.grids if tokens <= most]
        return holding[0] if holding else max((tiles for _, tiles in self.grids), default=1)


@dataclass(frozen=True)
class PatchEncoder:
    """An encoder that takes an image of any size as a row of patches and merges them (Qwen-VL, Pixtral)."""

    blocks: tuple[RowCost, ...]
    windowed: tuple[bool, ...]
    window: int
    """Patches in one attention window."""
    merge: int
    """Patches that become one token."""
    per_patch: int
    per_token: int
    joint: bool = False
    """Whether the images of a prompt are one sequence to the encoder, kept apart by its mask alone."""
    origin: Origin = "counted"

    def flops(self, multimodal: int, images: int) -> int:
        """Images count as equally large, and windows at the rim of an image as whole ones."""
        patches = multimodal * self.merge
        span = patches if self.joint else patches // max(images, 1)
        blocks = sum(
            block.flops(patches, min(self.window, span) if windowed else span)
            for block, windowed in zip(self.blocks, self.windowed, strict=True)
        )
        return blocks + patches * self.per_patch + multimodal * self.per_token


@dataclass(frozen=True)
class ProportionalEncoder:
    """A cost in proportion to the multimodal tokens: measured on a batch, or estimated from the weights."""

    measured: int
    tokens: int
    origin: Origin = "measured"

    def flops(self, multimodal: int, images: int) -> int:
        return round(self.measured * multimodal / max(self.tokens, 1))


def encoder_cost_of(model: PreTrainedModel) -> EncoderCost:
    """Cost of the model's encoder and projector, counted from their modules where their kind is known."""
    image: Any = model.get_encoder(modality="image")
    audio: Any = model.get_encoder(modality="audio")
    if hasattr(image, "patch_embed") and hasattr(image, "blocks") and hasattr(image, "merger"):
        return _patch_encoder(image)
    if hasattr(image, "patch_conv") and hasattr(image, "transformer"):
        return _pixtral_encoder(model, image) or _estimate(model)
    if _is_plain_tower(image):
        return _tiled_encoder(model, image) or _estimate(model)
    if hasattr(audio, "conv1") and hasattr(audio, "conv2") and hasattr(audio, "layers"):
        return _clip_encoder(model, audio) or _estimate(model)
    return _estimate(model)


def _estimate(model: PreTrainedModel) -> ProportionalEncoder:
    """As if every weight outside the decoder were applied once a token."""
    decoder = {id(weight) for weight in find_stack(model).parameters()}
    head = model.get_output_embeddings()
    decoder |= {id(weight) for weight in head.parameters()} if head is not None else set()
    others = sum(weight.numel() for weight in model.parameters() if id(weight) not in decoder)
    return ProportionalEncoder(2 * others, 1, "estimated")


def _is_plain_tower(tower: Any) -> bool:
    """One convolution that cuts patches, then layers of attention over all: CLIP, SigLIP and the like."""
    config = getattr(tower, "config", None)
    if not (hasattr(config, "image_size") and hasattr(config, "patch_size")):
        return False
    layers = _layers(tower)
    convolutions = [part for part in tower.modules() if isinstance(part, nn.Conv2d)]
    if not layers or len(convolutions) != 1:
        return False
    head = linear_flops([tower.head.mlp]) if _pooling_attention(tower) is not None else 0
    inside = sum(row_cost(layer).per_row for layer in layers)
    attentions = sum(attention_heads(part) is not None for layer in layers for part in layer.modules())
    return attentions == len(layers) and linear_flops([tower]) - _hidden_linears(tower) == inside + head


def _layers(tower: nn.Module) -> list[nn.Module]:
    lists = [part for part in tower.modules() if isinstance(part, nn.ModuleList)]
    return list(lists[0]) if lists else []


def _pooling_attention(tower: Any) -> nn.MultiheadAttention | None:
    """The attention of SigLIP's pooling head, which runs where it is there, used or not."""
    attention = getattr(getattr(tower, "head", None), "attention", None)
    return attention if isinstance(attention, nn.MultiheadAttention) else None


def _hidden_linears(tower: Any) -> int:
    """FLOPs that `linear_flops` sees inside `nn.MultiheadAttention`: of its output projection alone."""
    attention = _pooling_attention(tower)
    return linear_flops([attention]) if attention is not None else 0


def _tiled_encoder(model: PreTrainedModel, tower: Any) -> TiledEncoder | None:
    """CLIP or SigLIP: every tile is resized to `image_size` and cut into patches. None: unknown connector."""
    config = tower.config
    height, width = (
        of_image // of_patch
        for of_image, of_patch in zip(_pair(config.image_size), _pair(config.patch_size), strict=True)
    )
    patches = height * width
    embedding = next(module for module in tower.modules() if isinstance(module, nn.Conv2d))
    embeddings = find_module(tower, "embeddings")
    has_class = any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token"))
    rows = patches + has_class
    connector = connector_of(model, patches, rows, config.hidden_size)
    if connector is None:
        return None
    per_tile = (
        convolution_flops(embedding, patches)
        + sum(row_cost(layer).flops(rows) for layer in _layers(tower))
        + _pooling_head_flops(tower, rows)
        + connector.flops
    )
    pinpoints = getattr(model.config, "image_grid_pinpoints", None) or []
    side = config.image_size
    grids = {(high // side, wide // side) for high, wide in pinpoints}
    # The whole image as one tile, then the grid's own patches with a newline token after each row of them.
    sizes = {(patches + h * height * (w * width + 1), 1 + h * w) for h, w in grids}
    single = {(patches + 1, 1)} if grids else set()
    return TiledEncoder(per_tile, connector.tokens, tuple(sorted(sizes | single)))


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _pooling_head_flops(tower: Any, rows: int) -> int:
    """SigLIP's pooling head: one probe attends to all rows."""
    attention = _pooling_attention(tower)
    if attention is None:
        return 0
    width = attention.embed_dim
    projections = 4 * width**2 * (1 + rows)  # query and output of the probe, key and value of every row
    return projections + 4 * rows * width + linear_flops([tower.head.mlp])


def _clip_encoder(model: PreTrainedModel, tower: Any) -> TiledEncoder | None:
    """Whisper-like: a clip is padded to fixed frames, convolved to half, and pooled or stacked."""
    projector = find_module(model, "multi_modal_projector")
    linears = [part for part in projector.modules() if isinstance(part, nn.Linear)] if projector else []
    if projector is None or not linears or not hasattr(tower.config, "max_source_positions"):
        return None
    rows = tower.config.max_source_positions
    stacked = linears[0].in_features // tower.conv2.out_channels
    # Voxtral puts rows side by side; it has a pooler as well, which it does not use.
    tokens = rows // (2 if stacked == 1 and hasattr(tower, "avg_pooler") else stacked)
    return TiledEncoder(
        convolution_flops(tower.conv1, 2 * rows)
        + convolution_flops(tower.conv2, rows)
        + sum(row_cost(layer).flops(rows) for layer in tower.layers)
        + tokens * linear_flops([projector]),
        tokens,
    )


def _patch_encoder(tower: Any) -> PatchEncoder:
    config = tower.config
    whole = getattr(config, "fullatt_block_indexes", None)
    window = getattr(config, "window_size", None)
    cells = window // config.spatial_merge_size // config.patch_size if window else 0
    merge = config.spatial_merge_size**2
    # GLM-4V merges by a convolution before its merger, which has linear layers only.
    downsample = getattr(tower, "downsample", None)
    mergers = [tower.merger, *getattr(tower, "deepstack_merger_list", [])]
    return PatchEncoder(
        blocks=tuple(row_cost(block) for block in tower.blocks),
        windowed=tuple(bool(window) and index not in (whole or ()) for index in range(len(tower.blocks))),
        window=cells * cells * merge,
        merge=merge,
        per_patch=convolution_flops(tower.patch_embed.proj, 1),
        per_token=linear_flops(mergers)
        + (convolution_flops(downsample, 1) if isinstance(downsample, nn.Conv2d) else 0),
    )


def _pixtral_encoder(model: PreTrainedModel, tower: Any) -> PatchEncoder | None:
    """Pixtral: patches of all images in one sequence. None where what follows it is not known."""
    projector = find_module(model, "multi_modal_projector")
    if projector is None:
        return None
    merge = getattr(model.config, "spatial_merge_size", 1) ** 2
    layers = tower.transformer.layers
    return PatchEncoder(
        blocks=tuple(row_cost(layer) for layer in layers),
        windowed=(False,) * len(layers),
        window=0,
        merge=merge,
        per_patch=convolution_flops(tower.patch_conv, 1),
        per_token=linear_flops([projector]),
        joint=True,
    )


def measure_encoder(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> ProportionalEncoder:
    """Count encoder and projector on `inputs`, one batch as the model takes it, by running the model once.

    What the decoder stack and the output head count is taken off the whole. Prompts with other numbers of
    multimodal tokens are counted in proportion.
    """
    ids = inputs["input_ids"]
    placeholders = torch.tensor(sorted(placeholder_token_ids(model.config)), device=ids.device)
    tokens = int(torch.isin(ids, placeholders).sum())
    counter = flop_counter()
    inside = 0

    def enter(module: nn.Module, *arguments: Any) -> None:
        nonlocal inside
        inside -= counter.get_total_flops()

    def leave(module: nn.Module, *arguments: Any) -> None:
        nonlocal inside
        inside += counter.get_total_flops()

    parts = [part for part in (find_stack(model), model.get_output_embeddings()) if part is not None]
    handles = [part.register_forward_pre_hook(enter) for part in parts]
    handles += [part.register_forward_hook(leave) for part in parts]
    # The counter fails on weights that are inputs to a module, such as BLIP-2's queries, if they are trained.
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in trained:
            weight.requires_grad_(False)
        with torch.no_grad(), counter:
            model(**inputs)
    finally:
        for weight in trained:
            weight.requires_grad_(True)
        for handle in handles:
            handle.remove()
    return ProportionalEncoder(counter.get_total_flops() - inside, tokens)


def flop_counter() -> FlopCounterMode:
    """torch's FLOP counter, which by itself counts neither fused attention on a CPU nor grouped experts."""

    def attention(query: Any, key: Any, value: Any, *arguments: Any, **options: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def experts(rows: Any, weight: Any, *arguments: Any, **options: Any) -> int:
        return 2 * rows[0] * rows[1] * weight[-1]

    aten: Any = torch.ops.aten
    mapping: dict[Any, Any] = {aten._scaled_dot_product_flash_attention_for_cpu: attention}
    if hasattr(aten, "_grouped_mm"):
        mapping[aten._grouped_mm] = experts
    return FlopCounterMode(display=False, custom_mapping=mapping)
