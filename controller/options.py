"""Options of every command, as plain dataclasses.

This module imports neither torch nor transformers, so that `deepinsert --help` answers at once.
The same word means the same thing in every command.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(kw_only=True)
class RunOptions:
    out: Path
    """Run folder; the same command again continues what it finds there."""
    seed: int = 0
    """Seed of every random choice."""


@dataclass(kw_only=True)
class BackboneOptions:
    backbone: str = "tiny"
    """Folder, hub id, or "tiny" for the model that comes with the package."""
    device: str = "auto"
    """"auto" takes a GPU where there is one; else a torch device such as cpu or cuda:1."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights, but for those that finetune trains; "auto" is float32 on a CPU, on a GPU the
    checkpoint's own and in finetune bfloat16."""
    batch_size: int = 32
    """Prompts per forward."""


@dataclass(kw_only=True)
class DataOptions:
    data: Path
    """Instructions in LLaVA's JSON (such as llava_v1_5_mix665k.json)."""
    image_root: Path | None = None
    """Folder that image paths are relative to; by default the folder of the data file."""
    sources: str = ""
    """Sources to keep, by the first part of the image path: coco,textvqa,gqa ("text" has no image)."""
    fraction: float = 1.0
    """Share of the records to keep, drawn with the seed image by image, with all that is asked about each."""
    max_bad: str = "0.5%"
    """Share of records that may have a missing or broken image before the command stops."""


@dataclass(kw_only=True)
class SweepOptions(RunOptions, BackboneOptions, DataOptions):
    """Loss and accuracy at every insert layer, without training (paper, Appendix C)."""

    insert_layers: str = "all"
    """Candidate layers: all, 0-7 or 0,4,8."""
    accuracy: bool = True
    """Also compare each greedy answer with the reference."""
    agreement: bool = False
    """Also say how often the most probable first token is that of layer 0, which is then computed too."""
    batch_tokens: int = 8192
    """Tokens per forward when losses are computed; bounds the memory."""
    table: Path | None = None
    """Folder of the reward table, which sweeps of one backbone may share; by default OUT/table."""
    shard: str = ""
    """Compute part i of n alone, as 0/4; by default what torchrun or accelerate launch assigns, or all."""
    shard_prompts: int = 1024
    """Prompts of one file of the table; what a killed run has to compute again."""


@dataclass(kw_only=True)
class TrainPolicyOptions(RunOptions, BackboneOptions, DataOptions):
    """Learn which layer each prompt's multimodal tokens should enter at, and judge what was learned."""

    algorithm: Literal["ppo", "a2c", "dqn", "full-info"] = "ppo"
    """PPO (paper), A2C or DQN of stable-baselines3, or the exact policy gradient over the reward table."""
    insert_layers: str = "all"
    """Candidate layers: all, 0-7 or 0,4,8."""
    skip_weight: float = 0.5
    """Weight λ of the skip bonus, where nothing else is asked for: reward = -loss (nats) + λ * bonus."""
    skip_weight_range: str = "auto"
    """Weights to be asked for later: "0-2"; "auto" is 0 to twice --skip-weight, "none" that one alone."""
    bonus: Literal["depth", "flops", "time"] = "depth"
    """Skip bonus: depth L/N (paper), the share of prefill FLOPs saved, or of measured prefill time."""
    observation: str = "embeddings"
    """What to see of a prompt's text: embeddings (paper), or hidden:K, its state after K layers."""
    observe_image: bool = False
    """Also see the mean of the projected image features."""
    held_out: float = 0.25
    """Share of images kept for judging the policy."""
    seeds: int = 5
    """Policies to train and judge, from --seed on; the first of them is saved."""
    steps: int | None = None
    """Episodes of each training, one prompt each; by default as many as the algorithm needs."""
    table: Path | None = None
    """Folder of a sweep's reward table: what it knows is taken over, what is computed added; by default
    OUT/table."""
    batch_tokens: int = 8192
    """Tokens per forward when losses are computed; bounds the memory."""


