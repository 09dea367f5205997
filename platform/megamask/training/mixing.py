"""Refusals of a mixture that would move the past of a run, or repeat a source more often than allowed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

from megamask.config.identity import effective_stages, growth_problem
from megamask.config.load import load_stored_config
from megamask.config.schema.roots import TrainConfig
from megamask.data.loader import Loader
from megamask.errors import CheckpointIntegrityError, UsageError
from megamask.runs.configs import attempt_configs
from megamask.tracking.journal.seek import find_step
from megamask.training.batch_size import consumed_before
from megamask.training.progress import Progress

_NOT_STARTED = ". Nothing was started."
_log = logging.getLogger(__name__)


def refuse_moved_past(config: TrainConfig, run_dir: Path, attempt: int, progress: Progress, loader: Loader) -> None:
    """Compare the mixture with that of the attempt before; where its config is damaged, with what the journal counted.

    Args:
        config: of this attempt.
        run_dir: the run.
        attempt: number of this attempt.
        progress: of the checkpoint that it resumes from.
        loader: of this attempt.

    Raises:
        UsageError: a sample that was used would be another one.
        CheckpointIntegrityError: neither the config nor the journal can be read, and there are several corpora.
    """
    before = {number: path for number, path in attempt_configs(run_dir).items() if number < attempt}
    if not before or not progress.consumed_samples:
        return
    path = before[max(before)]
    try:
        recorded = load_stored_config(path)
    except UsageError as error:
        _log.warning("the config of the attempt before was not used: %s", error.message.removesuffix(_NOT_STARTED))
        problem = _count_problem(path, run_dir, progress, loader)
    else:
        problem = growth_problem(
            effective_stages(recorded.data.mixture, list(recorded.data.corpora)),
            effective_stages(config.data.mixture, list(config.data.corpora)),
            loader.skipped.index(progress.consumed_samples) * config.training.sequence_length,
        )
    if problem is not None:
        raise UsageError(
            f"{problem}. The past of a run does not move. Nothing was started.",
            hint="only the last stage may be given an end, beyond what was read, and stages be added behind it",
        )


def _count_problem(path: Path, run_dir: Path, progress: Progress, loader: Loader) -> str | None:
    """Say where the journal counted other samples of a source up to a step than this mixture gives, or None."""
    given = _nonzero(loader.consumed(progress.consumed_samples))
    record = find_step(run_dir, progress.step)
    if record is None and len(loader.sources) == 1:
        return None  # every mixture of one corpus reads the same samples
    if record is None:
        raise CheckpointIntegrityError(
            f"{path} is damaged and the journal has no line of step {progress.step}, so that nothing shows which "
            "mixture was read. Nothing was started.",
            hint="restore one of the two from a backup",
        )
    first = next(iter(loader.sources))  # the journal of a run on one corpus does not count by source
    counted = _nonzero(record.get("consumed_by_source") or {first: progress.consumed_samples})
    if counted == given:
        return None
    return f"data.mixture gives {given} samples by source up to step {progress.step}, but the run has read {counted}"


def _nonzero(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def refuse_repetition(config: TrainConfig, loader: Loader) -> None:
    """Hold the epochs of each source at the last step against `max_epochs` of the stages.

    Raises:
        UsageError: names the source, its epochs and the limit.
    """
    limits: dict[str, Fraction] = {}
    for stage in config.data.mixture:
        for name, limit in stage.get("max_epochs", {}).items():
            limits[name] = min(limits.get(name, Fraction(str(limit))), Fraction(str(limit)))
    if not limits:
        return
    consumed = loader.consumed(consumed_before(config.training.steps + 1, config.training))
    for name, limit in limits.items():
        rows = loader.sources[name].order.num_rows
        if consumed[name] > limit * rows:
            raise UsageError(
                f"data.mixture lets data.corpora.{name} be read {float(limit):g} times at most, but training.steps="
                f"{config.training.steps} reads {consumed[name]} samples of its {rows} rows, "
                f"{consumed[name] / rows:.2f} epochs. Nothing was started.",
                hint="train fewer steps, give the source less weight, or raise max_epochs",
            )
