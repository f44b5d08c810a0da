"""Losses of all questions about an image at many insert layers, nothing of them computed twice.

The backbone is frozen and its attention causal, so questions run as branches of one prefix
(`backbones.shared_prefix`). Models for which that does not hold run each question by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from backbones import Backbone
from backbones.shared_prefix import Branches, CannotShareError, SharedPrefix, Texts

from .block_forward import BlockForward, to_model
from .group_prompts import GroupPrompts, group_prompts
from .prompts import IGNORED, Prompt, answer_loss
from .token_tree import TokenTree, packs, token_tree

MOST_ROWS = 32
"""Prompts in a batch of those that run by themselves."""

LEAST_PACK = 256
"""Tokens of questions that run together even where the prefix is short."""

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

    `batch_tokens` bounds the tokens of a forward, but for a single prompt's. `apart` is why the last prompts
    that had to run by themselves did so; None where there were none.
    """

    def __init__(self, backbone: Backbone, batch_tokens: int = 8192) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens {batch_tokens!r}: give at least 1")
        self.backbone = backbone
        self.batch_tokens = batch_tokens
        self.texts: Texts = {}
        self.apart: str | None = None

    @torch.inference_mode()
    def run(self, prompts: Sequence[Prompt], insert_layers: Sequence[int]) -> GroupResult:
        """The prompts at each of `insert_layers`; those about the same images share what they can.

        A prompt's results depend on the other prompts given, in float32's last digits, and on nothing else:
        neither on the layers asked for together nor on earlier calls. Raises `DatasetError` for an image that
        cannot be read.
        """
        result = GroupResult.empty(len(prompts), len(insert_layers))
        left = set(range(len(prompts)))
        for group in group_prompts(self.backbone.processor, prompts):
            try:
                result.put(group.members, self._together(group, insert_layers))
            except CannotShareError as error:
                self.apart = str(error)
            else:
                left -= set(group.members)
        without = [index for index in sorted(left) if not prompts[index].images]
        alone = sorted(left - set(without))
        # Without an image nothing enters, whatever the layer.
        for members, layers in ((without, insert_layers[:1]), (alone, insert_layers)):
            for start in range(0, len(members), MOST_ROWS):
                some = members[start : start + MOST_ROWS]
                result.put(some, self.one_by_one([prompts[index] for index in some], layers))
        return result

    def _together(self, group: GroupPrompts, insert_layers: Sequence[int]) -> GroupResult:
        backbone = self.backbone
        shared = SharedPrefix(
            backbone.model, to_model(group.inputs, backbone.model), group.prefix, self.texts
        )
        # The last token of a text is predicted, never read.
        read = [text[:-1] for text in group.texts]
        runs = packs(read, min(self.batch_tokens, max(LEAST_PACK, group.prefix // 2)))
        trees = [token_tree([read[index] for index in run]) for run in runs]
        answers = [_Answers.of(group, run, tree) for run, tree in zip(runs, trees, strict=True)]
        result = GroupResult.empty(len(group.members), len(insert_layers))
        ids = group.inputs["input_ids"][0, : group.prefix].tolist()
        result.multimodal_tokens[:] = sum(token in backbone.placeholder_ids for token in ids)
        result.text_tokens[:] = (
            group.prefix - result.multimodal_tokens + [_last_begin(places) for places in group.answers]
        )
        branches = [_branches(tree, shared.prefix.device) for tree in trees]
        for layer, index, states in shared.run(branches, insert_layers):
            answers[index].judge(shared, states, result, insert_layers.index(layer))
        return result

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
class _Answers:
    """The A labelled tokens of a pack.

    `owner` (A,) is each one's prompt in the group, `node` (A,) the place in the tree that predicts it, and
    `target` (A,) its id.
    """

    owner: NDArray[np.int64]
    node: torch.Tensor
    target: torch.Tensor

    @classmethod
    def of(cls, group: GroupPrompts, run: Sequence[int], tree: TokenTree) -> _Answers:
        labelled = [
            (owner, path[place - 1], group.texts[owner][place])
            for owner, path in zip(run, tree.paths, strict=True)
            for place in group.answers[owner]
        ]
        owner, node, target = np.array(labelled, dtype=np.int64).T
        device = group.inputs["input_ids"].device
        return cls(owner, torch.from_numpy(node).to(device), torch.from_numpy(target).to(device))

    def judge(self, shared: SharedPrefix, states: torch.Tensor, result: GroupResult, column: int) -> None:
        """Fill `column` of the owners from the final hidden states (R, D) of the tree."""
        losses, best = [], []
        for node, target in zip(self.node.split(HEAD_ROWS), self.target.split(HEAD_ROWS), strict=True):
            logits = shared.logits(states[node.to(states.device)])
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses.append(F.cross_entropy(wide, target.to(wide.device), reduction="none").double().cpu())
            best.append(logits.argmax(dim=-1).cpu())
        right = torch.cat(best) == self.target.cpu()
        owners, first, counts = np.unique(self.owner, return_index=True, return_counts=True)
        sums = np.bincount(self.owner, weights=torch.cat(losses).numpy())
        result.losses[owners, column] = sums[owners] / counts
        result.first_tokens[owners, column] = torch.cat(best).numpy()[first]
        result.greedy[owners, column] = np.bincount(self.owner, weights=~right.numpy())[owners] == 0


def _branches(tree: TokenTree, device: torch.device) -> Branches:
    return Branches(*(torch.from_numpy(part).to(device) for part in (tree.ids, tree.depth, tree.seen)))


def _last_begin(places: Sequence[int]) -> int:
    """Where the last run of consecutive `places` begins."""
    return next(place for place in reversed(places) if place - 1 not in places)
