"""Tokenizers in the manner of sentencepiece as tokenizer.json: pieces of text with marks for spaces.

Supported are BPE and Unigram models with a piece for each byte and without normalization, so that text reads back:
Hugging Face tokenizers runs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamask.data.tokenizer.refusal import refuse

MAX_IDS = 1 << 24
SPACE_MARK = "\u2581"


def is_of_pieces(data: Mapping[str, Any]) -> bool:
    """Return whether a parsed tokenizer.json has pieces for single bytes, as sentencepiece's byte_fallback."""
    return bool(data["model"].get("byte_fallback"))


def byte_piece(byte: int) -> str:
    """Return the piece that represents one byte."""
    return f"<0x{byte:02X}>"


def bytes_of_pieces(data: Mapping[str, Any], name: str) -> dict[int, bytes]:
    """Return the text of each id of plain text.

    Args:
        data: a parsed tokenizer.json.
        name: the file, for messages.

    Raises:
        UsageError: text would not read back from its ids.
    """
    model = data["model"]
    if model.get("type") not in ("BPE", "Unigram"):
        raise refuse(name, f"its model is {model.get('type')!r}")
    _check_normalizer(data.get("normalizer"), name)
    _check_pre_tokenizer(data.get("pre_tokenizer"), name)
    vocab = vocabulary(model)
    for entry, number in [*vocab.items(), *((t["content"], t["id"]) for t in data.get("added_tokens") or [])]:
        if type(number) is not int or not 0 <= number < MAX_IDS:
            raise refuse(name, f"the entry {entry!r} has the id {str(number)[:40]}, allowed are 0 to {MAX_IDS - 1}")
    missing = [byte for byte in range(256) if byte_piece(byte) not in vocab]
    if missing:
        raise refuse(name, f"its vocabulary lacks {len(missing)} of the 256 bytes, the first is 0x{missing[0]:02x}")
    special = {token["content"] for token in data.get("added_tokens") or [] if token.get("special")}
    found = {
        token: piece.replace(SPACE_MARK, " ").encode()
        for piece, token in vocab.items()
        if piece not in special and piece != model.get("unk_token")
    }
    if model["type"] == "Unigram" and model.get("unk_id") is not None:
        found.pop(int(model["unk_id"]), None)
    return found | {vocab[byte_piece(byte)]: bytes([byte]) for byte in range(256)}


def vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    """Return the id of each entry of a BPE (a mapping) or Unigram model (a list of [piece, score])."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        return {str(piece): token for token, (piece, _) in enumerate(vocab)}
    return dict(vocab)


def _check_normalizer(normalizer: Any, name: str) -> None:
    steps = normalizer["normalizers"] if (normalizer or {}).get("type") == "Sequence" else [normalizer]
    for step in steps:
        is_mark = step is None or (step["type"] == "Prepend" and step["prepend"] == SPACE_MARK)
        if not is_mark and not (
            step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE_MARK
        ):
            raise refuse(name, f"its normalizer {step['type']} changes text, so it would not read back as it was")


def _check_pre_tokenizer(pre_tokenizer: Any, name: str) -> None:
    is_known = (
        pre_tokenizer is None
        or (pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("replacement") == SPACE_MARK)
        or (pre_tokenizer.get("type") == "Split" and pre_tokenizer.get("behavior") == "MergedWithPrevious")
    )
    if not is_known:
        raise refuse(name, f"its pre-tokenizer is {pre_tokenizer.get('type')} with options not known here")
