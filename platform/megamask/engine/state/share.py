"""One rank's share of the state on disk, and the check of all ranks' files before the commit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megamask.engine.state.host_copy import HostCopy
from megamask.engine.state.index import read_index, require
from megamask.engine.state.safetensors import write_slices
from megamask.engine.state.slices import StoredSlice, slices_of, stored_shapes
from megamask.errors import CheckpointIntegrityError
from megamask.storage.documents import DocumentKind, encode_document

OPTIMIZER_NAME = "optimizer.json"
OPTIMIZER = DocumentKind(format="megamask-optimizer", version=1, damage=CheckpointIntegrityError)


class Share:
    """All that this rank alone owns of the state. Its methods make no collective call.

    Args:
        slices: what this rank writes.
        shapes: every tensor that all ranks' files must hold together.
    """

    def __init__(
        self, slices: Sequence[StoredSlice], shapes: Mapping[str, tuple[int, ...]], *, num_updates: int, rank: int
    ) -> None:
        self._slices = slices
        self._shapes = shapes
        self._num_updates = num_updates
        self._rank = rank

    def write(self, folder: Path, gate: Callable[[], None] = lambda: None) -> list[str]:
        """Write this rank's files into an existing folder.

        Args:
            gate: called between tensors; what it raises ends the writing.

        Returns: their names, relative to the folder.
        Raises: OSError: the storage refused.
        """
        names = [write_slices(folder, self._slices, rank=self._rank, gate=gate)]
        if self._rank == 0:
            (folder / OPTIMIZER_NAME).write_bytes(encode_document(OPTIMIZER, {"num_updates": self._num_updates}))
            names.append(OPTIMIZER_NAME)
        return names

    def check(self, folder: Path) -> None:
        """Read the headers of all ranks' files as a resume does, after all have written; on one rank.

        Raises:
            CheckpointIntegrityError: the files do not hold every element of every tensor exactly once.
        """
        require(folder, read_index(folder), self._shapes)


def share(optimizer: Any, fp8: Any, *, rank: int, memory: HostCopy | None) -> Share:
    """Return this rank's share of the present state: views of it, or a copy in `memory`.

    Args:
        optimizer: the ShardedAdamW that holds this rank's shards.
        fp8: the Fp8 that holds the state of delayed scaling.
    """
    shards = [shard for shard in optimizer.shards() if shard.info.is_stored]
    if memory is not None:
        shards = memory.take(shards)
    return Share(
        [*slices_of(shards, optimizer.spec), *fp8.slices()],
        stored_shapes(optimizer.spec) | fp8.stored_shapes(),
        num_updates=optimizer.num_updates,
        rank=rank,
    )
