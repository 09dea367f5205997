"""The job of `megamask prepare`: a config in, a corpus and its report out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from megamask.config.schema.corpus import CorpusConfig
from megamask.data.corpus.prepare import build, merge, run_task
from megamask.data.corpus.progress_lines import ProgressLines
from megamask.data.corpus.scan import Progress
from megamask.data.corpus.tasks import task_of
from megamask_pipelines import standard_streams


def prepare_corpus(config: CorpusConfig, *, only_merge: bool = False) -> dict[str, Any]:
    """Prepare a corpus, with a progress bar on a terminal and lines elsewhere.

    Args:
        config: what to make of which inputs.
        only_merge: publish what tasks have read and encoded.

    Returns:
        corpus_id, documents, tokens, sequences, shards, bytes (UTF-8 bytes of the text), vocab_size, output_dir,
        reused (True when the same corpus was already there), warnings (about inputs that are probably not meant as they
        are read); counts are totals over the splits.

    Raises:
        UsageError, DataIntegrityError, StorageError: see `megamask.data.corpus.prepare.build`.
    """
    with progress_display() as progress:
        report = asdict(merge(config, progress) if only_merge else build(config, progress))
    return report | {"warnings": list(report["warnings"])}


def prepare_task(config: CorpusConfig, task: str) -> dict[str, Any]:
    """Read and encode the units of one task, `k/n`.

    Returns:
        task, num_tasks, units (of the task), reused (of them, done before), units_of_all.

    Raises: as `prepare_corpus`.
    """
    number, num_tasks = task_of(task)
    with progress_display() as progress:
        return asdict(run_task(config, number, num_tasks, progress))


@contextlib.contextmanager
def progress_display() -> Iterator[Progress]:
    """A bar per phase on stderr if that is a terminal, a line every 10 seconds elsewhere."""
    if not sys.stderr.isatty():
        yield ProgressLines(lambda line: standard_streams.write_line(line, sys.stderr))
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(phase: str, documents: int, done: int, total: int | None) -> None:
            del documents
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield show
