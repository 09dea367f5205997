"""Reads the index of a sharded state, which torch stores as a pickle, without unpickling it.

A pickle is a program: it may name any function and call it, change classes, and ask for memory by a number. Here a
closed set of its instructions is read, and all they can build are tuples, lists, dicts, numbers, strings and records
of named fields. No class is looked up and nothing is called. What came out is then checked field by field and only
then made into torch's objects.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = frozenset(
    {
        (_METADATA, "Metadata"),
        (_METADATA, "TensorStorageMetadata"),
        (_METADATA, "TensorProperties"),
        (_METADATA, "ChunkStorageMetadata"),
        (_METADATA, "MetadataIndex"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    }
)
# What an index calls; each stands for its only argument: a tuple, a string, a number.
_CALLS = frozenset({("torch", "Size"), ("torch.serialization", "_get_layout"), (_METADATA, "_MEM_FORMAT_ENCODING")})
_FLOAT32 = ("torch", "float32")
_FILE_NAME = re.compile(r"__\d{1,9}_\d{1,9}\.distcp")
_PLAIN_PROPERTIES = (_FLOAT32, "torch.strided", False, 0, False)
_MOST_ELEMENTS = 1 << 62
# A stored tensor is a zip archive of one record; its directory and its few small records take about 1.5 KiB.
MOST_OVERHEAD_BYTES = 1 << 16


class IndexProblem(ValueError):
    """What in an index no state has."""


@dataclass(frozen=True)
class _Name:
    module: str
    name: str

    @property
    def pair(self) -> tuple[str, str]:
        return self.module, self.name


class _Record:
    """An object of the pickle: what kind it says it is, and the fields it was given."""

    __slots__ = ("fields", "kind")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.fields: Any = None


_MARK = object()


def read_index(data: bytes) -> Metadata:
    """The index in the bytes of a `.metadata` file.

    Raises:
        IndexProblem: it holds another instruction, name, field or value than an index of float32 tensors has.
    """
    try:
        return _metadata(_Reader(data).run())
    except IndexProblem:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise IndexProblem(f"it is cut off or damaged ({type(error).__name__}: {error})") from error


class _Reader:
    """Runs the closed set of instructions over the bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._stack: list[Any] = []
        self._memo: list[Any] = []

    def run(self) -> Any:
        """The value that stands on the stack at the end."""
        actions = self._actions()
        while (code := self._take(1)[0]) != ord("."):
            if (action := actions.get(code)) is None:
                raise IndexProblem(f"byte {self._at - 1} is instruction 0x{code:02x}, which no index holds")
            action()
        if len(self._stack) != 1 or self._at != len(self._data):
            raise IndexProblem("it goes on after its end")
        return self._stack[0]

    def _actions(self) -> dict[int, Any]:
        push = self._stack.append
        return {
            0x80: lambda: self._take(1),  # PROTO
            0x95: lambda: self._take(8),  # FRAME
            0x8C: lambda: push(self._text(1)),
            ord("X"): lambda: push(self._text(4)),
            ord("K"): lambda: push(self._number(1)),
            ord("M"): lambda: push(self._number(2)),
            ord("J"): lambda: push(self._number(4, signed=True)),
            0x8A: lambda: push(self._number(self._number(1), signed=True)),  # LONG1
            ord("N"): lambda: push(None),
            0x88: lambda: push(True),
            0x89: lambda: push(False),
            ord("("): lambda: push(_MARK),
            ord(")"): lambda: push(()),
            ord("]"): lambda: push([]),
            ord("}"): lambda: push({}),
            0x85: lambda: push(tuple(self._pop(1))),
            0x86: lambda: push(tuple(self._pop(2))),
            0x87: lambda: push(tuple(self._pop(3))),
            ord("t"): lambda: push(tuple(self._pop_to_mark())),
            ord("a"): lambda: self._append(self._pop(1)),
            ord("e"): lambda: self._append(self._pop_to_mark()),
            ord("s"): lambda: self._set(self._pop(2)),
            ord("u"): lambda: self._set(self._pop_to_mark()),
            0x94: lambda: self._memo.append(self._stack[-1]),  # MEMOIZE
            ord("h"): lambda: push(self._memo[self._number(1)]),
            ord("j"): lambda: push(self._memo[self._number(4)]),
            0x93: self._name,  # STACK_GLOBAL
            0x81: self._make,  # NEWOBJ
            ord("R"): self._call,
            ord("b"): self._build,
        }

    def _take(self, size: int) -> bytes:
        piece = self._data[self._at : self._at + size]
        if len(piece) != size:
            raise IndexProblem("it is cut off")
        self._at += size
        return piece

    def _number(self, size: int, *, signed: bool = False) -> int:
        return int.from_bytes(self._take(size), "little", signed=signed)

    def _text(self, width: int) -> str:
        return self._take(self._number(width)).decode()

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise IndexProblem("it takes what it has not put down")
        popped = self._stack[-count:]
        del self._stack[-count:]
        return popped

    def _pop_to_mark(self) -> list[Any]:
        for place in range(len(self._stack) - 1, -1, -1):
            if self._stack[place] is _MARK:
                popped = self._stack[place + 1 :]
                del self._stack[place:]
                return popped
        raise IndexProblem("it takes what it has not put down")

    def _append(self, items: list[Any]) -> None:
        self._on_top(list).extend(items)

    def _set(self, items: list[Any]) -> None:
        self._on_top(dict).update(zip(items[::2], items[1::2], strict=True))

    def _on_top(self, kind: type) -> Any:
        if not self._stack or type(self._stack[-1]) is not kind:
            raise IndexProblem(f"it fills a {kind.__name__} that is none")
        return self._stack[-1]

    def _name(self) -> None:
        module, name = self._pop(2)
        if (module, name) not in _RECORDS | _CALLS | {_FLOAT32}:
            raise IndexProblem(f"it names {module}.{name}, which no index does")
        self._stack.append(_Name(module, name))

    def _make(self) -> None:
        name, arguments = self._pop(2)
        if not isinstance(name, _Name) or name.pair not in _RECORDS or arguments != ():
            raise IndexProblem("it makes an object that no index has")
        self._stack.append(_Record(name.name))

    def _call(self) -> None:
        name, arguments = self._pop(2)
        if not isinstance(name, _Name) or name.pair not in _CALLS or type(arguments) is not tuple:
            raise IndexProblem("it calls what no index calls")
        [argument] = arguments
        self._stack.append(argument)

    def _build(self) -> None:
        record, state = self._pop(2)
        if not isinstance(record, _Record) or record.fields is not None or type(state) not in (dict, tuple):
            raise IndexProblem("it gives fields to what has none")
        record.fields = state
        self._stack.append(record)


