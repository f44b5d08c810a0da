"""The names of a reward table's prompts: keys of their content, ids, sources, and what they share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import pyarrow as pa

from deepinsert.envs.prompts import Prompt

from .keys import IntArray, digest, group_key, prompt_keys


@dataclass(frozen=True)
class PromptNames:
    """The names of P prompts: P strings per field.

    Attributes:
        prompt_key: 16 hex digits of the prompt's content.
        prompt_id: its id in the data set.
        source: its source in the data set.
        image_key: equal for prompts about the same images.
        group_key: equal for prompts that are computed together; empty for losses without known groups.
    """

    prompt_key: list[str]
    prompt_id: list[str]
    source: list[str]
    image_key: list[str]
    group_key: list[str]

    @classmethod
    def of_prompts(
        cls, prompts: Sequence[Prompt], groups: Sequence[IntArray], batch_tokens: int
    ) -> PromptNames:
        """Return the names of prompts that are computed in `groups`, each the indices of its prompts."""
        keys = prompt_keys(prompts)
        group_keys = [""] * len(prompts)
        for group in groups:
            key = group_key([keys[index] for index in group], batch_tokens)
            for index in group:
                group_keys[index] = key
        return cls(
            keys,
            [prompt.id for prompt in prompts],
            [prompt.source for prompt in prompts],
            [prompt.image_key for prompt in prompts],
            group_keys,
        )

    @classmethod
    def of_losses(
        cls,
        count: int,
        *,
        prompt_keys: Sequence[str] | None = None,
        prompt_ids: Sequence[str] | None = None,
        sources: Sequence[str] | None = None,
        image_keys: Sequence[str] | None = None,
    ) -> PromptNames:
        """Return the names of `count` prompts whose losses come from elsewhere; all are optional.

        Args:
            count: the number of prompts.
            prompt_keys: keys of their contents; by default digests of image keys and ids.
            prompt_ids: their ids; by default "0", "1", and so on.
            sources: their sources; by default empty.
            image_keys: equal for prompts about the same images; by default each prompt has its own.

        Raises:
            ValueError: if one of them has another length.
        """
        numbers = [str(index) for index in range(count)]
        ids = _checked("prompt_ids", prompt_ids, numbers)
        images = _checked("image_keys", image_keys, numbers)
        keys = [digest([image, name]) for image, name in zip(images, ids, strict=True)]
        return cls(
            _checked("prompt_keys", prompt_keys, keys),
            ids,
            _checked("sources", sources, [""] * count),
            images,
            [""] * count,
        )

    @classmethod
    def of_lists(cls, lists: Iterable[pa.Table]) -> PromptNames:
        """Join the prompts of data sets in their order; a prompt key that came before is left out."""
        joined: dict[str, list[str]] = {field.name: [] for field in fields(cls)}
        earlier_keys: set[str] = set()
        for prompts in lists:
            keys = prompts["prompt_key"].to_pylist()
            rows = [row for row, key in enumerate(keys) if key not in earlier_keys]
            for name, values in joined.items():
                column = prompts[name].to_pylist()
                values.extend(column[row] for row in rows)
            earlier_keys.update(keys)
        return cls(**joined)

    def __len__(self) -> int:
        return len(self.prompt_key)

    def take(self, rows: Iterable[int]) -> PromptNames:
        """Return the names of some prompts."""
        rows = list(rows)
        return PromptNames(*([values[row] for row in rows] for values in self.columns().values()))

    def columns(self) -> dict[str, list[str]]:
        """Return the names as the columns of a data set's list and of a shard."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _checked(name: str, values: Sequence[str] | None, default: list[str]) -> list[str]:
    if values is None:
        return default
    if len(values) != len(default):
        raise ValueError(f"{name}: {len(values)} values for {len(default)} prompts")
    return [str(value) for value in values]
