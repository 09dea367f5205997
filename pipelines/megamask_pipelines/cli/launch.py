"""`megamask launch slurm|jobset|trainjob CONFIG`: make a run's job; `launch node CONFIG`: run one node of it."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamask.errors import MegamaskError, UsageError

if TYPE_CHECKING:
    from megamask.config.schema.roots import TrainConfig
    from megamask.launch.placement import NodePlace
    from megamask.resilience.signals import StopRequest


def ANSWER_IS_ON_DISK(result: dict[str, Any]) -> bool:
    """True if a stdout that cannot take the answer loses nothing: a job is nowhere else unless it was written."""
    return "target" not in result or result["written"] is not None or result["submitted"] is not None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "what",
        choices=["node", "slurm", "jobset", "trainjob"],
        help="node: run one node of a job, as a Slurm task, a pod or a machine; "
        "slurm, jobset, trainjob: make the job of a config for Slurm, Kubernetes or Kubeflow Trainer, and print it",
    )
    parser.add_argument("config", help="a run config, as configs/run/tiny.yaml")
    parser.add_argument("overrides", nargs="*", default=[], help="key.path=value, later ones win")
    parser.add_argument("--output", metavar="FILE", help="write the job to FILE instead of stdout")
    parser.add_argument("--check", action="store_true", help="ask the scheduler, if it is here; submit nothing")
    parser.add_argument("--submit", action="store_true", help="submit the job")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the job of a run; or start this node's share of the layout's ranks and wait for the job's end.

    Returns: of a job the answer of `render_job`; of a node run_dir, node, num_nodes, step, attempt, exit_code.
    Raises:
        UsageError: the config makes no job, or the scheduler refuses it.
        MegamaskError: a rank of this node failed, or the nodes could not meet.
    """
    from megamask.resilience.signals import StopRequest
    from megamask.resilience.surroundings import raise_descriptor_limit

    if arguments.check and arguments.submit:
        raise UsageError("--check submits nothing, and --submit asks for it; allowed: one of the two.")
    if arguments.what != "node":
        from megamask_pipelines.render_job import render_job

        return render_job(
            arguments.what,
            arguments.config,
            arguments.overrides,
            output=arguments.output,
            submit=arguments.submit,
            check=arguments.check,
        )
    if given := [name for name in ("output", "check", "submit") if getattr(arguments, name)]:
        raise UsageError(
            f"`launch node` has no --{given[0]}: it runs a node. Nothing was started.",
            hint="--output, --check and --submit belong to `launch slurm`, `launch jobset` and `launch trainjob`",
        )
    raise_descriptor_limit()
    with StopRequest() as signals:
        return _run_node(arguments, signals)


def _run_node(arguments: argparse.Namespace, signals: StopRequest) -> dict[str, Any]:
    from megamask.config.load import load_train_config
    from megamask.config.validate import validate_train
    from megamask.launch.node import run_node
    from megamask.launch.placement import node_place
    from megamask.launch.verdict import Verdict, launch_folder, write_verdict
    from megamask.resilience.process_facts import node_name
    from megamask.runs.layout import run_path
    from megamask_pipelines.node_metrics import metrics_file

    if leftover := [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ]:
        raise UsageError(
            f"the environment has {' and '.join(leftover)}, which place a single rank; this command starts all ranks "
            "of a node. Nothing was started.",
            hint=f"unset {' '.join(leftover)}",
        )
    place = node_place()
    loaded = load_train_config(arguments.config, arguments.overrides)
    run_dir = run_path(loaded.config.run.output_dir, loaded.config.run.name)
    try:
        validate_train(loaded.config, loaded.origins)
        with metrics_file(loaded.config, run_dir, place.node) as metrics:
            verdict, failure = run_node(
                ["train", arguments.config, *arguments.overrides],
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


def render(result: dict[str, Any]) -> str:
    """Return the job itself or what became of it, and of a node its last line."""
    if "target" not in result:
        return (
            f"node {result['node']} of {result['num_nodes']}: run {result['run_dir']}, step {result['step']} "
            f"(exit code {result['exit_code']})"
        )
    lines = [f"{result['target']} job {result['name']} is in {result['written']}"] if result["written"] else []
    lines += [f"submitted: {result['submitted']}"] if result["submitted"] is not None else []
    if result["asked"] is not None:
        lines.append(f"the scheduler accepts it: {result['asked']}")
    return "\n".join(lines) or result["text"].rstrip("\n")
