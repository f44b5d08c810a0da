"""A finetuning of a few seconds, whose options tests change."""

from pathlib import Path

import pytest

from deepinsert.controller.options import FinetuneOptions


@pytest.fixture(scope="session")
def small_run(rendered_data: Path) -> FinetuneOptions:
    """A dozen records, two per step, at insert layer 3, on the tiny backbone."""
    return FinetuneOptions(
        out=Path(),
        data=rendered_data,
        insert_layer=3,
        fraction=0.12,
        steps=5,
        batch_size=2,
        gradient_accumulation=1,
        save_every=1,
        lora_rank=4,
        learning_rate=1e-3,
        device="cpu",
    )
