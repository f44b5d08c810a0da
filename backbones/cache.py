"""A key-value cache layer that holds fewer keys than the sequence has positions.

Layers below the insert layer store no key or value of a multimodal token, while `generate()` and the
mask code of `transformers` go on asking for the logical length. The layer answers with the logical length
and remembers which position of the full sequence each of its keys has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionCacheLayerMixin


class UnsupportedCacheError(TypeError):
    """The cache in use cannot hold layers of different lengths yet."""


class ShortLayer(DynamicLayer):
    """A `DynamicLayer` some of whose positions were skipped.

    `columns` (B, K0) gives the position of the first K0 keys in the full sequence, -1 for a dummy. Keys
    appended later are text for every row, so key k has position k + `skipped`.
    """

    columns: Tensor
    skipped: int
    ragged: bool

    def get_seq_length(self) -> int:
        physical = super().get_seq_length()
        return physical + self.skipped if physical else 0

    @property
    def physical_length(self) -> int:
        """Keys in memory for each row, dummies included."""
        return DynamicLayer.get_seq_length(self)

    def key_columns(self, new: int = 0) -> Tensor:
        """(B, K) position of every key held, and of `new` text keys to come; -1 for a dummy."""
        known = self.columns.shape[1]
        tail = torch.arange(known, self.physical_length + new, device=self.columns.device) + self.skipped
        return torch.cat([self.columns, tail.expand(self.columns.shape[0], -1)], dim=1)

    def reset(self) -> None:
        super().reset()
        self.__class__ = DynamicLayer  # type: ignore[assignment]

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove >= 0 or not self.is_initialized:
            super().crop(tokens_to_remove)
            return
        length = self.get_seq_length() + tokens_to_remove
        columns = self.key_columns()
        # Rows may hold different numbers of the removed positions: what one row must keep, the others blank.
        removed = int((columns >= length).sum(dim=1).min())
        super().crop(-removed)
        columns = columns[:, : columns.shape[1] - removed]
        self.columns = columns.masked_fill(columns >= length, -1)
        self.ragged = bool((self.columns < 0).any())
        self.skipped = length - columns.shape[1]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.columns = self.columns.index_select(0, beam_idx.to(self.columns.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.columns = self.columns.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.columns = self.columns[indices, ...]


def short_layer(cache: Cache | None, layer_idx: int) -> ShortLayer | None:
    """The cache's layer where it already holds fewer keys than positions, else None."""
    if cache is None or layer_idx >= len(cache.layers):
        return None
    layer = cache.layers[layer_idx]
    return layer if isinstance(layer, ShortLayer) else None


def holds_short_layers(cache: Cache | None) -> bool:
    return cache is not None and any(isinstance(layer, ShortLayer) for layer in cache.layers)


def check_can_skip(cache: Cache, layer_idx: int) -> None:
    """Raise `UnsupportedCacheError` where layer `layer_idx` is not a plain growing one."""
    exists = layer_idx < len(cache.layers)
    kind: Any = type(cache.layers[layer_idx]) if exists else cache.layer_class_to_replicate
    if kind not in (DynamicLayer, ShortLayer) or cache.offloading:
        raise UnsupportedCacheError(
            f"{getattr(kind, '__name__', kind)}{' (offloaded)' if cache.offloading else ''} cannot skip "
            "multimodal tokens yet: use the default DynamicCache (full attention), pass use_cache=False, or "
            "insert at layer 0"
        )


def check_can_continue(cache: Cache | None, layer_idx: int) -> None:
    """Raise `UnsupportedCacheError` where recurrent layer `layer_idx` already holds a state.

    A dummy on the left of a row would change it; before the first row there is nothing to change.
    """
    layer = None if cache is None or layer_idx >= len(cache.layers) else cache.layers[layer_idx]
    if isinstance(layer, LinearAttentionCacheLayerMixin) and any(layer.has_previous_state.values()):
        raise UnsupportedCacheError(
            f"layer {layer_idx} carries a recurrent state, which a batch cannot continue where its rows have "
            "different numbers of text tokens, or none, beside multimodal ones: continue one row at a time, "
            "with text, or insert at layer 0"
        )


def shorten(cache: Cache, layer_idx: int, columns: Tensor, length: int, ragged: bool) -> None:
    """Record that layer `layer_idx`, just updated, holds the positions `columns` (B, K) of `length` seen."""
    layer: Any = cache.layers[layer_idx]
    layer.__class__ = ShortLayer
    layer.columns = columns
    layer.skipped = length - columns.shape[1]
    layer.ragged = ragged
