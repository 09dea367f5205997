"""A corpus as plain PyTorch users read it: the WebDataset library's standard pipeline over the shards.

    from megamask.data.webdataset import pipeline

    for sample in torch.utils.data.DataLoader(pipeline("corpora/main", "train"), batch_size=None, num_workers=2):
        sample["tokens.npy"], sample["docs.npy"]  # one shard block: [rows, L] token ids, [n, 3] document starts

Nothing of it checks the bytes, resumes, or keeps an order when the number of workers changes: training reads a corpus
by its index instead (`megamask.data.loader`).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from megamask.data.manifest import open_corpus
from megamask.errors import UsageError


def pipeline(corpus: str | Path, split: str = "train", *, shuffle: int = 0, seed: int = 0) -> Any:
    """The `webdataset.WebDataset` of a split's shard blocks.

    Args:
        corpus: a prepared corpus.
        split: "train" or "validation".
        shuffle: shard blocks of the library's shuffle buffer; 0 keeps the stored order.
        seed: of that shuffle.

    Returns:
        an iterable dataset of dictionaries: `__key__`, the number of the shard block; `tokens.npy`, [rows, L] uint16 or
        uint32; `docs.npy`, int64 [n, 3] of (row in the block, start in the row, document number). It is split over the
        ranks of torch.distributed and over the workers of a DataLoader by shard.

    Raises:
        UsageError: the folder is not a corpus, or has no such split; the library cannot open its path.
        DataIntegrityError: its manifest is damaged.
    """
    import webdataset

    folder = Path(corpus)
    shards = open_corpus(folder, "the corpus").split(split).shards
    urls = [str((folder / shard.name).absolute()) for shard in shards]
    if any(urlsplit(url).path != url for url in urls):
        raise UsageError(
            f"the path of the corpus {folder} contains ? or #, at which the WebDataset library cuts it off. "
            "Nothing was read.",
            hint="rename the folder, or name it by a link without these characters",
        )
    dataset = webdataset.WebDataset(
        urls,
        shardshuffle=len(urls) if shuffle else False,
        nodesplitter=webdataset.split_by_node,
        seed=seed,
        empty_check=False,
    )
    if shuffle:
        dataset = dataset.shuffle(shuffle, seed=seed)
    return dataset.map(_arrays)


def _arrays(sample: dict[str, Any]) -> dict[str, Any]:
    """Decode the .npy members; the library's own decoder would also run pickles."""
    return {
        name: np.load(io.BytesIO(value), allow_pickle=False) if name.endswith(".npy") else value
        for name, value in sample.items()
        if name in ("__key__", "tokens.npy", "docs.npy")
    }
