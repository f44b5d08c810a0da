"""The options of every command, as plain dataclasses; `--help` shows the docstrings of classes and fields.

This module imports neither torch nor transformers, so that `--help` answers in under a second. The same
word is the same option in every command.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(kw_only=True)
class RunOptions:
    """The options that all commands share."""

    out: Path
    """Run folder. The same command continues an interrupted run in it."""
    seed: int = 0
    """Seed of every random choice."""


@dataclass(kw_only=True)
class BackboneOptions:
    """The options of commands that run a backbone."""

    backbone: str = "tiny"
    """Folder, hub id, or "tiny" for the model that comes with the package."""
    device: str = "auto"
    """Torch device such as cpu or cuda:1. "auto" uses a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights, except those that finetune trains. "auto" is float32 on a CPU; on a GPU it is
    the checkpoint's precision, and bfloat16 in finetune."""
    batch_size: int = 32
    """Prompts per forward."""


@dataclass(kw_only=True)
class DataOptions:
    """The options of commands that read instruction data."""

    data: Path
    """Instructions in LLaVA's JSON (such as llava_v1_5_mix665k.json)."""
    image_root: Path | None = None
    """Folder that image paths are relative to. By default it is the folder of the data file."""
    sources: str = ""
    """Sources to keep, such as coco,textvqa,gqa. A source is the first part of the image path; records
    without image have the source "text"."""
    fraction: float = 1.0
    """Share of the records to keep. The seed draws images, each with all its questions."""
    max_bad: str = "0.5%"
    """Largest share of records with a missing or broken image. The command stops above it."""


@dataclass(kw_only=True)
class SweepOptions(RunOptions, BackboneOptions, DataOptions):
    """Measure loss and accuracy of the untouched model at every insert layer (paper, Appendix C)."""

    insert_layers: str = "all"
    """Candidate insert layers: all, 0-7 or 0,4,8."""
    accuracy: bool = True
    """Also compare each greedy answer with the reference."""
    agreement: bool = False
    """Also report how often the most probable first token is that of layer 0, and compute layer 0 for it."""
    batch_tokens: int = 8192
    """Tokens per forward when losses are computed. It bounds the memory."""
    table: Path | None = None
    """Folder of the reward table. Sweeps of one backbone may share it. By default it is OUT/table."""
    shard: str = ""
    """Compute only part i of n, written i/n, such as 0/4. By default, torchrun or accelerate launch assigns
    the parts, and a single process computes all."""
    shard_prompts: int = 1024
    """Prompts per file of the table. A killed run computes the prompts of an unfinished file again."""


@dataclass(kw_only=True)
class TrainPolicyOptions(RunOptions, BackboneOptions, DataOptions):
    """Learn an insert layer per prompt, and compare the policy with baselines on held-out images."""

    algorithm: Literal["ppo", "a2c", "dqn", "full-info"] = "ppo"
    """PPO (paper), A2C or DQN of stable-baselines3, or full-info: the exact policy gradient over the reward
    table."""
    insert_layers: str = "all"
    """Candidate insert layers: all, 0-7 or 0,4,8."""
    skip_weight: float = 0.5
    """Default weight λ of the skip bonus: reward = -loss (nats) + λ * bonus."""
    skip_weight_range: str = "auto"
    """Range of weights that the policy covers, such as "0-2". "auto" is 0 to twice --skip-weight; "none" is
    --skip-weight alone."""
    bonus: Literal["depth", "flops", "time"] = "depth"
    """Skip bonus: depth L/N (paper), the saved share of prefill FLOPs, or the saved share of prefill time."""
    observation: str = "embeddings"
    """Observation of a prompt's text: embeddings (paper), or hidden:K, the hidden states after K layers."""
    observe_image: bool = False
    """Also observe the mean of the projected image features."""
    held_out: float = 0.25
    """Share of images that are held out to evaluate the policy."""
    seeds: int = 5
    """Number of policies to train and evaluate, with seeds from --seed on. The first one is saved."""
    steps: int | None = None
    """Episodes of each training, with one prompt per episode. The default depends on the algorithm."""
    table: Path | None = None
    """Folder of a sweep's reward table. Its losses are used, and missing ones are added to it. By default it
    is OUT/table."""
    batch_tokens: int = 8192
    """Tokens per forward when losses are computed. It bounds the memory."""