@dataclass(kw_only=True)
class RecommendOptions(RunOptions, BackboneOptions):
    """Ask a trained policy for an insert layer, for one prompt or for a data set."""

    policy: Path
    """Run folder of train-policy."""
    skip_weight: float | None = None
    """Weight λ to ask at, within the range the policy was trained for; by default its own."""
    flops_ratio: float | None = None
    """Or: a budget, mean prefill FLOPs against insert layer 0, such as 0.75."""
    max_loss_increase: float | None = None
    """Or: nats of mean loss above insert layer 0's that are tolerated, such as 0.02."""
    table: Path | None = None
    """Reward table of the data (OUT/table of sweep); by default the policy's, where it holds the prompts."""
    prompt: str | None = None
    """One question to recommend a layer for."""
    image: Path | None = None
    """Its image."""
    data: Path | None = None
    """Or: a data set in LLaVA's JSON."""
    image_root: Path | None = None
    """Folder that image paths are relative to; by default the folder of the data file."""
    sources: str = ""
    """Sources to keep, by the first part of the image path."""
    fraction: float = 1.0
    """Share of the records to keep, drawn with the seed image by image, with all that is asked about each."""
    max_bad: str = "0.5%"
    """Share of records that may have a missing or broken image before the command stops."""


@dataclass(kw_only=True)
class FinetuneOptions(RunOptions, BackboneOptions, DataOptions):
    """Finetune a variant whose multimodal tokens enter at a fixed layer."""

    insert_layer: int | Literal["random"] = 0
    """Insert layer of the variant; 0 finetunes the baseline, "random" one model for all layers, each row at
    a layer drawn anew in each epoch."""
    method: Literal["lora", "qlora", "full", "projector"] = "lora"
    """LoRA on the text model's linear layers, LoRA beside weights of 4 bits, every weight but the encoder's,
    or the projector alone (LLaVA's first stage; the second is finetune with --backbone OUT/checkpoint)."""
    epochs: float = 1.0
    """Passes over the data."""
    steps: int | None = None
    """Optimiser steps; by default as many as the epochs take."""
    global_batch_size: int | None = None
    """Prompts per optimiser step, over all processes; by default LLaVA-1.5's 128, for the projector 256."""
    gradient_accumulation: int | None = None
    """Or: batches per optimiser step of each process."""
    learning_rate: float | None = None
    """By default LLaVA-1.5's: 2e-4 for LoRA, 2e-5 for full, 1e-3 for the projector alone."""
    projector_learning_rate: float | None = None
    """The projector's own; by default a tenth of the rate under LoRA, else the rate."""
    lora_rank: int = 128
    """Rank of LoRA's matrices; alpha is twice the rank (LLaVA-1.5)."""
    lora_dropout: float = 0.05
    """Share of LoRA's inputs that are dropped (LLaVA-1.5)."""
    freeze: tuple[str, ...] = ()
    """Parts that learn nothing: vision (always), projector, language, embeddings, lm_head, or the name of a
    module or its beginning."""
    group_by: Literal["none", "length", "modality-length"] = "none"
    """Batches of near lengths, or also of prompts either all with or all without images (LLaVA-1.5)."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    report_to: str = "none"
    """Where else the Trainer reports to: wandb, mlflow, ...; TensorBoard and a CSV are always written."""
    save_every: int = 100
    """Optimiser steps between checkpoints that a killed run continues from."""
    push_to_hub: bool = False
    """Publish the variant on the Hugging Face Hub at the end; also pushes a run that has finished."""
    hub_model_id: str | None = None
    """Repository to push to, as user/name; by default the run folder's name, in your own namespace."""
    hub_private_repo: bool = False
    """Make the repository private where it is made."""
    insert_layers: str = "all"
    """Layers that "random" draws from: all, 0-7 or 0,4,8; of a policy always its own."""
    layer_distribution: str = "uniform"
    """Or a run folder of train-policy: each prompt's layer by the policy's probabilities. Where weights are
    sharded (FSDP, ZeRO-3) a whole step has one layer, since processes must call each layer equally often."""
    distillation: float = 0.0
    """Weight of learning from the model's own answers at layer 0 instead of labels, 0 to 1; costs another
    forward a step."""


