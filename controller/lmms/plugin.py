"""lmms-eval's entry point: names the classes of the model."""

from __future__ import annotations

from typing import Any

MODEL = "deepinsert"


def manifest() -> Any:
    """Return the `ModelManifest` of `--model deepinsert`, in lmms-eval's chat and simple interfaces.

    Raises:
        ImportError: lmms-eval 0.7 or later is not installed.
    """
    try:
        from lmms_eval.models.registry_v2 import ModelManifest
    except ImportError as error:
        raise ImportError(f"lmms-eval 0.7 or later is needed: pip install lmms-eval ({error})") from error
    module = f"{__package__}.lmms_model"
    return ModelManifest(
        model_id=MODEL,
        chat_class_path=f"{module}.DeepInsertChat",
        simple_class_path=f"{module}.DeepInsertSimple",
    )
