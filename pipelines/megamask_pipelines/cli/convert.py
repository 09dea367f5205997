"""`megamask convert from-hf|to-hf SOURCE TARGET`: published models as checkpoints, and checkpoints as such models."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamask.errors import UsageError

_LINE_EVERY_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "direction",
        choices=["from-hf", "to-hf"],
        help="from-hf: a folder in Hugging Face layout to a checkpoint; to-hf: the other way",
    )
    parser.add_argument("source", help="from-hf: the folder; to-hf: a run directory (newest checkpoint) or checkpoint")
    parser.add_argument("target", help="the folder to make; it must not exist")
    parser.add_argument(
        "--ids",
        choices=["config", "tokenizer"],
        help="from-hf: which file decides where config.json and the tokenizer name different special ids",
    )
    parser.add_argument(
        "--family",
        metavar="NAME",
        help="to-hf: layout to write (that of an imported model, else the plain class that holds the network)",
    )
    experts = "to-hf: experts of a layer as separate or merged tensors (as imported, else separate)"
    parser.add_argument("--experts", metavar="FORM", help=experts)
    parser.add_argument(
        "--dtype",
        metavar="FORMAT",
        help="to-hf: number format of the weights: f32, bf16, f16 (that of an imported model, else f32)",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Convert one model.

    Returns: as `from_hub` and `to_hub`: path, family, tensors, bytes, resumed_files, and what each adds.
    """
    source, target = Path(arguments.source), Path(arguments.target)
    if arguments.direction == "from-hf":
        for name in ("family", "dtype", "experts"):
            if getattr(arguments, name) is not None:
                raise UsageError(f"--{name} was given with from-hf; allowed: with to-hf. Nothing was converted.")
        from megamask_pipelines.import_model import from_hub

        return from_hub(source, target, prefer_ids=arguments.ids, on_progress=_Progress())
    if arguments.ids is not None:
        raise UsageError("--ids was given with to-hf; allowed: with from-hf. Nothing was converted.")
    from megamask_pipelines.convert import to_hub

    return to_hub(
        source,
        target,
        family_name=arguments.family,
        number_format=arguments.dtype,
        experts=arguments.experts,
        on_progress=_Progress(),
    )


def render(result: Mapping[str, Any]) -> str:
    """Return some lines for a person."""
    line = (
        f"{result['path']}: {result['tensors']} tensors, {result['bytes']} bytes, layout {result['family']}, "
        "written, read back and compared"
    )
    if "model" not in result:
        return line
    settings = "\n".join(f"  {name}: {_yaml(value)}" for name, value in result["model"].items())
    problem = result["tokenizer_problem"]
    missing = "" if problem is None else f"\nwithout a tokenizer: {problem}"
    return f"{line}{missing}\na run that starts from it (initialise.source) needs\nmodel:\n{settings}"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class _Progress:
    """A line on stderr every ten seconds: a large model takes minutes."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._last >= _LINE_EVERY_S:
            self._last = time.monotonic()
            sys.stderr.write(f"convert: {done / total:.0%} of {total} bytes written and compared\n")
