"""Refusals of a mixture that would move the past of a run, or repeat a source more often than allowed."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from megamask.config.identity import effective_stages, growth_problem
from megamask.config.load import load_train_config
from megamask.config.schema.roots import TrainConfig
from megamask.data.loader import Loader
from megamask.errors import UsageError
from megamask.runs.configs import attempt_configs
from megamask.training.batch_size import consumed_before


def refuse_moved_past(config: TrainConfig, run_dir: Path, attempt: int, consumed_samples: int) -> None:
    """Compare the mixture with that of the attempt before.

    Args:
        config: of this attempt.
        run_dir: the run.
        attempt: number of this attempt.
        consumed_samples: of the checkpoint that it resumes from, 0 for none.

    Raises:
        UsageError: a sample that was used would be another one.
    """
    before = {number: path for number, path in attempt_configs(run_dir).items() if number < attempt}
    if not before or not consumed_samples:
        return
    recorded = load_train_config(before[max(before)], []).config
    problem = growth_problem(
        effective_stages(recorded.data.mixture, list(recorded.data.corpora)),
        effective_stages(config.data.mixture, list(config.data.corpora)),
        consumed_samples * config.training.sequence_length,
    )
    if problem is not None:
        raise UsageError(
            f"{problem}. The past of a run does not move. Nothing was started.",
            hint="only the last stage may be given an end, beyond what was read, and stages be added behind it",
        )


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
