"""A copy of this rank's share of the state in host memory, from which it is written while training goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megamask.engine.backend import Backend
    from megamask.engine.optimizer import Shard


class HostCopy:
    """Host memory for one copy of this rank's share, kept from one copy to the next.

    It is as large as the share (12 bytes for each weight that this rank stores) and is allocated at the first copy.
    Fresh pages each time would cost more than the copying.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._buffer = torch.empty(0, dtype=torch.float32)

    def take(self, shards: Sequence[Shard]) -> list[Shard]:
        """Return the shards with copies of their present tensors; the copies of an earlier call are overwritten."""
        tensors = [tensor for shard in shards for tensor in (shard.weight, *shard.moments.values())]
        sizes = [tensor.numel() for tensor in tensors]
        if self._buffer.numel() != sum(sizes):
            self._buffer = torch.empty(sum(sizes), dtype=torch.float32)
            self._backend.pin(self._buffer)
        copies = torch.split(self._buffer, sizes)
        for tensor, copy in zip(tensors, copies, strict=True):
            copy.copy_(tensor, non_blocking=True)
        self._backend.synchronize()
        remaining = iter(copies)
        return [
            dataclasses.replace(
                shard, weight=next(remaining), moments={name: next(remaining) for name in shard.moments}
            )
            for shard in shards
        ]
