"""What a run reads, as the journal names it and MLflow shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamask.data.loader import Loader


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
        manifest = loader.manifest
        entry = manifest.split(split)
        described.append(
            {
                "name": loader.source,
                "split": split,
                "corpus_id": manifest.corpus_id,
                "source": str(loader.folder.absolute()),
                "rows": entry.num_rows,
                "tokens": entry.num_tokens,
                "sequence_length": manifest.sequence_length,
                "tokenizer_digest": manifest.tokenizer_digest,
            }
        )
    return described
