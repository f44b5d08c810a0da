"""FLOPs of an encoder and its projector, which run before any decoder layer, whatever the insert layer.

The kinds that most models use are counted from their modules. `measure_encoder` counts any kind by running it
once. The cost of any other kind is estimated, and its `origin` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel

from deepinsert.backbones.families import find_stack, placeholder_token_ids
from deepinsert.backbones.parts import output_head

from .connector_costs import connector_of, find_module
from .module_costs import RowCost, attention_heads, convolution_flops, linear_flops, row_cost

Origin = Literal["counted", "measured", "estimated"]


class EncoderCost(Protocol):
    """FLOPs of encoder and projector for all images (or clips) of one prompt."""

    @property
    def origin(self) -> Origin:
        """Whether the cost is counted from modules, measured on a batch, or estimated from the weights."""

    def flops(self, multimodal: int, images: int) -> int:
        """Return the FLOPs for `images` images or clips that became `multimodal` tokens together."""
        ...


@dataclass(frozen=True)
class TiledEncoder:
    """An encoder with a fixed input size: CLIP or SigLIP on square tiles, Whisper-like towers on clips."""

    per_tile: int
    """FLOPs per tile."""
    tokens_per_tile: int
    """Tokens that one tile becomes; for a clip, the largest number."""
    grids: tuple[tuple[int, int], ...] = ()
    """(tokens, tiles) of each grid that an image can be cut into, ascending (LLaVA-NeXT, OneVision)."""
    origin: Origin = "counted"

    def flops(self, multimodal: int, images: int) -> int:
        """Return the FLOPs of all tiles of `images` images that became `multimodal` tokens together."""
        if self.grids:
            return self.per_tile * images * self.tiles(multimodal / max(images, 1))
        return self.per_tile * max(images, -(-multimodal // self.tokens_per_tile))

    def tiles(self, tokens: float) -> int:
        """Return the tiles of an image that became `tokens` tokens, by the smallest grid that holds them."""
        fitting = [tiles for capacity, tiles in self.grids if tokens <= capacity]
        return fitting[0] if fitting else max((tiles for _, tiles in self.grids), default=1)


@dataclass(frozen=True)
class PatchEncoder:
    """An encoder that reads an image of any size as patches and merges them (Qwen-VL, Pixtral)."""

    blocks: tuple[RowCost, ...]
    windowed: tuple[bool, ...]
    """Per block, whether its attention is limited to windows."""
    window: int
    """Patches in one attention window."""
    merge: int
    """Patches that become one token."""
    per_patch: int
    """FLOPs per patch before the blocks."""
    per_token: int
    """FLOPs per token after the blocks."""
    joint: bool = False
    """Whether the images of a prompt are one sequence to the encoder, kept separate by its mask alone."""
    origin: Origin = "counted"

    def flops(self, multimodal: int, images: int) -> int:
        """Return the FLOPs of all patches; images count as equally large, and windows at a rim as whole."""
        patches = multimodal * self.merge
        span = patches if self.joint else patches // max(images, 1)
        blocks = sum(
            block.flops(patches, min(self.window, span) if windowed else span)
            for block, windowed in zip(self.blocks, self.windowed, strict=True)
        )
        return blocks + patches * self.per_patch + multimodal * self.per_token


@dataclass(frozen=True)
class ProportionalEncoder:
    """A cost proportional to the multimodal tokens: measured on a batch, or estimated from the weights."""

    reference_flops: int
    reference_tokens: int
    """Multimodal tokens that cost `reference_flops`."""
    origin: Origin = "measured"

    def flops(self, multimodal: int, images: int) -> int:
        """Return the FLOPs for `multimodal` tokens, whatever the number of images."""
        return round(self.reference_flops * multimodal / max(self.reference_tokens, 1))


def encoder_cost_of(model: PreTrainedModel) -> EncoderCost:
    """Count the model's encoder and projector from their modules; estimate where their kind is unknown."""
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
    """Estimate the cost as if every weight outside the decoder and the head were applied once per token."""
    decoder = {id(weight) for weight in find_stack(model).parameters()}
    head = output_head(model)
    decoder |= {id(weight) for weight in head.parameters()} if head is not None else set()
    outside = sum(weight.numel() for weight in model.parameters() if id(weight) not in decoder)
    return ProportionalEncoder(2 * outside, 1, "estimated")


