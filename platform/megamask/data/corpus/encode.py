"""Encoding of documents into tokens, and writing of tokens into the shards of a corpus."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megamask.config.schema.corpus import CorpusConfig
from megamask.data.corpus.best_fit import BestFitPacker
from megamask.data.corpus.chat import ChatEncoder, chat_template
from megamask.data.corpus.inputs import InputFile
from megamask.data.corpus.pack import RowPacker, token_dtype
from megamask.data.corpus.scan import Counter, ScannedCorpus
from megamask.data.corpus.shard import ShardWriter
from megamask.data.corpus.splits import TRAIN, VALIDATION
from megamask.data.manifest import SplitEntry
from megamask.data.roles import answer_number
from megamask.data.tokenizer import CorpusTokenizer
from megamask.errors import UsageError

# The parity gate takes the first documents of each file suffix, then those whose count is a power of two.
_PARITY_FIRST = 8
_PARITY_CHARACTERS = 20_000


# (is answer, ids) of each segment of a document; plain text has one segment, which is not an answer.
Segments = Sequence[tuple[bool, npt.NDArray[Any]]]


class DocumentEncoder:
    """Encoder of documents, one by one; checks that the ids decode to the text.

    Args:
        config: chat template.
        tokenizer: its ids are compared with Hugging Face tokenizers on a sample of every kind of input.
    """

    def __init__(self, config: CorpusConfig, tokenizer: CorpusTokenizer) -> None:
        self._tokenizer = tokenizer
        self._chat = ChatEncoder(chat_template(config.chat_template), tokenizer)
        self._seen: Tally[str] = Tally()
        tokenizer.check_parity([])

    @property
    def vocab_size(self) -> int:
        """Number of entries of the tokenizer."""
        return self._tokenizer.vocab_size

    def encode(self, text: str, file: InputFile, number: int) -> Segments:
        """The ids of a document by segments, end-of-document last.

        Args:
            text: of the document.
            file: that has it.
            number: for messages.

        Raises:
            UsageError: the tokenizer loses part of the text or makes special tokens of it, or the chat template
                cannot be used.
        """
        tokenizer, kind = self._tokenizer, file.path.suffix
        self._seen[kind] += 1
        if self._seen[kind] <= _PARITY_FIRST or self._seen[kind].bit_count() == 1:
            tokenizer.check_text(text[:_PARITY_CHARACTERS])
        if file.format == "messages":
            return self._chat.segments(text, f"{file.path}, document {number}")
        ids = tokenizer.encode_array(text)
        special = (tokenizer.eod_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id)
        if np.isin(ids, special).any() or not tokenizer.is_complete(ids, text):
            raise UsageError(
                f"the tokenizer turned text of {file.path} into special tokens or lost part of it, so it cannot be "
                "used. Nothing was published.",
                hint="give another corpus.tokenizer.path, or train one with corpus.tokenizer.vocab_size",
            )
        return [(False, np.append(ids, tokenizer.eod_token_id))]


def encoded_texts(
    config: CorpusConfig, scanned: ScannedCorpus, tokenizer: CorpusTokenizer, count: Counter
) -> Iterator[Segments]:
    """Read the inputs again and encode every document that is taken.

    Raises:
        UsageError: the tokenizer cannot be used for this text.
        DataIntegrityError: an input changed since it was scanned.
    """
    encoder = DocumentEncoder(config, tokenizer)
    for number, file, text in scanned.texts(count):
        yield encoder.encode(text, file, number)
        count.document()


class CorpusWriter:
    """Packer of encoded documents and writer of the shards of their splits.

    Args:
        folder: the corpus folder being built.
        config: row shape and shard size.
        scanned: the inputs and the documents with their splits; gets the token counts.
        tokenizer: whose ids the documents hold.
    """

    def __init__(self, folder: Path, config: CorpusConfig, scanned: ScannedCorpus, tokenizer: CorpusTokenizer) -> None:
        self._scanned = scanned
        self._is_used: npt.NDArray[np.bool_] = np.zeros(tokenizer.vocab_size, dtype=np.bool_)
        dtype = token_dtype(tokenizer.vocab_size)
        names = [TRAIN, VALIDATION] if scanned.documents.is_validation.any() else [TRAIN]
        packer = BestFitPacker if config.packing == "best_fit" else RowPacker
        self._packers: dict[str, BestFitPacker | RowPacker] = {
            name: packer(
                sequence_length=config.sequence_length,
                rows_per_block=config.rows_per_block,
                dtype=dtype,
                pad_token_id=tokenizer.pad_token_id,
            )
            for name in names
        }
        self._writers = {
            name: ShardWriter(
                folder,
                name,
                blocks_per_shard=config.blocks_per_shard,
                sequence_length=config.sequence_length,
                itemsize=dtype.itemsize,
            )
            for name in names
        }

    def write(self, encoded: Iterable[Segments]) -> None:
        """Pack and write all documents.

        Args:
            encoded: the segments of each document that the corpus takes, in order.

        Raises:
            OSError: the storage refused.
        """
        documents = self._scanned.documents
        with ExitStack() as cleanup:
            for writer in self._writers.values():
                cleanup.callback(writer.abort)
            for number, segments in enumerate(encoded):
                documents.tokens.append(sum(len(tokens) for _, tokens in segments))
                split = documents.split_of(number)
                for _, tokens in segments:
                    self._is_used[tokens] = True
                listed = [(answer_number(number) if is_answer else number, tokens) for is_answer, tokens in segments]
                for block in self._packers[split].add_document(number, listed):
                    self._writers[split].add(block)
            for split, packer in self._packers.items():
                for block in packer.finish():
                    self._writers[split].add(block)
                self._writers[split].finish()

    def unused_ids(self) -> list[int]:
        """Ascending ids that occur in no document; the mask id and the pad id are always among them."""
        return [int(token) for token in np.flatnonzero(~self._is_used)]

    def packing(self) -> dict[str, Any]:
        """Return the packing statistics of each split, where the packer has any."""
        found = {name: packer.statistics() for name, packer in self._packers.items()}
        return {name: statistics for name, statistics in found.items() if statistics is not None}

    def split_entries(self) -> dict[str, SplitEntry]:
        """Counts and shards of each split, once everything is written."""
        documents = self._scanned.documents
        entries = {}
        for name, writer in self._writers.items():
            members = [number for number in range(len(documents)) if documents.split_of(number) == name]
            entries[name] = SplitEntry(
                num_documents=len(members),
                text_bytes=sum(documents.text_bytes[number] for number in members),
                num_tokens=self._packers[name].num_tokens,
                num_rows=sum(shard.rows for shard in writer.shards),
                num_padding=self._packers[name].num_padding,
                num_blocks=sum(shard.blocks for shard in writer.shards),
                shards=tuple(writer.shards),
            )
        return entries
