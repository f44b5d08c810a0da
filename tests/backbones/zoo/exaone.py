"""EXAONE 4.5: sliding windows in every other decoder layer, and full attention without positions."""

from __future__ import annotations

import transformers as hf
from transformers import PreTrainedModel

from .family import TEXT, Family
from .grid_towers import PLACEHOLDERS, WINDOWED
from .grids import VISUAL, patched


def _exaone4_5() -> PreTrainedModel:
    text = {"model_type": "exaone4", **TEXT, "sliding_window": 6, "sliding_window_pattern": 2}
    vision = {**WINDOWED, "num_key_value_heads": 2}
    return hf.Exaone4_5_ForConditionalGeneration(
        hf.Exaone4_5_Config(text_config=text, vision_config=vision, **PLACEHOLDERS)
    )


FAMILIES = [
    Family("exaone4_5", _exaone4_5, patched(), VISUAL),
    Family("exaone4_5-video", _exaone4_5, patched(videos=True), VISUAL),
]
