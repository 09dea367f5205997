"""The torch_dist format (torch.distributed.checkpoint): written in this process, read without trusting its pickle.

megatron-core's writer forks processes and lets a spawned manager import the main program again. Ours calls torch's own
file-system writer from the caller's thread: no process, no thread, no file that names a path or a random number.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

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

from megamask.engine.index_pickle import IndexProblem, read_index
from megamask.errors import CheckpointIntegrityError
from megamask.storage.durable import read_errors
from megamask.storage.plain_files import NotPlainError, open_plain, read_plain

METADATA_NAME = ".metadata"
IndexPart = tuple[SavePlan, list[WriteResult]]  # what one rank wrote, in the format's words
# Far beyond the index of any state: about 100 bytes for each part of each tensor.
_MOST_INDEX_BYTES = 1 << 30
_ARCHIVE_BEGINS = b"PK\x03\x04"


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
        CheckpointIntegrityError: the index is missing, names what it may not, points outside, or is no index.
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
                self._check_archives(items)
                self._reader.read_data(plan, _LoadPlanner(pieces, plan)).wait()
        except (  # whatever torch makes of bytes that are no tensor of the stated shape
            OSError,
            RuntimeError,
            AssertionError,
            LookupError,
            ValueError,
            TypeError,
            AttributeError,
            EOFError,
            zipfile.BadZipFile,
            pickle.UnpicklingError,
        ) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from error

    def _check_archives(self, items: Sequence[ReadItem]) -> None:
        infos = {item.storage_index: self._metadata.storage_data[item.storage_index] for item in items}
        for info in infos.values():
            with os.fdopen(open_plain(self._folder / info.relative_path), "rb") as file:
                _check_archive(cast(IO[bytes], _Part(file, info.offset, info.length)), info)

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


def _read_metadata(folder: Path) -> Metadata:
    """The index of a folder's state; each part that it names lies inside a plain file of the folder."""
    path = folder / METADATA_NAME
    try:
        with read_errors(path):
            metadata = read_index(read_plain(path, _MOST_INDEX_BYTES))
            sizes = {info.relative_path: 0 for info in metadata.storage_data.values()}
            for name in sizes:
                with os.fdopen(open_plain(folder / name), "rb") as file:
                    sizes[name] = os.fstat(file.fileno()).st_size
        for info in metadata.storage_data.values():
            if info.offset + info.length > sizes[info.relative_path]:
                raise IndexProblem(
                    f"a part ends at byte {info.offset + info.length} of {info.relative_path}, which has "
                    f"{sizes[info.relative_path]}"
                )
    except (OSError, NotPlainError, IndexProblem) as error:
        raise CheckpointIntegrityError(
            f"{path} is no index of a state: {error}. Nothing was loaded from it.",
            hint="choose another checkpoint",
        ) from error
    return metadata


class _Part(io.RawIOBase):
    """A range of a file, to be read and sought in like a file."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Goes to a place of the range; nothing before its beginning is reached."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        """The place in the range."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Reads on to the end of the range."""
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._offset + self._at)
        piece = self._file.read(len(view))
        view[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def _check_archive(part: IO[bytes], info: Any) -> None:
    """A stored tensor is a zip archive without compression: what it unpacks to is no larger than what it takes.

    Raises:
        BadZipFile, IndexProblem: it is not.
    """
    if part.read(len(_ARCHIVE_BEGINS)) != _ARCHIVE_BEGINS:  # torch would take it for another, older format
        raise IndexProblem(f"the part at byte {info.offset} of {info.relative_path} is no archive")
    with zipfile.ZipFile(part) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise IndexProblem(f"the part at byte {info.offset} of {info.relative_path} is compressed")
    if sum(member.file_size for member in members) > info.length:
        raise IndexProblem(f"the part at byte {info.offset} of {info.relative_path} is larger than its place")
