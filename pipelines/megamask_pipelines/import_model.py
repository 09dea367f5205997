"""The job of `megamask convert from-hf`: a published model as a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megamask.conversion.importing import PublishedModel, import_model, read_published
from megamask.conversion.published_tokens import IdSource


def from_hub(
    source: Path,
    target: Path,
    *,
    prefer_ids: IdSource | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Import a folder in Hugging Face layout.

    Args:
        prefer_ids: which file decides where config.json and the tokenizer name different ids; None refuses that.

    Returns: path, family, tensors, bytes, resumed_files, digest, dtype, attention, target_shift, objective, ids,
        tokenizer (whether the checkpoint has one), tokenizer_problem, model (the section of a run that starts from it).
    Raises:
        UsageError: the folder is not usable, or the target exists. DataIntegrityError: the folder is damaged.
        StorageError: the storage refused; the target does not exist.
    """
    report = import_model(target, read_published(source, prefer_ids=prefer_ids), on_progress=on_progress)
    origin = report.model.origin()
    return {
        "path": str(target),
        "family": origin.family,
        "tensors": report.tensors,
        "bytes": report.num_bytes,
        "resumed_files": report.resumed_files,
        "digest": report.commit.digest,
        "dtype": origin.dtype,
        "attention": origin.attention,
        "target_shift": origin.target_shift,
        "objective": report.model.objective.name,
        "ids": dict(origin.ids),
        "tokenizer": report.model.tokenizer is not None,
        "tokenizer_problem": report.model.tokenizer_problem,
        "model": model_section(report.model),
    }


def model_section(model: PublishedModel) -> dict[str, Any]:
    """The keys of a run's section `model` that describe this network."""
    spec = model.names.spec
    section = {name: value for name, value in spec.to_json().items() if name not in _NOT_OF_THE_SECTION}
    return section | (spec.experts.to_section() if spec.experts is not None else {})


_NOT_OF_THE_SECTION = ("vocab_size", "padded_vocab_size", "max_sequence_length", "experts")
