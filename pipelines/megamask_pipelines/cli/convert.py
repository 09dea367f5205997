"""`megamask convert to-hf CHECKPOINT FOLDER`: a checkpoint in Hugging Face layout."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LINE_EVERY_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("direction", choices=["to-hf"], help="to-hf: from a checkpoint to Hugging Face layout")
    parser.add_argument("source", help="a run directory (its newest checkpoint) or a checkpoint folder")
    parser.add_argument("target", help="the folder to make; it must not exist")
    parser.add_argument("--family", metavar="NAME", help="layout to write (the plain class that holds the network)")
    parser.add_argument("--dtype", default="f32", metavar="FORMAT", help="number format of the weights: f32, bf16, f16")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Convert one model.

    Returns: path, family, tensors, bytes, files, resumed_files, checkpoint, step.
    """
    from megamask_pipelines.convert import to_hub

    return to_hub(
        Path(arguments.source),
        Path(arguments.target),
        family_name=arguments.family,
        number_format=arguments.dtype,
        on_progress=_Progress(),
    )


def render(result: Mapping[str, Any]) -> str:
    """Return a line for a person."""
    return (
        f"{result['path']}: {result['tensors']} tensors, {result['bytes']} bytes, layout {result['family']}, "
        "written, read back and compared"
    )


class _Progress:
    """A line on stderr every ten seconds: a large model takes minutes."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._last >= _LINE_EVERY_S:
            self._last = time.monotonic()
            sys.stderr.write(f"convert: {done / total:.0%} of {total} bytes written and compared\n")
