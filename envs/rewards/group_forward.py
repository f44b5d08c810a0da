"""Computes the losses of all questions about some images at many insert layers, and nothing twice.

The backbone is frozen and its attention causal, so questions run as branches of one prefix
(`backbones.mechanism.shared_prefix`). Models for which this does not hold run each question by itself.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from deepinsert.backbones import Backbone
from deepinsert.backbones.loading import to_model
from deepinsert.backbones.mechanism.shared_prefix import (
    Branches,
    CannotShareError,
    SharedPrefix,
    Texts,
)
from deepinsert.envs.prompts import IGNORED, Prompt, answer_loss

from .block_forward import BlockForward
from .group_prompts import GroupPrompts, group_prompts, stack_inputs
from .token_tree import TokenTree, pack_texts, token_tree

MAX_ROWS = 32
"""Rows of a batch at most: images, or prompts that run by themselves."""

MIN_PACK_TOKENS = 256
"""A pack of questions may have this many tokens, however short the prefix is."""

MIN_FILL = 0.7
"""Least share of a pack's row in a batch that consists of its own tokens rather than padding."""

MAX_HEAD_ROWS = 1024
"""Rows of logits in memory at once, at most."""


@dataclass(frozen=True)
class GroupResult:
    """The losses of P prompts at K insert layers, and what the same forwards show besides.

    Attributes:
        losses: (P, K), the answers' mean next-token negative log-likelihoods in nats.
        first_tokens: (P, K), the most probable first tokens of the answers.
        greedy: (P, K), whether every labelled token, the end of the turn included, is the most probable one.
        text_tokens: (P,), text tokens of the prompt before its last answer.
        multimodal_tokens: (P,), multimodal tokens of the prompt before its last answer.
    """

    losses: NDArray[np.float64]
    first_tokens: NDArray[np.int64]
    greedy: NDArray[np.bool_]
    text_tokens: NDArray[np.int64]
    multimodal_tokens: NDArray[np.int64]

    @classmethod
    def empty(cls, prompts: int, layers: int) -> GroupResult:
        """Return a result to be filled: losses are NaN, everything else is 0."""
        shape = (prompts, layers)
        return cls(
            losses=np.full(shape, np.nan),
            first_tokens=np.zeros(shape, np.int64),
            greedy=np.zeros(shape, np.bool_),
            text_tokens=np.zeros(prompts, np.int64),
            multimodal_tokens=np.zeros(prompts, np.int64),
        )

    def put(self, members: Sequence[int], part: GroupResult) -> None:
        """Write the results of some prompts; a part with one layer is written to all layers."""
        for field in fields(self):
            getattr(self, field.name)[list(members)] = getattr(part, field.name)


