"""Rewinds: planned and written into skips.json by the attempt at fault, carried out by the next one.

From the moment at which skips.json names a rewind, every attempt removes the checkpoints that the rewind withdraws,
resumes from the newest one before them and leaves the samples out. So a kill at any moment changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from megamask.checkpoint.agreement import CheckpointEngine, on_main
from megamask.checkpoint.commit import Commit
from megamask.checkpoint.names import parse_folder_name
from megamask.checkpoint.reader import candidates
from megamask.checkpoint.retention import is_pinned, remove_committed
from megamask.config.schema.roots import TrainConfig
from megamask.data.skipped import SkippedSamples
from megamask.errors import CheckpointIntegrityError
from megamask.runs.layout import skips_path
from megamask.runs.skips import Rewind, read_rewinds, rewinds_before, write_rewinds
from megamask.storage.fault_points import reached
from megamask.training.batch_size import consumed_before

REWINDS_KEY = "rewinds"
"""Of a checkpoint's schedule: how many rewinds came before it."""


class Writer(Protocol):
    """The attempt as a rewind uses it."""

    run_dir: Path
    run_id: str
    number: int

    def check_claim(self) -> None:
        """Raise when a newer attempt has claimed the run."""


def skipped_by(rewinds: list[Rewind]) -> SkippedSamples:
    """Return the sample indices that rewinds leave out."""
    return SkippedSamples.of(rewind.samples for rewind in rewinds)


def rewinder(
    config: TrainConfig,
    engine: CheckpointEngine,
    attempt: Writer,
    before: list[Rewind],
    *,
    can_start_anew: bool,
    finish_saving: Callable[[], None],
) -> Callable[[int, str], Rewind | str]:
    """Return the function that makes a rewind hold; collective, the same answer on every rank.

    Args:
        before: the rewinds that the attempt trains under.
        can_start_anew: whether the first weights are at hand, where no checkpoint is early enough.
        finish_saving: waits for the save that is on its way; collective.
    """

    def rewind(step: int, rule: str) -> Rewind | str:
        if len(before) >= config.resilience.max_rewinds:
            return f"resilience.max_rewinds = {config.resilience.max_rewinds} rewinds of this run are used up. "
        finish_saving()
        planned = _planned(config, attempt.number, before, step, rule)

        def write() -> str | None:
            refusal = _refusal(config, attempt.run_dir, planned, can_start_anew=can_start_anew)
            if refusal is None:
                attempt.check_claim()
                reached("rewind.planned")
                write_rewinds(attempt.run_dir, attempt.run_id, [*before, planned])
                reached("rewind.written")
            return refusal

        return on_main(engine, write) or planned

    return rewind


def _planned(config: TrainConfig, attempt: int, before: list[Rewind], step: int, rule: str) -> Rewind:
    skipped, back_to = skipped_by(before), max(0, step - config.resilience.rewind_steps)
    return Rewind(
        attempt=attempt,
        step=step,
        back_to_step=back_to,
        first_sample=skipped.index(consumed_before(back_to + 1, config.training)),
        end_sample=skipped.index(consumed_before(step + 1, config.training) - 1) + 1,
        rule=rule,
    )


def _refusal(config: TrainConfig, run_dir: Path, rewind: Rewind, *, can_start_anew: bool) -> str | None:
    """Return why a rewind is not possible."""
    places = {folder: parse_folder_name(folder.name) or (0, 0) for folder in candidates(run_dir)}
    for folder, (step, attempt) in places.items():
        if rewind.withdraws(step=step, attempt=attempt) and is_pinned(folder):
            return f"A rewind to step {rewind.back_to_step} would remove {folder.name}, which is pinned. "
    if any(step <= rewind.back_to_step for step, _ in places.values()):
        return None
    every = config.checkpoint.every_steps
    if can_start_anew and every is not None and rewind.back_to_step < every:
        return None  # it begins again from the first weights: there never was a checkpoint so early
    return (
        f"No checkpoint of step {rewind.back_to_step} or before is kept to go back to (resilience.rewind_steps, "
        "checkpoint.keep_last). "
    )


def effective_rewinds(engine: CheckpointEngine, run_dir: Path, attempt: int) -> list[Rewind]:
    """Return the rewinds that an attempt trains under, on every rank; collective.

    Raises:
        CheckpointIntegrityError: skips.json is damaged.
    """
    return rewinds_before(on_main(engine, lambda: read_rewinds(run_dir)), attempt)


def withdraw(run_dir: Path, rewinds: list[Rewind]) -> list[str]:
    """Remove the checkpoints that rewinds have withdrawn, newest first; called on one rank before anything is loaded.

    Returns: their names.
    Raises:
        StorageError: the storage refused.
    """
    removed = []
    for folder in candidates(run_dir):
        step, attempt = parse_folder_name(folder.name) or (0, 0)
        if any(rewind.withdraws(step=step, attempt=attempt) for rewind in rewinds):
            remove_committed(folder)
            reached("rewind.checkpoint_removed")
            removed.append(folder.name)
    return removed


def refuse_lost_document(run_dir: Path, commit: Commit, schedule: Any, rewinds: list[Rewind]) -> None:
    """Refuse a checkpoint that counts other rewinds than skips.json has.

    Raises:
        CheckpointIntegrityError: the document is lost, or that of an earlier time.
    """
    recorded, known = schedule.get(REWINDS_KEY, 0), len(rewinds_before(rewinds, commit.attempt))
    if recorded != known:
        raise CheckpointIntegrityError(
            f"{commit.folder} was trained after {recorded} rewinds of the run; {skips_path(run_dir)} has {known} of "
            "them. Nothing was loaded.",
            hint="restore skips.json from a copy: without it no program knows which samples the run has left out",
        )
