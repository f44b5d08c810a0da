"""FLOPs of an encoder and its projector, which run before any decoder layer, whatever the insert layer.

Kinds that most models use are counted from their modules; `measure_encoder` counts any kind by running it
once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel

from .families import find_stack, placeholder_token_ids
from .module_costs import RowCost, convolution_flops, linear_flops, row_cost


class EncoderCost(Protocol):
    """FLOPs of encoder and projector for all images (or clips) of one prompt."""

    def flops(self, multimodal: int, images: int) -> int: ...


@dataclass(frozen=True)
class TiledEncoder:
    """An encoder with a fixed input: CLIP and SigLIP towers on square tiles, Whisper-like ones on clips."""

    per_tile: int
    grids: tuple[tuple[int, int], ...] = ()
    """(tokens, tiles) of each grid that an image can be cut into, ascending (LLaVA-NeXT, OneVision)."""

    def flops(self, multimodal: int, images: int) -> int:
        return self.per_tile * images * self.tiles(multimodal / max(images, 1))

    def tiles(self, tokens: float) -> int:
        """Tiles of an image that became `tokens` tokens: the smallest grid that can hold them."""
        holding = [tiles for most, tiles in self.grids if tokens <= most]
        return holding[0] if holding else max((tiles for _, tiles in self.grids), default=1)


@dataclass(frozen=True)
class PatchEncoder:
    """An encoder that takes an image of any size as a row of patches and merges them (Qwen-VL)."""

    blocks: tuple[RowCost, ...]
    windowed: tuple[bool, ...]
    window: int
    """Patches in one attention window."""
    merge: int
    """Patches that become one token."""
    per_patch: int
    per_token: int

    def flops(self, multimodal: int, images: int) -> int:
        """Windows at the rim of an image are counted as whole ones: a small part of the attention."""
        patches = multimodal * self.merge // max(images, 1)
        image = sum(
            block.flops(patches, min(self.window, patches) if windowed else None)
            for block, windowed in zip(self.blocks, self.windowed, strict=True)
        )
        return images * (image + patches * self.per_patch) + multimodal * self.per_token


@dataclass(frozen=True)
class ProportionalEncoder:
    """A cost in proportion to the multimodal tokens: measured on a batch, or estimated from the weights."""

    measured: int
    tokens: int

    def flops(self, multimodal: int, images: int) -> int:
        return round(self.measured * multimodal / max(self.tokens, 1))


def encoder_cost_of(model: PreTrainedModel) -> EncoderCost:
    """Cost of the model's encoder and projector, counted from their modules."""
    image: Any = model.get_encoder(modality="image")
    audio: Any = model.get_encoder(modality="audio")
    projector = _find(model, "multi_modal_projector")
    if hasattr(image, "patch_embed") and hasattr(image, "blocks") and hasattr(image, "merger"):
        return _patch_encoder(image)
    if projector is not None and hasattr(getattr(image, "config", None), "image_size"):
        return _tiled_encoder(model, image, projector)
    if projector is not None and hasattr(audio, "conv1") and hasattr(audio, "conv2"):
        return _clip_encoder(audio, projector)
    decoder = {id(weight) for weight in find_stack(model).parameters()}
    head = model.get_output_embeddings()
    decoder |= {id(weight) for weight in head.parameters()} if head is not None else set()
    others = sum(weight.numel() for weight in model.parameters() if id(weight) not in decoder)
    return ProportionalEncoder(2 * others, 1)


def _tiled_encoder(model: PreTrainedModel, tower: Any, projector: nn.Module) -> TiledEncoder:
    """CLIP or SigLIP: every tile is resized to `image_size` and cut into patches."""
    config = tower.config
    side = config.image_size // config.patch_size
    patches = side * side
    embedding = next(module for module in tower.modules() if isinstance(module, nn.Conv2d))
    embeddings = _find(tower, "embeddings")
    rows = patches + (1 if hasattr(embeddings, "class_embedding") else 0)
    layers = next(module for module in tower.modules() if isinstance(module, nn.ModuleList))
    dropped = getattr(model.config, "vision_feature_select_strategy", "default") == "default"
    tokens = patches if dropped else rows
    per_tile = (
        convolution_flops(embedding, patches)
        + sum(row_cost(layer).flops(rows) for layer in layers)
        + tokens * linear_flops([projector])
        + _pooling_head_flops(getattr(tower, "head", None), rows)
    )
    pinpoints = getattr(model.config, "image_grid_pinpoints", None) or []
    grids = {(height // config.image_size, width // config.image_size) for height, width in pinpoints}
    # The whole image as one tile, then the grid's own patches with a newline token after each row of them.
    sizes = {(patches + h * side * (w * side + 1), 1 + h * w) for h, w in grids}
    single = {(patches + 1, 1)} if grids else set()
    return TiledEncoder(per_tile, tuple(sorted(sizes | single)))


def _pooling_head_flops(head: Any, rows: int) -> int:
    """SigLIP's pooling head: one probe attends to all rows. It runs where it is there, used or not."""
    attention = getattr(head, "attention", None)
    if not isinstance(attention, nn.MultiheadAttention):
        return 0
    width = attention.embed_dim
    projections = 4 * width**2 * (1 + rows)  # query and output of the probe, key and value of every row
    return projections + 4 * rows * width + linear_flops([head.mlp])


def _clip_encoder(tower: Any, projector: nn.Module) -> TiledEncoder:
    """Whisper-like: a clip is padded to a fixed number of frames, convolved to half, and pooled by two."""
    rows = tower.config.max_source_positions
    return TiledEncoder(
        convolution_flops(tower.conv1, 2 * rows)
        + convolution_flops(tower.conv2, rows)
        + sum(row_cost(layer).flops(rows) for layer in tower.layers)
        + rows // 2 * linear_flops([projector])
    )


def _patch_encoder(tower: Any) -> PatchEncoder:
    config = tower.config
    whole = getattr(config, "fullatt_block_indexes", None)
    window = getattr(config, "window_size", None)
    cells = window // config.spatial_merge_size // config.patch_size if window else 0
    merge = config.spatial_merge_size**2
    return PatchEncoder(
        blocks=tuple(row_cost(block) for block in tower.blocks),
        windowed=tuple(bool(window) and index not in (whole or ()) for index in range(len(tower.blocks))),
        window=cells * cells * merge,
        merge=merge,
        per_patch=convolution_flops(tower.patch_embed.proj, 1),
        per_token=linear_flops([tower.merger]),
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
    try:
        with torch.no_grad(), counter:
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return ProportionalEncoder(counter.get_total_flops() - inside, tokens)


def flop_counter() -> FlopCounterMode:
    """torch's FLOP counter, which by itself counts no fused attention on a CPU."""

    def attention(query: Any, key: Any, value: Any, *arguments: Any, **options: Any) -> int:
        return sdpa_flop_count(query, key, value)

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={fused: attention})


def _find(model: nn.Module, name: str) -> nn.Module | None:
    """The first module whose last name is `name`."""
    return next((module for path, module in model.named_modules() if path.split(".")[-1] == name), None)
