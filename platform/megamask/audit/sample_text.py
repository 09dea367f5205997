"""Recomputed samples as text for people: their words, their masked tokens, the inputs of their documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamask.data.loader import Loader
from megamask.data.source import Source

_MASK_SIGN = "░"


def add_text(samples: list[dict[str, Any]], loader: Loader) -> None:
    """Add to each sample its text with masked tokens as blocks, and the names of the inputs of its documents."""
    names = {}
    for name, source in loader.sources.items():
        own = [sample for sample in samples if sample["source"] == name]
        names[name] = _input_names(source, {document["number"] for sample in own for document in sample["documents"]})
    for sample in samples:
        sample["text"] = _text(sample, loader)
        for document in sample["documents"]:
            document["input"] = names[sample["source"]].get(document["number"], "unknown")


def _input_names(source: Source, numbers: set[int]) -> dict[int, str]:
    import pyarrow.parquet as pq

    names: dict[int, str] = {}
    first = 0
    for table in source.manifest.content["documents"]["tables"]:
        wanted = sorted(number for number in numbers if first <= number < first + table["documents"])
        first += table["documents"]
        if wanted:
            rows = pq.read_table(
                source.folder / table["name"], columns=["number", "input"], filters=[("number", "in", wanted)]
            )
            names |= dict(zip(rows["number"].to_pylist(), rows["input"].to_pylist(), strict=True))
    return names


def _text(sample: Mapping[str, Any], loader: Loader) -> str:
    """The row's text; a masked token is as many blocks as it has bytes, and never shows."""
    tokenizer = loader.tokenizer
    masked = set(sample.get("masked", ()))
    parts: list[str] = []
    visible: list[int] = []
    for position, token in enumerate(sample["tokens"]):
        if token == tokenizer.pad_token_id:
            break
        if position not in masked:
            visible.append(token)
            continue
        parts.append(tokenizer.decode(visible))
        visible = []
        parts.append(_MASK_SIGN * max(1, tokenizer.token_bytes[token]))
    parts.append(tokenizer.decode(visible))
    return "".join(parts)
