"""The first pass over the inputs: digests and sizes of every file and document, and the split of each document."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megamask.config.schema.corpus import CorpusConfig
from megamask.data.corpus.documents import DocumentList
from megamask.data.corpus.inputs import InputFile, companions
from megamask.data.corpus.read_input import InputReader, part_digests, reading, text_bytes
from megamask.data.corpus.selection import Selection, Selector
from megamask.data.corpus.splits import TRAIN, choose_validation, decimal_text
from megamask.errors import DataIntegrityError, UsageError

# (phase, documents done, bytes done, bytes in all or None); for a person to watch, without influence on the result.
Progress = Callable[[str, int, int, int | None], None]

_GIANT = 1 << 24  # characters


@dataclass
class TextNotes:
    """Counts of unusual documents of one input; none of them is changed or left out."""

    empty: int = 0
    with_nul: int = 0
    with_replacement: int = 0
    giant: int = 0

    def add(self, text: str) -> None:
        """Count one document."""
        self.empty += not text
        self.giant += len(text) > _GIANT
        self.with_nul += "\0" in text
        self.with_replacement += "\ufffd" in text

    def plus(self, other: TextNotes) -> TextNotes:
        """Return the sums of two counts."""
        return TextNotes(**{name: count + getattr(other, name) for name, count in vars(self).items()})

    def warnings(self, file: InputFile) -> list[str]:
        """One sentence for each kind that occurs."""
        kinds = (
            (self.empty, "empty; each becomes one end-of-document token"),
            (self.with_nul, "with NUL characters, which are kept"),
            (self.with_replacement, "with U+FFFD, the sign of an earlier decoding error, which is kept"),
        )
        return [f"{file.path}: {count} document(s) {what}" for count, what in kinds if count]

    def counts(self) -> dict[str, int]:
        """Return the counts above zero, by kind."""
        return {name: count for name, count in vars(self).items() if count}


@dataclass(frozen=True, kw_only=True)
class ScannedInput:
    """One input, or a part of one, as the first pass saw it; `documents` are those in it, taken or not.

    Args:
        file: the input.
        sha256, bytes: of it, or of the bytes of the part.
        part: bytes of the input in which the part's lines begin; None for a complete input.
        parts: of the first part alone, sha256 of every part and, last, of the complete input.
    """

    file: InputFile
    sha256: str
    bytes: int
    documents: int
    notes: TextNotes
    part: range | None = None
    parts: tuple[str, ...] = ()


class Counter:
    """Sum of the documents and bytes of a phase, for a progress display.

    Args:
        progress: the display.
        phase: its name.
        total: bytes of the phase.
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
        found: the documents of all inputs.
        selection: which of them the corpus takes.
        validation_fraction: decimal string.
        jsonl_text_key: key of a .jsonl line that holds the text.
        warnings: sentences about inputs and texts that are probably not as they were meant.

    Raises:
        UsageError: the inputs hold no text, or a single document and a fraction above 0.
    """

    def __init__(
        self,
        inputs: list[ScannedInput],
        found: DocumentList,
        selection: Selection,
        *,
        validation_fraction: str,
        jsonl_text_key: str,
        warnings: list[str],
    ) -> None:
        self.inputs = inputs
        self.steps = selection.steps
        self.documents = found.subset(selection.is_kept)
        self.warnings = warnings + [text for scanned in inputs for text in scanned.notes.warnings(scanned.file)]
        self._found = found
        self._is_kept = selection.is_kept
        self._jsonl_text_key = jsonl_text_key
        if sum(self.documents.text_bytes) == 0:
            left = f" that the steps {', '.join(step['name'] for step in self.steps)} leave" if self.steps else ""
            raise UsageError(
                f"the corpus is empty: {len(inputs)} input file(s) hold no text at all{left}. Nothing was written.",
                hint="check corpus.inputs",
            )
        self.documents.is_validation = choose_validation(self.documents.split_hashes(), validation_fraction)

    def is_kept(self, place: int) -> bool:
        """Return whether the corpus takes the document at a place among all documents of the inputs."""
        return bool(self._is_kept[place])

    def documents_of_inputs(self) -> list[int]:
        """Return the number of documents that the corpus takes of each input."""
        counts = np.bincount(np.array(self.documents.input_index, dtype=np.int64), minlength=len(self.inputs))
        return [int(count) for count in counts]

    @property
    def num_bytes(self) -> int:
        """Bytes of all input files."""
        return sum(scanned.bytes for scanned in self.inputs)

    def texts(self, on_bytes: Callable[[int], None]) -> Iterator[tuple[int, InputFile, str]]:
        """Read the inputs again: (number, file, text) of each document that is taken, in order.

        Raises:
            DataIntegrityError: an input is no longer what the first pass saw.
        """
        place, number = 0, 0
        for scanned in self.inputs:
            for text in read_again(scanned, self._found, place, self._jsonl_text_key, on_bytes):
                if self._is_kept[place]:
                    yield number, scanned.file, text
                    number += 1
                place += 1

    def training_texts(
        self,
        num_bytes: int,
        progress: Progress,
        shown: Callable[[InputFile, str, str], str] = lambda file, text, where: text,
    ) -> Iterator[str]:
        """The first training documents up to `num_bytes` of UTF-8 text; the last one is cut at a character.

        Args:
            shown: the text that a document is encoded as, from its file, its own text and its place for messages.
        """
        documents = self.documents
        available = sum(documents.text_bytes[n] for n in range(len(documents)) if documents.split_of(n) == TRAIN)
        left = min(num_bytes, available)
        count = Counter(progress, "reading text for the tokenizer", left)
        for number, file, document in self.texts(lambda read: None):
            if documents.split_of(number) != TRAIN:
                continue
            text = shown(file, document, f"{file.name}, document {number}")
            size = documents.text_bytes[number] if text is document else len(text.encode())
            yield text if size <= left else text.encode()[:left].decode(errors="ignore")
            count.document()
            count(min(size, left))
            left -= size
            if left <= 0:
                return


def read_again(
    scanned: ScannedInput, found: DocumentList, first: int, jsonl_text_key: str, on_bytes: Callable[[int], None]
) -> Iterator[str]:
    """The texts of an input, which must be those of the first pass.

    Args:
        scanned: the input.
        found: documents of the first pass.
        first: place among them of the input's first.
        jsonl_text_key: key of a .jsonl line that holds the text.
        on_bytes: called with the number of bytes read.

    Raises:
        DataIntegrityError: the input is no longer what the first pass saw.
    """
    reader = InputReader(scanned.file, jsonl_text_key, on_bytes, part=scanned.part, keeps_broken=True)
    place, end = first, first + scanned.documents
    for document in reader.documents():
        if place >= end or hashlib.sha256(text_bytes(document.text)).digest() != found.text_sha256(place):
            raise changed(scanned.file)
        yield document.text
        place += 1
    if place != end or reader.sha256 != scanned.sha256:
        raise changed(scanned.file)


def scan(files: list[InputFile], config: CorpusConfig, progress: Progress) -> ScannedCorpus:
    """Read every input once.

    Args:
        files: in document order.
        config: how they are read, what is taken of them, and which share is held out.
        progress: called with the bytes read.

    Raises:
        UsageError: the inputs hold no text, or a single document and a fraction above 0.
        DataIntegrityError: an input is not of the format of its name.
    """
    inputs, found = scan_inputs(files, config, Counter(progress, "reading the inputs", num_bytes(files)))
    return assemble(inputs, found, config)


def assemble(inputs: list[ScannedInput], found: DocumentList, config: CorpusConfig) -> ScannedCorpus:
    """The corpus to be of all inputs that were scanned; raises as `scan`."""
    return ScannedCorpus(
        inputs,
        found,
        Selector(config).select(found),
        validation_fraction=decimal_text(config.validation_fraction),
        jsonl_text_key=config.jsonl_text_key,
        warnings=companions([scanned.file for scanned in inputs]),
    )


def num_bytes(files: Iterable[InputFile]) -> int:
    """Bytes of input files together."""
    total = 0
    for file in files:
        with reading(file.path):
            total += file.path.stat().st_size
    return total


def scan_inputs(
    files: Sequence[InputFile], config: CorpusConfig, count: Counter, part: range | None = None
) -> tuple[list[ScannedInput], DocumentList]:
    """Read some inputs, or a part of one, once: their documents, counted from the first of these files.

    Raises: as `scan`.
    """
    selector = Selector(config)
    found = DocumentList()
    inputs: list[ScannedInput] = []
    for place, file in enumerate(files):
        keeps_broken = config.filters.broken_unicode  # to be counted as left out
        reader = InputReader(file, config.jsonl_text_key, count, part=part, keeps_broken=keeps_broken)
        notes = TextNotes()
        first = len(found)
        for document in reader.documents():
            notes.add(document.text)
            count.document()
            found.append(
                input_index=place,
                offset=document.offset,
                num_bytes=document.bytes,
                text=text_bytes(document.text),
                dropped_by=selector.drops(document.text),
            )
            if selector.needs_signatures:
                found.signatures.append(selector.signature(document.text))
        inputs.append(
            ScannedInput(
                file=file,
                sha256=reader.sha256,
                bytes=reader.num_bytes,
                documents=len(found) - first,
                notes=notes,
                part=part,
                parts=tuple(part_digests(file.path, part)) if part is not None and part.start == 0 else (),
            )
        )
    return inputs, found


def changed(file: InputFile) -> DataIntegrityError:
    """Return the error for an input that is no longer what was read before."""
    return DataIntegrityError(
        f"{file.path} changed while the corpus was being prepared. Nothing was published.",
        hint="prepare again when no program writes to the inputs",
    )
