"""`megamask evaluate RUN_OR_CHECKPOINT`: a bound on the likelihood of text, in nats per token and bits per byte."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("checkpoint", help="a run directory (its newest checkpoint) or a checkpoint folder")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--text", nargs="+", metavar="FILE", default=[], help="UTF-8 files to score, each one document")
    what.add_argument(
        "--split", choices=("train", "validation"), default="validation", help="split of the corpus (validation)"
    )
    parser.add_argument("--corpus", metavar="FOLDER", help="corpus of --split; by default the run's own")
    parser.add_argument("--rows", type=int, help="rows to score; by default all of --text, the first 64 of a split")
    parser.add_argument("--draws", type=int, default=4, help="masks per row in one replicate (4)")
    parser.add_argument("--replicates", type=int, default=4, help="independent replicates, for the standard error (4)")
    parser.add_argument("--seed", type=int, help="seed of the masks; by default run.seed")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Scores a checkpoint.

    Returns: nelbo_nats_per_token, standard_error, bits_per_byte, num_tokens, num_bytes, num_samples, checkpoint,
        digest, step, draws, replicates, seed.
    """
    from megamask.errors import UsageError
    from megamask_pipelines.evaluate import EvaluationRequest, evaluate

    if arguments.text and arguments.corpus is not None:
        raise UsageError("--corpus was given with --text; allowed: one of them. Nothing was scored.")
    request = EvaluationRequest(
        texts=[Path(name) for name in arguments.text],
        split=arguments.split,
        corpus=None if arguments.corpus is None else Path(arguments.corpus),
        rows=arguments.rows,
        draws=arguments.draws,
        replicates=arguments.replicates,
        seed=arguments.seed,
    )
    return evaluate(Path(arguments.checkpoint), request)


def render(result: Mapping[str, Any]) -> str:
    """Two lines for a person."""
    bits = "unknown" if result["bits_per_byte"] is None else f"{result['bits_per_byte']:.4f}"
    return (
        f"{result['checkpoint']}: at most {result['nelbo_nats_per_token']:.4f} nats per token "
        f"(standard error {result['standard_error']:.4f}), {bits} bits per byte\n"
        f"{result['num_tokens']} tokens, {result['num_bytes']} bytes in {result['num_samples']} rows; "
        f"{result['draws']} masks a row, {result['replicates']} replicates"
    )
