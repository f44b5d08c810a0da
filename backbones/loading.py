"""A backbone in hand: the stock model, its processor, and where it came from.

`load_backbone` goes through `from_pretrained` alone, so any checkpoint in the published format loads; the
insert layer is read from `config.json`, or from `deepinsert.json` beside an adapter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.processing_utils import ProcessorMixin

from deepinsert.backbones.compat.transformers import adapter_config, file_beside, processor_without_video
from deepinsert.backbones.mechanism.insertion import deep_insert, insert_at, insert_layer_of

from .families import find_stack, placeholder_token_ids

TINY = Path(__file__).parent / "tiny"

HUB_ARGUMENTS = (
    "revision",
    "token",
    "cache_dir",
    "subfolder",
    "local_files_only",
    "force_download",
    "trust_remote_code",
)
"""What says where a checkpoint is, and so holds for its configuration and processor too."""

ADAPTER_FACTS = "deepinsert.json"
"""Beside an adapter's files: its insert layer, and the backbone it was trained on, as `load_backbone` takes
it."""


class ModelPrompt(Protocol):
    """A prompt that knows what a model reads of it, as `envs.Prompt` does."""

    @classmethod
    def to_generate(cls, processor: Any, prompts: Any) -> dict[str, Tensor]:
        """Inputs of `generate` for a batch of prompts: padded left, ending where the answers begin."""
        ...


class ChoosesLayers(Protocol):
    """What `generate` asks of a policy."""

    def layers(self, backbone: Any, prompts: Any) -> Sequence[int]:
        """The insert layer of each prompt on this backbone."""
        ...


@dataclass(frozen=True)
class Backbone:
    """A multimodal language model with a variable insert layer, and its processor.

    `name` is what was asked for: a folder, a hub id or "tiny".
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    name: str

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def num_layers(self) -> int:
        """N, the number of decoder layers."""
        return len(find_stack(self.model).layers)

    @property
    def insert_layer(self) -> int:
        """The insert layer in force outside `insert_at`."""
        return insert_layer_of(self.model)

    @cached_property
    def placeholder_ids(self) -> frozenset[int]:
        """Token ids whose positions an encoder's features fill."""
        return placeholder_token_ids(self.model.config)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of configuration and weights: equal for equal models, whatever folder they lie in."""
        return fingerprint(self.model)

    @contextmanager
    def insert_at(
        self, insert_layer: int | Sequence[int], *, multimodal_mask: Tensor | None = None
    ) -> Iterator[Backbone]:
        """Another insert layer for a while, one for the batch or one per row; as `backbones.insert_at`."""
        with insert_at(self.model, insert_layer, multimodal_mask=multimodal_mask):
            yield self

    def generate(
        self,
        prompts: Sequence[ModelPrompt],
        policy: ChoosesLayers | None = None,
        *,
        insert_layer: int | Sequence[int] | None = None,
        batch_size: int = 32,
        max_new_tokens: int = 32,
        **generate: Any,
    ) -> list[str]:
        """The answer to each prompt (P), greedy unless `generate`, which reaches `model.generate`, says else.

        `prompts` are `deepinsert.Prompt`s. A `policy`, such as `deepinsert.LayerPolicy`, chooses a layer for
        each, and prompts of several layers are generated together. Otherwise `insert_layer` is one layer, or
        one for each prompt; by default the one in force. With `num_return_sequences`, the answers to one
        prompt follow each other.

        Raises `ValueError` for both a policy and an insert layer, for another number of layers than of
        prompts, and for a layer that the model does not have.
        """
        layers = self._layer_of_each(prompts, policy, insert_layer)
        arguments = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens, **generate}
        model: Any = self.model
        answers: list[str] = []
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            inputs = to_model(type(prompts[start]).to_generate(self.processor, prompts[batch]), model)
            with self.insert_at(layers[batch]), torch.inference_mode():
                tokens = model.generate(**inputs, **arguments)
            told = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
            texts = self.tokenizer.batch_decode(tokens[:, told:], skip_special_tokens=True)
            answers += [text.strip() for text in texts]
        return answers

    def _layer_of_each(
        self,
        prompts: Sequence[ModelPrompt],
        policy: ChoosesLayers | None,
        insert_layer: int | Sequence[int] | None,
    ) -> list[int]:
        if policy is not None and insert_layer is not None:
            raise ValueError(f"both a policy and insert_layer {insert_layer}: give one of them")
        if policy is not None:
            insert_layer = policy.layers(self, prompts)
        if insert_layer is None:
            insert_layer = self.insert_layer
        layers = [insert_layer] * len(prompts) if isinstance(insert_layer, int) else list(insert_layer)
        if len(layers) != len(prompts):
            raise ValueError(
                f"{len(layers)} insert layers for {len(prompts)} prompts: give one, or one for each"
            )
        return layers

    def save_pretrained(self, path: str | Path) -> None:
        """Writes weights (safetensors), `config.json` with the insert layer, and the processor."""
        self.model.save_pretrained(path)
        self.processor.save_pretrained(path)


def load_backbone(
    source: str | Path = "tiny",
    *,
    insert_layer: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    **from_pretrained: Any,
) -> Backbone:
    """Load a model with its processor and make its insert layer variable.

    `source` is a folder, a hub id, or "tiny" for the backbone that comes with the package; where it holds an
    adapter alone, its base model is loaded and the adapter merged into it. `insert_layer` defaults to the one
    in `config.json` or beside the adapter, else 0. `dtype` "auto" means float32 on a CPU and the checkpoint's
    own precision elsewhere. Further arguments, such as `revision`, reach `from_pretrained`; with `device_map`
    the model stays where that puts it. The model is in eval mode.

    Raises `OSError` where there is no such model and `UnsupportedModelError` where it cannot be used.
    """
    path = TINY if str(source) == "tiny" else source
    hub = {name: from_pretrained[name] for name in HUB_ARGUMENTS if name in from_pretrained}
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto" and torch.device(device).type == "cpu":
        dtype = torch.float32
    where = {name: value for name, value in hub.items() if name != "trust_remote_code"}
    if (adapter := adapter_config(path, where)) is not None:
        base, inserted = adapter_facts(path, Path(adapter), where)
        rest = {name: value for name, value in from_pretrained.items() if name not in where}
        if Path(base).is_absolute() and not Path(base).is_dir():
            raise OSError(
                f"{path} is an adapter of the model in {base}, which is not there: put it back, or load the "
                "checkpoint that the adapter was merged into"
            )
        layer = inserted if insert_layer is None else insert_layer
        backbone = load_backbone(base, insert_layer=layer, device=device, dtype=dtype, **rest)
        return replace(backbone, model=merged(backbone.model, path, where), name=str(source))
    if Path(path).is_dir() and not (Path(path) / hub.get("subfolder", "") / "config.json").is_file():
        # Stock code would guess the model type from the folder's name.
        raise OSError(f"{path} holds neither a config.json nor an adapter: give the folder of a checkpoint")
    config = AutoConfig.from_pretrained(path, **hub)
    model, report = AutoModelForMultimodalLM.from_pretrained(
        path, config=config, dtype=dtype, output_loading_info=True, **from_pretrained
    )
    check_whole(source, report)
    processor = load_processor(path, config, **hub)
    if getattr(model, "hf_device_map", None) is None:
        model = model.to(device)
    model = deep_insert(model.eval(), insert_layer)
    return Backbone(model=model, processor=processor, name=str(source))


def check_whole(source: str | Path, report: Mapping[str, Any]) -> None:
    """Raise `OSError` where weights of a model were not found in its checkpoint, by what `from_pretrained`
    reports: stock code leaves them random and goes on."""
    absent = sorted(set(report["missing_keys"]) | {str(each) for each in report["mismatched_keys"]})
    if absent:
        raise OSError(
            f"{source}: {len(absent)} weights of the model are not in the checkpoint, such as {absent[0]}. "
            "Names of weights differ between versions of transformers, and this is "
            f"{transformers.__version__}: load the checkpoint with the version that its config.json names as "
            "transformers_version, or later"
        )


def adapter_facts(path: str | Path, config: Path, where: Mapping[str, Any]) -> tuple[str, int | None]:
    """The base model of an adapter and the insert layer it was trained at, None where that is not told."""
    told = file_beside(path, ADAPTER_FACTS, where)
    if told is not None:
        facts = json.loads(Path(told).read_text("utf-8"))
        return facts["backbone"], facts["insert_layer"]
    return json.loads(config.read_text("utf-8"))["base_model_name_or_path"], None


def merged(model: PreTrainedModel, adapter: str | Path, where: Mapping[str, Any]) -> Any:
    """`model` with an adapter's weights added to its own: the stock class again, without PEFT's layers."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter), **where).merge_and_unload().eval()


