"""Losses of all questions about some images at many insert layers, nothing of them computed twice.

The backbone is frozen and its attention causal, so questions run as branches of one prefix
(`backbones.mechanism.shared_prefix`). Models for which that does not hold run each question by itself.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from deepinsert.backbones import Backbone
from deepinsert.backbones.mechanism.shared_prefix import (
    Branches,
    CannotShareError,
    SharedPrefix,
    Texts,
)
from deepinsert.envs.prompts import IGNORED, Prompt, answer_loss

from .block_forward import BlockForward, to_model
from .group_prompts import GroupPrompts, group_prompts, stacked
from .token_tree import TokenTree, packs, token_tree

MOST_ROWS = 32
"""Rows of a batch: images, or prompts of those that run by themselves."""

LEAST_PACK = 256
"""Tokens of questions that run together even where the prefix is short."""

LEAST_FILLED = 0.7
"""Share of a pack's row in a batch that is its own tokens."""

HEAD_ROWS = 1024
"""Rows of logits held at once."""


@dataclass(frozen=True)
class GroupResult:
    """What P prompts cost at K insert layers.

    `losses` (P, K) are the answers' mean next-token negative log-likelihoods in nats. `first_tokens` (P, K)
    are the most probable first tokens of the answers; `greedy` (P, K) says whether every labelled token, the
    end of the turn included, is the most probable one. `text_tokens` and `multimodal_tokens` (P,) count the
    prompt up to where its last answer begins.
    """

    losses: NDArray[np.float64]
    first_tokens: NDArray[np.int64]
    greedy: NDArray[np.bool_]
    text_tokens: NDArray[np.int64]
    multimodal_tokens: NDArray[np.int64]

    @classmethod
    def empty(cls, prompts: int, layers: int) -> GroupResult:
        shape = (prompts, layers)
        counts = [np.zeros(prompts, dtype=np.int64) for _ in range(2)]
        return cls(
            np.full(shape, np.nan), np.zeros(shape, np.int64), np.zeros(shape, np.bool_), counts[0], counts[1]
        )

    def put(self, members: Sequence[int], part: GroupResult) -> None:
        """Take over the results of some prompts; one layer's stand for all where there is one."""
        for name in self.__dataclass_fields__:
            getattr(self, name)[list(members)] = getattr(part, name)


