"""verify corpus: passes an intact corpus, and names the first damage or lie of any other."""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megamask.config.schema.corpus import TokenizerConfig
from megamask.data.corpus.pack import RowGroup
from megamask.data.corpus.prepare import build
from megamask.data.corpus.shard import ShardWriter
from megamask.data.index import ShardIndex, pack_tar_index
from megamask.data.manifest import Manifest
from megamask.data.verify import verify_corpus
from megamask.errors import DataIntegrityError, ExitCode, UsageError
from megamask.storage.hashing import canonical_json, sha256_file
from support.shards import flip_bit
from support.texts import corpus_config

WORDS = ("alpha", "beta", "gamma", "delta", "h\u00e9\u00e9", "\u65e5\u672c")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    generator = random.Random(1)
    for number in range(9):
        text = " ".join(generator.choice(WORDS) for _ in range(generator.randrange(60)))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    changes = {"validation_fraction": 0.3, "tokenizer": TokenizerConfig(vocab_size=264)}
    build(corpus_config([str(folder / "*.txt")], folder / "corpus", **changes))
    return folder / "corpus"


@pytest.fixture
def corpus(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "corpus"))


def refused(corpus: Path, match: str) -> None:
    with pytest.raises(DataIntegrityError, match=match) as caught:
        verify_corpus(corpus)
    assert caught.value.exit_code == ExitCode.DATA_INTEGRITY


def content_of(corpus: Path) -> dict[str, Any]:
    return dict(json.loads((corpus / "manifest.json").read_bytes()))


