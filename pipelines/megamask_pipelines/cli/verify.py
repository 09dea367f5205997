"""`megamask verify corpus|checkpoint|run FOLDER`: reads every byte and compares it with what was recorded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("what", choices=("corpus", "checkpoint", "run"), help="what the folder holds")
    parser.add_argument("folder", help="a prepared corpus; a checkpoint folder or a run directory; a run directory")
    run = parser.add_argument_group("of a run")
    run.add_argument("--data", action="store_true", help="read its corpora and recompute the content of every step")
    run.add_argument("--evaluate", action="store_true", help="measure the bound of the newest checkpoint again")
    run.add_argument("--expect-head", metavar="N:SHA", help="line N of the journal must have this sha256")
    run.add_argument("--against-mlflow", action="store_true", help="compare with the run in MLflow; writes nothing")
    run.add_argument("--uri", help="tracking server for --against-mlflow, instead of the newest attempt's")
    run.add_argument(
        "--corpus",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="folder of a corpus, if it is not where the journal recorded it",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Verify a folder; the first damage raises, with exit code 64 for a corpus and 65 for a checkpoint.

    A run is read to its end; the answer lists all findings.

    Returns:
        for a corpus: corpus_id, rows, documents, tokens, shards, blocks, bytes, faults, ok; of a damaged one the error
        has shards, blocks, bytes and faults; for a checkpoint: as `verify_checkpoint`; for a run: as
        `megamask.audit.run.verify_run`.
    """
    if arguments.what == "corpus":
        return _verify_corpus(arguments.folder, show_progress=not getattr(arguments, "json", False))
    folder = Path(arguments.folder)
    if arguments.what == "run":
        from megamask_pipelines.verify_run import RunChecks, verify

        return verify(folder, RunChecks.of(arguments))
    from megamask.checkpoint.reader import verify_checkpoint
    from megamask.checkpoint.state_files import check_state

    return verify_checkpoint(folder, check_state)


def _verify_corpus(folder: str, *, show_progress: bool) -> dict[str, Any]:
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from megamask.data.verify import verify_corpus

    console = Console(stderr=True)
    if not show_progress or not sys.stderr.isatty():
        return verify_corpus(folder)
    columns = (TextColumn("verifying"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("verifying")
        return verify_corpus(folder, lambda done, total: bar.update(task, completed=done, total=total))


def render(result: dict[str, Any]) -> str:
    """One line for a person; of a run a line for each finding, too."""
    if "findings" in result:
        return _render_run(result)
    facts = ", ".join(f"{name} {value}" for name, value in result.items() if name not in ("ok", "faults"))
    return f"intact: {facts}"


def _render_run(result: dict[str, Any]) -> str:
    counts = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in result["checked"].items())
    state = "alive" if result["is_live"] else "not running"
    lines = [f"run {result['run_dir']} ({result['run_id']}), {state}", f"checked: {counts}"]
    lines += [f"note: {note}" for note in result["notes"]]
    for finding in result["findings"]:
        where = f"{finding['file']}, line {finding['line']}" if finding["line"] else finding["file"]
        lines.append(f"found: {where}: {finding['problem']}")
    more = result["num_findings"] - len(result["findings"])
    if more > 0:
        lines.append(f"found: {more} more")
    if result["head"] is not None:
        lines.append(f"journal head: {result['head']['seq']}:{result['head']['sha256']}")
    state = "everything agrees" if result["ok"] else f"damaged: {result['num_findings']} finding(s)"
    missing = "; ".join(result["not_covered"]) or "nothing"
    lines.append(f"{state}. Checked: {', '.join(result['covered'])}. Not checked: {missing}.")
    return "\n".join(lines)