@dataclass(kw_only=True)
class EvaluateOptions(RunOptions, BackboneOptions, DataOptions):
    """Put variants beside the baseline: accuracy, loss, FLOPs, measured time, KV-cache bytes."""

    benchmark: str = "instructions"
    """Whose data and rule: instructions (LLaVA's JSON, exact match), or a published benchmark by name."""
    variants: tuple[Path, ...] = ()
    """Run folders of finetune, the baseline first; `--backbone` itself is used where none is given."""
    insert_layers: str | None = None
    """Also `--backbone` at these fixed layers, without finetuning: all, 0-7 or 0,4,8."""
    policy: Path | None = None
    """Run folder of train-policy: also `--backbone` with each prompt at the layer that it chooses."""
    skip_weight: float | None = None
    """Skip weight λ to ask the policy for; by default the one it was made for."""
    max_new_tokens: int = 32
    """Longest answer to generate."""
    timing_repeats: int = 7
    """Timed repeats of prefill and decode for each variant."""
    score_samples: int = 200
    """Bootstrap draws for the interval of a score that is no mean of questions, as F1; 0 leaves it out."""
    metrics: str | None = None
    """Of a captions benchmark only these: bleu,rouge,meteor,cider,spice (what it has of them)."""


@dataclass(kw_only=True)
class LayerStudyOptions(RunOptions, BackboneOptions, DataOptions):
    """Finetune at every insert layer, and see whether the frozen model would have told which is best."""

    insert_layers: str = "all"
    """Layers to finetune at: all, 0-7 or 0,4,8."""
    held_out: float = 0.1
    """Share of images that every variant is judged on and none is trained on."""
    method: Literal["lora", "full"] = "full"
    """What finetuning trains, as in finetune."""
    learning_rate: float | None = 1e-3
    """Peak learning rate of every variant; the default suits the tiny backbone, full."""
    steps: int = 300
    """Optimiser steps of every variant, that for all depths included."""
    batch_size: int = 16
    """Prompts per forward, and per optimiser step."""
    random: bool = True
    """Also train one model for all these layers, with as many steps."""
    distillation: float = 0.5
    """Also train it with this weight of learning from its own answers at layer 0; 0 for without."""
    longer: int | None = None
    """Also train it, without distillation, for so many steps: how many does it need?"""
    skip_weights: str = "0,0.1,0.2,0.5,1"
    """Skip weights λ at which the layer of highest reward is compared, before and after finetuning."""
    policy_fraction: float = 0.1
    """Share of the training images that train-policy learns its expectation from."""
    max_new_tokens: int = 32
    """Longest answer to generate."""
    save_every: int = 100
    """Optimiser steps between checkpoints that a killed study continues from."""
    jobs: int = 1
    """Commands to run at a time, each with its share of the threads."""


@dataclass(kw_only=True)
class ReportOptions:
    """Put several evaluations of the same variants into one table and one picture."""

    out: Path
    """Run folder."""
    runs: tuple[Path, ...]
    """Run folders of evaluate, each of another benchmark or data set."""


