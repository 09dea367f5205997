"""A preparation in tasks: each reads and encodes its units, in any process, on any machine that shares the folder.

Task k of n does the units k, k + n, k + 2n, ...; what was done is not done again, for any number of tasks. The
first task that needs a tokenizer to be trained scans what is not scanned yet and trains it; the others wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megamask.config.schema.corpus import CorpusConfig
from megamask.data.corpus import units as units_module
from megamask.data.corpus.documents import DocumentList
from megamask.data.corpus.encode import DocumentEncoder, Segments
from megamask.data.corpus.inputs import find_inputs
from megamask.data.corpus.pack import token_dtype
from megamask.data.corpus.scan import Counter, Progress, ScannedCorpus, ScannedInput, assemble, read_again, scan_inputs
from megamask.data.corpus.units import (
    Unit,
    UnitStore,
    get_scan,
    joined,
    put_scan,
    scan_name,
    tokens_name,
    units_of,
)
from megamask.data.tokenizer import TOKENIZER_DIR, CorpusTokenizer
from megamask.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """Report of a task: its units, and those that were done before."""

    task: int
    num_tasks: int
    units: int
    reused: int
    units_of_all: int


class Tasks:
    """The units of one preparation and what was done of them.

    Args:
        config: what to make of which inputs.
        options: the manifest's options, by which tasks of one preparation know each other.
        target: the corpus to be.
        tokenizer: as loaded, or None where one is trained.
        train: trains one on a scanned corpus.
        progress: called with the bytes read.

    Raises:
        UsageError: the folder of the tasks belongs to another preparation.
    """

    def __init__(
        self,
        config: CorpusConfig,
        options: Mapping[str, Any],
        target: Path,
        tokenizer: CorpusTokenizer | None,
        train: Callable[[ScannedCorpus], CorpusTokenizer],
        progress: Progress,
    ) -> None:
        files = find_inputs(config.inputs, config.exclude)
        sizes = [file.path.stat().st_size for file in files]
        self.units = units_of(files, sizes)
        inputs = [{"name": file.name, "bytes": size} | file.options() for file, size in zip(files, sizes, strict=True)]
        plan = {
            "options": dict(options),
            "inputs": inputs,
            "unit_bytes": units_module.UNIT_BYTES,
            "units": len(self.units),
        }
        self.store = UnitStore(target, plan)
        self._config = config
        self.loaded = tokenizer
        self._train = train
        self._progress = progress

    def run(self, task: int, num_tasks: int) -> TaskReport:
        """Do the units of one task that are not done yet.

        Raises:
            UsageError: no such task exists, or the tokenizer cannot be used.
            DataIntegrityError: an input is damaged or changed.
        """
        mine = self.units[task::num_tasks]
        missing = [unit for unit in mine if not self.store.has(tokens_name(unit))]
        for unit in missing:
            self._scan(unit)
        if missing:
            encoder = DocumentEncoder(self._config, self._tokenizer())
            for unit in missing:
                self._encode(unit, encoder)
        return TaskReport(
            task=task,
            num_tasks=num_tasks,
            units=len(mine),
            reused=len(mine) - len(missing),
            units_of_all=len(self.units),
        )

    def scanned(self) -> ScannedCorpus:
        """The corpus to be, of all units.

        Raises:
            UsageError: a unit is missing.
        """
        self._refuse_missing([unit for unit in self.units if not self.store.has(scan_name(unit))])
        found = DocumentList()
        inputs: list[ScannedInput] = []
        for unit in self.units:
            inputs += get_scan(self.store, unit, found)
        return assemble(joined(inputs), found, self._config)

    def encoded(self, scanned: ScannedCorpus) -> Iterator[Segments]:
        """The segments of each document that the corpus takes, in order.

        Raises:
            UsageError: a unit is missing.
            DataIntegrityError: what a task stored is damaged.
        """
        self._refuse_missing([unit for unit in self.units if not self.store.has(tokens_name(unit))])
        first = 0
        for unit in self.units:
            arrays, _ = self.store.get(tokens_name(unit))
            ends = np.cumsum(arrays["lengths"]).tolist()
            answers, place = arrays["answers"].tolist(), 0
            for number, count in enumerate(arrays["segments"].tolist()):
                own = range(place, place + count)
                place += count
                if scanned.is_kept(first + number):
                    begins = [ends[segment - 1] if segment else 0 for segment in own]
                    yield [
                        (bool(answers[segment]), arrays["tokens"][begin : ends[segment]])
                        for segment, begin in zip(own, begins, strict=True)
                    ]
            first += len(arrays["segments"])

    def tokenizer(self) -> CorpusTokenizer:
        """The tokenizer that the units were encoded with.

        Raises:
            UsageError: none was trained yet.
        """
        if self.loaded is None and not (self.store.folder / TOKENIZER_DIR).is_dir():
            self._refuse_missing(self.units)
        return self._tokenizer()

    def _refuse_missing(self, missing: Sequence[Unit]) -> None:
        if missing:
            raise UsageError(
                f"{len(missing)} of {len(self.units)} units are not done, the first is unit {missing[0].number} "
                f"({missing[0].files[0].path}). Nothing was published.",
                hint=f"run the task that has it: --task k/n with {missing[0].number} mod n = k",
            )

    def _scan(self, unit: Unit) -> None:
        name = scan_name(unit)
        if self.store.has(name):
            return
        with self.store.locked(name):
            if self.store.has(name):
                return
            size = sum(file.path.stat().st_size for file in unit.files) if unit.part is None else len(unit.part)
            count = Counter(self._progress, f"reading {name}", size)
            inputs, found = scan_inputs(unit.files, self._config, count, unit.part)
            put_scan(self.store, unit, inputs, found)

    def _tokenizer(self) -> CorpusTokenizer:
        if self.loaded is not None:
            return self.loaded
        folder = self.store.folder / TOKENIZER_DIR
        if not folder.is_dir():
            with self.store.locked("tokenizer"):
                if not folder.is_dir():
                    for unit in self.units:
                        self._scan(unit)
                    self.store.put_folder(TOKENIZER_DIR, self._train(self.scanned()).files())
        return CorpusTokenizer.load(folder)

    def _encode(self, unit: Unit, encoder: DocumentEncoder) -> None:
        name = tokens_name(unit)
        with self.store.locked(name):
            if self.store.has(name):
                return
            found = DocumentList()
            inputs = get_scan(self.store, unit, found)
            count = Counter(self._progress, f"encoding {name}", sum(each.bytes for each in inputs))
            documents: list[Segments] = []
            for each in inputs:
                for text in read_again(each, found, len(documents), self._config.jsonl_text_key, count):
                    number = len(documents)
                    is_dropped = found.dropped_by[number] >= 0
                    documents.append([] if is_dropped else encoder.encode(text, each.file, number))
                    count.document()
            self.store.put(name, _arrays(documents, token_dtype(encoder.vocab_size)), {"documents": len(documents)})


def _arrays(documents: Sequence[Segments], dtype: np.dtype[Any]) -> dict[str, npt.NDArray[Any]]:
    """Documents as flat arrays: ids, length and kind of each segment, number of segments of each document."""
    segments = [segment for document in documents for segment in document]
    tokens = np.concatenate([np.empty(0, dtype), *(ids.astype(dtype) for _, ids in segments)])
    return {
        "tokens": tokens,
        "lengths": np.array([len(ids) for _, ids in segments], dtype=np.int64),
        "answers": np.array([is_answer for is_answer, _ in segments], dtype=np.bool_),
        "segments": np.array([len(document) for document in documents], dtype=np.int64),
    }


def task_of(text: str) -> tuple[int, int]:
    """`k/n` as (k, n).

    Raises:
        UsageError: it is not of that form, or k is not one of 0, ..., n - 1.
    """
    task, sign, count = text.partition("/")
    if not (sign and task.isdecimal() and count.isdecimal() and int(task) < int(count)):
        raise UsageError(f"--task is {text!r}; allowed: k/n with k from 0 to n - 1, for example 0/8. Nothing was done.")
    return int(task), int(count)