def _is_plain_tower(tower: Any) -> bool:
    """Whether a tower is one convolution that cuts patches, then layers of full attention (CLIP, SigLIP)."""
    config = getattr(tower, "config", None)
    if not (hasattr(config, "image_size") and hasattr(config, "patch_size")):
        return False
    layers = _layers(tower)
    convolutions = [part for part in tower.modules() if isinstance(part, nn.Conv2d)]
    if not layers or len(convolutions) != 1:
        return False
    head = linear_flops([tower.head.mlp]) if _pooling_attention(tower) is not None else 0
    inside_layers = sum(row_cost(layer).per_row for layer in layers)
    attentions = sum(attention_heads(part) is not None for layer in layers for part in layer.modules())
    everything = linear_flops([tower]) - _pooling_projection_flops(tower)
    return attentions == len(layers) and everything == inside_layers + head


def _layers(tower: nn.Module) -> list[nn.Module]:
    lists = [part for part in tower.modules() if isinstance(part, nn.ModuleList)]
    return list(lists[0]) if lists else []


def _pooling_attention(tower: Any) -> nn.MultiheadAttention | None:
    """Return the attention of SigLIP's pooling head, which runs even if its output is not used."""
    attention = getattr(getattr(tower, "head", None), "attention", None)
    return attention if isinstance(attention, nn.MultiheadAttention) else None


def _pooling_projection_flops(tower: Any) -> int:
    """Return the FLOPs of the only linear module inside `nn.MultiheadAttention`, its output projection."""
    attention = _pooling_attention(tower)
    return linear_flops([attention]) if attention is not None else 0


