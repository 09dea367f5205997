"""Headers of a state's files: where every part of every tensor lies. Plain integers and strings, no torch.

The files are safetensors; docs/formats.md describes what ours add to the format. Their headers are not read by the
library: it maps files into memory, so that a storage that fails ends the process by a signal instead of an error, and
it takes the last of two equal names.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamask.engine.state.coverage import Rectangle, overlap
from megamask.errors import CheckpointIntegrityError, UsageError
from megamask.storage.documents import parse_json
from megamask.storage.durable import read_errors
from megamask.storage.plain_files import NotPlainError, open_plain

FORMAT = "megamask-state"
VERSION = 1
PREFIX_BYTES = 8
# What the safetensors library reads at most. A rank of a large job writes a few hundred KiB.
MAX_HEADER_BYTES = 100_000_000
_FILE_NAME = re.compile(r"state-\d{5,9}\.safetensors")
_KEY = re.compile(r"(.{1,1000})#(?:0|[1-9]\d{0,8})", re.DOTALL)
_ENTRY = {"dtype", "shape", "data_offsets"}
_MAX_ELEMENTS = 1 << 62
# The index of version 0.1.0's states, which is a pickle.
_OLD_INDEX_NAME = ".metadata"


class HeaderError(ValueError):
    """A header that is not that of a state's file."""


