"""What a prompt costs at an insert layer: FLOPs of the prefill and bytes of the KV cache.

Every matrix product counts two FLOPs per multiply-add, as `torch.utils.flop_counter` does; attention is
counted full, not halved for causality. Norms, activations and rotary embeddings are not counted (well
under 1 %).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from .encoder_costs import EncoderCost, encoder_cost_of, measure_encoder
from .families import UnsupportedModelError, base_model_of, find_stack, is_encoder_decoder
from .module_costs import RowCost, key_value_width, row_cost


def eq5_flops(
    num_layers: int, width: int, mlp_width: int, text: int, multimodal: int, insert_layer: int
) -> float:
    """FLOPs of the decoder layers by the paper's eq. (5), for a plain decoder with a two-matrix MLP.

    A layer over n tokens of width D with MLP width m counts 4nD² + 2n²D + 2nDm; n is the number of text
    tokens below the insert layer and of all tokens from it on. The equation counts one FLOP per multiply-add:
    use it for ratios, and `CostModel` for absolute figures.
    """

    def layer(n: int) -> float:
        return 4 * n * width**2 + 2 * n**2 * width + 2 * n * width * mlp_width

    return float(insert_layer * layer(text) + (num_layers - insert_layer) * layer(text + multimodal))


@dataclass(frozen=True)
class CostModel:
    """FLOPs and cache bytes of one prompt, given its numbers of text and multimodal tokens and insert layer.

    Counts one row without padding. The decoder is counted from its modules: gated or plain MLP, grouped-query
    attention, any head width, mixtures of experts (only the experts a token visits), LoRA matrices.
    """

    layers: tuple[RowCost, ...]
    """Cost of each decoder layer."""
    key_value_widths: tuple[int, ...]
    """Numbers that each decoder layer caches for one token: keys and values of every key-value head."""
    head: int
    """FLOPs of the output head for one position."""
    can_keep_logits: bool
    """Whether the model's forward can apply the head to some positions only (Qwen2-Audio's cannot)."""
    element_bytes: int
    """Bytes of one cached number."""
    encoder: EncoderCost

    @classmethod
    def from_model(cls, model: PreTrainedModel, inputs: Mapping[str, Tensor] | None = None) -> CostModel:
        """Count `model`'s modules; nothing is run.

        Encoders of the CLIP and SigLIP, Qwen-VL and Whisper kinds are counted exactly; others are estimated
        from their number of weights. With `inputs`, one batch as the model takes it, encoder and projector
        are measured on it instead: exact for every family, and worth it where the image size varies.
        """
        stack = find_stack(model)
        base = base_model_of(model)
        if is_encoder_decoder(base):
            raise UnsupportedModelError(
                f"{type(base).__name__}: costs of encoder-decoders are not counted yet"
            )
        head = base.get_output_embeddings()
        return cls(
            layers=tuple(row_cost(layer) for layer in stack.layers),
            key_value_widths=tuple(key_value_width(layer) for layer in stack.layers),
            head=2 * head.in_features * head.out_features if isinstance(head, nn.Linear) else 0,
            can_keep_logits="logits_to_keep" in inspect.signature(type(base).forward).parameters,
            element_bytes=base.dtype.itemsize,
            encoder=encoder_cost_of(base) if inputs is None else measure_encoder(base, inputs),
        )

    @property
    def num_layers(self) -> int:
        """N, the number of decoder layers."""
        return len(self.layers)

    def decoder_flops(self, text: int, multimodal: int, insert_layer: int) -> int:
        """FLOPs of the decoder layers in the prefill of `text` + `multimodal` tokens."""
        self._check(text, multimodal, insert_layer)
        below = sum(layer.flops(text) for layer in self.layers[:insert_layer])
        return below + sum(layer.flops(text + multimodal) for layer in self.layers[insert_layer:])

    def prefill_flops(
        self, text: int, multimodal: int, insert_layer: int, images: int = 1, logits_to_keep: int = 0
    ) -> int:
        """FLOPs of the whole model's first forward: encoder, projector, decoder layers and output head.

        `images` is the number of images or audio clips that the multimodal tokens come from. `logits_to_keep`
        means what it means to the model's forward: 0 applies the head to every position, as `model(**inputs)`
        does, 1 to the last one, as `generate` does.
        """
        positions = text + multimodal
        if logits_to_keep and self.can_keep_logits:
            positions = min(logits_to_keep, positions)
        encoder = self.encoder.flops(multimodal, images) if multimodal else 0
        return self.decoder_flops(text, multimodal, insert_layer) + encoder + positions * self.head

    def flops_ratio(
        self, text: int, multimodal: int, insert_layer: int, images: int = 1, logits_to_keep: int = 0
    ) -> float:
        """FLOPs of the whole prefill against those of the stock model, insert layer 0."""
        stock = self.prefill_flops(text, multimodal, 0, images, logits_to_keep)
        return self.prefill_flops(text, multimodal, insert_layer, images, logits_to_keep) / stock

    def kv_cache_bytes(self, text: int, multimodal: int, insert_layer: int) -> int:
        """Bytes of keys and values after the prefill: layers below the insert layer hold text tokens only."""
        self._check(text, multimodal, insert_layer)
        below = sum(self.key_value_widths[:insert_layer]) * text
        above = sum(self.key_value_widths[insert_layer:]) * (text + multimodal)
        return self.element_bytes * (below + above)

    def _check(self, text: int, multimodal: int, insert_layer: int) -> None:
        if not 0 <= insert_layer <= self.num_layers:
            raise ValueError(f"insert_layer {insert_layer}: give a layer from 0 to {self.num_layers}")
        if text < 0 or multimodal < 0 or text + multimodal == 0:
            raise ValueError(f"{text} text and {multimodal} multimodal tokens are no prompt")
