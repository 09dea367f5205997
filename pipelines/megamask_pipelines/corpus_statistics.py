"""The job of `megamask data stats`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megamask.data.manifest import PROVENANCE_NAME
from megamask.data.stats import corpus_stats
from megamask.data.stats_page import card, html_page
from megamask.storage.durable import write_atomic


def statistics(folder: Path, *, html: str | None, writes_card: bool) -> dict[str, Any]:
    """Count what a corpus holds, and write the page and the card that were asked for.

    Raises:
        UsageError, DataIntegrityError, StorageError: as `corpus_stats`, or a file cannot be written.
    """
    stats = corpus_stats(folder)
    if html is not None:
        write_atomic(Path(html), html_page(stats).encode())
    if writes_card:
        path = folder / PROVENANCE_NAME
        provenance = json.loads(path.read_bytes()) if path.is_file() else {}
        write_atomic(folder / "CARD.md", card(stats, provenance).encode())
    return stats
