"""`megamask evaluate RUN_OR_CHECKPOINT`: a bound on the likelihood of text, in nats per token and bits per byte."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamask.config.schema.objective import NAMES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("checkpoint", help="a run directory (its newest checkpoint) or a checkpoint folder")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--text", nargs="+", metavar="FILE", default=[], help="UTF-8 files to score, each one document")
    what.add_argument(
        "--split", choices=("train", "validation"), default="validation", help="split of the corpus (validation)"
    )
    what.add_argument("--token-ids", metavar="FILE.npy", help="rows of token ids to score, int64 [n, L]")
    parser.add_argument("--corpus", metavar="FOLDER", help="corpus of --split; by default the run's own")
    parser.add_argument(
        "--score", choices=("all", "answers"), help="tokens of --split to score; by default as the run was trained"
    )
    parser.add_argument("--rows", type=int, help="rows to score; by default all of --text, the first 64 of a split")
    parser.add_argument("--draws", type=int, default=4, help="masks per row in one replicate (4)")
    parser.add_argument("--replicates", type=int, default=4, help="independent replicates, for the standard error (4)")
    parser.add_argument(
        "--objective",
        choices=NAMES,
        help="score as this objective; by default the model's own",
    )
    parser.add_argument(
        "--given-first",
        action="store_true",
        help="do not score the first token of each row: the same tokens as an autoregressive model",
    )
    parser.add_argument("--seed", type=int, help="seed of the masks; by default run.seed")
    parser.add_argument("--track", action="store_true", help="put the result on the run's page in MLflow")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Score a checkpoint.

    Returns: nelbo_nats_per_token, exact, objective, standard_error, bits_per_byte, num_tokens, num_bytes, num_samples,
        checkpoint, digest, step, draws, replicates, seed; with --track also mlflow_page.
    """
    from megamask.errors import UsageError
    from megamask.evaluation.request import EvaluationRequest
    from megamask_pipelines.evaluate import evaluate

    for option in ("corpus", "score"):
        if (arguments.text or arguments.token_ids) and getattr(arguments, option) is not None:
            other = "--text" if arguments.text else "--token-ids"
            raise UsageError(f"--{option} was given with {other}; allowed: one of them. Nothing was scored.")
    request = EvaluationRequest(
        texts=[Path(name) for name in arguments.text],
        split=arguments.split,
        corpus=None if arguments.corpus is None else Path(arguments.corpus),
        score=arguments.score,
        rows=arguments.rows,
        draws=arguments.draws,
        replicates=arguments.replicates,
        seed=arguments.seed,
        token_ids=None if arguments.token_ids is None else Path(arguments.token_ids),
        objective=arguments.objective,
        given_first=arguments.given_first,
    )
    path = Path(arguments.checkpoint)
    if not arguments.track:
        return evaluate(path, request)
    from megamask_pipelines.track import evaluation_result, tracked

    return tracked(
        path,
        lambda: evaluate(path, request),
        lambda run_dir, answer: evaluation_result(run_dir, request, answer),
    )


def render(result: Mapping[str, Any]) -> str:
    """A few lines for a person."""
    bits = "unknown" if result["bits_per_byte"] is None else f"{result['bits_per_byte']:.4f}"
    nats = f"{result['nelbo_nats_per_token']:.4f} nats per token"
    cost = f"exactly {nats}" if result["exact"] else f"at most {nats} (standard error {result['standard_error']:.4f})"
    how = "" if result["exact"] else f"; {result['draws']} masks a row, {result['replicates']} replicates"
    return (
        f"{result['checkpoint']}: {cost}, {bits} bits per byte\n"
        f"{result['num_tokens']} tokens, {result['num_bytes']} bytes in {result['num_samples']} rows{how}"
        + (f"\nin MLflow: {result['mlflow_page']}" if "mlflow_page" in result else "")
    )
