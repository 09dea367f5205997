from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamask.data.manifest import Manifest
from megamask.errors import DataIntegrityError, ExitCode, UsageError
from megamask.storage.hashing import canonical_json, hash_of, sha256_bytes


def shard(split: str, number: int, rows: int) -> dict[str, Any]:
    digest = sha256_bytes(f"{split}{number}".encode())
    return {
        "name": f"shards/{split}-{number:06d}.tar",
        "sha256": digest,
        "bytes": 10240,
        "blocks": 1,
        "rows": rows,
        "index_sha256": digest,
        "tar_index_sha256": digest,
    }


def split(name: str, *rows: int) -> dict[str, Any]:
    return {
        "documents": 2,
        "text_bytes": 30,
        "tokens": sum(rows) * 16 - 3,
        "sequences": sum(rows),
        "padding": 3,
        "blocks": len(rows),
        "shards": [shard(name, number, count) for number, count in enumerate(rows)],
    }


def content() -> dict[str, Any]:
    return {
        "format": "megamask-corpus",
        "version": 1,
        "dtype": "uint16",
        "sequence_length": 16,
        "tokenizer": {
            "digest": "ab" * 32,
            "vocab_size": 300,
            "eod_token_id": 297,
            "pad_token_id": 298,
            "mask_token_id": 299,
        },
        "documents": {"digest": "cd" * 32, "tables": []},
        "splits": {"train": split("train", 4, 2), "validation": split("validation", 1)},
    }


def write(folder: Path, value: dict[str, Any]) -> Path:
    (folder / "manifest.json").write_bytes(canonical_json(value))
    return folder


def test_manifest_reads_back_with_its_bytes_digest_as_corpus_id(tmp_path: Path) -> None:
    manifest = Manifest.load(write(tmp_path, content()))
    assert manifest.corpus_id == sha256_bytes((tmp_path / "manifest.json").read_bytes())
    assert (manifest.sequence_length, manifest.vocab_size, manifest.dtype.str) == (16, 300, "<u2")
    assert (manifest.eod_token_id, manifest.pad_token_id, manifest.mask_token_id) == (297, 298, 299)
    train = manifest.split("train")
    assert (train.num_rows, train.num_blocks, train.num_tokens, train.num_documents) == (6, 2, 93, 2)
    assert train.shards[1].index_name == "shards/train-000001.idx"
    assert train.to_json() == content()["splits"]["train"]


def test_source_digest_is_of_the_shards_in_order(tmp_path: Path) -> None:
    manifest = Manifest.load(write(tmp_path, content()))
    first, second = (entry.sha256 for entry in manifest.split("train").shards)
    assert manifest.source_digest("train") == hash_of(first, second)
    assert manifest.source_digest("train") != hash_of(second, first)


def test_missing_split_is_a_usage_error_that_names_the_key(tmp_path: Path) -> None:
    value = content()
    del value["splits"]["validation"]
    with pytest.raises(UsageError, match="no split 'validation'; it has: train") as caught:
        Manifest.load(write(tmp_path, value)).split("validation")
    assert "corpus.validation_fraction" in str(caught.value.hint)


def test_folder_without_manifest_is_a_usage_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UsageError, match="not a prepared corpus"):
            Manifest.load(folder)


def test_other_format_is_damage_and_a_newer_version_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(DataIntegrityError, match="has format 'other', not 'megamask-corpus'"):
        Manifest.load(write(tmp_path, content() | {"format": "other"}))
    with pytest.raises(UsageError, match="version 2"):
        Manifest.load(write(tmp_path, content() | {"version": 2}))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b'{"format": "megamask-corpus", "version": 1}', b"[" * 100_000])
def test_damaged_bytes_are_a_data_error(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(DataIntegrityError) as caught:
        Manifest.load(tmp_path)
    assert caught.value.exit_code == ExitCode.DATA_INTEGRITY


def test_bytes_that_are_not_canonical_are_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(canonical_json(content()) + b"\n")
    with pytest.raises(DataIntegrityError, match="canonical"):
        Manifest.load(tmp_path)


CONTRADICTIONS: dict[str, Callable[[dict[str, Any]], object]] = {
    "vocabulary too large": lambda m: m["tokenizer"].update(vocab_size=70000),
    "unknown dtype": lambda m: m.update(dtype="float32"),
    "equal ids": lambda m: m["tokenizer"].update(mask_token_id=298),
    "id outside": lambda m: m["tokenizer"].update(mask_token_id=300),
    "no train split": lambda m: m["splits"].pop("train"),
    "unknown split": lambda m: m["splits"].update(test=m["splits"]["train"]),
    "sequence length": lambda m: m.update(sequence_length=0),
    "traversal name": lambda m: m["splits"]["train"]["shards"][0].update(name="../train-000000.tar"),
    "duplicate shard": lambda m: m["splits"]["train"]["shards"].append(m["splits"]["train"]["shards"][0]),
    "row count": lambda m: m["splits"]["train"].update(sequences=7),
    "block count": lambda m: m["splits"]["train"].update(blocks=7),
    "token count": lambda m: m["splits"]["train"].update(tokens=7),
    "digest": lambda m: m["tokenizer"].update(digest="xyz"),
    "shard digest": lambda m: m["splits"]["train"]["shards"][0].update(sha256="A" * 64),
    "missing field": lambda m: m.pop("tokenizer"),
    "unknown shard field": lambda m: m["splits"]["train"]["shards"][0].update(path="/etc/passwd"),
    "wrong type": lambda m: m["splits"]["train"]["shards"][0].update(rows="4"),
    "negative count": lambda m: m["splits"]["train"].update(documents=-1),
    "count that is no number": lambda m: m["splits"]["validation"]["shards"][0].update(rows=True),
    "splits a list": lambda m: m.update(splits=[]),
}


@pytest.mark.parametrize("name", sorted(CONTRADICTIONS))
def test_manifest_that_contradicts_itself_is_a_data_error(name: str, tmp_path: Path) -> None:
    value = content()
    CONTRADICTIONS[name](value)
    with pytest.raises(DataIntegrityError, match=r"manifest\.json"):
        Manifest.load(write(tmp_path, value))
