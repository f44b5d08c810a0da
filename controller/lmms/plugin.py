"""What lmms-eval's entry point loads: where the model classes are."""

from __future__ import annotations

from typing import Any

MODEL = "deepinsert"


def manifest() -> Any:
    """The `ModelManifest` of `--model deepinsert`, in lmms-eval's chat and simple interfaces.

    Raises `ImportError` where lmms-eval (0.7 or later) is not installed.
    """
    try:
        from lmms_eval.models.registry_v2 import ModelManifest
    except ImportError as error:
        raise ImportError(f"lmms-eval 0.7 or later is needed: pip install lmms-eval ({error})") from error
    room = __package__
    return ModelManifest(
        model_id=MODEL,
        chat_class_path=f"{room}.model.DeepInsertChat",
        simple_class_path=f"{room}.model.DeepInsertSimple",
    )
