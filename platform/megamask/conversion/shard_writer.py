"""Safetensors files written one tensor at a time.

The library's own `save_file` holds all tensors of a file in memory; here a file's header is written first, from shapes
alone, and the tensors follow one by one. Format: https://huggingface.co/docs/safetensors (a little-endian 64-bit
length, a JSON header padded with spaces to 8 bytes, the tensors' bytes without gaps).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megamask.storage.durable import fsync_directory, storage_errors

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor that will be written: its name, shape and number format."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(tensors: Sequence[PlannedTensor], max_bytes: int) -> dict[str, list[PlannedTensor]]:
    """File name -> its tensors, in order; a file exceeds `max_bytes` only for a single larger tensor."""
    groups: list[list[PlannedTensor]] = []
    size = 0
    for tensor in tensors:
        if not groups or size + tensor.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, start=1)}


def write_shard(
    path: Path,
    tensors: Sequence[PlannedTensor],
    read: Callable[[PlannedTensor], torch.Tensor],
    *,
    metadata: Mapping[str, str],
) -> int:
    """Write one file and flush it; a file of this name appears only when it is complete.

    Args:
        read: returns a tensor's value; called once for each, in order. Values are cast to the planned format.

    Returns: bytes of the file.

    Raises:
        StorageError: the storage refused.
        ValueError: a value has another shape than planned.
    """
    temporary = path.with_name(path.name + ".partial")
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with storage_errors(f"writing {path}"):
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor in tensors:
                value = read(tensor)
                if tuple(value.shape) != tensor.shape:
                    raise ValueError(f"{tensor.name} has shape {tuple(value.shape)}, planned was {tensor.shape}")
                flat = value.to(tensor.dtype).contiguous().view(-1)
                file.write(flat.view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_directory(path.parent)
    return 8 + len(text) + offset


def index_document(shards: Mapping[str, Sequence[PlannedTensor]]) -> dict[str, object]:
    """The content of model.safetensors.index.json."""
    weight_map = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
    total = sum(tensor.num_bytes for tensors in shards.values() for tensor in tensors)
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
