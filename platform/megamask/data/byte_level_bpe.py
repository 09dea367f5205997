"""Reads a Hugging Face tokenizer.json and builds the same byte-level BPE in tiktoken, which encodes it faster.

Supported: model BPE over the 256 letters that stand for bytes, no normalizer, and a pre-tokenizer that is ByteLevel
with its own pattern, ByteLevel without one, or Split by a regular expression followed by ByteLevel without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken

from megamask.errors import UsageError

# The pattern of Hugging Face's ByteLevel pre-tokenizer, first published with GPT-2.
BYTE_LEVEL_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
MAX_IDS = 1 << 24
_WHOLE_TEXT_PATTERN = r"(?s:.)+"
_SUPPORTED = "supported is a byte-level BPE without normalizer (pre-tokenizer ByteLevel, or Split by Regex + ByteLevel)"


def letter_of_byte() -> dict[int, str]:
    """The printable letter that stands for each byte in a byte-level vocabulary.

    A byte that is a visible Latin-1 character stands for itself; the others, in ascending order, are U+0100 and up.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in visible}
    hidden = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


_BYTE_OF_LETTER = {letter: byte for byte, letter in letter_of_byte().items()}


def bytes_of_entry(entry: str) -> bytes | None:
    """The bytes that a vocabulary entry stands for, or None if a letter of it stands for no byte."""
    if not all(letter in _BYTE_OF_LETTER for letter in entry):
        return None
    return bytes(_BYTE_OF_LETTER[letter] for letter in entry)


def refuse(name: str, reason: str) -> UsageError:
    """The error for a tokenizer.json that cannot be served.

    Args:
        name: the file, for the message.
        reason: what in it is not supported.
    """
    return UsageError(
        f"{name}: {reason}; {_SUPPORTED}. Nothing was written.",
        hint="give another corpus.tokenizer.path, or train one with corpus.tokenizer.vocab_size",
    )


@dataclass(frozen=True, kw_only=True)
class ByteLevelBpe:
    """A BPE that tiktoken runs.

    Args:
        encoding: yields ranks, not ids.
        id_of_rank: int64, token id of each rank.
        bytes_of_id: what each id of plain text stands for.
        pattern: how text is cut before merging.
    """

    encoding: tiktoken.Encoding
    id_of_rank: npt.NDArray[np.int64]
    bytes_of_id: Mapping[int, bytes]
    pattern: str


def build(data: Mapping[str, Any], name: str) -> ByteLevelBpe:
    """Builds tiktoken's form of a parsed tokenizer.json.

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
    special = {token["content"] for token in data.get("added_tokens") or []}
    vocab: dict[str, int] = {entry: token for entry, token in model["vocab"].items() if entry not in special}
    bytes_of_id: dict[int, bytes] = {}
    for entry, token in vocab.items():
        raw = bytes_of_entry(entry)
        if raw is None or not raw:
            raise refuse(name, f"the vocabulary entry {entry!r} does not stand for bytes")
        bytes_of_id[token] = raw
    ranks, id_of_rank = _ranks(model, vocab, name)
    encoding = tiktoken.Encoding("megamask", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    ids = np.array(id_of_rank, dtype=np.int64)
    return ByteLevelBpe(encoding=encoding, id_of_rank=ids, bytes_of_id=bytes_of_id, pattern=pattern)


def _check_model(data: Mapping[str, Any], model: Mapping[str, Any], name: str) -> None:
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise refuse(name, f"its model is {model.get('type')!r}")
    if data.get("normalizer") is not None:
        raise refuse(name, "it has a normalizer, so text would not read back as it was")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise refuse(name, f"its model sets {option}")
    for option in ("truncation", "padding"):
        if data.get(option) is not None:
            raise refuse(name, f"it sets {option}")
    plain = [token["content"] for token in data.get("added_tokens") or [] if not token.get("special")]
    if plain:
        raise refuse(name, f"the added tokens {plain[:5]} are not special, so text would turn into them")


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


def _pattern_of(pre_tokenizer: Any, name: str) -> str:
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
    split = steps[0]
    is_plain_split = (
        len(steps) == 2
        and split.get("type") == "Split"
        and "Regex" in split.get("pattern", {})
        and split.get("behavior") == "Isolated"
        and not split.get("invert")
    )
    if not is_plain_split or has_own_pattern:
        raise refuse(name, f"its pre-tokenizer is {[step.get('type') for step in steps]} with options not known here")
    return str(split["pattern"]["Regex"])


def _ranks(model: Mapping[str, Any], vocab: Mapping[str, int], name: str) -> tuple[dict[bytes, int], list[int]]:
    letters = letter_of_byte()
    missing = [byte for byte in range(256) if letters[byte] not in vocab]
    if missing:
        raise refuse(name, f"its vocabulary lacks {len(missing)} of the 256 bytes, the first is 0x{missing[0]:02x}")
    ranks = {bytes([byte]): byte for byte in range(256)}
    id_of_rank = [vocab[letters[byte]] for byte in range(256)]
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
