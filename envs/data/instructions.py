"""Instruction data in LLaVA's JSON, as records of questions and answers.

The files come from strangers: whatever they hold, loading ends in usable records or in a `DatasetError` that
names file, record and field.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, overload

from .llava_json import ROLES, Draft, read_drafts
from .media import DatasetError, check_image

IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Turn:
    """One question and its answer. `question` keeps its `<image>` marks."""

    question: str
    answer: str


@dataclass(frozen=True)
class Record:
    """One conversation, about the images it names (none, one or several)."""

    id: str
    images: tuple[str, ...]
    """Paths below the image root, in the order in which `<image>` marks stand for them."""
    turns: tuple[Turn, ...]
    source: str
    """First folder of the first image's path ("coco"), "." for an image in no folder, "text" for no image."""
    index: int
    """Position in the file, from 0."""

    @property
    def image_key(self) -> str:
        """What `split_by_image` keeps together: the images' paths, one a line; the id where there is none."""
        return "\n".join(self.images) or self.id


@dataclass(frozen=True)
class Skipped:
    """A record that was left out, and why."""

    id: str
    index: int
    field: str
    reason: str


class InstructionData(Sequence[Record]):
    """The records of a file that are used, in the file's order.

    `root` is the folder image paths are relative to, `skipped` lists what was left out, `notes` counts by
    description what was mended ("leading gpt turn dropped").
    """

    def __init__(
        self,
        records: Sequence[Record],
        root: Path,
        path: Path,
        skipped: Sequence[Skipped] = (),
        notes: dict[str, int] | None = None,
    ) -> None:
        self._records = tuple(records)
        self.root = Path(root)
        self.path = Path(path)
        self.skipped = list(skipped)
        self.notes = dict(notes or {})

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Record, ...]: ...
    def __getitem__(self, index: int | slice) -> Record | tuple[Record, ...]:
        return self._records[index]

    def __repr__(self) -> str:
        return f"InstructionData({len(self)} records of {str(self.path)!r}, {len(self.skipped)} skipped)"

    def subset(self, indices: Sequence[int]) -> InstructionData:
        """The records at these positions, with the same root."""
        return InstructionData([self._records[i] for i in indices], self.root, self.path)


def load_instructions(
    path: str | Path,
    image_root: str | Path | None = None,
    *,
    sources: Sequence[str] | None = None,
    fraction: float = 1.0,
    seed: int = 0,
    max_bad: float = 0.005,
) -> InstructionData:
    """Records of a LLaVA instruction file (a JSON list, or one object a line in `.jsonl`).

    `image_root` defaults to the file's folder. `sources` keeps records by the first folder of their first
    image ("coco", or a longer prefix "coco/train2017"), "text" those without one. `fraction` then keeps that
    share of them, image by image with all records about it (the last image may be cut): chosen by `seed` and
    content, so that neither the file's order nor other images matter, and 0.1 is part of 0.2.

    `image` may be missing, null, a path or a list of paths; `<image>` in a question stands for the next one
    (all come before the first question where none is written; without images the mark is plain text). A
    leading gpt turn and a trailing human turn are dropped and counted in `notes`. Kept records whose images
    are missing, broken or outside `image_root`, or whose turns do not alternate, are left out and listed in
    `skipped`; only the header of each image is read.

    Raises `DatasetError` when more than the share `max_bad` of the kept records is left out, when nothing is
    left, when a source does not exist, and for every fault of structure; `ValueError` for a `fraction`
    or `max_bad` out of range.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction!r} must be above 0 and at most 1")
    if not 0 <= max_bad <= 1:
        raise ValueError(f"max_bad {max_bad!r} must be between 0 and 1")
    if not root.is_dir():
        raise DatasetError(f"image root {str(root)!r} is not a folder; name it with --image-root")

    drafts = _of_sources(path, read_drafts(path), sources)
    drafts = _fraction_of(drafts, fraction, seed)

    notes: Counter[str] = Counter()
    skipped: list[Skipped] = []
    records: list[Record] = []
    checked: dict[str, str | None] = {}
    for draft in drafts:
        record = _usable(draft, root, checked, notes)
        if isinstance(record, Record):
            records.append(record)
        else:
            skipped.append(record)
    _refuse_too_many(path, skipped, len(drafts), max_bad)
    if not records:
        raise DatasetError(f"{path}: no record is left; check the file, --sources, --fraction and --max-bad")
    return InstructionData(records, root, path, skipped, dict(notes))


class HasImageKey(Protocol):
    @property
    def image_key(self) -> str: ...


T = TypeVar("T", bound=HasImageKey)


def split_by_image(
    items: Sequence[T], held_out: float = 0.25, seed: int = 0
) -> tuple[Sequence[T], Sequence[T]]:
    """Divide records or prompts into (train, held out) so that no image is on both sides.

    Items that share an image, directly or through others, stay together (`image_key`: one path a line; an
    item without images goes by its id). About the share `held_out` of the items is held out, never more
    than the share unless one group alone exceeds it; groups are drawn by `seed` whatever the order of
    `items`. Both sides hold something where there are at least two groups and 0 < held_out < 1. An
    `InstructionData` gives two `InstructionData`, anything else two lists in the order of `items`.
    """
    if not 0 <= held_out <= 1:
        raise ValueError(f"held_out {held_out!r} must be between 0 and 1")
    groups = sorted(_connected(items).items(), key=lambda group: (_digest(seed, group[0]), group[0]))
    target = round(held_out * len(items))
    if 0 < held_out < 1 and len(groups) > 1:
        target = min(max(target, 1), len(items) - 1)
    chosen: set[int] = set()
    for _, members in groups:
        if len(chosen) + len(members) <= target:
            chosen.update(members)
    if not chosen and target and len(groups) > 1:
        chosen.update(min(groups, key=lambda group: len(group[1]))[1])
    train = [index for index in range(len(items)) if index not in chosen]
    held = sorted(chosen)
    if isinstance(items, InstructionData):
        return items.subset(train), items.subset(held)  # type: ignore[return-value]
    return [items[index] for index in train], [items[index] for index in held]


def _connected(items: Sequence[HasImageKey]) -> dict[str, list[int]]:
    """Positions of the items of each connected component, by the component's smallest image path or id."""
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    keys = [item.image_key.split("\n") for item in items]
    for first, *others in keys:
        for other in others:
            low, high = sorted((find(first), find(other)))
            parent[high] = low
    groups: dict[str, list[int]] = {}
    for index, (first, *_) in enumerate(keys):
        groups.setdefault(find(first), []).append(index)
    return groups


