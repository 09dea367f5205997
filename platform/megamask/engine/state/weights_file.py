"""Weights as files of the state, written one tensor at a time: for checkpoints that no engine holds in memory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from megamask.engine.state.index import file_name
from megamask.engine.state.safetensors import header_of
from megamask.storage.durable import fsync_directory, storage_errors

MAX_FILE_BYTES = 5 * 10**9


def plan_files(shapes: Mapping[str, tuple[int, ...]], max_bytes: int = MAX_FILE_BYTES) -> dict[str, list[str]]:
    """File name -> its tensors, in order; a file exceeds `max_bytes` only for a single larger tensor."""
    files: list[list[str]] = []
    size = 0
    for name, shape in shapes.items():
        num_bytes = 4 * math.prod(shape)
        if not files or size + num_bytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += num_bytes
    return {file_name(number): names for number, names in enumerate(files)}


def write_weights(
    path: Path,
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
) -> None:
    """Write one file and flush it; a file of this name appears only when it is complete.

    Memory: one tensor.

    Args:
        read: a tensor's value by name, float32; called once for each, in order.

    Raises:
        ValueError: a value has another shape or format.
        StorageError: the storage refused.
    """
    temporary = path.with_name(path.name + ".partial")
    with storage_errors(f"writing {path}"):
        with temporary.open("wb") as file:
            file.write(header_of([(name, shapes[name], (0,) * len(shapes[name]), shapes[name]) for name in names]))
            for name in names:
                value = read(name)
                if tuple(value.shape) != tuple(shapes[name]) or value.dtype != torch.float32:
                    raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}, planned was {shapes[name]}")
                file.write(value.contiguous().view(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_directory(path.parent)
