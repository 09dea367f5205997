"""The job of `megamask prepare`: a config in, a corpus and its report out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from megamask.config.schema.corpus import CorpusConfig
from megamask.data.corpus.prepare import build
from megamask.data.corpus.scan import Progress


def prepare_corpus(config: CorpusConfig) -> dict[str, Any]:
    """Prepares a corpus, with a progress bar on a terminal.

    Args:
        config: what to make of which inputs.

    Returns:
        corpus_id, documents, tokens, sequences, shards, bytes (UTF-8 bytes of the text), vocab_size, output_dir,
        reused (True when the same corpus was already there), warnings (about inputs that are probably not meant as they
        are read); counts are totals over the splits.

    Raises:
        UsageError, DataIntegrityError, StorageError: see `megamask.data.corpus.prepare.build`.
    """
    with progress_display() as progress:
        report = asdict(build(config, progress))
    return report | {"warnings": list(report["warnings"])}


@contextlib.contextmanager
def progress_display() -> Iterator[Progress]:
    """A bar per phase on stderr if that is a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda phase, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield show