def _fields(value: Any, kind: str, names: set[str], optional: frozenset[str] = frozenset()) -> dict[str, Any]:
    if not isinstance(value, _Record) or value.kind != kind or type(value.fields) is not dict:
        raise IndexProblem(f"it has something else where a {kind} belongs")
    if not names <= set(value.fields) <= names | optional:
        raise IndexProblem(f"a {kind} has the fields {sorted(map(str, value.fields))}")
    return value.fields


def _metadata(root: Any) -> Metadata:
    fields = _fields(
        root,
        "Metadata",
        {"state_dict_metadata", "planner_data", "storage_data", "storage_meta"},
        frozenset({"version"}),
    )
    if fields["planner_data"] is not None or fields["storage_meta"] is not None:
        raise IndexProblem("it says more than where tensors lie")
    tensors = {_string(name): _tensor(name, value) for name, value in _items(fields["state_dict_metadata"])}
    chunks = {(name, tuple(chunk.offsets)): chunk for name, tensor in tensors.items() for chunk in tensor.chunks}
    storage = dict(_stored(key, value, chunks) for key, value in _items(fields["storage_data"]))
    num_chunks = sum(len(tensor.chunks) for tensor in tensors.values())
    if not len(storage) == len(fields["storage_data"]) == len(chunks) == num_chunks:
        raise IndexProblem("it does not say once where each part of each tensor lies")
    _refuse_overlap(storage)
    return Metadata(state_dict_metadata=dict(tensors), storage_data=storage)


