"""Loading a backbone: a stock model with a variable insert layer, and its processor.

`load_backbone` uses `from_pretrained` alone, so any checkpoint in the published format loads. The insert
layer is read from `config.json`, or from `deepinsert.json` beside an adapter.
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
"""Folder of the tiny backbone, which comes with the package."""

HUB_ARGUMENTS = (
    "revision",
    "token",
    "cache_dir",
    "subfolder",
    "local_files_only",
    "force_download",
    "trust_remote_code",
)
"""Arguments that locate a checkpoint, and so apply to its configuration and processor too."""

ADAPTER_FACTS = "deepinsert.json"
"""File beside an adapter that holds its insert layer and the backbone it was trained on, as `load_backbone`
takes it."""


class ModelPrompt(Protocol):
    """A prompt that can turn itself into model inputs, as `envs.Prompt` does."""

    @classmethod
    def to_generate(cls, processor: Any, prompts: Any) -> dict[str, Tensor]:
        """Return the inputs of `generate` for a batch: padded left, ending where the answers begin."""
        ...


class LayerChooser(Protocol):
    """A policy, as far as `Backbone.generate` needs one."""

    def layers(self, backbone: Any, prompts: Any) -> Sequence[int]:
        """Return the insert layer of each prompt on this backbone (P,)."""
        ...


@dataclass(frozen=True)
class Backbone:
    """A multimodal language model with a variable insert layer, and its processor.

    `name` is the source that was loaded: a folder, a hub id or "tiny".
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    name: str

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer, or the processor itself where it is one."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
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
        """Digest of model type and weights: equal for equal models, whatever folder they were loaded from."""
        return fingerprint(self.model)

    @contextmanager
    def insert_at(
        self, insert_layer: int | Sequence[int], *, multimodal_mask: Tensor | None = None
    ) -> Iterator[Backbone]:
        """Use another insert layer inside this block, for the batch or per row; see `backbones.insert_at`."""
        with insert_at(self.model, insert_layer, multimodal_mask=multimodal_mask):
            yield self

    def generate(
        self,
        prompts: Sequence[ModelPrompt],
        policy: LayerChooser | None = None,
        *,
        insert_layer: int | Sequence[int] | None = None,
        batch_size: int = 32,
        max_new_tokens: int = 32,
        **generate: Any,
    ) -> list[str]:
        """Generate the answer to each prompt (P,), greedily by default.

        Prompts with different insert layers are generated in one batch.

        Args:
            prompts: `deepinsert.Prompt`s.
            policy: chooses a layer per prompt, such as a `deepinsert.LayerPolicy`.
            insert_layer: one layer, or one per prompt (P,); by default the layer in force.
            batch_size: prompts per call of `model.generate`.
            max_new_tokens: tokens per answer at most.
            **generate: further arguments of `model.generate`. With `num_return_sequences`, the answers to one
                prompt follow each other.

        Raises:
            ValueError: both a policy and an insert layer are given, the numbers of layers and of prompts
                differ, or the model does not have a layer.
        """
        layers = self._layers_of(prompts, policy, insert_layer)
        arguments = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens, **generate}
        model: Any = self.model
        answers: list[str] = []
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            inputs = to_model(type(prompts[start]).to_generate(self.processor, prompts[batch]), model)
            with self.insert_at(layers[batch]), torch.inference_mode():
                tokens = model.generate(**inputs, **arguments)
            prompt_length = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
            texts = self.tokenizer.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)
            answers += [text.strip() for text in texts]
        return answers

    def _layers_of(
        self,
        prompts: Sequence[ModelPrompt],
        policy: LayerChooser | None,
        insert_layer: int | Sequence[int] | None,
    ) -> list[int]:
        """Return the insert layer of each prompt (P,)."""
        if policy is not None and insert_layer is not None:
            raise ValueError(f"both a policy and insert_layer {insert_layer}: give one of them")
        if policy is not None:
            insert_layer = policy.layers(self, prompts)
        if insert_layer is None:
            insert_layer = self.insert_layer
        layers = [insert_layer] * len(prompts) if isinstance(insert_layer, int) else list(insert_layer)
        if len(layers) != len(prompts):
            raise ValueError(
                f"{len(layers)} insert layers for {len(prompts)} prompts: give one, or one per prompt"
            )
        return layers

    def save_pretrained(self, path: str | Path) -> None:
        """Write weights (safetensors), `config.json` with the insert layer, and the processor."""
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
    """Load a model with its processor and make its insert layer variable; the model is in eval mode.

    Args:
        source: a folder, a hub id, or "tiny" for the backbone that comes with the package. If it holds only
            an adapter, its base model is loaded and the adapter is merged into it.
        insert_layer: by default the layer in `config.json` or beside the adapter, else 0.
        device: a torch device; "auto" means CUDA where there is one, else the CPU.
        dtype: "auto" means float32 on a CPU and the checkpoint's own precision elsewhere.
        **from_pretrained: further arguments of `from_pretrained`, such as `revision`. With `device_map`, the
            model stays on the devices that it names.

    Raises:
        OSError: there is no such model, or its checkpoint is incomplete.
        UnsupportedModelError: the model cannot have a variable insert layer.
    """
    path = TINY if str(source) == "tiny" else source
    hub = {name: from_pretrained[name] for name in HUB_ARGUMENTS if name in from_pretrained}
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto" and torch.device(device).type == "cpu":
        dtype = torch.float32
    location = {name: value for name, value in hub.items() if name != "trust_remote_code"}
    if (adapter := adapter_config(path, location)) is not None:
        base, trained_layer = adapter_facts(path, adapter, location)
        other_arguments = {name: value for name, value in from_pretrained.items() if name not in location}
        if Path(base).is_absolute() and not Path(base).is_dir():
            raise OSError(
                f"{path} is an adapter of the model in {base}, which is not there: put it back, or load the "
                "checkpoint that the adapter was merged into"
            )
        layer = trained_layer if insert_layer is None else insert_layer
        backbone = load_backbone(base, insert_layer=layer, device=device, dtype=dtype, **other_arguments)
        return replace(backbone, model=merge_adapter(backbone.model, path, location), name=str(source))
    if Path(path).is_dir() and not (Path(path) / hub.get("subfolder", "") / "config.json").is_file():
        # Stock code would guess the model type from the folder's name.
        raise OSError(f"{path} holds neither a config.json nor an adapter: give the folder of a checkpoint")
    config = AutoConfig.from_pretrained(path, **hub)
    model, report = AutoModelForMultimodalLM.from_pretrained(
        path, config=config, dtype=dtype, output_loading_info=True, **from_pretrained
    )
    check_all_weights_loaded(source, report)
    processor = load_processor(path, config, **hub)
    if getattr(model, "hf_device_map", None) is None:
        model = model.to(device)
    model = deep_insert(model.eval(), insert_layer)
    return Backbone(model=model, processor=processor, name=str(source))


