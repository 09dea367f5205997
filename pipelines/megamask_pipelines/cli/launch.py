"""`megamask launch slurm|jobset|trainjob CONFIG`: make a run's job; `launch node CONFIG`: run one node of it."""

from __future__ import annotations

import argparse
from typing import Any

from megamask.errors import UsageError


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
        from megamask_pipelines.run_node import run_node

        return run_node(arguments.config, arguments.overrides, signals)


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
