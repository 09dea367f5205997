from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megamask.data.manifest import Manifest
from megamask.data.reader import SplitReader
from megamask.data.webdataset import pipeline
from megamask.errors import UsageError
from support.shards import random_documents, write_token_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_token_corpus(tmp_path / "c: 1%", random_documents(60), validation=random_documents(9, seed=1))
    return tmp_path / "c: 1%"


@pytest.mark.promise("plain PyTorch users read every row of a corpus with the WebDataset library")
@pytest.mark.parametrize("workers", [0, 2])
def test_pipeline_gives_every_row_of_the_split(corpus: Path, workers: int) -> None:
    reader = SplitReader(corpus, Manifest.load(corpus), "train")
    loader = torch.utils.data.DataLoader(pipeline(corpus, "train"), batch_size=None, num_workers=workers)
    blocks = {int(sample["__key__"]): sample for sample in loader}
    rows = np.concatenate([np.asarray(blocks[number]["tokens.npy"]) for number in sorted(blocks)])
    assert np.array_equal(rows, [reader.read(row).tokens for row in range(reader.num_rows)])
    first = np.asarray(blocks[0]["docs.npy"])
    assert first[first[:, 0] == 1, 1:].tolist() == reader.read(1).documents.tolist()


def test_pipeline_shuffles_by_its_seed_and_loses_nothing(corpus: Path) -> None:
    def keys(**options: int) -> list[str]:
        return [sample["__key__"] for sample in pipeline(corpus, "train", **options)]

    stored, one, again, other = keys(), keys(shuffle=50, seed=1), keys(shuffle=50, seed=1), keys(shuffle=50, seed=2)
    assert sorted(one) == sorted(other) == sorted(stored) == stored
    assert one == again
    assert len({tuple(order) for order in (stored, one, other)}) == 3


def test_pipeline_of_a_missing_split_or_corpus_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no split 'test'"):
        pipeline(corpus, "test")
    with pytest.raises(UsageError, match="not a folder"):
        pipeline(tmp_path / "gone")
    (tmp_path / "what?").symlink_to(corpus)
    with pytest.raises(UsageError, match=r"contains \? or #"):
        pipeline(tmp_path / "what?")
