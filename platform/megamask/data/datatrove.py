"""Steps of datatrove pipelines that make a corpus, where text outgrows the tasks of one machine.

    from datatrove.executor import SlurmPipelineExecutor
    from megamask.data.datatrove import CorpusTask, PublishCorpus, WriteDocuments

    filtered = SlurmPipelineExecutor([reader, *filters, WriteDocuments("documents")], tasks=1000, ...)
    encoded = SlurmPipelineExecutor([CorpusTask("corpus.yaml")], tasks=200, depends=filtered, ...)
    SlurmPipelineExecutor([PublishCorpus("corpus.yaml")], tasks=1, depends=encoded, ...).run()

corpus.yaml is a config of `megamask prepare` whose `corpus.inputs` is `documents/*.jsonl`. So the corpus is the one
that `megamask prepare corpus.yaml` makes of these files, whatever the numbers of tasks; a task that is repeated writes
the same bytes. Needs the package datatrove (the extra `megamask[datatrove]`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from megamask.config.load import load_prepare_config
from megamask.config.schema.corpus import CorpusConfig
from megamask.config.validate import validate_prepare
from megamask.data.corpus.prepare import merge, run_task
from megamask.storage.durable import fsync_directory, make_folders, storage_errors


class WriteDocuments(PipelineStep):  # type: ignore[misc]  # the library has no types
    """Writer of each task's documents into FOLDER/<task>.jsonl, complete or not there; passes them on.

    Args:
        folder: a local or shared folder.
        keys: metadata to write beside `text` and `id`, for filters of their own; values must be JSON.
    """

    type, name = "WRITER", "megamask documents"

    def __init__(self, folder: str | Path, keys: Sequence[str] = ()) -> None:
        super().__init__()
        self.folder = str(folder)
        self.keys = tuple(keys)

    def run(self, data: Iterable[Any] | None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Write the documents of one task, in the order given."""
        del world_size
        path = Path(self.folder) / f"{rank:05d}.jsonl"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with storage_errors(f"writing {path}"):
            make_folders(path.parent)
            with temporary.open("w", encoding="ascii") as file:
                for document in data or ():
                    metadata = {key: document.metadata[key] for key in self.keys if key in document.metadata}
                    json.dump({"id": document.id, "text": document.text} | metadata, file)
                    file.write("\n")
                    self.stat_update("documents")
                    yield document
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            fsync_directory(path.parent)


class CorpusTask(PipelineStep):  # type: ignore[misc]
    """`megamask prepare CONFIG --task RANK/TASKS`, as a step of its own.

    Args:
        config: path of the config.
        overrides: key.path=value.
    """

    type, name = "TOKENIZER", "megamask task"

    def __init__(self, config: str | Path, overrides: Sequence[str] = ()) -> None:
        super().__init__()
        self.config = str(config)
        self.overrides = list(overrides)

    def run(self, data: Iterable[Any] | None, rank: int = 0, world_size: int = 1) -> Iterable[Any] | None:
        """Read and encode the units of one task."""
        report = run_task(self._load(), rank, world_size)
        self.stat_update("units", value=report.units)
        return data

    def _load(self) -> CorpusConfig:
        loaded = load_prepare_config(self.config, self.overrides)
        validate_prepare(loaded.config, loaded.origins)
        return loaded.config.corpus


class PublishCorpus(CorpusTask):
    """`megamask prepare CONFIG --merge`, as a step of one task."""

    name = "megamask merge"

    def run(self, data: Iterable[Any] | None, rank: int = 0, world_size: int = 1) -> Iterable[Any] | None:
        """Deduplicate, pack and publish on the first rank."""
        del world_size
        if rank == 0:
            report = merge(self._load())
            self.stat_update("documents", value=report.documents)
        return data
