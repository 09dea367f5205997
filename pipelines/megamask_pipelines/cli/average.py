"""`megamask average RUN TARGET --best K`: the checkpoints with the lowest bounds, merged into one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("run", help="a run directory, <run.output_dir>/<run.name>")
    parser.add_argument("target", help="the checkpoint folder to make; it must not exist")
    parser.add_argument("--best", type=int, default=3, metavar="K", help="how many checkpoints to merge (3)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Average the best checkpoints. Returns: as `average_best`."""
    from megamask_pipelines.average import average_best

    return average_best(Path(arguments.run), Path(arguments.target), count=arguments.best)


def render(result: Mapping[str, Any]) -> str:
    """Return some lines for a person."""
    lines = [f"{result['path']}: mean of {len(result['checkpoints'])} checkpoints, {result['tensors']} tensors"]
    lines += [f"  {entry['checkpoint']}  {entry['nelbo_nats_per_token']:.4f}" for entry in result["checkpoints"]]
    return "\n".join(lines)
