"""A rank's part of the state as one safetensors file, and the reader that fills any slice from any set of files.

Any program that knows safetensors opens the files; docs/formats.md describes the places of their parts. They are
written and read here, tensor by tensor, because the library does neither of two things: write while asking whether to
go on, and report a failing storage as an error (it maps files into memory).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch

from megamask.engine.state.coverage import Rectangle
from megamask.engine.state.index import (
    FORMAT,
    PREFIX_BYTES,
    VERSION,
    StoredPart,
    StoredTensor,
    damaged,
    file_name,
    read_index,
    require,
)
from megamask.engine.state.slices import StoredSlice
from megamask.storage.durable import read_errors
from megamask.storage.plain_files import NotPlainError, open_plain

_READ_BYTES = 1 << 23


def write_slices(
    folder: Path, slices: Sequence[StoredSlice], *, rank: int, gate: Callable[[], None] = lambda: None
) -> str:
    """Write one rank's file. No collective call, so any thread may do it while training goes on.

    Args:
        gate: called before each slice; what it raises ends the writing.

    Returns: the name of the file.
    Raises:
        FileExistsError: the file exists; it is not touched.
        OSError: the storage refused.
    """
    name = file_name(rank)
    with (folder / name).open("xb") as file:
        file.write(header_of([(each.name, each.shape, each.offsets, tuple(each.data.shape)) for each in slices]))
        for each in slices:
            gate()
            # one slice at a time is copied beside the state, and only where it is not on the host already
            file.write(each.data.detach().cpu().contiguous().numpy().data.cast("B"))
    return name


def header_of(parts: Sequence[tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]]) -> bytes:
    """Return length and header, padded with spaces so that the data is aligned to 8 bytes.

    Args:
        parts: name and shape of the complete tensor, offsets and sizes of the rectangle, in the order of the data.
    """
    places = {"format": FORMAT, "version": str(VERSION)}
    entries: dict[str, object] = {}
    counts: dict[str, int] = {}
    end = 0
    for name, shape, offsets, sizes in parts:
        number = counts.setdefault(name, 0)
        counts[name] += 1
        key, begin, end = f"{name}#{number}", end, end + 4 * math.prod(sizes)
        entries[key] = {"dtype": "F32", "shape": list(sizes), "data_offsets": [begin, end]}
        places[key] = json.dumps({"offsets": offsets, "shape": shape}, separators=(",", ":"))
    text = json.dumps({"__metadata__": places, **entries}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(PREFIX_BYTES + len(text)) % 8)
    return len(text).to_bytes(PREFIX_BYTES, "little") + text


@dataclass(frozen=True)
class _Copy:
    """Rectangle to copy from a stored part to a slice: the one that both contain."""

    part: StoredPart
    target: StoredSlice
    common: Rectangle


class StateReader:
    """Reads tensors of a folder, without a process group.

    Args:
        index: what `read_index` returned for the folder, maybe on another rank; None to read the headers here.

    Raises:
        CheckpointIntegrityError, UsageError, StorageError: as `read_index`.
    """

    def __init__(self, folder: Path, index: dict[str, StoredTensor] | None = None) -> None:
        self._folder = folder
        self.index = read_index(folder) if index is None else index

    @torch.no_grad()
    def read(self, slices: Sequence[StoredSlice]) -> None:
        """Fill the slices' tensors from the stored ones, however those were cut.

        Raises:
            CheckpointIntegrityError: a tensor is missing or has another shape, or a file is shorter than its header
                states.
            StorageError: the storage does not let it be read.
        """
        require(self._folder, self.index, {each.name: each.shape for each in slices})
        copies: dict[str, list[_Copy]] = {}
        for each in slices:
            for copy in _copies(self.index[each.name], each):
                copies.setdefault(copy.part.file, []).append(copy)
        for name, of_file in copies.items():
            path = self._folder / name
            try:
                with read_errors(path), os.fdopen(open_plain(path), "rb", buffering=0) as file:
                    for copy in sorted(of_file, key=lambda copy: copy.part.start):
                        _fill(file, copy)
            except (OSError, NotPlainError, EOFError) as error:
                raise damaged(self._folder, f"{name}: {error}") from error


def _copies(stored: StoredTensor, target: StoredSlice) -> Iterator[_Copy]:
    wanted = target.rectangle
    for part in stored.parts:
        ends = [
            min(a + b, c + d)
            for a, b, c, d in zip(
                part.rectangle.offsets, part.rectangle.sizes, wanted.offsets, wanted.sizes, strict=True
            )
        ]
        begins = tuple(map(max, part.rectangle.offsets, wanted.offsets))
        sizes = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
        if min(sizes) > 0:
            yield _Copy(part, target, Rectangle(offsets=begins, sizes=sizes))


def _fill(file: FileIO, copy: _Copy) -> None:
    """Read full rows of the stored part, some MiB at a time, and copy the common columns of each."""
    stored = copy.part.rectangle
    row_shape = stored.sizes[1:]
    row_bytes = 4 * math.prod(row_shape)
    first, stop = copy.common.rows
    step = max(1, _READ_BYTES // row_bytes)
    for row in range(first, stop, step):
        num_rows = min(step, stop - row)
        buffer = bytearray(num_rows * row_bytes)
        file.seek(copy.part.start + (row - stored.offsets[0]) * row_bytes)
        _read_exactly(file, memoryview(buffer))
        rows = torch.frombuffer(buffer, dtype=torch.float32).view(num_rows, *row_shape)
        if row_shape:
            begin = copy.common.offsets[1] - stored.offsets[1]
            rows = rows[:, begin : begin + copy.common.sizes[1]]
        # where these rows belong in the slice's own coordinates
        at = [begin - offset for begin, offset in zip(copy.common.offsets, copy.target.offsets, strict=True)]
        at[0] += row - first
        copy.target.data[tuple(slice(begin, begin + size) for begin, size in zip(at, rows.shape, strict=True))] = rows


def _read_exactly(file: FileIO, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        if not (count := file.readinto(buffer[done:])):
            raise EOFError("the file ends within a tensor")
        done += count
