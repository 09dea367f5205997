"""An export planned from a checkpoint: family, number formats, configuration, tokenizer, and the record beside them."""

from __future__ import annotations

import torch

from megamask.checkpoint.commit import Commit
from megamask.checkpoint.names import HUB_FOLDER_NAME
from megamask.checkpoint.standalone import LoadedCheckpoint
from megamask.conversion.documents import ExportRecord, documents
from megamask.conversion.export import ExportPlan
from megamask.conversion.hub_folder import GENERATION_NAME, TOKENIZER_NAMES
from megamask.conversion.name_map import NameMap
from megamask.conversion.reading import reading_of
from megamask.conversion.shard_writer import DTYPE_NAMES
from megamask.errors import UsageError
from megamask.models.families.base import Family, TokenIds
from megamask.models.families.registry import family_named, plain_family
from megamask.models.vocabulary import NO_ID

FORMATS = {name.lower(): dtype for dtype, name in DTYPE_NAMES.items()}
EXPERTS = ("separate", "merged")


def export_plan(
    checkpoint: LoadedCheckpoint, *, family_name: str | None, number_format: str | None, experts: str | None
) -> ExportPlan:
    """Plan the files of an export of a checkpoint.

    Args:
        family_name: layout to write; None for that of an imported model, else for the plain class that holds the
            network without remote code.
        number_format: f32, bf16 or f16; None for that of an imported model, tensor by tensor, else f32.
        experts: separate or merged tensors of a layer's experts; None for those of an imported model, else separate.

    Raises:
        UsageError: a name that does not exist, or a family that does not fit the network or its training.
    """
    for option, value, allowed in (("--dtype", number_format, tuple(FORMATS)), ("--experts", experts, EXPERTS)):
        if value is not None and value not in allowed:
            raise UsageError(f"{option} is {value!r}; allowed: {', '.join(allowed)}. Nothing was written.")
    family, record = _family(checkpoint, family_name), _record(checkpoint)
    _check_family(family, record)
    names = NameMap(
        family=family, spec=checkpoint.model.spec, has_merged_experts=_has_merged_experts(checkpoint, experts)
    )
    dtype, other_dtypes = _formats(checkpoint, names, number_format)
    return ExportPlan(
        names=names,
        dtypes=dict.fromkeys(names.hub_shapes(), dtype) | other_dtypes,
        documents=_documents(checkpoint, names, record, DTYPE_NAMES[dtype]),
        source_digest=checkpoint.commit.digest,
    )


def _has_merged_experts(checkpoint: LoadedCheckpoint, experts: str | None) -> bool:
    if experts is None:
        return checkpoint.origin is not None and checkpoint.origin.has_merged_experts
    if checkpoint.model.spec.experts is None:
        raise UsageError(f"--experts is {experts}, but the network is dense; leave it out. Nothing was written.")
    return experts == "merged"


def _family(checkpoint: LoadedCheckpoint, name: str | None) -> Family:
    if name is not None:
        return family_named(name)
    origin = checkpoint.origin
    return (
        plain_family(checkpoint.model.spec) if origin is None or origin.family is None else family_named(origin.family)
    )


def _formats(
    checkpoint: LoadedCheckpoint, names: NameMap, name: str | None
) -> tuple[torch.dtype, dict[str, torch.dtype]]:
    """Number format of most tensors, and published name -> format of the others.

    A tensor keeps the format of the imported ones that it is made of, in another family's layout too; f32 where they
    differ, which holds all of them exactly.
    """
    origin = checkpoint.origin
    if name is not None:
        return FORMATS[name], {}
    if origin is None or origin.dtype is None or origin.family is None:
        return FORMATS["f32"], {}
    most = FORMATS[origin.dtype.lower()]
    source = NameMap(family=family_named(origin.family), spec=names.spec, has_merged_experts=origin.has_merged_experts)
    imported = {
        canonical: FORMATS[origin.other_dtypes.get(tensor.name, origin.dtype).lower()]
        for tensor in source.published.values()
        for canonical, _ in tensor.parts
    }
    others = {}
    for tensor in names.published.values():
        formats = {imported[canonical] for canonical, _ in tensor.parts}
        found = formats.pop() if len(formats) == 1 else FORMATS["f32"]
        if found != most:
            others[tensor.name] = found
    return most, others


def _record(checkpoint: LoadedCheckpoint) -> ExportRecord:
    """Return what a decoder must know, from the objective as it reads a row."""
    objective = checkpoint.objective
    reading = reading_of(objective)
    return ExportRecord(
        attention=reading.attention,
        target_shift=reading.has_shift,
        block_size=reading.block_size,
        objective=objective.record(),
        checkpoint=checkpoint.commit.digest,
        step=checkpoint.commit.step,
    )


def _check_family(family: Family, record: ExportRecord) -> None:
    """Refuse a family whose own decoder would read these weights in another way.

    The plain autoregressive classes are containers: the record beside them states how to read the weights.
    """
    is_container = family.attention == "causal"
    if is_container or (family.attention, family.target_shift) == (record.attention, record.target_shift):
        return
    raise UsageError(
        f"--family is {family.name}, whose models attend {family.attention} "
        f"{'with' if family.target_shift else 'without'} a target shift; this checkpoint was trained "
        f"{record.attention} {'with' if record.target_shift else 'without'} it. Nothing was written.",
        hint="leave --family out: the plain class holds the same weights, and megamask.json states how to read them",
    )


def _documents(checkpoint: LoadedCheckpoint, names: NameMap, record: ExportRecord, dtype: str) -> dict[str, bytes]:
    vocabulary, tokenizer, origin = checkpoint.model.vocabulary, checkpoint.own_tokenizer, checkpoint.origin
    texts = {"eos": vocabulary.eod_token_id, "pad": vocabulary.pad_token_id, "mask": vocabulary.mask_token_id}
    known = {kind: token for kind, token in texts.items() if token != NO_ID}
    if origin is not None and origin.kind == "imported":
        return documents(
            names,
            TokenIds(**origin.ids),
            record,
            dtype=dtype,
            tokenizer_json=None,
            special_tokens={},
        ) | _published_tokenizer(checkpoint.commit)
    return documents(
        names,
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
