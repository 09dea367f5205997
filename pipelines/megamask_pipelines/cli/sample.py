"""`megamask sample RUN_OR_CHECKPOINT`: continues a prompt, or fills the masked spans of a text."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("checkpoint", help="a run directory (its newest checkpoint) or a checkpoint folder")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="text to continue; without it and --infill, text from nothing")
    what.add_argument("--infill", metavar="TEXT", help="text in which each <|mask:N|> is N tokens to fill")
    parser.add_argument("--length", type=int, metavar="N", help="tokens after the prompt (64, or what fits)")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (one for each masked token)")
    parser.add_argument("--block-length", type=int, metavar="N", help="masked tokens finished at a time (all)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (0)")
    parser.add_argument(
        "--order",
        choices=("confidence", "random"),
        default="confidence",
        help="which tokens are written first; random with --temperature 1 is ancestral sampling (confidence)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the sampling noise (0)")
    parser.add_argument("--track", action="store_true", help="put the text on the run's page in MLflow")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Decode one sequence.

    Returns: text, infilled, tokens, num_denoising_steps, nfe, checkpoint, step; with --track also mlflow_page.
    """
    from megamask.generation.confidence import DecodingOptions
    from megamask_pipelines.sample import SampleRequest, sample

    for name in ("prompt", "infill"):
        _refuse_undecodable(f"--{name}", getattr(arguments, name))
    options = DecodingOptions(
        num_denoising_steps=arguments.steps,
        block_length=arguments.block_length,
        temperature=arguments.temperature,
        seed=arguments.seed,
        order=arguments.order,
    )
    request = SampleRequest(
        prompt=arguments.prompt, text_with_spans=arguments.infill, length=arguments.length, options=options
    )
    path = Path(arguments.checkpoint)
    if not arguments.track:
        return sample(path, request)
    from megamask_pipelines.track import sample_result, tracked

    return tracked(path, lambda: sample(path, request), lambda run_dir, answer: sample_result(run_dir, request, answer))


def _refuse_undecodable(argument: str, text: str | None) -> None:
    """Refuse bytes of the command line that are not UTF-8; Python shows them as halves of surrogate pairs."""
    from megamask.errors import UsageError

    for place, letter in enumerate(text or ""):
        if 0xD800 <= ord(letter) < 0xE000:
            raise UsageError(
                f"{argument} is not UTF-8 text: character {place} is the byte 0x{ord(letter) & 0xFF:02x}. "
                "Nothing was decoded.",
                hint="give the text in UTF-8 and run in a UTF-8 locale",
            )


def render(result: Mapping[str, Any]) -> str:
    """The text and nothing else."""
    return str(result["text"])
