"""The first pass over the inputs: digests and sizes of every file and document, and the split of each document."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megamask.data.corpus.documents import DocumentList
from megamask.data.corpus.inputs import InputFile, companions
from megamask.data.corpus.read_input import InputReader, reading
from megamask.data.corpus.splits import TRAIN, choose_validation
from megamask.errors import DataIntegrityError, UsageError

# (phase, documents done, bytes done, bytes in all or None); for a person to watch, without influence on the result.
Progress = Callable[[str, int, int, int | None], None]


@dataclass(frozen=True, kw_only=True)
class ScannedInput:
    """One input as the first pass saw it."""

    file: InputFile
    sha256: str
    bytes: int
    documents: int


@dataclass
class TextNotes:
    """Counts of what is unusual in the documents of one input; nothing of it is changed or left out."""

    empty: int = 0
    with_nul: int = 0
    with_replacement: int = 0

    def add(self, text: str) -> None:
        """Count one document."""
        self.empty += not text
        self.with_nul += "\0" in text
        self.with_replacement += "\ufffd" in text

    def warnings(self, file: InputFile) -> list[str]:
        """One sentence for each kind that occurs."""
        kinds = (
            (self.empty, "empty; each becomes one end-of-document token"),
            (self.with_nul, "with NUL characters, which are kept"),
            (self.with_replacement, "with U+FFFD, the sign of an earlier decoding error, which is kept"),
        )
        return [f"{file.path}: {count} document(s) {what}" for count, what in kinds if count]


class Counter:
    """Adds up the documents and bytes of a phase for a progress display.

    Args:
        progress: the display.
        phase: its name.
        total: bytes of the whole phase.
    """

    def __init__(self, progress: Progress, phase: str, total: int) -> None:
        self._progress = progress
        self._phase = phase
        self._total = total
        self._done = 0
        self._documents = 0
        progress(phase, 0, 0, total)

    def __call__(self, count: int) -> None:
        """Note `count` more bytes."""
        self._done += count
        self._progress(self._phase, self._documents, self._done, self._total)

    def document(self) -> None:
        """Note one more document; shown with the next bytes."""
        self._documents += 1


class ScannedCorpus:
    """The inputs and documents of a corpus to be, and a way to read the texts again.

    Args:
        inputs: in document order.
        documents: of all inputs; splits are chosen.
        jsonl_text_key: key of a .jsonl line that holds the text.
        warnings: sentences about inputs and texts that are probably not as they were meant.
    """

    def __init__(
        self, inputs: list[ScannedInput], documents: DocumentList, jsonl_text_key: str, warnings: list[str]
    ) -> None:
        self.inputs = inputs
        self.documents = documents
        self.warnings = warnings
        self._jsonl_text_key = jsonl_text_key

    @property
    def num_bytes(self) -> int:
        """Bytes of all input files."""
        return sum(scanned.bytes for scanned in self.inputs)

    def texts(self, on_bytes: Callable[[int], None]) -> Iterator[tuple[int, InputFile, str]]:
        """Reads the inputs again: (number, file, text) of each document in order.

        Raises:
            DataIntegrityError: an input is no longer what the first pass saw.
        """
        number = 0
        for scanned in self.inputs:
            reader = InputReader(scanned.file, self._jsonl_text_key, on_bytes)
            first = number
            for document in reader.documents():
                is_known = number < len(self.documents) and (
                    hashlib.sha256(document.text.encode()).digest() == self.documents.text_sha256(number)
                )
                if not is_known:
                    raise _changed(scanned.file)
                yield number, scanned.file, document.text
                number += 1
            if number - first != scanned.documents or reader.sha256 != scanned.sha256:
                raise _changed(scanned.file)

    def training_texts(self, num_bytes: int, progress: Progress) -> Iterator[str]:
        """The first training documents up to `num_bytes` of UTF-8 text; the last one is cut at a character."""
        documents = self.documents
        available = sum(documents.text_bytes[n] for n in range(len(documents)) if documents.split_of(n) == TRAIN)
        left = min(num_bytes, available)
        count = Counter(progress, "reading text for the tokenizer", left)
        for number, _, text in self.texts(lambda read: None):
            if documents.split_of(number) != TRAIN:
                continue
            size = documents.text_bytes[number]
            yield text if size <= left else text.encode()[:left].decode(errors="ignore")
            count.document()
            count(min(size, left))
            left -= size
            if left <= 0:
                return


def scan(files: list[InputFile], *, jsonl_text_key: str, validation_fraction: str, progress: Progress) -> ScannedCorpus:
    """Reads every input once.

    Args:
        files: in document order.
        jsonl_text_key: key of a .jsonl line that holds the text.
        validation_fraction: decimal string.
        progress: told the bytes read.

    Raises:
        UsageError: there is no text at all, or a single document and a fraction above 0.
        DataIntegrityError: an input is not what its name says.
    """
    documents = DocumentList()
    inputs: list[ScannedInput] = []
    total = 0
    for file in files:
        with reading(file.path):
            total += file.path.stat().st_size
    count = Counter(progress, "reading the inputs", total)
    warnings = companions(files)
    for place, file in enumerate(files):
        reader, notes = InputReader(file, jsonl_text_key, count), TextNotes()
        first = len(documents)
        for document in reader.documents():
            notes.add(document.text)
            count.document()
            documents.append(
                input_index=place, offset=document.offset, num_bytes=document.bytes, text=document.text.encode()
            )
        inputs.append(
            ScannedInput(file=file, sha256=reader.sha256, bytes=reader.num_bytes, documents=len(documents) - first)
        )
        warnings += notes.warnings(file)
    if sum(documents.text_bytes) == 0:
        raise UsageError(
            f"the corpus is empty: {len(files)} input file(s) hold no text at all. Nothing was written.",
            hint="check corpus.inputs",
        )
    documents.is_validation = choose_validation(documents.split_hashes(), validation_fraction)
    return ScannedCorpus(inputs, documents, jsonl_text_key, warnings)


def _changed(file: InputFile) -> DataIntegrityError:
    return DataIntegrityError(
        f"{file.path} changed while the corpus was being prepared. Nothing was published.",
        hint="prepare again when nobody writes to the inputs",
    )
