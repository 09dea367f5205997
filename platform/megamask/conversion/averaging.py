"""The average of checkpoints of one run: the last step of LLaDA2.0's recipe, and of others.

Weights are added in float64, in the order of the steps, and rounded once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megamask.checkpoint.commit import Commit
from megamask.checkpoint.contents import read_model, read_state
from megamask.checkpoint.names import COMMIT_NAME, TOKENIZER_NAME
from megamask.checkpoint.origin import Origin, publish_without_run
from megamask.conversion.partial_folder import Progress, partial_folder, refuse_existing, show
from megamask.engine.state.restore import canonical_reader
from megamask.engine.state.weights_file import MAX_FILE_BYTES, plan_files, write_weights
from megamask.errors import UsageError
from megamask.models.shapes import canonical_shapes
from megamask.storage.hashing import hash_of


@dataclass(frozen=True, kw_only=True)
class AverageReport:
    """Result of an average.

    Args:
        num_bytes: bytes of the weights.
    """

    commit: Commit
    tensors: int
    num_bytes: int


def best_commits(commits: Sequence[Commit], count: int) -> list[Commit]:
    """The commits with the lowest bounds of the newest kind, by step; of equal bounds the later one.

    Raises:
        UsageError: fewer than `count` have such a bound.
    """
    newest = max((commit.bound_from_step for commit in commits if commit.bound is not None), default=1)
    measured = [
        (commit.bound, -commit.step, commit)
        for commit in commits
        if commit.bound is not None and commit.bound_from_step == newest
    ]
    if len(measured) < count:
        phase = "" if newest == 1 else f" in the objective's last phase, from step {newest} on"
        raise UsageError(
            f"{len(measured)} of {len(commits)} checkpoints have a bound of their own step{phase}; {count} are needed. "
            "Nothing was written.",
            hint="set evaluation.every_steps so that it meets checkpoint.every_steps, or give a smaller --best",
        )
    chosen = sorted(measured, key=lambda entry: entry[:2])[:count]
    return sorted((commit for _, _, commit in chosen), key=lambda commit: commit.step)


def average(
    target: Path,
    commits: Sequence[Commit],
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> AverageReport:
    """Write the mean of verified checkpoints as a checkpoint without a run. Memory: one tensor, three times.

    Args:
        commits: at least one, of one network; the documents are those of the last one.

    Raises:
        UsageError: the target exists, or the checkpoints are of different models.
        CheckpointIntegrityError: a checkpoint cannot be read. StorageError: the storage refused.
    """
    refuse_existing(target)
    model, state = read_model(commits[-1].folder), read_state(commits[-1].folder)
    for commit in commits:
        if read_model(commit.folder).to_json() != model.to_json():
            raise UsageError(
                f"{commit.folder} is of another model than {commits[-1].folder}. Nothing was written.",
                hint="average checkpoints of one run",
            )
    shapes = canonical_shapes(model.spec)
    files = plan_files(shapes, max_file_bytes)
    partial = partial_folder(target, hash_of([commit.digest for commit in commits], list(files.items())))
    (partial / COMMIT_NAME).unlink(missing_ok=True)
    sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    progress = Progress(sum(sizes.values()), on_progress)
    readers = [canonical_reader(commit.folder, model.spec) for commit in commits]

    def mean(name: str) -> torch.Tensor:
        progress.add(sizes[name])
        total = torch.zeros(shapes[name], dtype=torch.float64)
        for read in readers:
            total += read(name)
        return (total / len(readers)).to(torch.float32)

    for file, names in files.items():
        if not (partial / file).is_file():
            write_weights(partial / file, names, shapes, mean)
    last = commits[-1]
    tokenizer = {name for name in last.files if name.startswith(f"{TOKENIZER_NAME}/")}
    commit = publish_without_run(
        partial,
        list(files),
        origin=_origin(commits),
        model=model,
        state=state,
        documents={name: (last.folder / name).read_bytes() for name in sorted(tokenizer)},
    )
    show(partial, target)
    commit = dataclasses.replace(commit, folder=target)
    return AverageReport(commit=commit, tensors=len(shapes), num_bytes=sum(sizes.values()))


def _origin(commits: Sequence[Commit]) -> Origin:
    merged = tuple(
        {"digest": commit.digest, "step": commit.step, "nelbo_nats_per_token": str(commit.bound)} for commit in commits
    )
    return Origin(kind="average", checkpoints=merged)
