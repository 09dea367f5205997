"""megatron-energon, where it is installed, reads our shards by the .tar.idx that is beside each."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from support.shards import packed_rows, random_documents, write_token_corpus


@pytest.mark.promise("megatron-energon reads every row of a corpus, with the tar indexes that are in it")
def test_energon_reads_every_row_and_agrees_with_the_tar_indexes(tmp_path: Path) -> None:
    energon = pytest.importorskip("megatron.energon", exc_type=ImportError)
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    documents, corpus = random_documents(60), tmp_path / "corpus"
    manifest = write_token_corpus(corpus, documents)
    names = [shard.name for shard in manifest.split("train").shards]
    ours = {name: (corpus / f"{name}.idx").read_bytes() for name in names}
    WebdatasetPreparator.prepare_dataset(corpus, names, split_parts_ratio=[("train", 1.0)], workers=1)
    assert {name: (corpus / f"{name}.idx").read_bytes() for name in names} == ours
    (corpus / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")

    class Rows(energon.DefaultTaskEncoder):  # type: ignore[name-defined, misc]
        """Keeps the sample as it is."""

        decoder = None
        cookers = [energon.Cooker(energon.stateless(lambda sample: sample))]  # noqa: RUF012

    dataset = energon.get_train_dataset(
        str(corpus),
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        repeat=False,
        task_encoder=Rows(),
    )
    rows = [
        row
        for sample in energon.get_loader(dataset)
        for row in np.load(io.BytesIO(sample["tokens.npy"]), allow_pickle=False).tolist()
    ]
    expected = packed_rows(documents, sequence_length=16, eod=61, pad=62)
    assert sorted(rows) == sorted(expected)