@dataclass(kw_only=True)
class RecommendOptions(RunOptions, BackboneOptions):
    """Recommend an insert layer for one prompt or for a data set, with a trained policy."""

    policy: Path
    """Run folder of train-policy."""
    skip_weight: float | None = None
    """Skip weight λ, within the range of the policy. By default it is the policy's --skip-weight."""
    flops_ratio: float | None = None
    """Instead of a skip weight: a budget of mean prefill FLOPs relative to insert layer 0, such as 0.75."""
    max_loss_increase: float | None = None
    """Instead of a skip weight: the tolerated mean loss above that of insert layer 0 in nats, such as
    0.02."""
    table: Path | None = None
    """Reward table of the data (OUT/table of sweep). By default it is the policy's table, if that holds the
    prompts."""
    prompt: str | None = None
    """One question to recommend a layer for."""
    image: Path | None = None
    """Image of the question."""
    data: Path | None = None
    """Instead of a question: a data set in LLaVA's JSON."""
    image_root: Path | None = None
    """Folder that image paths are relative to. By default it is the folder of the data file."""
    sources: str = ""
    """Sources to keep, such as coco,textvqa,gqa. A source is the first part of the image path."""
    fraction: float = 1.0
    """Share of the records to keep. The seed draws images, each with all its questions."""
    max_bad: str = "0.5%"
    """Largest share of records with a missing or broken image. The command stops above it."""


@dataclass(kw_only=True)
class FinetuneOptions(RunOptions, BackboneOptions, DataOptions):
    """Finetune a variant of the backbone at a fixed insert layer."""

    insert_layer: int | Literal["random"] = 0
    """Insert layer of the variant. 0 finetunes the baseline. "random" finetunes one model for all layers:
    each row draws a layer, again in each epoch."""
    method: Literal["lora", "qlora", "full", "projector"] = "lora"
    """lora: LoRA on the text model's linear layers. qlora: LoRA beside base weights of 4 bits. full: all
    weights except the encoder's. projector: the projector alone (LLaVA's first stage; for the second,
    finetune again with --backbone OUT/checkpoint)."""
    epochs: float = 1.0
    """Passes over the data."""
    steps: int | None = None
    """Optimiser steps. By default the epochs determine them."""
    global_batch_size: int | None = None
    """Prompts per optimiser step, over all processes. By default it is LLaVA-1.5's 128, or 256 for
    projector."""
    gradient_accumulation: int | None = None
    """Instead of --global-batch-size: batches of each process per optimiser step."""
    learning_rate: float | None = None
    """Peak learning rate. By default it is LLaVA-1.5's: 2e-4 for LoRA, 2e-5 for full, 1e-3 for projector."""
    projector_learning_rate: float | None = None
    """Learning rate of the projector. By default it is a tenth of --learning-rate under LoRA, else the
    same."""
    lora_rank: int = 128
    """Rank of LoRA's matrices. LoRA's alpha is twice the rank (LLaVA-1.5)."""
    lora_dropout: float = 0.05
    """Dropout probability of LoRA's inputs (LLaVA-1.5)."""
    freeze: tuple[str, ...] = ()
    """Parts that are not trained: vision (always frozen), projector, language, embeddings, lm_head, or the
    name of a module or its beginning."""
    group_by: Literal["none", "length", "modality-length"] = "none"
    """length: batches of similar lengths. modality-length: also either all or none of a batch's prompts have
    images (LLaVA-1.5)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass. It needs less memory and about a third more time."""
    report_to: str = "none"
    """Service that the Trainer also reports to, such as wandb or mlflow. TensorBoard and CSV logs are always
    written."""
    save_every: int = 100
    """Optimiser steps between checkpoints, from which a killed run continues."""
    push_to_hub: bool = False
    """Publish the variant on the Hugging Face Hub at the end. It also publishes a finished run."""
    hub_model_id: str | None = None
    """Repository to publish to, as user/name. By default it is the run folder's name in your namespace."""
    hub_private_repo: bool = False
    """Make the repository private if it is created."""
    insert_layers: str = "all"
    """Layers that --insert-layer random draws from: all, 0-7 or 0,4,8. A policy keeps its own."""
    layer_distribution: str = "uniform"
    """uniform, or a run folder of train-policy: each prompt's layer is drawn by the policy's probabilities.
    If weights are sharded (FSDP, ZeRO-3), all rows of a step have one layer, because all processes must call
    each layer equally often."""
    distillation: float = 0.0
    """Weight (0 to 1) of the distillation loss: the model learns from its own answers at layer 0 instead of
    the labels. It needs another forward per step."""