def _of_sources(path: Path, drafts: list[Draft], sources: Sequence[str] | None) -> list[Draft]:
    if sources is None:
        return drafts
    kept: dict[int, Draft] = {}
    for source in sources:
        prefix = source.rstrip("/") + "/"
        found = [
            draft
            for draft in drafts
            if draft.source == source or (draft.images and draft.images[0].startswith(prefix))
        ]
        if not found:
            counts = Counter(draft.source[:40] for draft in drafts)
            there = ", ".join(f"{name} ({count})" for name, count in counts.most_common(20)) or "none"
            raise DatasetError(f"{path}: no record of source {source!r}; the sources are: {there}")
        kept.update((draft.index, draft) for draft in found)
    return [kept[index] for index in sorted(kept)]


def _fraction_of(drafts: list[Draft], fraction: float, seed: int) -> list[Draft]:
    if fraction == 1 or not drafts:
        return drafts
    count = max(1, round(fraction * len(drafts)))
    content = {draft.index: repr((draft.id, draft.images, draft.said)) for draft in drafts}

    def rank(draft: Draft) -> tuple[bytes, bytes, int]:
        own = content[draft.index]
        image = repr(draft.images) if draft.images else own
        return _digest(seed, image), _digest(seed, own), draft.index

    ranked = sorted(drafts, key=rank)
    return sorted(ranked[:count], key=lambda draft: draft.index)


def _usable(
    draft: Draft, root: Path, checked: dict[str, str | None], notes: Counter[str]
) -> Record | Skipped:
    """The record, or why it has to be left out. `checked` remembers images' faults (None: in order)."""
    said = draft.said
    mended = []
    if said and said[0][0] == "gpt":
        said = said[1:]
        mended.append("leading gpt turn dropped")
    if said and said[-1][0] == "human":
        said = said[:-1]
        mended.append("trailing human turn dropped")
    if any(role != ROLES[position % 2] for position, (role, _) in enumerate(said)):
        return _skip(draft, "conversations", "human and gpt turns do not alternate")
    if not said:
        return _skip(draft, "conversations", "no question with an answer")
    turns = tuple(Turn(said[i][1], said[i + 1][1]) for i in range(0, len(said), 2))

    if draft.images:
        marks = sum(turn.question.count(IMAGE_MARK) for turn in turns)
        if marks == 0:
            mended.append("images without an <image> mark put before the first question")
        elif marks != len(draft.images):
            return _skip(draft, "image", f"{marks} {IMAGE_MARK} marks for {len(draft.images)} images")
    for image in draft.images:
        if image not in checked:
            checked[image] = _fault(root, image)
        if (fault := checked[image]) is not None:
            return _skip(draft, "image", fault)
    notes.update(mended)
    return Record(draft.id, draft.images, turns, draft.source, draft.index)


def _skip(draft: Draft, field: str, reason: str) -> Skipped:
    return Skipped(draft.id, draft.index, field, reason)


def _fault(root: Path, image: str) -> str | None:
    try:
        check_image(root, image)
    except DatasetError as error:
        return str(error)
    return None


def _refuse_too_many(path: Path, skipped: list[Skipped], total: int, max_bad: float) -> None:
    if len(skipped) <= max_bad * total:
        return
    first = skipped[0]
    raise DatasetError(
        f"{path}, record {first.index} (id {first.id!r}), field {first.field!r}: {first.reason}. "
        f"{len(skipped)} of {total} records cannot be used, more than the {max_bad:.3%} allowed: "
        "check --image-root, mend the data, or raise --max-bad"
    )


def _digest(seed: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}\n{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
