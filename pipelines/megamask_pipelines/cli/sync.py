"""`megamask sync RUN`: sends to MLflow what the journal has and MLflow has not."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("run", help="a run directory, <run.output_dir>/<run.name>; it may be training")
    parser.add_argument(
        "--uri",
        help="tracking server to send to, or env:NAME, instead of the one in the newest attempt's config",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make MLflow's history of the run complete; repeating it changes nothing.

    Returns: what `sync_run` returns.
    """
    from megamask_pipelines.sync_run import sync_run

    return sync_run(Path(arguments.run), uri=arguments.uri)


def render(result: dict[str, Any]) -> str:
    """A few lines for a person."""
    lines = [
        f"{result['run_dir']} is complete in MLflow: {result['steps']} steps, {result['checkpoints']} checkpoints, "
        f"{result['status']}; {result['records_sent']} records were sent now",
        f"in {result['page'] or result['uri']} (experiment {result['experiment']}, run {result['mlflow_run_id']})",
    ]
    if result["doubled_steps"]:
        lines.append(f"{result['doubled_steps']} steps are stored more than once: something else wrote to this run")
    return "\n".join(lines)
