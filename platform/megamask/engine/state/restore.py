"""Loading the state on resume, and the weights alone for evaluation and sampling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megamask.engine.collectives import Collectives
from megamask.engine.state.index import StoredTensor, read_index
from megamask.engine.state.safetensors import StateReader
from megamask.engine.state.share import OPTIMIZER, OPTIMIZER_NAME
from megamask.engine.state.slices import StoredSlice, slices_of
from megamask.errors import CheckpointIntegrityError
from megamask.models.shapes import canonical_shapes
from megamask.models.spec import ModelSpec
from megamask.storage.documents import read_document


def load(folder: Path, optimizer: Any, fp8: Any, spec: ModelSpec, collectives: Collectives) -> None:
    """Read this rank's shards and gather the others'; collective.

    Rank 0 reads the headers of all files for all ranks; each rank then opens only the files with parts of its own.

    Raises:
        CheckpointIntegrityError: the folder does not hold the complete state of this network; every rank raises.
        UsageError: version 0.1.0 wrote the state.
    """
    failures: list[BaseException] = []
    index: dict[str, StoredTensor] | None = None
    try:
        index = read_index(folder) if collectives.is_main else None
    except Exception as error:  # noqa: BLE001  raised on every rank
        failures.append(error)
    collectives.raise_alike(failures, CheckpointIntegrityError)
    index = collectives.broadcast_object(index)
    try:
        optimizer.num_updates = read_num_updates(folder)
        reader = StateReader(folder, index)
        scales = fp8.targets(reader.index)
        reader.read([*slices_of(optimizer.shards(), spec), *scales])
    except Exception as error:  # noqa: BLE001  raised on every rank
        failures.append(error)
    collectives.raise_alike(failures, CheckpointIntegrityError)
    fp8.loaded(scales)
    optimizer.publish_weights()


def canonical_reader(folder: Path, spec: ModelSpec) -> Callable[[str], torch.Tensor]:
    """Return a function from a canonical name to its weight, float32 on the CPU, read when it is asked for.

    Needs no process group and no megatron-core.

    Raises:
        CheckpointIntegrityError: the folder does not hold the weights of such a network.
        UsageError: version 0.1.0 wrote the state.
    """
    reader, shapes = StateReader(folder), canonical_shapes(spec)

    def read(name: str) -> torch.Tensor:
        shape = tuple(shapes[name])
        weight = torch.empty(shape, dtype=torch.float32)
        reader.read([StoredSlice(name=name, shape=shape, offsets=(0,) * len(shape), data=weight)])
        return weight

    return read


def read_canonical_weights(folder: Path, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Return all weights by canonical name; raises as `canonical_reader`."""
    read = canonical_reader(folder, spec)
    return {name: read(name) for name in canonical_shapes(spec)}


def read_num_updates(folder: Path) -> int:
    """Return how many updates Adam has made.

    Raises:
        CheckpointIntegrityError: optimizer.json is damaged. UsageError: a newer megamask wrote it.
    """
    path = folder / OPTIMIZER_NAME
    num_updates = read_document(OPTIMIZER, path).get("num_updates")
    if type(num_updates) is not int or num_updates < 0:
        raise OPTIMIZER.damaged(path, f"has num_updates {num_updates!r}")
    return num_updates
