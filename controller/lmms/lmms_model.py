"""The model that `lmms_eval --model deepinsert` runs: a backbone at an insert layer, or with a layer policy.

    lmms_eval --model deepinsert --model_args pretrained=PATH,insert_layer=8 --tasks pope,gqa --batch_size 16

Answers do not depend on the batch size. Multiple-choice tasks that compare losses need lmms-eval's simple
interface: add `--force_simple`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from deepinsert.backbones import load_backbone
from deepinsert.backbones.loading import to_model
from deepinsert.controller.answers.batched import generation_inputs
from deepinsert.controller.policy.layer_policy import LayerPolicy
from deepinsert.controller.runs.processes import Processes
from deepinsert.controller.runs.progress_bars import progress_bar
from deepinsert.envs.prompts import IGNORED, Prompt, answer_loss, encode
from deepinsert.envs.rewards.block_forward import BlockForward

from .questions import GenerationSettings, chat_prompt, simple_prompt

try:
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms
    from lmms_eval.models.model_utils.gen_metrics import log_metrics
    from loguru import logger
except ImportError as error:
    raise ImportError(f"lmms-eval 0.7 or later is needed: pip install lmms-eval ({error})") from error


class AnswerScore(tuple[float, bool]):
    """The loss of an answer, and whether greedy decoding gives it."""

    def strip(self) -> str:
        """Return an empty text; lmms-eval's cache calls `strip` on responses and stores those with text."""
        return ""