def _tensor(name: Any, value: Any) -> TensorStorageMetadata:
    fields = _fields(value, "TensorStorageMetadata", {"properties", "size", "chunks"})
    properties = fields["properties"]
    if not isinstance(properties, _Record) or properties.kind != "TensorProperties":
        raise IndexProblem(f"tensor {name} has no properties")
    stated = tuple(entry.pair if isinstance(entry, _Name) else entry for entry in properties.fields)
    if stated != _PLAIN_PROPERTIES or [type(entry) for entry in stated] != [type(entry) for entry in _PLAIN_PROPERTIES]:
        raise IndexProblem(f"tensor {name} is no plain float32 tensor: {stated}")
    size = _size(fields["size"])
    if type(fields["chunks"]) is not list or not fields["chunks"]:
        raise IndexProblem(f"tensor {name} has no parts")
    chunks = [_chunk(name, size, chunk) for chunk in fields["chunks"]]
    return TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size(size), chunks)


def _chunk(name: Any, size: tuple[int, ...], value: Any) -> ChunkStorageMetadata:
    fields = _fields(value, "ChunkStorageMetadata", {"offsets", "sizes"})
    offsets, sizes = _size(fields["offsets"]), _size(fields["sizes"])
    is_inside = len(offsets) == len(sizes) == len(size) and all(
        offset + length <= total for offset, length, total in zip(offsets, sizes, size, strict=True)
    )
    if not is_inside:
        raise IndexProblem(f"a part of tensor {name} is {sizes} at {offsets}, outside of {size}")
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def _stored(
    key: Any, value: Any, chunks: dict[tuple[str, tuple[int, ...]], ChunkStorageMetadata]
) -> tuple[MetadataIndex, _StorageInfo]:
    index = _fields(key, "MetadataIndex", {"fqn", "offset", "index"})
    place = _fields(value, "_StorageInfo", {"relative_path", "offset", "length"}, frozenset({"transform_descriptors"}))
    name, offset = _string(index["fqn"]), _size(index["offset"])
    path = _string(place["relative_path"])
    if not _FILE_NAME.fullmatch(path) or place.get("transform_descriptors") is not None:
        raise IndexProblem(f"it names the file {path!r}, which no state has")
    start, length = _count(place["offset"]), _count(place["length"])
    chunk = chunks.get((name, offset))
    if chunk is None or index["index"] is not None:
        raise IndexProblem(f"it stores a part of {name} at {offset}, which that tensor does not have")
    num_bytes = 4 * math.prod(chunk.sizes)
    if not num_bytes <= length <= num_bytes + MOST_OVERHEAD_BYTES:
        raise IndexProblem(f"a part of {name} has {num_bytes} bytes and is stored in {length}")
    return MetadataIndex(name, chunk.offsets), _StorageInfo(path, start, length)


def _refuse_overlap(storage: dict[MetadataIndex, _StorageInfo]) -> None:
    places = sorted((info.relative_path, info.offset, info.length) for info in storage.values())
    for (path, start, length), (next_path, next_start, _) in pairwise(places):
        if path == next_path and start + length > next_start:
            raise IndexProblem(f"two parts overlap in {path} at byte {next_start}")


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if type(value) is not dict:
        raise IndexProblem("it has something else where a mapping belongs")
    yield from value.items()


def _string(value: Any) -> str:
    if type(value) is not str:
        raise IndexProblem("it has something else where a name belongs")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MOST_ELEMENTS:
        raise IndexProblem(f"it counts {str(value)[:40]} bytes or elements")
    return value


def _size(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > 8:
        raise IndexProblem("it has something else where a shape belongs")
    size = tuple(map(_count, value))
    if math.prod(size) >= _MOST_ELEMENTS:
        raise IndexProblem(f"it has a tensor of shape {size}")
    return size
