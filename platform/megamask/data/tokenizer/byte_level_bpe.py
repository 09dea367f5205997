"""Byte-level BPE of a Hugging Face tokenizer.json, built in tiktoken, which encodes faster.

Supported: model BPE over the 256 letters that represent bytes, no normalizer or NFC, and a pre-tokenizer that ends with
ByteLevel. tiktoken runs it if the pre-tokenizer is ByteLevel with its own pattern, ByteLevel without one, or Split by a
regular expression followed by ByteLevel without one; Hugging Face tokenizers runs the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken

from megamask.data.tokenizer.pieces import MAX_IDS
from megamask.data.tokenizer.refusal import refuse
from megamask.errors import UsageError

# The pattern of Hugging Face's ByteLevel pre-tokenizer, first published with GPT-2.
BYTE_LEVEL_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
NO_BYTE = -1
# tab, line feed, carriage return, printable ASCII, and the bytes of longer characters up to U+FFFF
_NEEDED_BYTES = (0x09, 0x0A, 0x0D, *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC3, 0xED), 0xEE, 0xEF)
_WHOLE_TEXT_PATTERN = r"(?s:.)+"


def letter_of_byte() -> dict[int, str]:
    """Return the printable letter that represents each byte in a byte-level vocabulary.

    A byte that is a visible Latin-1 character represents itself; the others, in ascending order, are U+0100 and up.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in visible}
    hidden = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


_BYTE_OF_LETTER = {letter: byte for byte, letter in letter_of_byte().items()}


def bytes_of_entry(entry: str) -> bytes | None:
    """Return the bytes of a vocabulary entry, or None if a letter of it represents no byte."""
    if not all(letter in _BYTE_OF_LETTER for letter in entry):
        return None
    return bytes(_BYTE_OF_LETTER[letter] for letter in entry)


@dataclass(frozen=True, kw_only=True)
class ByteLevelBpe:
    """A byte-level BPE.

    Args:
        encoding: yields ranks, not ids; None where tiktoken has no form of the pre-tokenizer.
        id_of_rank: int64, token id of each rank; NO_BYTE for a byte that the vocabulary lacks.
        bytes_of_id: what each id of plain text represents.
    """

    encoding: tiktoken.Encoding | None
    id_of_rank: npt.NDArray[np.int64]
    bytes_of_id: Mapping[int, bytes]

    @cached_property
    def missing_bytes(self) -> frozenset[int]:
        """Bytes that the vocabulary has no entry for; a text with one of them cannot be encoded."""
        return frozenset(range(256)) - {raw[0] for raw in self.bytes_of_id.values() if len(raw) == 1}

    def encode(self, text: str, name: str) -> npt.NDArray[np.int64]:
        """Return the ids of a text by tiktoken, int64 [n].

        Args:
            name: of the tokenizer, for the message.

        Raises:
            UsageError: the text has a byte that the vocabulary lacks.
        """
        assert self.encoding is not None  # the caller has looked
        ids = self.id_of_rank[np.array(self.encoding.encode_ordinary(text), dtype=np.int64)]
        if self.missing_bytes and bool((ids == NO_BYTE).any()):
            byte = next(byte for byte in text.encode() if byte in self.missing_bytes)
            raise UsageError(
                f"{name} has no entry for the byte 0x{byte:02x}, which a text contains. Nothing was written.",
                hint="remove such characters from the text, or take another tokenizer",
            )
        return ids


def build(data: Mapping[str, Any], name: str) -> ByteLevelBpe:
    """Build tiktoken's form of a parsed tokenizer.json.

    tiktoken merges the pair whose bytes have the lowest rank, so ranks follow the order of merges, whatever the ids
    are: the 256 bytes first, then one rank a merge.

    Args:
        data: the parsed file.
        name: the file, for messages.

    Raises:
        UsageError: it is not a supported tokenizer.
    """
    try:
        return _build(data, name)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise refuse(name, f"a part of it is missing or has the wrong type ({error!r})") from error