@dataclass(kw_only=True)
class ScoreOptions(RunOptions):
    """Score answers that are there already by a benchmark's published rule; no model is loaded."""

    benchmark: str = "instructions"
    """What the data is: instructions (LLaVA's JSON), textvqa, vqav2, okvqa, gqa, pope, mme, scienceqa, ai2d,
    mmbench, mmmu, esc50, vocalsound, vggsound, fsd50k, audioset, coco-captions, chebi20 or captions."""
    data: Path
    """The benchmark's published file or folder."""
    answers: Path
    """JSON lines (or a list) of id and prediction, as evaluate writes; or LLaVA's question_id and text."""
    image_root: Path | None = None
    """Folder that image paths are relative to; by default the folder of the data."""
    embedder: str | None = None
    """What finds the label that a sound's description means: tfidf, or a sentence-transformers model."""
    tokenizer: str | None = None
    """Tokens that BLEU counts for chebi20: words, or the tokenizer of a model (folder or hub id)."""
    metrics: str | None = None
    """Of a captions benchmark only these: bleu,rouge,meteor,cider,spice (what it has of them)."""


@dataclass(kw_only=True)
class BenchOptions(RunOptions):
    """Measure prefill, decoding and training by insert layer beside the stock model, in paired rounds."""

    backbone: str = "bench"
    """Folder, hub id or "tiny" for a model of yours on rendered images; "bench" for a LLaVA with random
    weights, large enough for arithmetic to dominate (bench-half, bench-small and bench-tiny are smaller)."""
    full: bool = False
    """Batches of 1, 8 and 32 with up to 2,304 image tokens; takes the better part of an hour on two cores."""
    cases: str = ""
    """Only these: prefill,decode,train-full,train-lora,rows (one layer a row),ragged,mixed (both padded)."""
    insert_layers: str = "quarters"
    """Layers to measure: all, 0-7 or 0,4,8; "quarters" is 0 and each quarter of the depth."""
    batch_size: int | None = None
    """Rows of each forward; by default the batch sizes of the table, and 8 for a model of yours."""
    repeats: int | None = None
    """Rounds; each runs the stock model and every layer once. By default fewer for what takes longer."""
    threads: int | None = None
    """Threads of torch on a CPU; 1 gives the steadiest figures on a machine that others use too."""
    device: str = "auto"
    """"auto" takes a GPU where there is one; else a torch device such as cpu or cuda:1."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision; "auto" is float32 on a CPU, else bfloat16 or the checkpoint's own."""


@dataclass(kw_only=True)
class PredictOptions(RunOptions):
    """Expect times and memory of a device by the roofline model, from the model's config.json alone."""

    backbone: str = "tiny"
    """Folder with a config.json, hub id, or "tiny"; no weights are read or fetched."""
    device_name: str
    """A100-40, A100-80, H100, H200, L40S, "RTX 4090", T4, cpu (this machine, measured), or your own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of weights and cache; "auto" is the configuration's own."""
    text_tokens: int = 64
    """Text tokens of a prompt."""
    multimodal_tokens: int | None = None
    """Image or audio tokens of a prompt; by default those of its images, where all images have as many."""
    images: int = 1
    """Images or clips of a prompt."""
    batch_size: int = 1
    """Prompts in the batch."""
    insert_layers: str = "all"
    """Layers to predict: all, 0-7 or 0,4,8."""
    efficiency: float = 0.5
    """Share of the device's peak and bandwidth that kernels reach; ratios do not depend on it."""
    peak_tflops: float | None = None
    """TFLOP/s in this dtype of a device that is not in the table, with --bandwidth-gb and --memory-gb."""
    bandwidth_gb: float | None = None
    """Its memory bandwidth in GB/s."""
    memory_gb: float | None = None
    """Its memory in GB."""


@dataclass(kw_only=True)
class DemoOptions:
    """The whole way on the embedded tiny backbone, from data to the evaluation of a variant."""

    out: Path = Path("runs/demo")
    """Run folder; each step writes a folder named after its command."""
    seed: int = 0
    """Seed of every random choice."""
    skip_weight: float = 0.3
    """Weight λ of the skip bonus: reward = -loss (nats) + λ * bonus."""
    quick: bool = False
    """A much smaller run, to see that everything works."""
