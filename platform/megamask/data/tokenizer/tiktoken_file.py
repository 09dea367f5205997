"""A tiktoken file in the form of tokenizer.json: the merges that its ranks imply."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import tiktoken

from megamask.data.tokenizer.byte_level_bpe import BYTE_LEVEL_PATTERN, letter_of_byte
from megamask.data.tokenizer.refusal import refuse
from megamask.data.tokenizer.sources import Source, byte_level_json
from megamask.storage.hashing import sha256_bytes

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_NOT_WORD = r"[^\r\n\p{L}\p{N}]?"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
# How the published encodings of these names cut text.
PATTERNS = {
    "gpt2": BYTE_LEVEL_PATTERN,
    "cl100k_base": _CONTRACTIONS + rf"|{_NOT_WORD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*" + _TAIL,
    "o200k_base": (
        rf"{_NOT_WORD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_NOT_WORD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
    ),
}


def read_tiktoken(file: Path, content: bytes, pattern: str | None) -> Source:
    """Read a tiktoken file.

    Args:
        content: of the file.
        pattern: a name of PATTERNS or a regular expression.

    Raises:
        UsageError: it is damaged, or the pattern is not given or no pattern.
    """
    name = str(file)
    if not pattern:
        raise refuse(
            name,
            "a tiktoken file does not contain the pattern that cuts text into words",
            hint=f"set corpus.tokenizer.pattern to {', '.join(PATTERNS)} (Llama 3 and Qwen: cl100k_base), or to a "
            "regular expression",
        )
    try:
        pairs = (line.split() for line in content.splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise refuse(name, f"a line of it is not base64 and a rank ({error})") from error
    regex = PATTERNS.get(pattern, pattern)
    try:
        encoding = tiktoken.Encoding(file.name, pat_str=regex, mergeable_ranks=ranks, special_tokens={})
    except ValueError as error:
        raise refuse(name, f"corpus.tokenizer.pattern {pattern!r} is not a pattern ({error})") from error
    letters = letter_of_byte()
    text = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [
        [text[part] for part in parts]
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        if len(token) > 1 and len(parts := _parts(token, ranks, rank)) == 2
    ]
    pre_tokenizer: Any = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    vocab = {text[token]: rank for token, rank in ranks.items()}
    return Source(
        kind="tiktoken",
        files={file.name: sha256_bytes(content)},
        data=byte_level_json(vocab, merges, [], pre_tokenizer, ignore_merges=True),
        library="tiktoken",
        encode=encoding.encode_ordinary,
    )


def _parts(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """Return the parts that the merges below a rank leave of a token: two parts are the merge that makes it."""
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 1:
        best, place = min((ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1))
        if best >= limit:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts
