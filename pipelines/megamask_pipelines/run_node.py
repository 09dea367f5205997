"""The job of `megamask launch node`: this node's share of the layout's ranks, and the job's one verdict."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megamask.config.load import load_train_config
from megamask.config.schema.roots import TrainConfig
from megamask.config.validate import validate_train
from megamask.errors import MegamaskError, UsageError
from megamask.launch.node import run_node as start_node
from megamask.launch.placement import NodePlace, node_place
from megamask.launch.verdict import Verdict, launch_folder, write_verdict
from megamask.resilience.process_facts import node_name
from megamask.resilience.signals import StopRequest
from megamask.runs.layout import run_path
from megamask_pipelines.node_metrics import metrics_file


def run_node(path: str, overrides: Sequence[str], signals: StopRequest) -> dict[str, Any]:
    """Start this node's ranks and wait for the end of the job.

    Args:
        path, overrides: the run config and the arguments that change it.
        signals: stop requests to this process; its handlers are in place.

    Returns: run_dir, node, num_nodes, step, attempt, exit_code.
    Raises:
        UsageError: the environment places a rank, or the nodes cannot share the layout's ranks equally.
        MegamaskError: a rank of this node failed, or the nodes could not meet.
    """
    if leftover := [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ]:
        raise UsageError(
            f"the environment has {' and '.join(leftover)}, which place a single rank; this command starts all ranks "
            "of a node. Nothing was started.",
            hint=f"unset {' '.join(leftover)}",
        )
    place = node_place()
    loaded = load_train_config(path, overrides)
    run_dir = run_path(loaded.config.run.output_dir, loaded.config.run.name)
    try:
        validate_train(loaded.config, loaded.origins)
        with metrics_file(loaded.config, run_dir, place.node) as metrics:
            verdict, failure = start_node(
                ["train", path, *overrides],
                place,
                run_dir,
                ranks_per_node=_ranks_per_node(loaded.config, place),
                signals=signals,
                launch=loaded.config.launch,
                metrics=metrics,
            )
            if metrics is not None:
                metrics.exit_code = verdict.code
    except MegamaskError as error:
        if place.node == 0:  # the other nodes wait for a verdict
            with contextlib.suppress(MegamaskError, OSError):
                code = int(error.exit_code)
                write_verdict(launch_folder(run_dir, place.token), Verdict(code=code, node=node_name()))
        raise
    if failure is not None and int(failure.exit_code) == verdict.code:
        raise failure
    return _answer(run_dir, place, verdict.step, verdict.attempt, verdict.code)


def _answer(run_dir: Path, place: NodePlace, step: int, attempt: int, code: int) -> dict[str, Any]:
    return {
        "run_dir": str(run_dir),
        "node": place.node,
        "num_nodes": place.num_nodes,
        "step": step,
        "attempt": attempt,
        "exit_code": code,
    }


def _ranks_per_node(config: TrainConfig, place: NodePlace) -> int:
    layout = config.layout
    ranks = layout.num_processes
    if ranks % place.num_nodes:
        raise UsageError(
            f"the layout needs {ranks} ranks, which {place.num_nodes} nodes cannot share equally. Nothing was started.",
            hint="change layout.data_parallel_size, or the number of nodes",
        )
    return ranks // place.num_nodes
