"""`megamask inspect RUN --step N`: the samples of one step, their documents, and which tokens were masked."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("run", help="a run directory, <run.output_dir>/<run.name>")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--step", type=int, help="1-based number of the step")
    which.add_argument("--sample", type=int, metavar="INDEX", help="one sample alone, by its global index from 0")
    parser.add_argument(
        "--corpus",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="where a corpus of the run is now, if it has moved",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Recompute the samples of a step, and show all or one.

    Returns:
        step, seed, samples, batch_digest, content_digest, masked_tokens, matches_journal; for a person each sample
        has its text and the names of its inputs too.
    """
    from megamask.audit.recompute import batches, check_step, inspect_step, open_loader, recorded_run
    from megamask.audit.sample_text import add_text
    from megamask.training.batch_size import step_of_sample
    from megamask_pipelines.corpus_arguments import corpora_of

    recorded = recorded_run(Path(arguments.run), corpora_of(arguments.corpus, outcome="Nothing was recomputed."))
    sample = arguments.sample
    step = arguments.step if sample is None else step_of_sample(max(sample, 0), batches(recorded))
    check_step(recorded, step)
    with open_loader(recorded) as loader:
        report = inspect_step(recorded, loader, step)
        if sample is not None:
            report["samples"] = [each for each in report["samples"] if each["sample_index"] == sample]
        if not getattr(arguments, "json", False):
            add_text(report["samples"], loader)
    return report


def _noise(sample: Mapping[str, Any]) -> str:
    if "masked" in sample:
        return f"t {sample['t']:.4f}, {len(sample['masked'])}"
    return f"{len(sample['scored'])}"


def _kind(sample: Mapping[str, Any]) -> str:
    return " masked" if "masked" in sample else " scored"


def render(result: Mapping[str, Any]) -> str:
    """A few lines a sample for a person."""
    journal = {True: "as in the journal", None: "the journal has no line of this step"}[result["matches_journal"]]
    lines = [
        f"step {result['step']}, seed {result['seed']}, {len(result['samples'])} samples, "
        f"content {result['content_digest']} ({journal})"
    ]
    for sample in result["samples"]:
        num_eligible = len(sample["tokens"]) - sample["num_padding"]
        lines += [
            "",
            f"sample {sample['sample_index']}: {sample['source']} row {sample['row']}, "
            f"{_noise(sample)} of {num_eligible} tokens{_kind(sample)}, {sample['num_padding']} padding",
            *(
                f"  from position {document['start']}: document {document['number']} ({document.get('input', '?')})"
                for document in sample["documents"]
            ),
            sample.get("text", ""),
        ]
    return "\n".join(lines)
