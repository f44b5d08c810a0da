"""The model that `lmms_eval --model deepinsert` runs: a backbone at an insert layer, or with a policy.

    lmms_eval --model deepinsert --model_args pretrained=PATH,insert_layer=8 --tasks pope,gqa --batch_size 16

Answers do not depend on the batch size. Tasks of multiple choice that compare losses need lmms-eval's simple
interface: add `--force_simple`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from deepinsert.backbones import load_backbone
from deepinsert.backbones.loading import to_model
from deepinsert.controller.answers.batched import generation_inputs
from deepinsert.controller.policy.layer_policy import LayerPolicy
from deepinsert.controller.runs.progress_bars import progress_bar
from deepinsert.envs.prompts import IGNORED, Prompt, answer_loss, encode
from deepinsert.envs.rewards.block_forward import BlockForward

from .questions import Wish, chat_prompt, simple_prompt

try:
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms
    from lmms_eval.models.model_utils.gen_metrics import log_metrics
    from loguru import logger
except ImportError as error:
    raise ImportError(f"lmms-eval 0.7 or later is needed: pip install lmms-eval ({error})") from error


class Judged(tuple[float, bool]):
    """A loss, and whether greedy decoding gives the answer."""

    def strip(self) -> str:
        """Nothing: lmms-eval's cache asks every response for its text, and keeps those that have one."""
        return ""