def check_all_weights_loaded(source: str | Path, report: Mapping[str, Any]) -> None:
    """Raise `OSError` if a checkpoint lacks weights of its model, by the report of `from_pretrained`.

    Stock code leaves such weights random and goes on.
    """
    absent = sorted(set(report["missing_keys"]) | {str(each) for each in report["mismatched_keys"]})
    if absent:
        raise OSError(
            f"{source}: {len(absent)} weights of the model are not in the checkpoint, such as {absent[0]}. "
            "Names of weights differ between versions of transformers, and this is "
            f"{transformers.__version__}: load the checkpoint with the version that its config.json names as "
            "transformers_version, or later"
        )


def adapter_facts(path: str | Path, config_file: Path, location: Mapping[str, Any]) -> tuple[str, int | None]:
    """Return an adapter's base model and the insert layer it was trained at, None if no file names it."""
    facts_file = file_beside(path, ADAPTER_FACTS, location)
    if facts_file is not None:
        facts = json.loads(facts_file.read_text("utf-8"))
        return facts["backbone"], facts["insert_layer"]
    return json.loads(config_file.read_text("utf-8"))["base_model_name_or_path"], None


def merge_adapter(model: PreTrainedModel, adapter: str | Path, location: Mapping[str, Any]) -> Any:
    """Return `model` with an adapter's weights added to its own: a stock model without PEFT's layers."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter), **location).merge_and_unload().eval()


def load_processor(path: str | Path, config: PreTrainedConfig, **hub: Any) -> Any:
    """Load the model's processor, without its video part if torchvision is missing (only videos need it)."""
    auto_class: Any = AutoProcessor
    try:
        return auto_class.from_pretrained(path, **hub)
    except (ImportError, TypeError):  # early 5.x raise TypeError
        without_video = None if find_spec("torchvision") else processor_without_video(config)
        if without_video is None:
            raise
    return without_video.from_pretrained(path, **hub)


def fingerprint(model: PreTrainedModel) -> str:
    """Return 16 hex digits over the shapes and a fixed sample of every weight's values.

    At most 64 evenly spaced values of each tensor are read, in float32, so that a 7B model costs no more
    than a small one. Neither the insert layer nor the names of the weights matter; those names differ
    between versions of transformers.
    """
    samples = []
    for weight in model.state_dict().values():
        flat = weight.detach().reshape(-1)
        step = max(1, flat.numel() // 64)
        sample = flat[::step][:64].to("cpu", torch.float32)
        samples.append(f"{tuple(weight.shape)}".encode() + sample.numpy().tobytes())
    return hashlib.sha256(model.config.model_type.encode() + b"".join(sorted(samples))).hexdigest()[:16]


def to_model(inputs: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Move `inputs` to the model's device, with pixels and spectra in the model's precision."""
    device, dtype = model.device, model.dtype
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