class GroupForward:
    """Runs prompts that share images through the backbone, at many insert layers.

    `batch_tokens` bounds the tokens of a forward; a single longer prompt exceeds it. `unshared_reason` is why
    prompts last ran by themselves, without a shared prefix; None if none has done so.
    """

    def __init__(self, backbone: Backbone, batch_tokens: int = 8192) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens {batch_tokens!r}: give at least 1")
        self.backbone = backbone
        self.batch_tokens = batch_tokens
        self.texts: Texts = {}
        self.unshared_reason: str | None = None

    @torch.inference_mode()
    def run(self, prompts: Sequence[Prompt], insert_layers: Sequence[int]) -> GroupResult:
        """The prompts at each of `insert_layers`; those about the same images share what they can.

        A prompt's results depend on the other prompts given, in float32's last digits, and on nothing else:
        neither on the layers asked for together nor on earlier calls, nor on the number of threads, since on
        a CPU one computes. Raises `DatasetError` for an image that cannot be read.
        """
        with one_thread(self.backbone.device):
            return self._run(prompts, insert_layers)

    def _run(self, prompts: Sequence[Prompt], insert_layers: Sequence[int]) -> GroupResult:
        result = GroupResult.empty(len(prompts), len(insert_layers))
        left = set(range(len(prompts)))
        for groups in self._alike(group_prompts(self.backbone.processor, prompts)):
            try:
                found = self._together(groups, insert_layers)
            except CannotShareError as error:
                self.unshared_reason = str(error)
                continue
            for group, part in zip(groups, found, strict=True):
                result.put(group.members, part)
                left -= set(group.members)
        without = [index for index in sorted(left) if not prompts[index].images]
        alone = sorted(left - set(without))
        # Without an image nothing enters, whatever the layer.
        for members, layers in ((without, insert_layers[:1]), (alone, insert_layers)):
            for start in range(0, len(members), MOST_ROWS):
                some = members[start : start + MOST_ROWS]
                result.put(some, self.one_by_one([prompts[index] for index in some], layers))
        return result

    def _alike(self, groups: Sequence[GroupPrompts]) -> list[list[GroupPrompts]]:
        """Groups that can be rows of one batch: alike up to their last multimodal token."""
        batches: dict[Hashable, list[list[GroupPrompts]]] = {}
        for group in groups:
            rows = max(1, min(MOST_ROWS, self.batch_tokens // len(group.inputs["input_ids"][0])))
            alike = batches.setdefault(group.layout, [[]])
            if len(alike[-1]) >= rows:
                alike.append([])
            alike[-1].append(group)
        return [batch for alike in batches.values() for batch in alike]

    def _together(self, groups: Sequence[GroupPrompts], insert_layers: Sequence[int]) -> list[GroupResult]:
        """Groups that are alike, as rows of one batch of prefixes."""
        backbone, prefix = self.backbone, groups[0].prefix
        inputs = to_model(stacked([group.inputs for group in groups]), backbone.model)
        shared = SharedPrefix(backbone.model, inputs, prefix, self.texts)
        results = [GroupResult.empty(len(group.members), len(insert_layers)) for group in groups]
        for group, result in zip(groups, results, strict=True):
            ids = group.inputs["input_ids"][0, :prefix].tolist()
            result.multimodal_tokens[:] = sum(token in backbone.placeholder_ids for token in ids)
            begins = [_last_begin(places) for places in group.answers]
            result.text_tokens[:] = prefix - result.multimodal_tokens + begins
        branches, answers = [], []
        for rows in self._calls(self._packs(groups), prefix):
            branches.append(_branches(rows, shared.prefix.device))
            answers.append(_Answers.of(groups, rows))
        for layer, index, states in shared.run(branches, insert_layers):
            answers[index].judge(shared, states, results, insert_layers.index(layer))
        return results

    def _packs(self, groups: Sequence[GroupPrompts]) -> list[_Pack]:
        """The texts of all groups in trees of about the same size: large, so that the prefix is seldom
        repeated, but not so large that most tokens are masked from one another."""
        most = min(self.batch_tokens, max(LEAST_PACK, groups[0].prefix // 2))
        found = []
        for number, group in enumerate(groups):
            texts = [text[:-1] for text in group.texts]  # the last token is predicted, never read
            size = len(token_tree(texts).ids)
            for members in packs(texts, min(most, math.ceil(1.1 * size / math.ceil(size / most)))):
                found.append(_Pack(number, members, token_tree([texts[index] for index in members])))
        return found

    def _calls(self, rows: Sequence[_Pack], prefix: int) -> list[list[_Pack]]:
        """Packs that run as one batch, each with the keys of its prefix, and few tokens that only fill."""
        calls: list[list[_Pack]] = []
        for pack in sorted(rows, key=lambda pack: -len(pack.tree.ids)):
            widest = len(calls[-1][0].tree.ids) if calls else 0
            fits = calls and (len(calls[-1]) + 1) * (prefix + widest) <= self.batch_tokens
            if not fits or len(pack.tree.ids) < LEAST_FILLED * widest:
                calls.append([])
            calls[-1].append(pack)
        return calls

    @torch.inference_mode()
    def one_by_one(self, prompts: Sequence[Prompt], insert_layers: Sequence[int]) -> GroupResult:
        """As `run`, each prompt by itself in padded batches, at one insert layer after the other."""
        forward = BlockForward(self.backbone, prompts)
        inputs = forward.encode(slice(None))
        half = len(prompts) // 2
        if half and inputs["input_ids"].numel() > self.batch_tokens:
            result = GroupResult.empty(len(prompts), len(insert_layers))
            for start, stop in ((0, half), (half, len(prompts))):
                part = self.one_by_one(prompts[start:stop], insert_layers)
                result.put(range(start, stop), part)
            return result
        result = GroupResult.empty(len(prompts), len(insert_layers))
        result.text_tokens[:], result.multimodal_tokens[:] = forward.count_tokens(inputs)
        for column, layer in enumerate(insert_layers):
            logits, labels = forward.logits(inputs, layer)
            best, targets = logits[:, :-1].argmax(dim=-1), labels[:, 1:]
            kept = targets != IGNORED
            first = best.gather(1, kept.int().argmax(dim=1, keepdim=True))[:, 0]
            result.losses[:, column] = answer_loss(logits, labels).double().cpu().numpy()
            result.first_tokens[:, column] = first.cpu().numpy()
            result.greedy[:, column] = ((best == targets) | ~kept).all(dim=1).cpu().numpy()
        return result


@dataclass(frozen=True)
class _Pack:
    """Texts of group number `group`, its prompts `members`, as one tree."""

    group: int
    members: list[int]
    tree: TokenTree


@dataclass(frozen=True)
class _Answers:
    """The A labelled tokens of some packs.

    `group` (A,) and `owner` (A,) say whose each one is, the group and the prompt in it; `row` (A,) and `node`
    (A,) which pack predicts it, and where in its tree; `target` (A,) is its id.
    """

    group: NDArray[np.int64]
    owner: NDArray[np.int64]
    row: NDArray[np.int64]
    node: NDArray[np.int64]
    target: NDArray[np.int64]

    @classmethod
    def of(cls, groups: Sequence[GroupPrompts], rows: Sequence[_Pack]) -> _Answers:
        labelled = [
            (pack.group, owner, row, path[place - 1], groups[pack.group].texts[owner][place])
            for row, pack in enumerate(rows)
            for owner, path in zip(pack.members, pack.tree.paths, strict=True)
            for place in groups[pack.group].answers[owner]
        ]
        return cls(*np.array(labelled, dtype=np.int64).T)

    def judge(
        self, shared: SharedPrefix, states: torch.Tensor, results: Sequence[GroupResult], column: int
    ) -> None:
        """Fill `column` of the owners from the final hidden states (W, R, D) of the packs."""
        losses, best = [], []
        for start in range(0, len(self.node), HEAD_ROWS):
            some = slice(start, start + HEAD_ROWS)
            logits = shared.logits(states[self.row[some], self.node[some]])
            target = torch.from_numpy(self.target[some]).to(logits.device)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses.append(F.cross_entropy(wide, target, reduction="none").double().cpu().numpy())
            best.append(logits.argmax(dim=-1).cpu().numpy())
        loss, said = np.concatenate(losses), np.concatenate(best)
        for number in np.unique(self.group):
            own, result = self.group == number, results[number]
            owners, first, counts = np.unique(self.owner[own], return_index=True, return_counts=True)
            wrong = np.bincount(self.owner[own], weights=said[own] != self.target[own])
            result.losses[owners, column] = np.bincount(self.owner[own], weights=loss[own])[owners] / counts
            result.first_tokens[owners, column] = said[own][first]
            result.greedy[owners, column] = wrong[owners] == 0


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, sums in one order whatever the machine; several processes use several cores."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _branches(rows: Sequence[_Pack], device: torch.device) -> Branches:
    """Packs filled up to the size of the largest with tokens that see themselves alone."""
    most = max(len(pack.tree.ids) for pack in rows)
    owner = np.array([pack.group for pack in rows], dtype=np.int64)
    ids = np.full((len(rows), most), rows[0].tree.ids[0])
    depth = np.zeros((len(rows), most), dtype=np.int64)
    seen = np.tile(np.eye(most, dtype=np.bool_), (len(rows), 1, 1))
    for row, pack in enumerate(rows):
        tree, count = pack.tree, len(pack.tree.ids)
        ids[row, :count], depth[row, :count], seen[row, :count, :count] = tree.ids, tree.depth, tree.seen
    return Branches(*(torch.from_numpy(part).to(device) for part in (owner, ids, depth, seen)))


def _last_begin(places: Sequence[int]) -> int:
    """Where the last run of consecutive `places` begins."""
    return next(place for place in reversed(places) if place - 1 not in places)