def forge(corpus: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest as a buggy writer would: canonical, with provenance and sums that fit."""
    content = content_of(corpus)
    change(content)
    (corpus / "manifest.json").write_bytes(canonical_json(content))
    (corpus / "provenance.json").unlink(missing_ok=True)


def rewrite_shard(corpus: Path, change: Callable[[int, RowGroup], RowGroup | None]) -> None:
    """Writes the training shards again with some blocks changed, all checksums and digests true."""
    manifest = Manifest.load(corpus)
    blocks = []
    for entry in manifest.split("train").shards:
        index = ShardIndex.unpack((corpus / entry.index_name).read_bytes(), name="index")
        with tarfile.open(corpus / entry.name) as tar:
            for number in range(index.first_block, index.first_block + index.num_blocks):
                tokens, docs = (
                    np.load(io.BytesIO(tar.extractfile(f"{number:06d}.{kind}.npy").read()))  # type: ignore[union-attr]
                    for kind in ("tokens", "docs")
                )
                blocks.append(RowGroup(tokens=tokens, docs=docs))
        for name in (entry.name, entry.index_name, entry.tar_index_name):
            (corpus / name).unlink()
    writer = ShardWriter(corpus, "train", blocks_per_shard=3, sequence_length=16, itemsize=2)
    for number, block in enumerate(blocks):
        changed = change(number, block)
        writer.add(block if changed is None else changed)
    writer.finish()
    forge(corpus, lambda content: content["splits"]["train"].update(shards=[vars(shard) for shard in writer.shards]))


def put_token(block: int, row: int, position: int, token: int) -> Callable[[int, RowGroup], RowGroup | None]:
    def change(number: int, given: RowGroup) -> RowGroup | None:
        if number == block:
            given.tokens[row, position] = token
        return given

    return change


def test_whole_corpus_passes_and_is_counted(prepared: Path) -> None:
    manifest = Manifest.load(prepared)
    seen: list[tuple[int, int]] = []
    report = verify_corpus(prepared, lambda done, total: seen.append((done, total)))
    totals = manifest.content["totals"]
    assert report == {
        "corpus_id": sha256_file(prepared / "manifest.json"),
        "rows": totals["sequences"],
        "documents": totals["documents"],
        "tokens": totals["tokens"],
        "shards": totals["shards"],
        "blocks": sum(split.num_blocks for split in manifest.splits.values()),
        "bytes": sum(shard.bytes for split in manifest.splits.values() for shard in split.shards),
        "faults": [],
        "ok": True,
    }
    assert report["shards"] > 3
    assert seen[-1] == (report["rows"], report["rows"])
    assert seen == sorted(set(seen))


def test_rewriting_the_shards_unchanged_passes(corpus: Path) -> None:
    rewrite_shard(corpus, lambda _number, _block: None)
    assert verify_corpus(corpus)["ok"] is True


def test_flipped_bit_in_a_row_names_shard_member_and_row(corpus: Path) -> None:
    entry = Manifest.load(corpus).split("train").shards[1]
    index = ShardIndex.unpack((corpus / entry.index_name).read_bytes(), name="index")
    flip_bit(corpus / entry.name, int(index.blocks["tokens_offset"][1]) + 2 * 32 + 5)
    refused(corpus, r"train-000001\.tar: member 000004\.tokens\.npy, row 2 of the block: crc32c is")


@pytest.mark.promise("verify finds any flipped byte of a shard")
def test_every_flipped_byte_of_a_shard_is_found(corpus: Path) -> None:
    path = corpus / "shards" / "train-000000.tar"
    size = path.stat().st_size
    for offset in [*range(0, 700, 23), *range(700, size, size // 40), size - 1]:
        flip_bit(path, offset, offset % 8)
        refused(corpus, r"train-000000\.tar")
        flip_bit(path, offset, offset % 8)
    assert verify_corpus(corpus)["ok"] is True


@pytest.mark.parametrize(
    "name",
    [
        "shards/train-000000.idx",
        "shards/train-000000.tar.idx",
        "shards/validation-000000.tar",
        "documents/000000.parquet",
        "tokenizer/tokenizer.json",
        "tokenizer/special_tokens.json",
        "manifest.json",
    ],
)
@pytest.mark.parametrize("where", [0.1, 0.5, 0.97])
def test_flipped_bit_in_any_file_is_found(corpus: Path, name: str, where: float) -> None:
    path = corpus / name
    flip_bit(path, int(path.stat().st_size * where), 1)
    with pytest.raises((DataIntegrityError, UsageError), match=Path(name).parts[0].removesuffix(".json")):
        verify_corpus(corpus)


@pytest.mark.parametrize(
    "name",
    ["shards/train-000001.tar", "shards/train-000001.idx", "shards/train-000001.tar.idx", "documents/000000.parquet"],
)
def test_missing_file_is_named(corpus: Path, name: str) -> None:
    (corpus / name).unlink()
    refused(corpus, f"{name} is missing, but the manifest names it")


@pytest.mark.parametrize("name", ["shards/train-000099.tar", "documents/000009.parquet", "tokenizer/merges.txt"])
def test_file_that_the_manifest_does_not_name_is_refused(corpus: Path, name: str) -> None:
    (corpus / name).write_bytes(b"")
    refused(corpus, f"{name} is not named by the manifest")


@pytest.mark.parametrize("name", ["shards/train-000000.tar", "tokenizer/tokenizer.json", "provenance.json"])
def test_link_is_refused_even_to_the_right_bytes(corpus: Path, tmp_path: Path, name: str) -> None:
    (corpus / name).rename(tmp_path / "elsewhere")
    (corpus / name).symlink_to(tmp_path / "elsewhere")
    refused(corpus, f"{name} is a link")


def test_documents_table_outside_the_corpus_is_refused(corpus: Path) -> None:
    forge(corpus, lambda content: content["documents"]["tables"][0].update(name="../elsewhere.parquet"))
    refused(corpus, r"'\.\./elsewhere\.parquet' leads out of the corpus")


def test_manifest_in_another_form_is_refused(corpus: Path) -> None:
    (corpus / "manifest.json").write_text(json.dumps(content_of(corpus), indent=1))
    refused(corpus, "canonical")


def test_provenance_of_another_corpus_is_refused(corpus: Path) -> None:
    (corpus / "provenance.json").write_bytes(
        canonical_json({"format": "megamask-corpus-provenance", "version": 1, "corpus_id": "0" * 64})
    )
    refused(corpus, "provenance.json is about corpus 0000")


def test_mask_id_in_a_row_is_refused(corpus: Path) -> None:
    mask = Manifest.load(corpus).mask_token_id
    rewrite_shard(corpus, put_token(2, 1, 7, mask))
    refused(corpus, r"000002\.tokens\.npy, row 1 of the block, position 7: the mask id")


def test_id_outside_the_vocabulary_is_refused(corpus: Path) -> None:
    rewrite_shard(corpus, put_token(1, 0, 3, 60000))
    refused(corpus, r"000001\.tokens\.npy, row 0 of the block, position 3: an id outside the vocabulary")


def test_padding_before_the_last_row_is_refused(corpus: Path) -> None:
    rewrite_shard(corpus, put_token(0, 3, 2, Manifest.load(corpus).pad_token_id))
    refused(corpus, r"000000\.tokens\.npy, row 3 of the block, position 2: padding")


def test_end_of_document_in_the_wrong_place_is_refused(corpus: Path) -> None:
    rewrite_shard(corpus, put_token(0, 0, 1, Manifest.load(corpus).eod_token_id))
    refused(corpus, r"row 0 of the block, position \d+: a document's end misplaced")


@pytest.mark.parametrize("column", [0, 1, 2])
def test_document_table_of_a_block_is_compared_with_the_documents(corpus: Path, column: int) -> None:
    def change(number: int, block: RowGroup) -> RowGroup:
        if number == 1:
            block.docs[-1, column] += 1
        return block

    rewrite_shard(corpus, change)
    refused(corpus, r"member 000001\.docs\.npy does not list the documents")


def test_row_of_nothing_but_padding_is_refused(corpus: Path) -> None:
    manifest = Manifest.load(corpus)
    last = manifest.split("train").num_blocks - 1

    def lengthen(number: int, block: RowGroup) -> RowGroup | None:
        if number != last:
            return None
        row = np.full((1, 16), manifest.pad_token_id, dtype=block.tokens.dtype)
        return RowGroup(tokens=np.concatenate([block.tokens, row]), docs=block.docs)

    rewrite_shard(corpus, lengthen)

    def count(content: dict[str, Any]) -> None:
        split = content["splits"]["train"]
        split.update(sequences=split["sequences"] + 1, padding=split["padding"] + 16)
        content["totals"]["sequences"] += 1

    forge(corpus, count)  # the counts agree with the shards; only the documents' lengths mean that a row is too many
    refused(corpus, r"split train has \d+ rows; its documents fill")


def test_row_that_omits_a_document_it_begins_inside_is_refused(corpus: Path) -> None:
    rewrite_shard(
        corpus, lambda number, block: RowGroup(tokens=block.tokens, docs=block.docs[1:]) if number == 1 else None
    )
    refused(corpus, r"member 000001\.docs\.npy")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda content: content["unused_ids"].pop(), "unused_ids"),
        (lambda content: content["totals"].update(tokens=1), "totals"),
        (lambda content: content["inputs"][0].update(documents=2), "inputs or tables"),
        (lambda content: content["splits"]["train"].update(documents=99), "split train has other documents"),
        (lambda content: content["options"].update(validation_fraction="0.9"), "in the wrong split"),
        (lambda content: content["tokenizer"].update(eod_token_id=5), r"\(vocab_size, eod, pad, mask\)"),
        (lambda content: content["documents"].update(digest="0" * 64), "digest of its content"),
        (lambda content: content["tokenizer"].update(digest="0" * 64), "tokenizer: its digest"),
    ],
)
def test_manifest_that_lies_is_refused(corpus: Path, change: Callable[[dict[str, Any]], object], match: str) -> None:
    forge(corpus, change)
    refused(corpus, match)


def test_documents_table_with_a_gap_is_refused(corpus: Path) -> None:
    path = corpus / "documents" / "000000.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table.slice(0, 2), table.slice(3)]), path)
    forge(corpus, lambda content: content["documents"]["tables"][0].update(documents=table.num_rows - 1))
    refused(corpus, "the row of document 2")


def test_tar_index_of_other_offsets_is_refused(corpus: Path) -> None:
    path = corpus / "shards" / "train-000000.tar.idx"
    path.write_bytes(pack_tar_index([0, 512, 1024], 2048))
    digest = sha256_file(path)
    forge(corpus, lambda content: content["splits"]["train"]["shards"][0].update(tar_index_sha256=digest))
    refused(corpus, r"train-000000\.tar\.idx: its offsets")


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_folder_that_is_no_corpus_is_a_usage_error(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "x")
    with pytest.raises(UsageError, match="x is not a") as caught:
        verify_corpus(tmp_path / "x")
    assert caught.value.exit_code == ExitCode.USAGE


def test_corpus_of_a_newer_version_is_a_usage_error(corpus: Path) -> None:
    forge(corpus, lambda content: content.update(version=2))
    with pytest.raises(UsageError, match="version 2"):
        verify_corpus(corpus)


def test_corpus_in_an_object_store_is_refused() -> None:
    with pytest.raises(UsageError, match="s3://bucket/corpus is in an object store"):
        verify_corpus("s3://bucket/corpus")
