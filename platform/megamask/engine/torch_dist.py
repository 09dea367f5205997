"""The torch_dist format (torch.distributed.checkpoint): written in this process, read without trusting its pickle.

megatron-core's writer forks processes and lets a spawned manager import the main program again. Ours calls torch's own
file-system writer from the caller's thread: no process, no thread, no file that names a path or a random number.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from megamask.errors import CheckpointIntegrityError
from megamask.storage.durable import read_errors

METADATA_NAME = ".metadata"
IndexPart = tuple[SavePlan, list[WriteResult]]  # what one rank wrote, in the format's words
_FILE_NAME = re.compile(r"__\d+_\d+\.distcp")

# Everything that the pickle of a Metadata object refers to; any other name in it is refused before it is imported.
_CHECKPOINT = "torch.distributed.checkpoint."
_ALLOWED = {
    (_CHECKPOINT + "metadata", "Metadata"),
    (_CHECKPOINT + "metadata", "TensorStorageMetadata"),
    (_CHECKPOINT + "metadata", "TensorProperties"),
    (_CHECKPOINT + "metadata", "ChunkStorageMetadata"),
    (_CHECKPOINT + "metadata", "MetadataIndex"),
    (_CHECKPOINT + "metadata", "_MEM_FORMAT_ENCODING"),
    (_CHECKPOINT + "filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch", "float32"),
    ("torch.serialization", "_get_layout"),
}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A rectangle of a stored tensor, held by this rank.

    Args:
        name: of the stored tensor.
        shape: of the whole stored tensor.
        offsets: where the rectangle begins.
        data: float32, the rectangle; written from or read into.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    data: torch.Tensor

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """The rectangle in the format's words."""
        return ChunkStorageMetadata(offsets=torch.Size(self.offsets), sizes=self.data.size())


class _SavePlanner(DefaultSavePlanner):
    """Writes a list of pieces, and asks before each whether to go on."""

    def __init__(self, pieces: Sequence[Piece], gate: Callable[[], None] = lambda: None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._gate = gate
        self._data = {(piece.name, piece.offsets): piece.data for piece in pieces}
        self._items = [_write_item(piece) for piece in pieces]

    def create_local_plan(self) -> SavePlan:
        return SavePlan(self._items)

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        self._gate()
        return self._data[(index.fqn, tuple(index.offset or ()))]


def _write_item(piece: Piece) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(piece.name, piece.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=piece.chunk, properties=TensorProperties(dtype=piece.data.dtype), size=torch.Size(piece.shape)
        ),
    )


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta | None:
        return None  # it would store the absolute path and a random number


