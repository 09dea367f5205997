"""Corpora in an object store: the rows of the local ones, for any reply of the store; a real S3 server process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from megamask.config.schema.data import DataConfig
from megamask.data import Corpus
from megamask.data.block_cache import BlockCache
from megamask.data.loader import Loader
from megamask.errors import DataIntegrityError, ExitCode, StorageError, UsageError
from megamask.storage import ranges
from megamask.storage.ranges import RemoteFolder
from support.shards import flip_bit, random_documents, write_token_corpus

pytest.importorskip("obstore")
pytest.importorskip("moto")

SERVER = Path(__file__).parents[1] / "support" / "s3_server.py"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local") / "corpus"
    write_token_corpus(folder, random_documents(30, seed=4))
    return folder


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory, local: Path) -> Iterator[str]:
    port_file = tmp_path_factory.mktemp("s3") / "port"
    process = subprocess.Popen([sys.executable, str(SERVER), str(port_file)], stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        try:
            while not (port_file.exists() and port_file.read_text()):
                assert process.poll() is None
                time.sleep(0.05)
            url = f"http://127.0.0.1:{port_file.read_text()}"
            for name, value in {
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_REGION": "us-east-1",
                "AWS_ALLOW_HTTP": "true",
            }.items():
                patch.setenv(name, value)
            _request(f"{url}/bucket", "PUT")
            for path in local.rglob("*"):
                if path.is_file():
                    _request(f"{url}/bucket/corpus/{path.relative_to(local).as_posix()}", "PUT", path.read_bytes())
            yield url
        finally:
            process.kill()
            process.wait()


def _request(url: str, method: str, data: bytes | None = None) -> bytes:
    headers = {
        "Authorization": "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request",
        "Content-Type": "application/octet-stream",
    }
    request = urllib.request.Request(url, data=data, method=method, headers=headers)
    with urllib.request.urlopen(request) as reply:
        return bytes(reply.read())


def spoil(endpoint: str, kind: str, count: int) -> None:
    _request(f"{endpoint}/_faults?kind={kind}&count={count}", "POST", b"")


def gets(endpoint: str) -> int:
    return int(_request(f"{endpoint}/_faults", "GET"))


def open_loader(root: str, cache: Path) -> Loader:
    data = DataConfig(corpora={"main": root}, cache_dir=str(cache), shuffle_window_blocks=3)
    return Loader(data.corpora, data, 16)


def rows_of(root: str, cache: Path) -> list[list[int]]:
    with open_loader(root, cache) as loader:
        loader.prefetch(0, loader.num_rows, range(loader.num_rows))
        return loader.batch(0, loader.num_rows, range(loader.num_rows)).tokens.tolist()


@pytest.mark.promise("a corpus in an object store gives the same batches as on local disk")
def test_remote_corpus_gives_the_batches_of_the_local_one(local: Path, endpoint: str, tmp_path: Path) -> None:
    expected = rows_of(str(local), tmp_path)
    before = gets(endpoint)
    assert rows_of("s3://bucket/corpus", tmp_path / "cache") == expected
    num_blocks = len(list((tmp_path / "cache" / "blocks").glob("*/*.bin")))
    assert gets(endpoint) == before + num_blocks  # one range a block
    assert rows_of("s3://bucket/corpus", tmp_path / "cache") == expected
    assert gets(endpoint) == before + num_blocks  # all of it from the cache


@pytest.mark.promise("errors, short, wrong and slow replies of an object store change nothing or stop the run")
@pytest.mark.parametrize("kind", ["error", "short", "wrong", "slow"])
def test_spoiled_replies_are_asked_for_again(local: Path, endpoint: str, tmp_path: Path, kind: str) -> None:
    spoil(endpoint, kind, 2)
    assert rows_of("s3://bucket/corpus", tmp_path / "cache") == rows_of(str(local), tmp_path)


def test_bytes_that_stay_wrong_are_an_integrity_error(endpoint: str, tmp_path: Path) -> None:
    spoil(endpoint, "wrong", 10_000)
    try:
        with pytest.raises(
            DataIntegrityError, match=r"s3://bucket/corpus/shards/train-.*member \d+\.tokens\.npy, byte"
        ):
            rows_of("s3://bucket/corpus", tmp_path / "cache")
        assert not list((tmp_path / "cache" / "blocks").glob("*/*.bin"))
    finally:
        spoil(endpoint, "error", 0)


def test_replies_that_stay_short_are_a_storage_error(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "_FIRST_PAUSE_S", 0.001)
    spoil(endpoint, "short", 10_000)
    try:
        with pytest.raises(StorageError, match=r"reading s3://bucket/corpus/shards/train-") as caught:
            rows_of("s3://bucket/corpus", tmp_path / "cache")
        assert caught.value.exit_code == ExitCode.STORAGE
    finally:
        spoil(endpoint, "error", 0)


def test_dead_endpoint_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(ranges, "_RETRY_TIMEOUT_S", 1)
    with pytest.raises(StorageError, match="Nothing of it was used"):
        open_loader("http://127.0.0.1:9/corpus", tmp_path)


def test_folder_without_a_corpus_is_refused(endpoint: str, tmp_path: Path) -> None:
    del endpoint
    with pytest.raises(UsageError, match=r"s3://bucket/nothing is not a prepared corpus"):
        open_loader("s3://bucket/nothing", tmp_path)


def test_credentials_in_a_url_are_refused() -> None:
    with pytest.raises(UsageError, match="credentials come from the environment"):
        RemoteFolder("s3://key:secret@bucket/corpus")


def test_damaged_block_of_the_cache_is_fetched_again(local: Path, endpoint: str, tmp_path: Path) -> None:
    expected = rows_of("s3://bucket/corpus", tmp_path / "cache")
    for path in (tmp_path / "cache" / "blocks").glob("*/*.bin"):
        flip_bit(path, 3)
    before = gets(endpoint)
    assert rows_of("s3://bucket/corpus", tmp_path / "cache") == expected == rows_of(str(local), tmp_path)
    assert gets(endpoint) > before


def test_corpus_by_url_is_a_sequence_of_its_rows(
    local: Path, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del endpoint
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [row.tolist() for row in Corpus.open("s3://bucket/corpus")] == [row.tolist() for row in Corpus.open(local)]


def test_cache_stays_within_its_bytes_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "blocks", 10_000)
    for block in range(100):
        os.close(cache.open("a" * 64, block, lambda: bytes(1000)))
    cache.shrink()
    kept = {path.name for path in (tmp_path / "blocks").glob("*/*")}
    assert "99.bin" in kept
    assert 1 <= len(kept) <= 10


def test_block_removed_while_it_is_open_stays_readable(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "blocks", 1)
    descriptor = cache.open("a" * 64, 0, lambda: b"block")
    cache.shrink()
    assert os.pread(descriptor, 9, 0) == b"block"
    os.close(descriptor)
    assert not list((tmp_path / "blocks").glob("*/*"))
