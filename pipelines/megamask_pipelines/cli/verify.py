"""`megamask verify corpus|checkpoint FOLDER`: reads every byte and compares it with what was recorded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("what", choices=("corpus", "checkpoint"), help="what the folder holds")
    parser.add_argument("folder", help="a prepared corpus; or a checkpoint folder or a run directory")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Verifies a folder; the first damage raises, with exit code 64 for a corpus and 65 for a checkpoint.

    Returns:
        for a corpus: corpus_id, rows, documents, tokens, shards, ok; for a checkpoint: what `verify_checkpoint` says.
    """
    folder = Path(arguments.folder)
    if arguments.what == "corpus":
        return _verify_corpus(folder, show_progress=not getattr(arguments, "json", False))
    from megamask.checkpoint.reader import verify_checkpoint

    return verify_checkpoint(folder)


def _verify_corpus(folder: Path, *, show_progress: bool) -> dict[str, Any]:
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
    """One line for a person."""
    facts = ", ".join(f"{name} {value}" for name, value in result.items() if name != "ok")
    return f"whole: {facts}"
