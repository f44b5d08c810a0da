"""Costs of a prompt at an insert layer: FLOPs of prefill and decode, bytes of weights and of the KV cache.

Every matrix product counts two FLOPs per multiply-add, as `torch.utils.flop_counter` does. Attention is
counted in full, neither halved for causality nor cut to a sliding window. Norms, activations and rotary
embeddings are not counted (well under 1 %).
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMultimodalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from deepinsert.backbones.compat.transformers import sharing_modes
from deepinsert.backbones.errors import UnsupportedModelError
from deepinsert.backbones.families import base_model_of, find_stack, is_encoder_decoder
from deepinsert.backbones.parts import output_head

from .encoder_costs import EncoderCost, encoder_cost_of, measure_encoder
from .module_costs import LayerTraffic, RowCost, key_value_width, layer_traffic, row_cost, weight_bytes

Count = int | Sequence[int]
"""One number for all rows of a batch, or one per row."""


def eq5_flops(
    num_layers: int, width: int, mlp_width: int, text: int, multimodal: int, insert_layer: int
) -> float:
    """Return the FLOPs of the decoder layers by the paper's eq. (5), for a decoder with a two-matrix MLP.

    A layer over n tokens of width D with MLP width m counts 4nD² + 2n²D + 2nDm; n is the number of text
    tokens below the insert layer and of all tokens from it on. The equation counts one FLOP per multiply-add:
    use it for ratios, and `CostModel` for absolute figures.

    Args:
        num_layers: N, the number of decoder layers.
        width: D, the width of the hidden states.
        mlp_width: m, the inner width of the MLP.
        text: T, the number of text tokens.
        multimodal: M, the number of multimodal tokens.
        insert_layer: L, from 0 to N.
    """

    def layer(n: int) -> float:
        return 4 * n * width**2 + 2 * n**2 * width + 2 * n * width * mlp_width

    return float(insert_layer * layer(text) + (num_layers - insert_layer) * layer(text + multimodal))


@dataclass(frozen=True)
class DecodeCost:
    """Costs of one forward that gives every row of a batch its next token."""

    flops: int
    weight_bytes: float
    """Bytes of the decoder layers and the head, read once per batch; of the experts, those visited."""
    kv_cache_bytes: int
    """Bytes of the keys and values that are read."""


@dataclass(frozen=True)
class CostModel:
    """FLOPs and bytes of prompts, from their numbers of text and multimodal tokens and their insert layers.

    The decoder is counted from its modules: gated or plain MLP, grouped-query attention, any head width,
    mixtures of experts (only the experts that a token visits), LoRA matrices.

    For `text`, `multimodal`, `insert_layer` and `images`, methods take one number, or a sequence with one
    number per row of a batch (`insert_layer=[0, 4, 12]`). They return the sum over the rows, without padding.
    They raise `ValueError` for an insert layer outside 0 to N, for an empty prompt, and if two sequences
    differ in length.
    """

    layers: tuple[RowCost, ...]
    """FLOPs of each decoder layer."""
    traffic: tuple[LayerTraffic, ...]
    """Bytes that each decoder layer moves through memory."""
    key_value_widths: tuple[int, ...]
    """Numbers that each decoder layer caches per token: keys and values of every key-value head."""
    cache_limits: tuple[int | None, ...]
    """Tokens that each layer's cache keeps at most: one less than a sliding window; None without a limit."""
    head: int
    """FLOPs of the output head per position."""
    head_bytes: int
    can_keep_logits: bool
    """Whether the model's forward can apply the head to some positions only; Qwen2-Audio's cannot."""
    dtype: torch.dtype
    """Precision of the weights and of the cache."""
    encoder: EncoderCost
    encoder_bytes: int
    """Bytes of the weights outside the decoder layers, the head and the input embeddings."""
    weight_bytes: int
    """Bytes of all weights; tied weights count once."""

    @classmethod
    def from_model(cls, model: PreTrainedModel, inputs: Mapping[str, Tensor] | None = None) -> CostModel:
        """Count the modules of `model` without running it.

        Encoders of the CLIP and SigLIP, Qwen-VL, Pixtral and Whisper kinds, behind projectors, Q-Formers and
        the like, are counted exactly for images and sounds. Others are estimated from their number of
        weights, and `encoder.origin` says so. With `inputs`, one batch as the model takes it, the model runs
        once and encoder and projector are measured instead, which is exact for every family and for videos.

        Raises `UnsupportedModelError` for a model that multimodal tokens cannot enter late.
        """
        stack = find_stack(model)
        base = base_model_of(model)
        if is_encoder_decoder(base):
            raise UnsupportedModelError(
                f"{type(base).__name__}: costs of encoder-decoders are not counted yet"
            )
        head: Any = output_head(base)
        parts = [stack.layers, base.get_input_embeddings(), *([] if head is None else [head])]
        total = weight_bytes([base])
        return cls(
            layers=tuple(row_cost(layer) for layer in stack.layers),
            traffic=tuple(layer_traffic(layer) for layer in stack.layers),
            key_value_widths=_key_value_widths(stack),
            cache_limits=_cache_limits(base, stack),
            head=2 * head.in_features * head.out_features if isinstance(head, nn.Linear) else 0,
            head_bytes=0 if head is None else head.weight.nbytes,
            can_keep_logits=_can_keep_logits(base),
            dtype=base.dtype,
            encoder=encoder_cost_of(base) if inputs is None else measure_encoder(base, inputs),
            encoder_bytes=total - weight_bytes(parts),
            weight_bytes=total,
        )

    @classmethod
    def from_config(cls, config: PreTrainedConfig, dtype: torch.dtype | None = None) -> CostModel:
        """Count the model that `config` describes; it is built on torch's meta device, without weights.

        `dtype` defaults to the configuration's own, else float32. Raises what `from_model` raises.
        """
        if type(config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
            raise UnsupportedModelError(
                f"model type {config.model_type!r} is no multimodal language model: give one that is"
            )
        configured: Any = config.dtype or config.get_text_config().dtype or torch.float32
        auto_class: Any = AutoModelForMultimodalLM
        with torch.device("meta"):
            model = auto_class.from_config(config)
        # Early 5.x neither convert the precision of all parts nor tie weights on the meta device.
        model.to(dtype or configured).tie_weights()
        return cls.from_model(model)

    @property
    def num_layers(self) -> int:
        """N, the number of decoder layers."""
        return len(self.layers)

    @property
    def element_bytes(self) -> int:
        """Bytes of one cached number."""
        return self.dtype.itemsize

    def decoder_flops(self, text: Count, multimodal: Count, insert_layer: Count) -> int:
        """Return the FLOPs of the decoder layers in the prefill of `text` + `multimodal` tokens."""
        total = 0
        for text_tokens, multimodal_tokens, first_full in self._rows(text, multimodal, insert_layer):
            total += sum(layer.flops(text_tokens) for layer in self.layers[:first_full])
            total += sum(layer.flops(text_tokens + multimodal_tokens) for layer in self.layers[first_full:])
        return total

    def prefill_flops(
        self,
        text: Count,
        multimodal: Count,
        insert_layer: Count,
        images: Count = 1,
        logits_to_keep: int = 0,
    ) -> int:
        """Return the FLOPs of the whole model's first forward: encoder, projector, decoder layers and head.

        Args:
            text: T, text tokens.
            multimodal: M, multimodal tokens.
            insert_layer: L.
            images: the number of images or audio clips that the multimodal tokens come from.
            logits_to_keep: as in the model's forward: 0 applies the head to every position, as
                `model(**inputs)` does, and 1 to the last one, as `generate` does.
        """
        total = self.decoder_flops(text, multimodal, insert_layer)
        for text_tokens, multimodal_tokens, _, count in self._rows(text, multimodal, insert_layer, images):
            total += self.encoder.flops(multimodal_tokens, count) if multimodal_tokens else 0
            total += self.head_positions(text_tokens + multimodal_tokens, logits_to_keep) * self.head
        return total

    def head_positions(self, positions: int, logits_to_keep: int) -> int:
        """Return to how many of a prompt's `positions` the output head is applied."""
        if logits_to_keep and self.can_keep_logits:
            return min(logits_to_keep, positions)
        return positions

    def flops_ratio(
        self,
        text: Count,
        multimodal: Count,
        insert_layer: Count,
        images: Count = 1,
        logits_to_keep: int = 0,
    ) -> float:
        """Return the FLOPs of the whole prefill as a share of those of the stock model, insert layer 0.

        The arguments are those of `prefill_flops`.
        """
        rows = self._rows(text, multimodal, insert_layer, images)
        text_tokens, multimodal_tokens, _, counts = zip(*rows, strict=True)
        stock = self.prefill_flops(text_tokens, multimodal_tokens, 0, counts, logits_to_keep)
        return self.prefill_flops(text, multimodal, insert_layer, images, logits_to_keep) / stock

    def kv_cache_bytes(self, text: Count, multimodal: Count, insert_layer: Count) -> int:
        """Return the bytes of keys and values after the prefill.

        Layers below the insert layer hold text tokens only. Count tokens generated since as text. The fixed
        states of recurrent layers are not counted.
        """
        return self.element_bytes * sum(
            width * tokens
            for row in self._rows(text, multimodal, insert_layer)
            for width, tokens in zip(self.key_value_widths, self.cached_tokens(*row), strict=True)
        )

    def cached_tokens(self, text: int, multimodal: int, insert_layer: int) -> list[int]:
        """Return the tokens of one row that each layer's cache holds (N,)."""
        lengths = [text] * insert_layer + [text + multimodal] * (self.num_layers - insert_layer)
        return [
            length if limit is None else min(length, limit)
            for length, limit in zip(lengths, self.cache_limits, strict=True)
        ]

    def decode_cost(self, text: Count, multimodal: Count, insert_layer: Count) -> DecodeCost:
        """Count the forward that gives every row one more token, with `text` + `multimodal` tokens cached.

        Tokens generated so far count as text. The more text is generated, the less the insert layer changes.
        """
        rows = self._rows(text, multimodal, insert_layer)
        flops = 0
        for row in rows:
            cached = self.cached_tokens(*row)
            flops += self.head + sum(
                layer.flops(1, tokens + 1) for layer, tokens in zip(self.layers, cached, strict=True)
            )
        weights = sum(layer.weights_read(len(rows)) for layer in self.traffic) + self.head_bytes
        return DecodeCost(flops, weights, self.kv_cache_bytes(text, multimodal, insert_layer))

    def _rows(self, *columns: Count) -> list[tuple[int, ...]]:
        """Return one tuple per row: text tokens, multimodal tokens, insert layer, and any further columns."""
        lengths = {len(column) for column in columns if not isinstance(column, int)}
        if len(lengths) > 1:
            raise ValueError(
                f"sequences of {sorted(lengths)} numbers: give one number for all rows, or one per row"
            )
        rows = max(lengths, default=1)
        spread = [[column] * rows if isinstance(column, int) else column for column in columns]
        result = [tuple(map(operator.index, row)) for row in zip(*spread, strict=True)]
        for text, multimodal, insert_layer, *_ in result:
            if not 0 <= insert_layer <= self.num_layers:
                raise ValueError(f"insert_layer {insert_layer}: give a layer from 0 to {self.num_layers}")
            if text < 0 or multimodal < 0 or text + multimodal == 0:
                raise ValueError(f"{text} text and {multimodal} multimodal tokens are no prompt")
        return result


def _can_keep_logits(model: Any) -> bool:
    """Whether the model's forward takes `logits_to_keep`, or passes it to its language model (BLIP-2)."""
    parts = [model, getattr(model, "language_model", model)]
    return any("logits_to_keep" in inspect.signature(type(part).forward).parameters for part in parts)


def _cache_layers(model: PreTrainedModel, stack: Any) -> list[Any]:
    """Return the layers of the empty cache that `transformers` makes for the model; None for missing ones."""
    layers: list[Any] = DynamicCache(config=model.config).layers
    return layers + [None] * (len(stack.layers) - len(layers))


def _key_value_widths(stack: Any) -> tuple[int, ...]:
    """Return the numbers that each layer caches per token.

    Layers that read another layer's keys, as Gemma 3n's last ones do, cache none.
    """
    modes = sharing_modes(stack) or [None] * len(stack.layers)
    return tuple(
        0 if mode == "reuse" else key_value_width(layer)
        for layer, mode in zip(stack.layers, modes, strict=True)
    )


def _cache_limits(model: PreTrainedModel, stack: Any) -> tuple[int | None, ...]:
    """Return the tokens that each layer's cache keeps at most; None for a layer without a sliding window.

    A sliding layer's cache keeps what the next token will see: the window without that token.
    """
    return tuple(
        cached.sliding_window - 1 if getattr(cached, "is_sliding", False) else None
        for cached in _cache_layers(model, stack)
    )
