"""Ranges of a manifest's values, checked before anything is computed with them or allocated for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Counts are below what a 64-bit sum of them can hold; ids and lengths below what a table of them takes.
_MAX_INTEGER = 1 << 53
_MAX_IDS = 1 << 24
MAX_ROW_TOKENS = 1 << 24
_FRACTION = re.compile(r"0(\.[0-9]{1,400})?")
_TABLE = re.compile(r"documents/[0-9]{6,9}\.parquet")
_PACKERS = ({"name": "concatenate-and-cut", "version": 1}, {"name": "best-fit", "version": 1})
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_count(value: Any) -> bool:
    """Return whether a value is an integer that can count bytes, rows or documents."""
    return type(value) is int and 0 <= value < _MAX_INTEGER


def odd_value(content: Mapping[str, Any]) -> str | None:
    """Return the first value for reading that has a wrong type, is out of range or leads out of the corpus, or None.

    Raises:
        KeyError, TypeError, AttributeError: a part is missing or of another kind.
    """
    tokenizer = content["tokenizer"]
    for name in ("vocab_size", "eod_token_id", "pad_token_id", "mask_token_id"):
        if not is_count(tokenizer[name]) or tokenizer[name] > _MAX_IDS:
            return f"tokenizer.{name} is {_shown(tokenizer[name])}"
    if not is_count(content["sequence_length"]) or content["sequence_length"] > MAX_ROW_TOKENS:
        return f"sequence_length is {_shown(content['sequence_length'])}"
    for number, table in enumerate(content["documents"]["tables"]):
        if not _TABLE.fullmatch(table["name"]) or int(table["name"][10:-8]) != number:
            leads = (
                "leads out of the corpus, as that"
                if ".." in table["name"] or table["name"][0] == "/"
                else "is not that"
            )
            return f"the name {_shown(table['name'])} {leads} of table {number}"
        if not is_count(table["documents"]):
            return f"table {number} has {_shown(table['documents'])} documents"
    return None


def odd_record(content: Mapping[str, Any]) -> str | None:
    """Return the first such value of those that only verifying needs, or None; raises as `odd_value`."""
    if not _FRACTION.fullmatch(content["options"]["validation_fraction"]):
        return f"validation_fraction is {_shown(content['options']['validation_fraction'])}"
    if content["packer"] not in _PACKERS:
        return f"the packer is {_shown(content['packer'])}"
    for entry in content["inputs"]:
        is_named = type(entry["name"]) is str and _SHA256.fullmatch(entry["sha256"])
        if not (is_named and is_count(entry["bytes"]) and is_count(entry["documents"])):
            return f"the input {_shown(entry['name'])} is misstated"
    ids = content["unused_ids"]
    if type(ids) is not list or not all(map(is_count, ids)) or ids != sorted(set(ids)):
        return "unused_ids are not ascending ids"
    if not all(map(is_count, content["totals"].values())):
        return "a total is not a count"
    return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
