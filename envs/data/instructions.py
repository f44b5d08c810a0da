"""Loads instruction data in LLaVA's JSON as records of questions and answers, and splits it by image.

The files are not trusted: whatever they hold, loading ends in usable records or in a `DatasetError` that
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
"""Text in a question that stands for the record's next image."""


@dataclass(frozen=True)
class Turn:
    """One question and its answer. `question` keeps its `<image>` marks."""

    question: str
    answer: str


@dataclass(frozen=True)
class Record:
    """One conversation about no, one or several images."""

    id: str
    images: tuple[str, ...]
    """Paths below the image root, in the order of the `<image>` marks."""
    turns: tuple[Turn, ...]
    source: str
    """First folder of the first image's path ("coco"), "." for an image in no folder, "text" for no image."""
    index: int
    """Position in the file, from 0."""

    @property
    def image_key(self) -> str:
        """Key by which `split_by_image` groups: the images' paths, one per line, or the id without images."""
        return "\n".join(self.images) or self.id


@dataclass(frozen=True)
class Skipped:
    """A record that was left out, the field at fault, and the reason."""

    id: str
    index: int
    field: str
    reason: str


class InstructionData(Sequence[Record]):
    """The usable records of a data file, in the file's order.

    Args:
        records: The usable records.
        root: Folder that image paths are relative to.
        path: The data file.
        skipped: The records that were left out.
        notes: Number of repairs by description ("leading gpt turn dropped").
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
    """Load the records of a LLaVA instruction file (a JSON list, or one object per line in `.jsonl`).

    `image` may be missing, null, a path or a list of paths. Each `<image>` in a question stands for the next
    image. Without such marks, all images come before the first question; without images, the mark is plain
    text. A leading gpt turn and a trailing human turn are dropped and counted in `notes`. A selected record
    is left out and listed in `skipped` where an image is missing, broken or outside `image_root`, or where
    turns do not alternate. Only the header of each image is read.

    Args:
        path: The instruction file.
        image_root: Folder that image paths are relative to; by default the file's folder.
        sources: Select records by the first folder of their first image ("coco", or a longer prefix such as
            "coco/train2017"); "text" selects records without images.
        fraction: Share of these records to select, in (0, 1]. Images are taken one by one with all their
            records (the last image may be cut). The choice depends on `seed` and content alone, not on the
            file's order or on other images, and the records of 0.1 are among those of 0.2.
        seed: Seed of that choice.
        max_bad: Largest share of the selected records that may be left out, in [0, 1].

    Raises:
        DatasetError: More than `max_bad` of the records are left out, none remains, a source does not exist,
            or the file's structure is faulty.
        ValueError: `fraction` or `max_bad` is out of range.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction!r} must be above 0 and at most 1")
    if not 0 <= max_bad <= 1:
        raise ValueError(f"max_bad {max_bad!r} must be between 0 and 1")
    if not root.is_dir():
        raise DatasetError(f"image root {str(root)!r} is not a folder; set it with --image-root")

    drafts = _from_sources(path, read_drafts(path), sources)
    drafts = _sample(drafts, fraction, seed)

    notes: Counter[str] = Counter()
    skipped: list[Skipped] = []
    records: list[Record] = []
    faults: dict[str, str | None] = {}
    for draft in drafts:
        record = _finish(draft, root, faults, notes)
        if isinstance(record, Record):
            records.append(record)
        else:
            skipped.append(record)
    _refuse_too_many(path, skipped, len(drafts), max_bad)
    if not records:
        raise DatasetError(f"{path}: no record remains; check the file, --sources, --fraction and --max-bad")
    return InstructionData(records, root, path, skipped, dict(notes))


class HasImageKey(Protocol):
    """A record or prompt whose images identify it in a split."""

    @property
    def image_key(self) -> str:
        """The images' paths, one per line, or an id without images."""
        ...


T = TypeVar("T", bound=HasImageKey)