@dataclass(kw_only=True)
class EvaluateOptions(RunOptions, BackboneOptions, DataOptions):
    """Compare variants with the baseline: accuracy, loss, FLOPs, measured time, KV-cache bytes."""

    benchmark: str = "instructions"
    """Benchmark of the data and of the scoring rule: instructions (LLaVA's JSON, exact match), or the name of
    a published benchmark."""
    variants: tuple[Path, ...] = ()
    """Run folders of finetune, the baseline first. By default --backbone itself is evaluated."""
    insert_layers: str | None = None
    """Also evaluate --backbone at these fixed layers, without finetuning: all, 0-7 or 0,4,8."""
    policy: Path | None = None
    """Run folder of train-policy. Also evaluate --backbone with the policy's layer for each prompt."""
    skip_weight: float | None = None
    """Skip weight λ for the policy. By default it is the policy's --skip-weight."""
    max_new_tokens: int = 32
    """Largest number of tokens per answer."""
    timing_repeats: int = 7
    """Timed repeats of prefill and decode per variant."""
    score_samples: int = 200
    """Bootstrap samples for the interval of a score that is not a mean over questions, such as F1. With 0
    there is no interval."""
    metrics: str | None = None
    """Metrics of a captions benchmark to compute, some of bleu,rouge,meteor,cider,spice. The default depends
    on the benchmark."""


@dataclass(kw_only=True)
class LayerStudyOptions(RunOptions, BackboneOptions, DataOptions):
    """Finetune at every insert layer, and compare the results with the frozen model's prediction."""

    insert_layers: str = "all"
    """Layers to finetune at: all, 0-7 or 0,4,8."""
    held_out: float = 0.1
    """Share of images that are held out to evaluate the variants."""
    method: Literal["lora", "full"] = "full"
    """Finetuning method, as in finetune."""
    learning_rate: float | None = 1e-3
    """Peak learning rate of every variant. The default suits full finetuning of the tiny backbone."""
    steps: int = 300
    """Optimiser steps of every variant, also of the model for all depths."""
    batch_size: int = 16
    """Prompts per forward, and per optimiser step."""
    random: bool = True
    """Also train one model for all these layers, with the same number of steps."""
    distillation: float = 0.5
    """Also train the model for all layers with this weight of distillation from its own answers at layer 0. 0
    omits it."""
    longer: int | None = None
    """Also train the model for all layers, without distillation, for this number of steps."""
    skip_weights: str = "0,0.1,0.2,0.5,1"
    """Skip weights λ at which the layers of highest reward before and after finetuning are compared."""
    policy_fraction: float = 0.1
    """Share of the training images that train-policy learns from."""
    max_new_tokens: int = 32
    """Largest number of tokens per answer."""
    save_every: int = 100
    """Optimiser steps between checkpoints, from which a killed study continues."""
    jobs: int = 1
    """Commands that run at the same time, each with its share of the threads."""


@dataclass(kw_only=True)
class ReportOptions:
    """Join several evaluations of the same variants in one table and one picture."""

    out: Path
    """Run folder."""
    runs: tuple[Path, ...]
    """Run folders of evaluate, one per benchmark or data set."""