def load_processor(path: str | Path, config: PreTrainedConfig, **hub: Any) -> Any:
    """The model's processor; without its video half where torchvision, which only that needs, is missing."""
    try:
        return AutoProcessor.from_pretrained(path, **hub)
    except (ImportError, TypeError):  # the second in early 5.x
        without_video = None if find_spec("torchvision") else processor_without_video(config)
        if without_video is None:
            raise
    return without_video.from_pretrained(path, **hub)


def fingerprint(model: PreTrainedModel) -> str:
    """16 hex digits over the shapes and a fixed sample of every weight's values.

    At most 64 evenly spaced values of each tensor are read, in float32, so that a 7B model costs no more
    than a small one. Neither the insert layer enters nor the names of the weights, which differ between
    versions of transformers.
    """
    parts = []
    for weight in model.state_dict().values():
        flat = weight.detach().reshape(-1)
        step = max(1, flat.numel() // 64)
        sample = flat[::step][:64].to("cpu", torch.float32)
        parts.append(f"{tuple(weight.shape)}".encode() + sample.numpy().tobytes())
    return hashlib.sha256(model.config.model_type.encode() + b"".join(sorted(parts))).hexdigest()[:16]


def to_model(inputs: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """`inputs` on the model's device, with pixels and spectra in the model's precision."""
    device, dtype = model.device, model.dtype
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
