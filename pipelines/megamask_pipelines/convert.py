"""The job of `megamask convert to-hf`: a checkpoint as a folder in Hugging Face layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megamask.checkpoint.standalone import load_checkpoint
from megamask.conversion.export import export
from megamask.conversion.exporting import export_plan
from megamask.engine.state.restore import canonical_reader


def to_hub(
    checkpoint_path: Path,
    target: Path,
    *,
    family_name: str | None = None,
    number_format: str | None = None,
    experts: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Export the newest checkpoint of a run, or the checkpoint folder that is named.

    Args:
        family_name, number_format, experts: as of `export_plan`.

    Returns: path, family, tensors, bytes, files, resumed_files, checkpoint, step.

    Raises:
        UsageError: the family does not fit the network, or the target exists. CheckpointIntegrityError: the checkpoint
            does not verify. StorageError: the storage refused; the target does not exist.
    """
    checkpoint = load_checkpoint(checkpoint_path)
    plan = export_plan(checkpoint, family_name=family_name, number_format=number_format, experts=experts)
    read = canonical_reader(checkpoint.commit.folder, checkpoint.model.spec)
    report = export(target, plan, read, on_progress=on_progress)
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