class _LoadPlanner(DefaultLoadPlanner):
    """Reads a list of pieces out of whatever rectangles were stored."""

    def __init__(self, pieces: Sequence[Piece], plan: LoadPlan) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._data = {(piece.name, piece.offsets): piece.data for piece in pieces}
        self._plan = plan

    def create_local_plan(self) -> LoadPlan:
        return self._plan

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The tensor that an item of the plan names."""
        return self._data[(index.fqn, tuple(index.offset or ()))]

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise pickle.UnpicklingError("this state holds no objects, only tensors")


def write_pieces(
    folder: Path, pieces: Sequence[Piece], *, rank: int, gate: Callable[[], None] = lambda: None
) -> tuple[list[str], IndexPart]:
    """Writes the pieces of one rank; no collective call, so that any thread may do it while training goes on.

    One tensor at a time is copied beside the pieces: torch stores whole storages.

    Args:
        gate: called before each piece; what it raises ends the writing.

    Returns: the names of the files, and what `write_index` must know of them.
    Raises: OSError, RuntimeError: the storage refused.
    """
    planner, writer = _SavePlanner(pieces, gate), _writer(folder)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    # torch numbers files by a plan's place in the list of all; this rank's place is all that matters here
    plan = writer.prepare_global_plan([plan] * (rank + 1))[-1]
    results = writer.write_data(planner.finish_plan(plan), planner).wait()
    return [f"__{rank}_0.distcp"], (planner.create_local_plan(), results)


def write_index(folder: Path, parts: Sequence[IndexPart]) -> list[str]:
    """Writes the index of all ranks' pieces, which together must be every element of every tensor exactly once.

    Args:
        parts: what each rank's `write_pieces` returned, in rank order.

    Returns: the names of the files.
    Raises: OSError, RuntimeError: the storage refused.
    """
    planner = _SavePlanner([])
    _, metadata = planner.create_global_plan([plan for plan, _ in parts])
    _writer(folder).finish(metadata, [results for _, results in parts])
    return [METADATA_NAME]


def _writer(folder: Path) -> _Writer:
    # per_thread_copy_ahead=0: on a GPU machine torch would copy through a stream of its own, from device 0's default
    writer = _Writer(folder, thread_count=1, sync_files=False, overwrite=False, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(is_coordinator=True)
    return writer


class StateReader:
    """Reads tensors of a folder, without a process group.

    Raises:
        CheckpointIntegrityError: the index is missing, names what it may not, or is no index.
        StorageError: the storage does not let it be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader = FileSystemReader(folder)
        self._metadata = _read_metadata(folder)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=False)

    def read(self, pieces: Sequence[Piece]) -> None:
        """Fills the pieces' tensors from the stored ones, whatever rectangles those were cut into.

        Raises:
            CheckpointIntegrityError: a tensor is missing, has another shape, or lacks elements.
            StorageError: the storage does not let it be read.
        """
        items = [item for piece in pieces for item in self._read_items(piece)]
        plan = LoadPlan(items)
        try:
            with read_errors(self._folder):
                self._reader.read_data(plan, _LoadPlanner(pieces, plan)).wait()
        except (OSError, RuntimeError, AssertionError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from error

    def _read_items(self, piece: Piece) -> list[ReadItem]:
        stored = self._metadata.state_dict_metadata.get(piece.name)
        if not isinstance(stored, TensorStorageMetadata):
            raise self._damaged(f"it has no tensor {piece.name}")
        if tuple(stored.size) != piece.shape or stored.properties.dtype != piece.data.dtype:
            raise self._damaged(
                f"{piece.name} is {stored.properties.dtype} {tuple(stored.size)} there, "
                f"{piece.data.dtype} {piece.shape} here"
            )
        items: list[ReadItem] = create_read_items_for_chunk_list(piece.name, stored, [piece.chunk])
        if sum(math.prod(item.lengths) for item in items) != piece.data.numel():
            raise self._damaged(f"elements of {piece.name} are missing")
        return items

    def _damaged(self, reason: str) -> CheckpointIntegrityError:
        return CheckpointIntegrityError(
            f"the state in {self._folder} cannot be loaded: {reason.splitlines()[0]}",
            hint="choose another checkpoint; `megamask verify checkpoint` tells whether this one is whole",
        )


class _ClosedUnpickler(pickle.Unpickler):
    """Builds the classes of the index and nothing else: a pickle may otherwise name any function and call it."""

    def find_class(self, module: str, name: str) -> Any:
        """A class of the closed list, or a refusal; nothing else is ever looked up."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index does")
        return super().find_class(module, name)


def _read_metadata(folder: Path) -> Metadata:
    path = folder / METADATA_NAME
    try:
        with read_errors(path), path.open("rb") as file:
            metadata = _load_closed(file)
    except (OSError, EOFError, AttributeError, ValueError, TypeError, pickle.UnpicklingError) as error:
        raise CheckpointIntegrityError(
            f"{path} is no index of a state: {error}. Nothing was loaded from it.",
            hint="choose another checkpoint",
        ) from error
    for info in metadata.storage_data.values():
        if not _FILE_NAME.fullmatch(info.relative_path) or info.transform_descriptors:
            raise CheckpointIntegrityError(
                f"{path} names the file {info.relative_path!r}, which no state has. Nothing was loaded from it.",
                hint="choose another checkpoint",
            )
    return metadata


def _load_closed(file: BinaryIO) -> Metadata:
    metadata = _ClosedUnpickler(file).load()
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise pickle.UnpicklingError("it is no index")
    return metadata
