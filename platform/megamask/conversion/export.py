"""Export of a network as a folder in Hugging Face layout: shard by shard, resumable, verified, visible at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megamask.conversion.hub_folder import INDEX_NAME, WEIGHTS_NAME, HubFolder
from megamask.conversion.joining import join
from megamask.conversion.name_map import NameMap
from megamask.conversion.partial_folder import Progress, partial_folder, refuse_existing, show
from megamask.conversion.shard_writer import PlannedTensor, index_document, plan_shards, write_shard
from megamask.errors import DataIntegrityError
from megamask.storage.durable import write_atomic
from megamask.storage.hashing import hash_of

MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """Result of an export.

    Args:
        tensors: number of tensors.
        num_bytes: bytes of the weight files.
        resumed_files: weight files that an interrupted export had finished.
    """

    family: str
    tensors: int
    num_bytes: int
    files: tuple[str, ...]
    resumed_files: int


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """Content of an export.

    Args:
        names: family and network.
        dtypes: published name -> number format.
        documents: file name -> content of everything that is not weights: config.json, the tokenizer, ...
        source_digest: identifies the weights that are read, so that an interrupted export of others is not resumed.
        max_shard_bytes: size of a weight file.
    """

    names: NameMap
    dtypes: Mapping[str, torch.dtype]
    documents: Mapping[str, bytes]
    source_digest: str
    max_shard_bytes: int = MAX_SHARD_BYTES

    def shards(self) -> dict[str, list[PlannedTensor]]:
        """File name -> tensors."""
        tensors = [
            PlannedTensor(name=name, shape=shape, dtype=self.dtypes[name])
            for name, shape in self.names.hub_shapes().items()
        ]
        return plan_shards(tensors, self.max_shard_bytes)

    def digest(self) -> str:
        """H of everything that decides the bytes of the weight files."""
        layout = [
            [file, [[tensor.name, list(tensor.shape), str(tensor.dtype)] for tensor in tensors]]
            for file, tensors in self.shards().items()
        ]
        return hash_of(self.source_digest, layout)


def export(
    target: Path,
    plan: ExportPlan,
    read: Callable[[str], torch.Tensor],
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExportReport:
    """Write a network into a new folder.

    The files are made in `<target>.partial`, compared with the source bit for bit, and only then renamed. After an
    interruption the same call continues with the first file that is missing. Memory: one tensor, twice.

    Args:
        read: returns a canonical tensor by name.
        on_progress: called after each tensor with bytes done and bytes in all, for writing and for verifying.

    Raises:
        UsageError: the target exists; it is not touched.
        DataIntegrityError: a written tensor does not read back; the partial folder is removed.
        StorageError: the storage refused; the target does not exist.
    """
    refuse_existing(target)
    shards, partial = plan.shards(), partial_folder(target, plan.digest())
    progress = Progress(2 * sum(tensor.num_bytes for tensors in shards.values() for tensor in tensors), on_progress)

    def value_of(tensor: PlannedTensor) -> torch.Tensor:
        progress.add(tensor.num_bytes)
        return join(plan.names.published[tensor.name], read, tensor.dtype)

    resumed = 0
    for file, tensors in shards.items():
        if (partial / file).is_file():
            resumed += 1
            progress.add(sum(tensor.num_bytes for tensor in tensors))
            continue
        write_shard(partial / file, tensors, value_of, metadata={"format": "pt"})
    documents = dict(plan.documents)
    if list(shards) != [WEIGHTS_NAME]:
        documents[INDEX_NAME] = (json.dumps(index_document(shards), indent=2) + "\n").encode()
    for name, data in documents.items():
        write_atomic(partial / name, data)
    _verify(partial, shards, value_of)
    num_bytes = sum((partial / file).stat().st_size for file in shards)
    show(partial, target)
    return ExportReport(
        family=plan.names.family.name,
        tensors=len(plan.names.published),
        num_bytes=num_bytes,
        files=tuple(shards),
        resumed_files=resumed,
    )


def _verify(
    folder: Path, shards: Mapping[str, list[PlannedTensor]], value_of: Callable[[PlannedTensor], torch.Tensor]
) -> None:
    """Read every tensor back as a user would and compare it bit for bit."""
    written = HubFolder(folder)
    for tensors in shards.values():
        for tensor in tensors:
            found, expected = written.tensor(tensor.name, tensor.shape), value_of(tensor)
            if found.dtype != expected.dtype or not torch.equal(
                found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
            ):
                shutil.rmtree(folder)
                raise DataIntegrityError(
                    f"{tensor.name} does not read back from {folder} as it was written; the folder was removed.",
                    hint="check the storage, then export again",
                )
