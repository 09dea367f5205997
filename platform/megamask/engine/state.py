"""The sharded state: canonical weights and Adam's moments, each rank writing and reading only its own share.

A checkpoint holds, for each canonical tensor NAME, the tensors `NAME` (float32 weights), `optimizer.exp_avg.NAME` and
`optimizer.exp_avg_sq.NAME`. Names and shapes do not depend on the layout, so any layout loads what any other wrote, and
no rank ever gathers anything (law 8): that is why megatron-core's `fully_reshardable` mapping, which collects the
moments of all data-parallel ranks on one of them and stores the weights twice, is not used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megamask.engine.collectives import Collectives
from megamask.engine.host_memory import HostMemory
from megamask.engine.rectangles import rectangles
from megamask.engine.torch_dist import IndexPart, Piece, StateReader, write_index, write_pieces
from megamask.errors import CheckpointIntegrityError
from megamask.models.shapes import canonical_shapes
from megamask.models.spec import ModelSpec
from megamask.storage.durable import read_errors
from megamask.storage.hashing import canonical_json

if TYPE_CHECKING:
    from megamask.engine.optimizer import Shard

OPTIMIZER_NAME = "optimizer.json"
FORMAT = "megamask-optimizer"
VERSION = 1


class Share:
    """What this rank writes of the state: all that it alone owns. Its methods make no collective call."""

    def __init__(self, pieces: Sequence[Piece], *, num_updates: int, rank: int) -> None:
        self._pieces = pieces
        self._num_updates = num_updates
        self._rank = rank

    def write(self, folder: Path, gate: Callable[[], None] = lambda: None) -> tuple[list[str], IndexPart]:
        """Writes this rank's files into an existing folder.

        Args:
            gate: called between tensors; what it raises ends the writing.

        Returns: their names, relative to the folder, and what `write_index` must know of them.
        Raises: OSError, RuntimeError: the storage refused.
        """
        names, part = write_pieces(folder, self._pieces, rank=self._rank, gate=gate)
        if self._rank == 0:
            document = {"format": FORMAT, "version": VERSION, "num_updates": self._num_updates}
            (folder / OPTIMIZER_NAME).write_bytes(canonical_json(document))
            names = [*names, OPTIMIZER_NAME]
        return names, part

    def write_index(self, folder: Path, parts: Sequence[IndexPart]) -> list[str]:
        """On one rank, after all have written; `parts` in rank order. Returns the names of the files."""
        return write_index(folder, parts)


def share(optimizer: Any, *, rank: int, memory: HostMemory | None) -> Share:
    """This rank's share of the present state: views of it, or a copy in `memory`.

    Args:
        optimizer: the ShardedAdamW that holds this rank's shards.
    """
    shards = [shard for shard in optimizer.shards() if shard.info.is_stored]
    if memory is not None:
        shards = memory.copy(shards)
    return Share(list(_pieces(shards, optimizer.spec)), num_updates=optimizer.num_updates, rank=rank)


def load(folder: Path, optimizer: Any, spec: ModelSpec, collectives: Collectives) -> None:
    """Reads this rank's shards and gathers the others'; collective.

    Raises:
        CheckpointIntegrityError: the folder does not hold the whole state of this network; every rank raises.
    """
    failures: list[BaseException] = []
    try:
        optimizer.num_updates = _read_num_updates(folder / OPTIMIZER_NAME)
        StateReader(folder).read(list(_pieces(optimizer.shards(), spec)))
    except Exception as error:  # noqa: BLE001  raised on every rank
        failures.append(error)
    collectives.raise_alike(failures, CheckpointIntegrityError)
    optimizer.publish_weights()


def read_canonical_weights(folder: Path, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """All weights by canonical name, float32 on the CPU; needs no process group and no megatron-core.

    Raises:
        CheckpointIntegrityError: the folder does not hold the weights of such a network.
    """
    reader, weights = StateReader(folder), dict[str, torch.Tensor]()
    for name, shape in canonical_shapes(spec).items():
        weights[name] = torch.empty(shape, dtype=torch.float32)
        reader.read([Piece(name=name, shape=tuple(shape), offsets=(0,) * len(shape), data=weights[name])])
    return weights


def _pieces(shards: Iterable[Shard], spec: ModelSpec) -> Iterator[Piece]:
    """Views of shards, as rectangles of the canonical tensors."""
    shapes = canonical_shapes(spec)
    for shard in shards:
        info = shard.info
        parts = rectangles(info.canonical, columns=info.num_columns, start=shard.start, stop=shard.stop)
        for part in parts:
            tensors = {"": shard.weight} | {f"optimizer.{name}.": moment for name, moment in shard.moments.items()}
            for prefix, flat in tensors.items():
                yield Piece(
                    name=prefix + part.name,
                    shape=tuple(shapes[part.name]),
                    offsets=part.offsets,
                    data=flat[part.first : part.first + part.num_elements].view(part.sizes),
                )


def _read_num_updates(path: Path) -> int:
    try:
        with read_errors(path):
            document = json.loads(path.read_bytes())
        if document["format"] != FORMAT or document["version"] != VERSION:
            raise ValueError(f"its format is {document['format']} {document['version']}")
        return int(document["num_updates"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointIntegrityError(
            f"{path} cannot be read: {error}. Expected: {FORMAT} version {VERSION}. Nothing was loaded.",
            hint="choose another checkpoint, or the megamask that wrote it",
        ) from error
