"""`megamask status RUN`: the history and state of a run, or of every run in a folder, from the folders alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_LISTED = ("run_dir", "run_id", "phase", "is_live", "num_attempts", "step", "steps", "loss", "last_checkpoint", "error")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("run", help="a run directory, <run.output_dir>/<run.name>, or a folder of run directories")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="one row a step (of a folder: a row a run) as CSV")
    form.add_argument(
        "--goodput", action="store_true", help="where the time went: productive, lost, restore, save, ..."
    )
    form.add_argument("--plot", metavar="FILE", help="draw loss, bound, gradient norm and rate: .png, .svg or .pdf")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read a run directory, or all of a folder.

    Returns: as `run_state`; for a folder `runs`, an array of such answers; with --csv also `csv`, with --plot
        `plot`, with --goodput `goodput`.
    Raises:
        UsageError: neither a run directory nor a folder of them.
    """
    from megamask.audit.curves import COLUMNS, curve_rows, plot_curves, to_csv
    from megamask.audit.state import run_state, run_states, runs_in
    from megamask.errors import UsageError
    from megamask.runs.layout import record_path

    folder = Path(arguments.run)
    if not record_path(folder).is_file() and runs_in(folder):
        if arguments.plot is not None or arguments.goodput:
            option = "--plot" if arguments.plot is not None else "--goodput"
            raise UsageError(f"{option} takes one run, {folder} is a folder of runs. Nothing was drawn or counted.")
        answer: dict[str, Any] = {"folder": str(folder), "runs": run_states(folder)}
        return {**answer, "csv": to_csv(_LISTED, answer["runs"])} if arguments.csv else answer
    answer = run_state(folder)
    if arguments.csv:
        answer["csv"] = to_csv(COLUMNS, curve_rows(folder))
    if arguments.goodput:
        from megamask.audit.goodput import goodput

        answer["goodput"] = goodput(folder)
    if arguments.plot is not None:
        plot_curves(folder, Path(arguments.plot))
        answer["plot"] = arguments.plot
    return answer


def render(result: dict[str, Any]) -> str:
    """About ten lines for a person; a line a run for a folder."""
    from megamask.audit.state_text import goodput_text, line_of_state, state_text

    if "csv" in result:
        return str(result["csv"])
    if "goodput" in result:
        return goodput_text(result["goodput"])
    if "runs" in result:
        return "\n".join(map(line_of_state, result["runs"]))
    return state_text(result)