@overload
def split_by_image(
    items: InstructionData, held_out: float = 0.25, seed: int = 0
) -> tuple[InstructionData, InstructionData]: ...
@overload
def split_by_image(
    items: Sequence[T], held_out: float = 0.25, seed: int = 0
) -> tuple[Sequence[T], Sequence[T]]: ...
def split_by_image(
    items: InstructionData | Sequence[T], held_out: float = 0.25, seed: int = 0
) -> tuple[InstructionData, InstructionData] | tuple[Sequence[T], Sequence[T]]:
    """Divide records or prompts into (train, held out) so that no image is on both sides.

    Items that share an image, directly or through other items, stay together. About the share `held_out` of
    the items is held out, and never more unless a single group exceeds it. Groups are drawn by `seed`,
    whatever the order of `items`. Neither side is empty where there are at least two groups and
    0 < held_out < 1. An `InstructionData` gives two `InstructionData`; other sequences give two lists in the
    order of `items`.

    Raises `ValueError` for a `held_out` outside [0, 1].
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
    train_indices = [index for index in range(len(items)) if index not in chosen]
    held_out_indices = sorted(chosen)
    if isinstance(items, InstructionData):
        return items.subset(train_indices), items.subset(held_out_indices)
    return [items[index] for index in train_indices], [items[index] for index in held_out_indices]


def _connected(items: Sequence[HasImageKey]) -> dict[str, list[int]]:
    """Group the positions of items that share images (union-find over image paths).

    Each group's key is its smallest image path, or the id of an item without images.
    """
    parent: dict[str, str] = {}

    def root_of(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    keys = [item.image_key.split("\n") for item in items]
    for first, *others in keys:
        for other in others:
            low, high = sorted((root_of(first), root_of(other)))
            parent[high] = low
    groups: dict[str, list[int]] = {}
    for index, (first, *_) in enumerate(keys):
        groups.setdefault(root_of(first), []).append(index)
    return groups


def _from_sources(path: Path, drafts: list[Draft], sources: Sequence[str] | None) -> list[Draft]:
    """The drafts of the named sources in the file's order; `DatasetError` for a source without any."""
    if sources is None:
        return drafts
    selected: dict[int, Draft] = {}
    for source in sources:
        prefix = source.rstrip("/") + "/"
        matches = [
            draft
            for draft in drafts
            if draft.source == source or (draft.images and draft.images[0].startswith(prefix))
        ]
        if not matches:
            counts = Counter(draft.source[:40] for draft in drafts)
            names = ", ".join(f"{name} ({count})" for name, count in counts.most_common(20)) or "none"
            raise DatasetError(f"{path}: no record of source {source!r}; the sources are: {names}")
        selected.update((draft.index, draft) for draft in matches)
    return [selected[index] for index in sorted(selected)]


def _sample(drafts: list[Draft], fraction: float, seed: int) -> list[Draft]:
    """The share `fraction` of the drafts, drawn image by image by a seeded hash of content."""
    if fraction == 1 or not drafts:
        return drafts
    count = max(1, round(fraction * len(drafts)))

    def rank(draft: Draft) -> tuple[bytes, bytes, int]:
        content = repr((draft.id, draft.images, draft.turns))
        image = repr(draft.images) if draft.images else content
        return _digest(seed, image), _digest(seed, content), draft.index

    return sorted(sorted(drafts, key=rank)[:count], key=lambda draft: draft.index)


def _finish(draft: Draft, root: Path, faults: dict[str, str | None], notes: Counter[str]) -> Record | Skipped:
    """The record of a draft, or the reason to leave it out.

    `faults` caches the fault of each image (None for a usable one); `notes` counts repairs.
    """
    turns, repairs = _trim(draft.turns)
    roles = tuple(role for role, _ in turns)
    if roles != ROLES * (len(turns) // 2):
        return _skip(draft, "conversations", "human and gpt turns do not alternate")
    if not turns:
        return _skip(draft, "conversations", "no question with an answer")
    texts = [text for _, text in turns]
    pairs = tuple(Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=True))

    if draft.images:
        marks = sum(pair.question.count(IMAGE_MARK) for pair in pairs)
        if marks == 0:
            repairs.append("images without an <image> mark put before the first question")
        elif marks != len(draft.images):
            return _skip(draft, "image", f"{marks} {IMAGE_MARK} marks for {len(draft.images)} images")
    for image in draft.images:
        if image not in faults:
            faults[image] = _image_fault(root, image)
        if (fault := faults[image]) is not None:
            return _skip(draft, "image", fault)
    notes.update(repairs)
    return Record(draft.id, draft.images, pairs, draft.source, draft.index)


def _trim(turns: tuple[tuple[str, str], ...]) -> tuple[tuple[tuple[str, str], ...], list[str]]:
    """The turns from the first question to the last answer, and a note for each turn dropped."""
    repairs = []
    if turns and turns[0][0] == "gpt":
        turns = turns[1:]
        repairs.append("leading gpt turn dropped")
    if turns and turns[-1][0] == "human":
        turns = turns[:-1]
        repairs.append("trailing human turn dropped")
    return turns, repairs


def _skip(draft: Draft, field: str, reason: str) -> Skipped:
    return Skipped(draft.id, draft.index, field, reason)


def _image_fault(root: Path, image: str) -> str | None:
    """The reason why an image cannot be used, or None."""
    try:
        check_image(root, image)
    except DatasetError as error:
        return str(error)
    return None


def _refuse_too_many(path: Path, skipped: list[Skipped], total: int, max_bad: float) -> None:
    """Raise `DatasetError` where more than the share `max_bad` of `total` records is left out."""
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
