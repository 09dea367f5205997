"""`megamask data stats|find|export CORPUS`: what a corpus holds, where a document is, its files for other programs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamask.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument(
        "what", choices=("stats", "find", "export"), help="statistics; rows and steps of a document; export"
    )
    parser.add_argument("corpus", help="a prepared corpus")
    stats = parser.add_argument_group("stats")
    stats.add_argument("--html", metavar="FILE", help="write tables and plots to one file")
    stats.add_argument("--card", action="store_true", help="write the dataset card, CARD.md, beside the manifest")
    find = parser.add_argument_group("find")
    find.add_argument("--document", type=int, metavar="N", help="by number")
    find.add_argument("--text", metavar="FILE", help="by text: a file with exactly the document's")
    find.add_argument("--run", metavar="DIR", help="also the steps of this run that read it")
    export = parser.add_argument_group("export")
    export.add_argument("--megatron", metavar="PREFIX", help="write PREFIX.bin and PREFIX.idx, as Megatron reads them")
    export.add_argument("--split", default="train", help="split to export (default train)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Count, or find.

    Returns: of stats, `megamask.data.stats.corpus_stats`; of find, `documents`: array of number, input, split,
        first_row, last_row, rows and, with --run, `steps`; of export, documents, tokens, prefix.
    """
    folder = Path(arguments.corpus)
    if arguments.what == "find":
        from megamask_pipelines.find_document import find

        return find(folder, number=arguments.document, text=arguments.text, run=arguments.run)
    if arguments.what == "export":
        from megamask.data.megatron_files import export_megatron

        if not arguments.megatron:
            raise UsageError("`megamask data export` needs --megatron PREFIX. Nothing was written.")
        return export_megatron(folder, Path(arguments.megatron), arguments.split) | {"prefix": arguments.megatron}
    if arguments.document is not None or arguments.text or arguments.run:
        raise UsageError("--document, --text and --run belong to `megamask data find`. Nothing was read.")
    from megamask_pipelines.corpus_statistics import statistics

    return statistics(folder, html=arguments.html, writes_card=arguments.card)


def render(result: Mapping[str, Any]) -> str:
    """A line a source, or a line a document."""
    if "prefix" in result:
        prefix = result["prefix"]
        return f"{result['documents']} documents, {result['tokens']} tokens are in {prefix}.bin and {prefix}.idx"
    if "documents" in result:
        lines = [
            f"document {found['number']} ({found['input']}, {found['split']}): rows {found['first_row']} to "
            f"{found['last_row']}"
            + (f", steps {', '.join(map(str, found['steps'])) or 'none'}" if "steps" in found else "")
            for found in result["documents"]
        ]
        return "\n".join(lines) or "no document of the corpus has this text"
    lines = [
        f"{name}: {values['documents']} documents, {values['text_bytes']} bytes, {values['tokens']} tokens, "
        f"{values['bytes_per_token']} bytes per token"
        for name, values in list(result["sources"].items())[:50]
    ]
    if len(result["sources"]) > len(lines):
        lines.append(f"{len(result['sources']) - len(lines)} more; --json lists all")
    return "\n".join(lines)
