"""The processes of one command, as `torchrun` and `accelerate launch` describe them in the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Processes:
    """The place of this process among those that were launched together.

    `rank` counts over all machines from 0 to `world_size - 1`; `local_rank` counts on this machine and is
    None if no launcher has set it.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None

    @classmethod
    def from_environment(cls) -> Processes:
        """Read `RANK`, `WORLD_SIZE` and `LOCAL_RANK`; without a launcher this process is the only one.

        Raises:
            ValueError: a variable is not a whole number.
        """
        local_rank = os.environ.get("LOCAL_RANK")
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            world_size=int(os.environ.get("WORLD_SIZE", 1)),
            local_rank=None if local_rank is None else int(local_rank),
        )

    @property
    def is_first(self) -> bool:
        """Whether this process writes what the processes write once, such as results."""
        return self.rank == 0

    def cuda_device(self, device_count: int | None = None) -> str:
        """Return the device string of this process's GPU, such as `"cuda:1"`.

        With `device_count`, processes beyond the machine's GPUs share them in turn.
        """
        index = self.local_rank or 0
        return f"cuda:{index if device_count is None else index % device_count}"
