"""The statistics of a corpus as one HTML file and as a dataset card in Markdown; neither needs anything else."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

_STYLE = (
    "body{font:15px sans-serif;max-width:60em;margin:2em auto}table{border-collapse:collapse}"
    "td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}"
    "rect{fill:#4477aa}text{font-size:12px}"
)
_BAR, _LABEL, _WIDTH = 18, 220, 480  # pixels


def html_page(stats: Mapping[str, Any]) -> str:
    """The page of `corpus_stats`: tables, and bars for lengths, sources, duplicates and token frequencies."""
    sources, tokens = stats["sources"], stats["tokens"]
    columns = ("documents", "text_bytes", "tokens", "bytes_per_token")
    duplicates = stats["duplicates"]
    frequent = [(json.dumps(entry["text"], ensure_ascii=False), entry["count"]) for entry in tokens["most_frequent"]]
    parts = [
        f"<h1>Corpus {stats['corpus_id'][:16]}</h1>",
        f"<p>{stats['vocab_size']} vocabulary entries, {tokens['unused']} of them in no document; rows of "
        f"{stats['sequence_length']} tokens. Duplicates: {duplicates['documents']} documents, "
        f"{duplicates['text_bytes']} bytes.</p>",
        "<h2>Splits</h2>",
        _table("split", stats["splits"]),
        "<h2>Sources</h2>",
        _table("source", {name: {column: values[column] for column in columns} for name, values in sources.items()}),
        _bars([(name, values["tokens"]) for name, values in sources.items()][:100]),
        "<h2>Left out while it was prepared</h2>" if stats["steps"] else "",
        _table(
            "step",
            {
                step["name"]: {"documents": step["documents"], "text_bytes": step["text_bytes"]}
                for step in stats["steps"]
            },
        )
        if stats["steps"]
        else "",
        "<h2>Lengths of documents, tokens</h2>",
        _bars(list(stats["lengths"].items())),
        f"<h2>Most frequent tokens in {tokens['counted_rows']} rows</h2>",
        _bars(frequent),
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Corpus</title><style>{_STYLE}</style>\n{body}\n'
    )


def card(stats: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """The dataset card of a corpus.

    Args:
        stats: of `corpus_stats`.
        provenance: the content of provenance.json; empty where it was lost.
    """
    stated = {file.get("source", file["name"]): file for file in provenance.get("files", [])}
    lines = [
        "# Dataset card",
        "",
        f"- corpus id: `{stats['corpus_id']}`",
        f"- licence: {provenance.get('licence') or 'not stated'}",
        f"- origin: {provenance.get('origin') or 'not stated'}",
        f"- prepared: {provenance.get('prepared_at', 'unknown')}",
        f"- rows of {stats['sequence_length']} tokens, vocabulary of {stats['vocab_size']}",
        "",
        "| source | documents | bytes | tokens | bytes per token | licence | origin | version |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, values in stats["sources"].items():
        file = stated.get(name, {})
        facts = [file.get(key, "") for key in ("licence", "origin", "version")]
        counts = [values[key] for key in ("documents", "text_bytes", "tokens", "bytes_per_token")]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in (name, *counts, *facts)) + " |")
    for step in stats["steps"]:
        lines.append(f"\nLeft out by `{step['name']}`: {step['documents']} documents, {step['text_bytes']} bytes.")
    return "\n".join(lines) + "\n"


def _table(first: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    columns = list(next(iter(rows.values()))) if rows else []
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}" for name in (first, *columns))
    body = "".join(
        f"<tr><td>{html.escape(name)}" + "".join(f"<td>{values[column]}" for column in columns)
        for name, values in rows.items()
    )
    return f"<table><tr>{head}{body}</table>"


def _bars(values: Sequence[tuple[str, int]]) -> str:
    most = max((count for _, count in values), default=1) or 1
    rows = [
        f'<text x="0" y="{number * _BAR + 13}">{html.escape(name[:32])}</text>'
        f'<rect x="{_LABEL}" y="{number * _BAR + 2}" width="{max(1, count * _WIDTH // most)}" height="{_BAR - 4}"/>'
        f'<text x="{_LABEL + count * _WIDTH // most + 6}" y="{number * _BAR + 13}">{count}</text>'
        for number, (name, count) in enumerate(values)
    ]
    return f'<svg width="{_LABEL + _WIDTH + 90}" height="{len(values) * _BAR + 4}">{"".join(rows)}</svg>'
