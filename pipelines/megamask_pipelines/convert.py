"""The job of `megamask convert to-hf`: a checkpoint as a folder in Hugging Face layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megamask.checkpoint.commit import Commit
from megamask.checkpoint.names import HUB_FOLDER_NAME
from megamask.conversion.documents import ExportRecord, documents
from megamask.conversion.export import ExportPlan, export
from megamask.conversion.hub_folder import GENERATION_NAME, TOKENIZER_NAMES
from megamask.conversion.name_map import NameMap
from megamask.conversion.shard_writer import DTYPE_NAMES
from megamask.engine.state.restore import canonical_reader
from megamask.errors import UsageError
from megamask.models.context import BlockPattern, Causal
from megamask.models.families.base import AttentionKind, Family, TokenIds
from megamask.models.families.registry import family_named, plain_family
from megamask.models.vocabulary import NO_ID
from megamask_pipelines.checkpoint_loading import LoadedCheckpoint, load_checkpoint

FORMATS = {name.lower(): dtype for dtype, name in DTYPE_NAMES.items()}


def to_hub(
    checkpoint_path: Path,
    target: Path,
    *,
    family_name: str | None,
    number_format: str | None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Export the newest checkpoint of a run, or the checkpoint folder that is named.

    Args:
        family_name: layout to write; None for that of an imported model, else for the plain class that holds the
            network without remote code.
        number_format: f32, bf16 or f16; None for that of an imported model, tensor by tensor, else f32.

    Returns: path, family, tensors, bytes, files, resumed_files, checkpoint, step.

    Raises:
        UsageError: the family does not fit the network, or the target exists. CheckpointIntegrityError: the checkpoint
            does not verify. StorageError: the storage refused; the target does not exist.
    """
    if number_format is not None and number_format not in FORMATS:
        raise UsageError(f"--dtype is {number_format!r}; allowed: {', '.join(FORMATS)}. Nothing was written.")
    checkpoint = load_checkpoint(checkpoint_path)
    spec = checkpoint.model.spec
    family = _family(checkpoint, family_name)
    record = _record(checkpoint)
    _check_family(family, record)
    names = NameMap(family=family, spec=spec)
    dtype, other_dtypes = _formats(checkpoint, family, number_format)
    plan = ExportPlan(
        names=names,
        dtypes=dict.fromkeys(names.hub_shapes(), dtype) | other_dtypes,
        documents=_documents(checkpoint, family, record, DTYPE_NAMES[dtype]),
        source_digest=checkpoint.commit.digest,
    )
    report = export(target, plan, canonical_reader(checkpoint.commit.folder, spec), on_progress=on_progress)
    return {
        "path": str(target),
        "family": report.family,
        "tensors": report.tensors,
        "bytes": report.num_bytes,
        "files": list(report.files),
        "resumed_files": report.resumed_files,
        "checkpoint": str(checkpoint.commit.folder),
        "step": checkpoint.commit.step,
    }


def _family(checkpoint: LoadedCheckpoint, name: str | None) -> Family:
    if name is not None:
        return family_named(name)
    origin = checkpoint.origin
    return (
        plain_family(checkpoint.model.spec) if origin is None or origin.family is None else family_named(origin.family)
    )


def _formats(
    checkpoint: LoadedCheckpoint, family: Family, name: str | None
) -> tuple[torch.dtype, dict[str, torch.dtype]]:
    """Number format of most tensors, and published name -> format of the others."""
    origin = checkpoint.origin
    if name is not None:
        return FORMATS[name], {}
    if origin is None or origin.dtype is None:
        return FORMATS["f32"], {}
    others = origin.other_dtypes if origin.family == family.name else {}
    return FORMATS[origin.dtype.lower()], {name: FORMATS[dtype.lower()] for name, dtype in others.items()}


def _record(checkpoint: LoadedCheckpoint) -> ExportRecord:
    """Return what a decoder must know, from the objective as it reads a row."""
    objective = checkpoint.objective
    row = torch.zeros(1, 16, dtype=torch.int64)
    reading = objective.decoder.reading(row, torch.ones_like(row, dtype=torch.bool))
    pattern = reading.context.pattern
    kind: AttentionKind = "bidirectional"
    if isinstance(pattern, Causal):
        kind = "causal"
    elif isinstance(pattern, BlockPattern):
        kind = "block_causal"
    return ExportRecord(
        attention=kind,
        target_shift=reading.shift == 1,
        block_size=pattern.block_size if isinstance(pattern, BlockPattern) else None,
        objective=objective.record(),
        checkpoint=checkpoint.commit.digest,
        step=checkpoint.commit.step,
    )


def _check_family(family: Family, record: ExportRecord) -> None:
    """Refuse a family whose own decoder would read these weights in another way.

    The plain autoregressive classes are containers: the record beside them states how to read the weights.
    """
    is_container = family.plain_twin is None
    if is_container or (family.attention, family.target_shift) == (record.attention, record.target_shift):
        return
    raise UsageError(
        f"--family is {family.name}, whose models attend {family.attention} "
        f"{'with' if family.target_shift else 'without'} a target shift; this checkpoint was trained "
        f"{record.attention} {'with' if record.target_shift else 'without'} it. Nothing was written.",
        hint="leave --family out: the plain class holds the same weights, and megamask.json states how to read them",
    )


def _documents(checkpoint: LoadedCheckpoint, family: Family, record: ExportRecord, dtype: str) -> dict[str, bytes]:
    vocabulary, tokenizer, origin = checkpoint.model.vocabulary, checkpoint.own_tokenizer, checkpoint.origin
    texts = {"eos": vocabulary.eod_token_id, "pad": vocabulary.pad_token_id, "mask": vocabulary.mask_token_id}
    known = {kind: token for kind, token in texts.items() if token != NO_ID}
    if origin is not None and origin.kind == "imported":
        return documents(
            family,
            checkpoint.model.spec,
            TokenIds(**origin.ids),
            record,
            dtype=dtype,
            tokenizer_json=None,
            special_tokens={},
        ) | _published_tokenizer(checkpoint.commit)
    return documents(
        family,
        checkpoint.model.spec,
        TokenIds(**known),
        record,
        dtype=dtype,
        tokenizer_json=None if tokenizer is None else tokenizer.files()["tokenizer.json"],
        special_tokens={} if tokenizer is None else {kind: tokenizer.decode([token]) for kind, token in known.items()},
    )


def _published_tokenizer(commit: Commit) -> dict[str, bytes]:
    """The tokenizer's and chat template's files of an imported model, and its generation config, as they came."""
    names = (GENERATION_NAME, *TOKENIZER_NAMES)
    found = {name: f"{HUB_FOLDER_NAME}/{name}" for name in names}
    return {name: (commit.folder / path).read_bytes() for name, path in found.items() if path in commit.files}