def _tiled_encoder(model: PreTrainedModel, tower: Any) -> TiledEncoder | None:
    """Count CLIP or SigLIP, which resize every tile to `image_size`; None where the connector is unknown."""
    config = tower.config
    height, width = (
        image_side // patch_side
        for image_side, patch_side in zip(_pair(config.image_size), _pair(config.patch_size), strict=True)
    )
    patches = height * width
    patch_embedding = next(module for module in tower.modules() if isinstance(module, nn.Conv2d))
    embeddings = find_module(tower, "embeddings")
    has_class_token = any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token"))
    rows = patches + has_class_token
    connector = connector_of(model, patches, rows, config.hidden_size)
    if connector is None:
        return None
    per_tile = (
        convolution_flops(patch_embedding, patches)
        + sum(row_cost(layer).flops(rows) for layer in _layers(tower))
        + _pooling_head_flops(tower, rows)
        + connector.flops
    )
    pinpoints = getattr(model.config, "image_grid_pinpoints", None) or []
    side = config.image_size
    grids = {(high // side, wide // side) for high, wide in pinpoints}
    # The whole image is one tile; the grid's own patches follow, with a newline token after each row of them.
    sizes = {(patches + h * height * (w * width + 1), 1 + h * w) for h, w in grids}
    single = {(patches + 1, 1)} if grids else set()
    return TiledEncoder(per_tile, connector.tokens, tuple(sorted(sizes | single)))


def _pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """Return (height, width) of a size in a configuration, which is one number for a square."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def _pooling_head_flops(tower: Any, rows: int) -> int:
    """Return the FLOPs of SigLIP's pooling head, in which one probe attends to all rows."""
    attention = _pooling_attention(tower)
    if attention is None:
        return 0
    width: int = attention.embed_dim
    projections = 4 * width**2 * (1 + rows)  # query and output of the probe, key and value of every row
    return projections + 4 * rows * width + linear_flops([tower.head.mlp])


def _clip_encoder(model: PreTrainedModel, tower: Any) -> TiledEncoder | None:
    """Count a Whisper-like tower: a clip is padded, halved by convolution, then pooled or stacked."""
    projector = find_module(model, "multi_modal_projector")
    linears = [part for part in projector.modules() if isinstance(part, nn.Linear)] if projector else []
    if projector is None or not linears or not hasattr(tower.config, "max_source_positions"):
        return None
    rows = tower.config.max_source_positions
    rows_per_token = linears[0].in_features // tower.conv2.out_channels
    # Voxtral concatenates rows; it has a pooler as well, which it does not use.
    tokens = rows // (2 if rows_per_token == 1 and hasattr(tower, "avg_pooler") else rows_per_token)
    return TiledEncoder(
        convolution_flops(tower.conv1, 2 * rows)
        + convolution_flops(tower.conv2, rows)
        + sum(row_cost(layer).flops(rows) for layer in tower.layers)
        + tokens * linear_flops([projector]),
        tokens,
    )


def _patch_encoder(tower: Any) -> PatchEncoder:
    """Count a tower of the Qwen-VL kind, whose blocks attend within windows or within a whole image."""
    config = tower.config
    full_attention_blocks = getattr(config, "fullatt_block_indexes", None) or ()
    window = getattr(config, "window_size", None)
    window_side = window // config.spatial_merge_size // config.patch_size if window else 0
    merge = config.spatial_merge_size**2
    # GLM-4V merges by a convolution before its merger, which has linear layers only.
    downsample = getattr(tower, "downsample", None)
    mergers = [tower.merger, *getattr(tower, "deepstack_merger_list", [])]
    return PatchEncoder(
        blocks=tuple(row_cost(block) for block in tower.blocks),
        windowed=tuple(
            bool(window) and index not in full_attention_blocks for index in range(len(tower.blocks))
        ),
        window=window_side * window_side * merge,
        merge=merge,
        per_patch=convolution_flops(tower.patch_embed.proj, 1),
        per_token=linear_flops(mergers)
        + (convolution_flops(downsample, 1) if isinstance(downsample, nn.Conv2d) else 0),
    )


def _pixtral_encoder(model: PreTrainedModel, tower: Any) -> PatchEncoder | None:
    """Count Pixtral, which puts the patches of all images into one sequence; None without a projector."""
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

    The FLOPs of the decoder stack and of the output head are subtracted from the total. Prompts with other
    numbers of multimodal tokens are counted in proportion.
    """
    ids = inputs["input_ids"]
    placeholders = torch.tensor(sorted(placeholder_token_ids(model.config)), device=ids.device)
    tokens = int(torch.isin(ids, placeholders).sum())
    counter = flop_counter()
    decoder_flops = 0

    def enter(module: nn.Module, *arguments: Any) -> None:
        nonlocal decoder_flops
        decoder_flops -= counter.get_total_flops()

    def leave(module: nn.Module, *arguments: Any) -> None:
        nonlocal decoder_flops
        decoder_flops += counter.get_total_flops()

    decoder_parts = [part for part in (find_stack(model), output_head(model)) if part is not None]
    handles = [part.register_forward_pre_hook(enter) for part in decoder_parts]
    handles += [part.register_forward_hook(leave) for part in decoder_parts]
    # The counter fails on trainable weights that are inputs to a module, such as BLIP-2's queries.
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in trainable:
            weight.requires_grad_(False)
        with torch.no_grad(), counter:
            model(**inputs)
    finally:
        for weight in trainable:
            weight.requires_grad_(True)
        for handle in handles:
            handle.remove()
    return ProportionalEncoder(counter.get_total_flops() - decoder_flops, tokens)


def flop_counter() -> FlopCounterMode:
    """Return torch's FLOP counter, extended to fused attention on a CPU and to grouped experts."""
    count_attention: Callable[..., int] = sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *arguments: Any, **options: Any) -> int:
        return count_attention(query, key, value)

    def experts(rows: Sequence[int], weight: Sequence[int], *arguments: Any, **options: Any) -> int:
        return 2 * rows[0] * rows[1] * weight[-1]

    aten: Any = torch.ops.aten
    mapping: dict[Any, Callable[..., int]] = {aten._scaled_dot_product_flash_attention_for_cpu: attention}
    if hasattr(aten, "_grouped_mm"):
        mapping[aten._grouped_mm] = experts
    return FlopCounterMode(display=False, custom_mapping=mapping)
