"""`megamask train CONFIG [overrides]`: trains, or resumes, and ends with the contract's exit code."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from megamask.errors import MegamaskError

if TYPE_CHECKING:
    from megamask.resilience.signals import StopRequest

# A stdout that cannot take the answer does not undo the work.
ANSWER_IS_ON_DISK = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("config", help="a run config, as configs/run/tiny.yaml")
    parser.add_argument("overrides", nargs="*", default=[], help="key.path=value, later ones win")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compose, validate, open the corpora and print parameters, FLOPs and steps per epoch; train nothing",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train in this process, or in one process per rank when the layout needs several.

    Returns: run_id, run_dir, step, loss, exit_code, reason; with --check the answer of `check_run`.
    """
    from megamask.resilience.signals import StopRequest
    from megamask.resilience.stacks import offer_stacks
    from megamask.resilience.surroundings import raise_descriptor_limit

    offer_stacks()
    # no reverse DNS, or a peer that is not there yet: torch's C++ code prints a trace for each try
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    raise_descriptor_limit()
    with StopRequest() as signals:  # first of all: from here on a signal asks for an orderly end
        return _train(arguments, signals)


def _train(arguments: argparse.Namespace, signals: StopRequest) -> dict[str, Any]:
    from megamask.config.load import load_train_config
    from megamask.config.validate import validate_train
    from megamask.launch.rank_folder import leave_report
    from megamask.provenance.redaction import redacted, register_references
    from megamask.runs.layout import run_path
    from megamask.tracking.mlflow.store import URI_KEY, check_target
    from megamask_pipelines.pretrain import run_training

    try:
        loaded = load_train_config(arguments.config, arguments.overrides)
        register_references(loaded.config)
        validate_train(loaded.config, loaded.origins)
        mlflow, run = loaded.config.tracking.mlflow, loaded.config.run
        if mlflow.enabled:  # what never takes anything would only show as an outage at the end
            check_target(URI_KEY, run_path(run.output_dir, run.name), mlflow, after="Nothing was started.")
        if arguments.check:
            from megamask_pipelines.check_run import check_run

            return check_run(loaded.config)
        return run_training(loaded.config, ["train", arguments.config, *arguments.overrides], signals)
    except MegamaskError as error:
        if leave_report(redacted(error)):
            raise SystemExit(int(error.exit_code)) from error
        raise


def render(result: dict[str, Any]) -> str:
    """The last lines for a person."""
    if "parameters" in result:
        from megamask_pipelines.check_run import render_check

        return render_check(result)
    from pathlib import Path

    from megamask.tracking.mlflow.state import page_of_run

    page = page_of_run(Path(result["run_dir"]))
    loss = "none" if result["loss"] is None else f"{result['loss']:.4f} nats per token"
    return (
        f"run {result['run_dir']}: step {result['step']}, loss {loss}, {result['reason']} "
        f"(exit code {result['exit_code']})" + ("" if page is None else f"\nin MLflow: {page}")
    )