class DeepInsertSimple(lmms):
    """Questions as a text and its images; also compares the losses of given answers."""

    is_simple = True

    def __init__(
        self,
        pretrained: str = "tiny",
        insert_layer: int | None = None,
        policy: str | None = None,
        skip_weight: float | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        max_batch_size: int | None = None,
        **from_pretrained: Any,
    ) -> None:
        """`pretrained` is a folder, a hub id or "tiny"; `insert_layer` by default that of its config.json;
        `policy` a run folder of train-policy, asked for `skip_weight`. Further arguments, such as `revision`,
        reach `from_pretrained`.

        Raises `ValueError` for both a layer and a policy, a skip weight without a policy, and a batch size
        that is no number.
        """
        super().__init__()
        if policy is not None and insert_layer is not None:
            raise ValueError(f"both policy={policy} and insert_layer={insert_layer}: give one of them")
        if policy is None and skip_weight is not None:
            raise ValueError(f"skip_weight={skip_weight}: it is asked of a policy; give policy= too")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"--batch_size {batch_size}: give a number such as 16")
        self.batch_size = int(batch_size)
        self._rank = int(os.environ.get("RANK", 0))
        self._world_size = int(os.environ.get("WORLD_SIZE", 1))
        if device in (None, "cuda") and self._world_size > 1 and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.backbone: Any = load_backbone(
            pretrained, insert_layer=insert_layer, device=device or "auto", dtype=dtype, **from_pretrained
        )
        self.skip_weight = skip_weight
        self.policy: Any = None if policy is None else LayerPolicy.load(policy, self.backbone)
        self.warned: set[str] = set()

    @property
    def device(self) -> torch.device:
        """Where lmms-eval puts what it gathers from several processes."""
        return self.backbone.device

    def clean(self) -> None:
        """Give the model's memory back, for a judge that lmms-eval may load next."""
        self.backbone = self.policy = None
        super().clean()

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """An answer, a `GenerationResult`, to each request, in their order."""
        answers: list[Any] = [None] * len(requests)
        seconds, tokens = 0.0, 0
        for rows in progress_bar(list(self.batches(requests)), "answers"):
            prompts = [self.ask(requests[row]) for row in rows]
            wish = self.wish(requests[rows[0]])
            started = time.perf_counter()
            found = self.answer(prompts, wish)
            seconds += time.perf_counter() - started
            for row, (text, count) in zip(rows, found, strict=True):
                answers[row] = GenerationResult(text, TokenCounts(output_tokens=count))
                tokens += count
        speed = tokens / seconds if seconds else 0.0
        log_metrics(total_gen_tokens=tokens, total_elapsed_time=seconds, avg_speed=speed)
        return answers

    def batches(self, requests: Sequence[Any]) -> Iterator[list[int]]:
        """Rows of requests that are generated alike, the longest texts first, `batch_size` at a time."""
        alike: dict[str, list[int]] = {}
        for row, request in enumerate(requests):
            alike.setdefault(json.dumps(self.generation(request), sort_keys=True, default=str), []).append(
                row
            )
        for rows in alike.values():
            rows.sort(key=lambda row: -len(requests[row].args[0]))
            for start in range(0, len(rows), self.batch_size):
                yield rows[start : start + self.batch_size]

    def answer(self, prompts: Sequence[Prompt], wish: Wish) -> list[tuple[str, int]]:
        """The answer to each prompt and how many tokens its text took."""
        backbone = self.backbone
        inputs = generation_inputs(backbone, prompts)
        stops = {"stop_strings": list(wish.until), "tokenizer": backbone.tokenizer} if wish.until else {}
        with backbone.insert_at(self.layers(prompts)), torch.inference_mode():
            tokens = backbone.model.generate(**inputs, **wish.arguments, **stops)
        told = 0 if backbone.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        special = torch.tensor(backbone.tokenizer.all_special_ids, device=tokens.device)
        counts = (~torch.isin(tokens[:, told:], special)).sum(dim=1).tolist()
        texts = backbone.tokenizer.batch_decode(tokens[:, told:], skip_special_tokens=True)
        return [(wish.cut(text), count) for text, count in zip(texts, counts, strict=True)]

    def layers(self, prompts: Sequence[Prompt]) -> list[int]:
        """The insert layer of each prompt."""
        if self.policy is None:
            return [self.backbone.insert_layer] * len(prompts)
        return list(self.policy.layers(self.backbone, prompts, self.skip_weight))

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Of each given answer: its mean loss in nats a token, and whether greedy decoding would give it.

        The loss, not its negative, as in lmms-eval's own models: its multiple choice takes the least.
        """
        scores: list[Any] = [None] * len(requests)
        for start in progress_bar(range(0, len(requests), self.batch_size), "losses"):
            rows = range(start, min(start + self.batch_size, len(requests)))
            prompts = [self.given(requests[row]) for row in rows]
            inputs = to_model(encode(self.backbone.processor, prompts), self.backbone.model)
            with torch.inference_mode():
                logits, labels = BlockForward(self.backbone, prompts).logits(inputs, self.layers(prompts))
            losses = answer_loss(logits, labels).tolist()
            wrong = (logits[:, :-1].argmax(dim=-1) != labels[:, 1:]) & (labels[:, 1:] != IGNORED)
            for row, loss, misses in zip(rows, losses, wrong.any(dim=1).tolist(), strict=True):
                # lmms-eval turns bare tuples into strings; what a GenerationResult holds it takes as it is.
                scores[row] = GenerationResult(Judged((loss, not misses)))
        return scores

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        raise NotImplementedError(
            f"{requests[0].task_name}: rounds that depend on earlier answers are not supported by deepinsert"
        )

    def ask(self, request: Any) -> Prompt:
        """The question of a request to generate."""
        context, _, to_visuals, row, task, split = request.args
        return simple_prompt(f"{task}/{row}", context, self.visuals(to_visuals, task, split, row))

    def given(self, request: Any) -> Prompt:
        """The question of a request with the answer whose loss it asks for."""
        if len(request.args) != 6:
            raise ValueError(
                f"{request.task_name}: acc_mutual_info compares log-likelihoods, and these are losses; "
                "leave that metric out"
            )
        context, target, to_visuals, row, task, split = request.args
        answer = target if isinstance(target, str) else target(self.task_dict[task][split][row])
        visuals = self.visuals(to_visuals, task, split, row)
        return simple_prompt(f"{task}/{row}", context, visuals, str(answer).strip())

    def visuals(self, to_visuals: Any, task: str, split: str, row: int) -> list[Any]:
        """What a task shows beside a question; nothing for a task of text."""
        found = to_visuals(self.task_dict[task][split][row]) if to_visuals is not None else None
        return [visual for visual in found or [] if visual is not None]

    def generation(self, request: Any) -> Mapping[str, Any]:
        """A request's `generation_kwargs`."""
        return request.args[1]

    def wish(self, request: Any) -> Wish:
        """How a request is to be generated; says once what it ignores."""
        wish = Wish.read(self.generation(request))
        news = set(wish.ignored) - self.warned
        if news:
            self.warned |= news
            logger.warning(f"{request.task_name}: generation_kwargs {', '.join(sorted(news))} are ignored")
        return wish


class DeepInsertChat(DeepInsertSimple):
    """Questions as chat messages with media in place; for what is generated only."""

    is_simple = False

    def ask(self, request: Any) -> Prompt:
        _, to_messages, _, row, task, split = request.args
        return chat_prompt(f"{task}/{row}", to_messages(self.task_dict[task][split][row]))

    def generation(self, request: Any) -> Mapping[str, Any]:
        return request.args[2]