class DeepInsertSimple(lmms):  # type: ignore[misc]  # lmms-eval is optional, and untyped without it
    """The model in lmms-eval's simple interface: a question is a text with images; answers can be scored."""

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
        """Load the backbone and the policy.

        Args:
            pretrained: a folder, a hub id or "tiny".
            insert_layer: by default the one of the checkpoint's config.json.
            policy: a run folder of train-policy; the policy then chooses each question's layer.
            skip_weight: the skip weight λ to ask the policy for; by default the policy's own.
            batch_size: questions per call of the model.
            device: by default a GPU if there is one; of several processes, each has its own.
            dtype: the dtype of the weights.
            max_batch_size: is ignored; lmms-eval passes it to every model.
            **from_pretrained: further arguments of `from_pretrained`, such as `revision`.

        Raises:
            ValueError: both a layer and a policy are given, a skip weight is given without a policy, or the
                batch size is not a number.
        """
        super().__init__()
        if policy is not None and insert_layer is not None:
            raise ValueError(f"both policy={policy} and insert_layer={insert_layer}: give one of them")
        if policy is None and skip_weight is not None:
            raise ValueError(f"skip_weight={skip_weight} has an effect only with a policy; give policy= too")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"--batch_size {batch_size}: give a number such as 16")
        self.batch_size = int(batch_size)
        processes = Processes.from_environment()
        self._rank, self._world_size = processes.rank, processes.world_size
        if device in (None, "cuda") and processes.world_size > 1 and torch.cuda.is_available():
            device = processes.cuda_device()
        self.backbone: Any = load_backbone(
            pretrained, insert_layer=insert_layer, device=device or "auto", dtype=dtype, **from_pretrained
        )
        self.skip_weight = skip_weight
        self.policy: Any = None if policy is None else LayerPolicy.load(policy, self.backbone)
        self.reported_settings: set[str] = set()

    @property
    def device(self) -> torch.device:
        """The device on which lmms-eval gathers the results of several processes."""
        device: torch.device = self.backbone.device
        return device

    def clean(self) -> None:
        """Free the model's memory for a grader model that lmms-eval may load next."""
        self.backbone = self.policy = None
        super().clean()

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Generate an answer (a `GenerationResult`) to each request, in the order of the requests."""
        answers: list[Any] = [None] * len(requests)
        seconds, tokens = 0.0, 0
        for rows in progress_bar(list(self.batches(requests)), "answers"):
            prompts = [self.question_prompt(requests[row]) for row in rows]
            settings = self.generation_settings(requests[rows[0]])
            start = time.perf_counter()
            batch_answers = self.answer(prompts, settings)
            seconds += time.perf_counter() - start
            for row, (text, count) in zip(rows, batch_answers, strict=True):
                answers[row] = GenerationResult(text, TokenCounts(output_tokens=count))
                tokens += count
        speed = tokens / seconds if seconds else 0.0
        log_metrics(total_gen_tokens=tokens, total_elapsed_time=seconds, avg_speed=speed)
        return answers

    def batches(self, requests: Sequence[Any]) -> Iterator[list[int]]:
        """Yield rows of requests with equal settings in batches, those with the longest texts first."""
        rows_by_settings: dict[str, list[int]] = {}
        for row, request in enumerate(requests):
            settings = json.dumps(self.task_settings(request), sort_keys=True, default=str)
            rows_by_settings.setdefault(settings, []).append(row)
        for rows in rows_by_settings.values():
            rows.sort(key=lambda row: -len(requests[row].args[0]))
            for start in range(0, len(rows), self.batch_size):
                yield rows[start : start + self.batch_size]

    def answer(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[tuple[str, int]]:
        """Return the answer to each prompt and the number of tokens of its text."""
        backbone = self.backbone
        inputs = generation_inputs(backbone, prompts)
        stops: dict[str, Any] = {}
        if settings.until:
            stops = {"stop_strings": list(settings.until), "tokenizer": backbone.tokenizer}
        with backbone.insert_at(self.layers(prompts)), torch.inference_mode():
            tokens = backbone.model.generate(**inputs, **settings.arguments, **stops)
        prompt_length = 0 if backbone.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        answers = tokens[:, prompt_length:]
        special_ids = torch.tensor(backbone.tokenizer.all_special_ids, device=tokens.device)
        counts = (~torch.isin(answers, special_ids)).sum(dim=1).tolist()
        texts = backbone.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [(settings.truncate(text), count) for text, count in zip(texts, counts, strict=True)]

    def layers(self, prompts: Sequence[Prompt]) -> list[int]:
        """Return the insert layer of each prompt."""
        if self.policy is None:
            return [self.backbone.insert_layer] * len(prompts)
        return list(self.policy.layers(self.backbone, prompts, self.skip_weight))

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Return an `AnswerScore` for the answer of each request; its loss is the mean per token, in nats.

        The loss is not negated, as in lmms-eval's own models, whose multiple-choice tasks choose the
        smallest.
        """
        scores: list[Any] = [None] * len(requests)
        for start in progress_bar(range(0, len(requests), self.batch_size), "losses"):
            rows = range(start, min(start + self.batch_size, len(requests)))
            prompts = [self.answered_prompt(requests[row]) for row in rows]
            inputs = to_model(encode(self.backbone.processor, prompts), self.backbone.model)
            with torch.inference_mode():
                logits, labels = BlockForward(self.backbone, prompts).logits(inputs, self.layers(prompts))
            losses = answer_loss(logits, labels).tolist()
            is_wrong = (logits[:, :-1].argmax(dim=-1) != labels[:, 1:]) & (labels[:, 1:] != IGNORED)
            is_greedy = (~is_wrong.any(dim=1)).tolist()
            for row, score in zip(rows, zip(losses, is_greedy, strict=True), strict=True):
                # lmms-eval turns plain tuples into strings, but keeps the content of a GenerationResult.
                scores[row] = GenerationResult(AnswerScore(score))
        return scores

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Raise `NotImplementedError`: rounds that depend on earlier answers are not supported."""
        raise NotImplementedError(
            f"{requests[0].task_name}: rounds that depend on earlier answers are not supported by deepinsert"
        )

    def question_prompt(self, request: Any) -> Prompt:
        """Return the question of a request for `generate_until`."""
        context, _, to_visuals, row, task, split = request.args
        return simple_prompt(f"{task}/{row}", context, self.visuals(to_visuals, task, split, row))

    def answered_prompt(self, request: Any) -> Prompt:
        """Return the question of a request for `loglikelihood`, with the answer to score.

        Raises:
            ValueError: the task's metric needs log-likelihoods instead of losses.
        """
        if len(request.args) != 6:
            raise ValueError(
                f"{request.task_name}: acc_mutual_info needs log-likelihoods, but deepinsert gives losses; "
                "leave that metric out"
            )
        context, target, to_visuals, row, task, split = request.args
        answer = target if isinstance(target, str) else target(self.task_dict[task][split][row])
        visuals = self.visuals(to_visuals, task, split, row)
        return simple_prompt(f"{task}/{row}", context, visuals, str(answer).strip())

    def visuals(self, to_visuals: Any, task: str, split: str, row: int) -> list[Any]:
        """Return the visuals of a question; a task of text has none.

        Args:
            to_visuals: the task's function from a document to its visuals, or None.
            task: the name of the task.
            split: the split of its data.
            row: the row of the document in the split.
        """
        visuals = to_visuals(self.task_dict[task][split][row]) if to_visuals is not None else None
        return [visual for visual in visuals or [] if visual is not None]

    def task_settings(self, request: Any) -> Mapping[str, Any]:
        """Return the `generation_kwargs` of a request."""
        settings: Mapping[str, Any] = request.args[1]
        return settings

    def generation_settings(self, request: Any) -> GenerationSettings:
        """Return how to generate the answer of a request, with one warning per setting that is ignored."""
        settings = GenerationSettings.from_task(self.task_settings(request))
        unreported = set(settings.ignored) - self.reported_settings
        if unreported:
            self.reported_settings |= unreported
            names = ", ".join(sorted(unreported))
            logger.warning(f"{request.task_name}: generation_kwargs {names} are ignored")
        return settings


class DeepInsertChat(DeepInsertSimple):
    """The model in lmms-eval's chat interface: questions are messages; answers are only generated."""

    is_simple = False

    def question_prompt(self, request: Any) -> Prompt:
        """Return the question of a request for `generate_until`."""
        _, to_messages, _, row, task, split = request.args
        return chat_prompt(f"{task}/{row}", to_messages(self.task_dict[task][split][row]))

    def task_settings(self, request: Any) -> Mapping[str, Any]:
        """Return the `generation_kwargs` of a request."""
        settings: Mapping[str, Any] = request.args[2]
        return settings