@dataclass(kw_only=True)
class ScoreOptions(RunOptions):
    """Score existing answers by a benchmark's published rule, without loading a model."""

    benchmark: str = "instructions"
    """Benchmark of the data: instructions (LLaVA's JSON), textvqa, vqav2, okvqa, gqa, pope, mme, scienceqa,
    ai2d, mmbench, mmmu, esc50, vocalsound, vggsound, fsd50k, audioset, coco-captions, chebi20 or captions."""
    data: Path
    """The benchmark's published file or folder."""
    answers: Path
    """JSON lines (or a list) of id and prediction, as evaluate writes, or of LLaVA's question_id and text."""
    image_root: Path | None = None
    """Folder that image paths are relative to. By default it is the folder of the data."""
    embedder: str | None = None
    """Embedder that finds the label nearest to a sound's description: tfidf, or the name of a
    sentence-transformers model."""
    tokenizer: str | None = None
    """Tokens that BLEU counts for chebi20: words, or the tokenizer of a model (folder or hub id)."""
    metrics: str | None = None
    """Metrics of a captions benchmark to compute, some of bleu,rouge,meteor,cider,spice. The default depends
    on the benchmark."""


@dataclass(kw_only=True)
class BenchOptions(RunOptions):
    """Measure prefill, decoding and training by insert layer against the stock model, in paired rounds."""

    backbone: str = "bench"
    """Folder, hub id or "tiny" to measure your model on rendered images. "bench" is a LLaVA with random
    weights, large enough for arithmetic to dominate; bench-half, bench-small and bench-tiny are smaller."""
    full: bool = False
    """Measure batches of 1, 8 and 32 with up to 2,304 image tokens. It takes most of an hour on two cores."""
    cases: str = ""
    """Cases to measure, some of prefill,decode,train-full,train-lora,rows (one insert layer per
    row),ragged,mixed (both padded)."""
    insert_layers: str = "quarters"
    """Layers to measure: all, 0-7 or 0,4,8. "quarters" is layer 0 and each quarter of the depth."""
    batch_size: int | None = None
    """Rows per forward. By default those of the grid of cells, or 8 for your model."""
    repeats: int | None = None
    """Rounds. Each round runs the stock model and every layer once. By default slower cases have fewer."""
    threads: int | None = None
    """Threads of torch on a CPU. 1 gives the steadiest figures on a shared machine."""
    device: str = "auto"
    """Torch device such as cpu or cuda:1. "auto" uses a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision. "auto" is float32 on a CPU; on a GPU it is bfloat16 or the checkpoint's precision."""


@dataclass(kw_only=True)
class PredictOptions(RunOptions):
    """Predict times and memory on a device by the roofline model, from the model's config.json alone."""

    backbone: str = "tiny"
    """Folder with a config.json, hub id, or "tiny". No weights are read or downloaded."""
    device_name: str
    """A100-40, A100-80, H100, H200, L40S, "RTX 4090", T4, cpu (this machine, measured), or the name of your
    device."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of weights and cache. "auto" is the precision in the configuration."""
    text_tokens: int = 64
    """Text tokens per prompt."""
    multimodal_tokens: int | None = None
    """Image or audio tokens per prompt. By default those of its images, if all images have equally many."""
    images: int = 1
    """Images or clips per prompt."""
    batch_size: int = 1
    """Prompts in the batch."""
    insert_layers: str = "all"
    """Layers to predict: all, 0-7 or 0,4,8."""
    efficiency: float = 0.5
    """Share of the device's peak and bandwidth that kernels reach. Ratios do not depend on it."""
    peak_tflops: float | None = None
    """Peak TFLOP/s in this dtype of a device outside the list, together with --bandwidth-gb and
    --memory-gb."""
    bandwidth_gb: float | None = None
    """Memory bandwidth of that device in GB/s."""
    memory_gb: float | None = None
    """Memory of that device in GB."""


@dataclass(kw_only=True)
class DemoOptions:
    """Run all commands on the embedded tiny backbone, from data to the evaluation of a variant."""

    out: Path = Path("runs/demo")
    """Run folder. Each step writes a folder in it that is named after its command."""
    seed: int = 0
    """Seed of every random choice."""
    skip_weight: float = 0.3
    """Weight λ of the skip bonus: reward = -loss (nats) + λ * bonus."""
    quick: bool = False
    """Run on much less data, to check that everything works."""