def file_name(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"state-{rank:05d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class StoredPart:
    """A rectangle of a tensor and where it is stored, row by row, as little-endian float32.

    Args:
        file: name of the file in the state's folder.
        start: first byte in that file.
    """

    rectangle: Rectangle
    file: str
    start: int


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of the state; its parts are every element exactly once."""

    shape: tuple[int, ...]
    parts: tuple[StoredPart, ...]


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a folder's state, by name.

    Raises:
        CheckpointIntegrityError: a header is damaged, or the files do not hold each element of each tensor once.
        UsageError: version 0.1.0 wrote the state.
        StorageError: the storage does not let a file be read.
    """
    try:
        with read_errors(folder):
            names = sorted(path.name for path in folder.iterdir() if _FILE_NAME.fullmatch(path.name))
            is_old = not names and (folder / _OLD_INDEX_NAME).exists()
    except OSError as error:
        raise damaged(folder, f"the folder cannot be read: {error.strerror}") from error
    if is_old:
        raise old_state(folder)
    if not names:
        raise damaged(folder, f"it has no file {file_name(0)}")
    shapes: dict[str, tuple[int, ...]] = {}
    parts: dict[str, list[StoredPart]] = {}
    for name in names:
        try:
            with read_errors(folder / name):
                header, data_start, size = _read_header(folder / name)
            for tensor, shape, part in _parts(header, name, data_start, size):
                if shapes.setdefault(tensor, shape) != shape:
                    raise HeaderError(f"{tensor} has shape {shape}, in another file {shapes[tensor]}")
                parts.setdefault(tensor, []).append(part)
        except (OSError, NotPlainError, ValueError) as error:
            raise damaged(folder, f"{name}: {error}") from error
    for tensor, shape in shapes.items():
        _refuse_incomplete(folder, tensor, shape, parts[tensor])
    return {tensor: StoredTensor(shape=shape, parts=tuple(parts[tensor])) for tensor, shape in shapes.items()}


def require(folder: Path, index: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse an index that lacks one of these tensors, or has it in another shape.

    Raises:
        CheckpointIntegrityError: names the first such tensor.
    """
    for name, shape in shapes.items():
        if name not in index:
            raise damaged(folder, f"it has no tensor {name}")
        if index[name].shape != tuple(shape):
            raise damaged(folder, f"{name} has shape {index[name].shape} there, {tuple(shape)} here")


def damaged(folder: Path, reason: str) -> CheckpointIntegrityError:
    """Return the error for a state that cannot be loaded."""
    return CheckpointIntegrityError(
        f"the state in {folder} cannot be loaded: {reason}. Nothing was loaded from it.",
        hint="choose another checkpoint; `megamask verify checkpoint` shows which ones are intact",
    )


def is_old_state(names: Iterable[str]) -> bool:
    """Return whether these are the files of a checkpoint that version 0.1.0 wrote."""
    return _OLD_INDEX_NAME in names


def old_state(folder: Path) -> UsageError:
    """Return the error for a state in the format of version 0.1.0."""
    return UsageError(
        f"the state in {folder} was written by megamask 0.1.0 as torch.distributed.checkpoint files, whose index is a "
        "pickle; this version reads safetensors and no pickle. Nothing was loaded.",
        hint="continue, evaluate or sample this run with megamask 0.1.0, or start a new run under another run.name",
    )


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header, the first byte of the data and the size of the file."""
    with os.fdopen(open_plain(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        num_bytes = int.from_bytes(file.read(PREFIX_BYTES), "little")
        if size < PREFIX_BYTES or not 2 <= num_bytes <= min(MAX_HEADER_BYTES, size - PREFIX_BYTES):
            raise HeaderError(f"its header would have {num_bytes} bytes, the file has {size}")
        header = parse_json(file.read(num_bytes))
    if not isinstance(header, dict):
        raise HeaderError("its header is not a JSON object")
    return header, PREFIX_BYTES + num_bytes, size


def _parts(
    header: dict[str, Any], file: str, data_start: int, size: int
) -> Iterable[tuple[str, tuple[int, ...], StoredPart]]:
    """Yield tensor, shape of the tensor and part of each entry; together the entries fill the file."""
    places = header.pop("__metadata__", None)
    stated = [places.pop(key, None) for key in ("format", "version")] if isinstance(places, dict) else None
    if stated != [FORMAT, str(VERSION)]:
        raise HeaderError(f"its format is not {FORMAT} version {VERSION}")
    if places.keys() != header.keys():
        raise HeaderError("its entries are not those of its metadata")
    end = 0
    for key, (begin, stop, sizes) in sorted(
        ((key, _entry(key, value)) for key, value in header.items()), key=lambda item: item[1][:2]
    ):
        if begin != end or stop - begin != 4 * math.prod(sizes):
            raise HeaderError(f"{key} has bytes {begin} to {stop}, which is not where {sizes} float32 numbers belong")
        end = stop
        name, shape, offsets = _place(key, places[key], sizes)
        rectangle = Rectangle(offsets=offsets, sizes=sizes)
        yield name, shape, StoredPart(rectangle=rectangle, file=file, start=data_start + begin)
    if data_start + end != size:
        raise HeaderError(f"it has {size} bytes, its header describes {data_start + end}")


def _entry(key: str, value: Any) -> tuple[int, int, tuple[int, ...]]:
    """Return first byte, byte after the last and sizes of an entry."""
    if not isinstance(value, dict) or value.keys() != _ENTRY or value["dtype"] != "F32":
        raise HeaderError(f"{key} is not a float32 tensor")
    span = _counts(key, value["data_offsets"], at_least=0)
    if len(span) != 2:
        raise HeaderError(f"{key} has {len(span)} data offsets")
    return span[0], span[1], _counts(key, value["shape"], at_least=1)


def _place(key: str, text: Any, sizes: tuple[int, ...]) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Return tensor, its shape and the offsets of a part with these sizes."""
    match = _KEY.fullmatch(key)
    place = parse_json(text) if isinstance(text, str) else None
    if match is None or not isinstance(place, dict) or place.keys() != {"offsets", "shape"}:
        raise HeaderError(f"{key[:80]!r} has no place in a tensor")
    shape, offsets = _counts(key, place["shape"], at_least=1), _counts(key, place["offsets"], at_least=0)
    is_inside = len(shape) == len(offsets) == len(sizes) in (1, 2) and all(
        offset + length <= total for offset, length, total in zip(offsets, sizes, shape, strict=True)
    )
    if not is_inside:
        raise HeaderError(f"{key} is {sizes} at {offsets}, outside of {shape}")
    return match[1], shape, offsets


def _counts(key: str, value: Any, *, at_least: int) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 8:
        raise HeaderError(f"{key} has something else where a shape belongs")
    if not all(type(number) is int and at_least <= number < _MAX_ELEMENTS for number in value):
        raise HeaderError(f"{key} has the numbers {str(value)[:80]}")
    return tuple(value)


def _refuse_incomplete(folder: Path, name: str, shape: tuple[int, ...], parts: list[StoredPart]) -> None:
    rectangles = [part.rectangle for part in parts]
    if found := overlap(rectangles):
        raise damaged(folder, f"two parts of {name} overlap at {found[1].offsets}")
    num_elements = sum(rectangle.num_elements for rectangle in rectangles)
    if num_elements != math.prod(shape):
        raise damaged(folder, f"{name} has {num_elements} of {math.prod(shape)} elements")