class GroupForward:
    """Runs prompts that share images through the backbone, at many insert layers.

    Args:
        backbone: the backbone.
        batch_tokens: bounds the tokens of a forward; only a single longer prompt exceeds it.

    Attributes:
        unshared_reason: why prompts last ran by themselves, without a shared prefix; None if none has.
    """

    def __init__(self, backbone: Backbone, batch_tokens: int = 8192) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens {batch_tokens!r}: give at least 1")
        self.backbone = backbone
        self.batch_tokens = batch_tokens
        self.unshared_reason: str | None = None
        self._texts: Texts = {}

    @torch.inference_mode()
    def run(self, prompts: Sequence[Prompt], insert_layers: Sequence[int]) -> GroupResult:
        """Run the prompts at each of `insert_layers`; prompts about the same images share what they can.

        A prompt's results depend on the other prompts of the call (in the last digits of float32), but not on
        the other layers, on earlier calls, or on the number of threads: a CPU uses one.

        Raises:
            DatasetError: if an image cannot be read.
        """
        with one_thread(self.backbone.device):
            return self._run(prompts, insert_layers)

    def _run(self, prompts: Sequence[Prompt], insert_layers: Sequence[int]) -> GroupResult:
        result = GroupResult.empty(len(prompts), len(insert_layers))
        remaining = set(range(len(prompts)))
        for groups in self._batches(group_prompts(self.backbone.processor, prompts)):
            try:
                parts = self._run_shared(groups, insert_layers)
            except CannotShareError as error:
                self.unshared_reason = str(error)
                continue
            for group, part in zip(groups, parts, strict=True):
                result.put(group.members, part)
                remaining -= set(group.members)
        without_image = [index for index in sorted(remaining) if not prompts[index].images]
        with_image = sorted(remaining - set(without_image))
        # Without an image nothing enters, so that all layers have the same results.
        for members, layers in ((without_image, insert_layers[:1]), (with_image, insert_layers)):
            for start in range(0, len(members), MAX_ROWS):
                rows = members[start : start + MAX_ROWS]
                result.put(rows, self.run_separately([prompts[index] for index in rows], layers))
        return result

    def _batches(self, groups: Sequence[GroupPrompts]) -> list[list[GroupPrompts]]:
        """Return the groups in batches; those of a batch have the same layout, so they can be its rows."""
        batches: dict[Hashable, list[list[GroupPrompts]]] = {}
        for group in groups:
            rows = max(1, min(MAX_ROWS, self.batch_tokens // len(group.inputs["input_ids"][0])))
            same_layout = batches.setdefault(group.layout, [[]])
            if len(same_layout[-1]) >= rows:
                same_layout.append([])
            same_layout[-1].append(group)
        return [batch for same_layout in batches.values() for batch in same_layout]

    def _run_shared(self, groups: Sequence[GroupPrompts], insert_layers: Sequence[int]) -> list[GroupResult]:
        """Run groups of the same layout, whose prefixes are the rows of one batch.

        Raises:
            CannotShareError: if rows of the model depend on more than the rows before them.
        """
        backbone, prefix = self.backbone, groups[0].prefix
        inputs = to_model(stack_inputs([group.inputs for group in groups]), backbone.model)
        shared = SharedPrefix(backbone.model, inputs, prefix, self._texts)
        results = [GroupResult.empty(len(group.members), len(insert_layers)) for group in groups]
        for group, result in zip(groups, results, strict=True):
            ids = group.inputs["input_ids"][0, :prefix].tolist()
            result.multimodal_tokens[:] = sum(token in backbone.placeholder_ids for token in ids)
            begins = [_last_begin(places) for places in group.answers]
            result.text_tokens[:] = prefix - result.multimodal_tokens + begins
        branches, answers = [], []
        for batch in self._pack_batches(self._packs(groups), prefix):
            branches.append(_branches(batch, shared.prefix.device))
            answers.append(_Answers.of(groups, batch))
        for layer, index, states in shared.run(branches, insert_layers):
            answers[index].fill(results, insert_layers.index(layer), shared, states)
        return results

    def _packs(self, groups: Sequence[GroupPrompts]) -> list[_Pack]:
        """Return the texts of all groups as trees of about the same size.

        A large tree repeats the prefix seldom, but in a tree that is too large most tokens are masked from
        one another.
        """
        max_tokens = min(self.batch_tokens, max(MIN_PACK_TOKENS, groups[0].prefix // 2))
        all_packs = []
        for number, group in enumerate(groups):
            texts = [text[:-1] for text in group.texts]  # the last token is predicted but not read
            size = len(token_tree(texts).ids)
            even_tokens = math.ceil(1.1 * size / math.ceil(size / max_tokens))
            for members in pack_texts(texts, min(max_tokens, even_tokens)):
                tree = token_tree([texts[index] for index in members])
                all_packs.append(_Pack(number, members, tree))
        return all_packs

    def _pack_batches(self, packs: Sequence[_Pack], prefix: int) -> list[list[_Pack]]:
        """Return the packs in batches with little padding; each row includes the keys of its prefix."""
        batches: list[list[_Pack]] = []
        for pack in sorted(packs, key=lambda pack: -len(pack.tree.ids)):
            widest = len(batches[-1][0].tree.ids) if batches else 0
            fits = batches and (len(batches[-1]) + 1) * (prefix + widest) <= self.batch_tokens
            if not fits or len(pack.tree.ids) < MIN_FILL * widest:
                batches.append([])
            batches[-1].append(pack)
        return batches

    @torch.inference_mode()
    def run_separately(self, prompts: Sequence[Prompt], insert_layers: Sequence[int]) -> GroupResult:
        """Like `run`, but without sharing: prompts are rows of padded batches, with a forward per layer."""
        forward = BlockForward(self.backbone, prompts)
        inputs = forward.encode(slice(None))
        half = len(prompts) // 2
        if half and inputs["input_ids"].numel() > self.batch_tokens:
            result = GroupResult.empty(len(prompts), len(insert_layers))
            for start, stop in ((0, half), (half, len(prompts))):
                result.put(range(start, stop), self.run_separately(prompts[start:stop], insert_layers))
            return result
        result = GroupResult.empty(len(prompts), len(insert_layers))
        result.text_tokens[:], result.multimodal_tokens[:] = forward.count_tokens(inputs)
        for column, layer in enumerate(insert_layers):
            logits, labels = forward.logits(inputs, layer)
            best, targets = logits[:, :-1].argmax(dim=-1), labels[:, 1:]
            labelled = targets != IGNORED
            first = best.gather(1, labelled.int().argmax(dim=1, keepdim=True))[:, 0]
            result.losses[:, column] = answer_loss(logits, labels).double().cpu().numpy()
            result.first_tokens[:, column] = first.cpu().numpy()
            result.greedy[:, column] = ((best == targets) | ~labelled).all(dim=1).cpu().numpy()
        return result


@dataclass(frozen=True)
class _Pack:
    """Some texts of one group, as one tree; `members` are their prompts in the group number `group`."""

    group: int
    members: list[int]
    tree: TokenTree


@dataclass(frozen=True)
class _Answers:
    """The A labelled tokens of some packs.

    Attributes:
        group: (A,), the number of the token's group.
        owner: (A,), its prompt in the group.
        row: (A,), the pack that predicts it.
        node: (A,), the node of the pack's tree that predicts it.
        target: (A,), its id.
    """

    group: NDArray[np.int64]
    owner: NDArray[np.int64]
    row: NDArray[np.int64]
    node: NDArray[np.int64]
    target: NDArray[np.int64]

    @classmethod
    def of(cls, groups: Sequence[GroupPrompts], packs: Sequence[_Pack]) -> _Answers:
        """Return the labelled tokens of `packs`, in the order of their rows."""
        labelled = [
            (pack.group, owner, row, path[place - 1], groups[pack.group].texts[owner][place])
            for row, pack in enumerate(packs)
            for owner, path in zip(pack.members, pack.tree.paths, strict=True)
            for place in groups[pack.group].answers[owner]
        ]
        return cls(*np.array(labelled, dtype=np.int64).T)

    def fill(
        self, results: Sequence[GroupResult], column: int, shared: SharedPrefix, states: torch.Tensor
    ) -> None:
        """Fill one column of the results of these prompts.

        Args:
            results: the result of each group.
            column: the index of the insert layer.
            shared: computes logits.
            states: the final hidden states (W, R, D) of the packs.
        """
        losses, predictions = self._predict(shared, states)
        for number in np.unique(self.group):
            tokens, result = self.group == number, results[number]
            owner, is_wrong = self.owner[tokens], predictions[tokens] != self.target[tokens]
            owners, first, counts = np.unique(owner, return_index=True, return_counts=True)
            sums = np.bincount(owner, weights=losses[tokens])[owners]
            result.losses[owners, column] = sums / counts
            result.first_tokens[owners, column] = predictions[tokens][first]
            result.greedy[owners, column] = np.bincount(owner, weights=is_wrong)[owners] == 0

    def _predict(
        self, shared: SharedPrefix, states: torch.Tensor
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the loss of each labelled token and the most probable token in its place, (A,) each."""
        losses, predictions = [], []
        for start in range(0, len(self.node), MAX_HEAD_ROWS):
            part = slice(start, start + MAX_HEAD_ROWS)
            logits = shared.logits(states[self.row[part], self.node[part]])
            target = torch.from_numpy(self.target[part]).to(logits.device)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses.append(F.cross_entropy(wide, target, reduction="none").double().cpu().numpy())
            predictions.append(logits.argmax(dim=-1).cpu().numpy())
        return np.concatenate(losses), np.concatenate(predictions)


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Use one thread on a CPU, so that sums have the same order on every machine.

    Several cores are used by several processes.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _branches(packs: Sequence[_Pack], device: torch.device) -> Branches:
    """Return packs as branches; smaller trees are padded with tokens that see only themselves."""
    width = max(len(pack.tree.ids) for pack in packs)
    owner = np.array([pack.group for pack in packs], dtype=np.int64)
    ids = np.full((len(packs), width), packs[0].tree.ids[0])
    depth = np.zeros((len(packs), width), dtype=np.int64)
    visible = np.tile(np.eye(width, dtype=np.bool_), (len(packs), 1, 1))
    for row, pack in enumerate(packs):
        tree, count = pack.tree, len(pack.tree.ids)
        ids[row, :count], depth[row, :count] = tree.ids, tree.depth
        visible[row, :count, :count] = tree.visible
    return Branches(*(torch.from_numpy(part).to(device) for part in (owner, ids, depth, visible)))


def _last_begin(places: Sequence[int]) -> int:
    """Return where the last run of consecutive `places` begins."""
    return next(place for place in reversed(places) if place - 1 not in places)
