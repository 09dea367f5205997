"""Curves of a run from its journal: as rows, as CSV, as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megamask.errors import UsageError
from megamask.storage.durable import storage_errors
from megamask.tracking.journal.lines import read_journal
from megamask.tracking.records import Evaluation, Step, read_record

_STEP = ("step", "time", "loss", "nelbo_nats_per_token", "grad_norm", "learning_rate", "global_batch_size")
_COUNTS = ("consumed_samples", "consumed_tokens", "tokens_per_second", "mfu")
_EVALUATION = ("nelbo_nats_per_token", "standard_error", "bits_per_byte")
COLUMNS = (*_STEP, *_COUNTS, *(f"evaluation_{name}" for name in _EVALUATION))
_SUFFIXES = (".png", ".svg", ".pdf")


def curve_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return a row of `COLUMNS` for each step, ascending; of a repeated step that of the highest attempt."""
    rows: dict[int, dict[str, Any]] = {}
    bounds: dict[int, dict[str, Any]] = {}
    for line in read_journal(run_dir):
        match read_record(line):
            case Step() as step:
                rows[step.step] = {name: getattr(step, name) for name in (*_STEP, *_COUNTS)}
            case Evaluation() as evaluation:
                bounds[evaluation.step] = {f"evaluation_{name}": getattr(evaluation, name) for name in _EVALUATION}
    return [row | bounds.get(step, {}) for step, row in sorted(rows.items())]


def to_csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a header; missing values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def plot_curves(run_dir: Path, picture: Path) -> None:
    """Write loss with the held-out bound, gradient norm and learning rate over the steps as a picture.

    Raises:
        UsageError: the name has no suffix of a picture, or no step is journalled.
        StorageError: the storage refused.
    """
    if picture.suffix.lower() not in _SUFFIXES:
        raise UsageError(
            f"--plot is {picture}; allowed: a name that ends in {', '.join(_SUFFIXES)}. Nothing was drawn."
        )
    rows = curve_rows(run_dir)
    if not rows:
        raise UsageError(f"{run_dir} has no step in its journal yet. Nothing was drawn.")
    from matplotlib.figure import Figure  # the object, without pyplot: no window system is asked for

    figure = Figure(figsize=(8, 8), layout="constrained")
    loss, norm, rate = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
    _draw(loss, rows, "loss", "training loss")
    _draw(loss, rows, "evaluation_nelbo_nats_per_token", "held-out bound", marker="o")
    loss.set_ylabel("nats per token")
    loss.legend()
    _draw(norm, rows, "grad_norm")
    norm.set_ylabel("gradient norm")
    _draw(rate, rows, "learning_rate")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    figure.suptitle(run_dir.name)
    with storage_errors(f"writing {picture}", outcome="Nothing was drawn."):
        figure.savefig(picture)


def _draw(axes: Any, rows: Sequence[Mapping[str, Any]], name: str, label: str | None = None, **style: Any) -> None:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1, **style)
