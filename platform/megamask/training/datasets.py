"""Datasets of a run, as the journal names them and MLflow shows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamask.data.loader import Loader
from megamask.data.manifest import PROVENANCE, PROVENANCE_NAME
from megamask.errors import MegamaskError
from megamask.storage.documents import read_document
from megamask.storage.ranges import is_remote


def _origin(folder: Path) -> dict[str, Any]:
    """Return origin and licence of a corpus' inputs; empty where its provenance cannot be read."""
    try:
        provenance = read_document(PROVENANCE, folder / PROVENANCE_NAME)
        return {name: provenance.get(name) for name in ("origin", "licence")}
    except MegamaskError:
        return {}


def described_datasets(loaders: Mapping[str, Loader | None]) -> list[dict[str, Any]]:
    """The splits that an attempt reads.

    Args:
        loaders: by split, "train" or "validation"; one that is not read is None.

    Returns:
        For each split: name (of the corpus in data.corpora), split, corpus_id, source (the corpus' folder, absolute),
        rows, tokens (eligible ones), sequence_length, tokenizer_digest.
    """
    described = []
    for split, loader in loaders.items():
        if loader is None:
            continue
        for source in loader.sources.values():
            manifest = source.manifest
            entry = manifest.split(split)
            excluded = loader.quarantined.get(source.name)
            described.append(
                {
                    "name": source.name,
                    "split": split,
                    "corpus_id": manifest.corpus_id,
                    "source": source.location if is_remote(source.location) else str(source.folder.absolute()),
                    "rows": entry.num_rows,
                    "tokens": entry.num_tokens,
                    "text_bytes": entry.text_bytes,
                    **_origin(source.folder),
                    "sequence_length": manifest.sequence_length,
                    "tokenizer_digest": manifest.tokenizer_digest,
                }
                | ({} if excluded is None else {"quarantined_rows": excluded.tolist()})
            )
    return described