def _build(data: Mapping[str, Any], name: str) -> ByteLevelBpe:
    model = data["model"]
    _check_model(data, model, name)
    _check_ids(data, model, name)
    pattern = _pattern_of(data.get("pre_tokenizer"), name)
    added = {token["content"] for token in data.get("added_tokens") or []}
    vocab: dict[str, int] = {entry: token for entry, token in model["vocab"].items() if entry not in added}
    bytes_of_id: dict[int, bytes] = {}
    for entry, token in vocab.items():
        raw = bytes_of_entry(entry)
        if raw is None or not raw:
            raise refuse(name, f"the vocabulary entry {entry!r} does not represent bytes")
        bytes_of_id[token] = raw
    ranks, id_of_rank = _ranks(model, vocab, name)
    encoding = None
    if pattern is not None:
        encoding = tiktoken.Encoding("megamask", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return ByteLevelBpe(encoding=encoding, id_of_rank=np.array(id_of_rank, dtype=np.int64), bytes_of_id=bytes_of_id)


def _check_model(data: Mapping[str, Any], model: Mapping[str, Any], name: str) -> None:
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise refuse(name, f"its model is {model.get('type')!r}")
    if not is_nfc(data.get("normalizer")) and data.get("normalizer") is not None:
        raise refuse(name, "it has a normalizer other than NFC, so text would not read back as it was")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise refuse(name, f"its model sets {option}")
    for option in ("truncation", "padding"):
        if data.get(option) is not None:
            raise refuse(name, f"it sets {option}")


def is_nfc(normalizer: Any) -> bool:
    """Return whether a normalizer is Unicode's canonical composition, which changes no character's meaning."""
    if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence":
        return all(step == {"type": "NFC"} for step in normalizer["normalizers"])
    return bool(normalizer == {"type": "NFC"})


def _check_ids(data: Mapping[str, Any], model: Mapping[str, Any], name: str) -> None:
    """Each id is a small number and belongs to one entry: tables are as long as the highest id."""
    ids = dict(model["vocab"])
    for token in data.get("added_tokens") or []:
        if ids.setdefault(token["content"], token["id"]) != token["id"]:
            raise refuse(name, f"the entry {token['content']!r} has two ids")
    for entry, number in ids.items():
        if type(number) is not int or not 0 <= number < MAX_IDS:
            raise refuse(name, f"the entry {entry!r} has the id {str(number)[:40]}, allowed are 0 to {MAX_IDS - 1}")
    if len(set(ids.values())) != len(ids):
        raise refuse(name, "two entries have one id")


def _pattern_of(pre_tokenizer: Any, name: str) -> str | None:
    """Return how text is cut before merging, as one pattern; None where that takes more than a pattern."""
    steps = [pre_tokenizer]
    if isinstance(pre_tokenizer, dict) and pre_tokenizer.get("type") == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    if not steps or not isinstance(steps[-1], dict) or steps[-1].get("type") != "ByteLevel":
        raise refuse(name, "its pre-tokenizer does not end with ByteLevel")
    byte_level = steps[-1]
    if byte_level.get("add_prefix_space"):
        raise refuse(name, "its pre-tokenizer puts a space before the text")
    has_own_pattern = byte_level.get("use_regex", True)
    if len(steps) == 1:
        return BYTE_LEVEL_PATTERN if has_own_pattern else _WHOLE_TEXT_PATTERN
    for step in steps[:-1]:
        if step.get("type") not in ("Split", "Digits") or step.get("behavior", "Isolated") == "Removed":
            raise refuse(name, f"its pre-tokenizer is {[step.get('type') for step in steps]} with options not known")
    split = steps[0]
    is_plain_split = (
        len(steps) == 2
        and split["type"] == "Split"
        and "Regex" in split.get("pattern", {})
        and split.get("behavior") == "Isolated"
        and not split.get("invert")
        and not has_own_pattern
    )
    return str(split["pattern"]["Regex"]) if is_plain_split else None


def _ranks(model: Mapping[str, Any], vocab: Mapping[str, int], name: str) -> tuple[dict[bytes, int], list[int]]:
    letters = letter_of_byte()
    # a published vocabulary may lack bytes that its training text did not have; of those that text needs, none
    missing = [byte for byte in _NEEDED_BYTES if letters[byte] not in vocab]
    if missing:
        raise refuse(name, f"its vocabulary lacks {len(missing)} bytes of UTF-8 text, the first is 0x{missing[0]:02x}")
    ranks = {bytes([byte]): byte for byte in range(256)}
    id_of_rank = [vocab.get(letters[byte], NO_BYTE) for byte in range(256)]
    entries = ["".join(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
    if model.get("ignore_merges"):  # whole pieces are then looked up first, as tiktoken always does
        entries += sorted(vocab, key=lambda entry: vocab[entry])
    for entry in entries:
        raw = bytes_of_entry(entry)
        if raw is None or entry not in vocab:
            raise refuse(name, f"the merge into {entry!r} gives no entry of the vocabulary")
        if raw not in ranks:
            ranks[raw] = len(id_of_rank)
            id_of_rank.append(vocab[entry])
    return ranks, id_of_rank
