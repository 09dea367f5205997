"""The fault table: for any damage of a shard, reading gives the right rows or names the damage, never others."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megamask.config.schema.data import DataConfig
from megamask.data.corpus.prepare import build
from megamask.data.index import ShardIndex
from megamask.data.loader import Loader
from megamask.errors import DataIntegrityError
from megamask_pipelines.cli import main as cli
from support.shards import flip_bit
from support.texts import corpus_config, write_inputs

SHARD = "shards/train-000001.tar"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    build(corpus_config(write_inputs(folder / "inputs"), folder / "corpus"))
    return folder / "corpus"


@pytest.fixture
def corpus(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "corpus"))


def index_of(corpus: Path) -> ShardIndex:
    path = (corpus / SHARD).with_suffix(".idx")
    return ShardIndex.unpack(path.read_bytes(), name=path.name)


def data_bit(corpus: Path) -> None:
    flip_bit(corpus / SHARD, int(index_of(corpus).blocks["tokens_offset"][1]) + 37, 2)


def documents_bit(corpus: Path) -> None:
    flip_bit(corpus / SHARD, int(index_of(corpus).blocks["docs_offset"][1]) + 1, 2)


def truncated(corpus: Path) -> None:
    os.truncate(corpus / SHARD, (corpus / SHARD).stat().st_size // 2)


def zeroed(corpus: Path) -> None:
    data = (corpus / SHARD).read_bytes()
    (corpus / SHARD).write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def deleted(corpus: Path) -> None:
    (corpus / SHARD).unlink()


def header_name(corpus: Path) -> None:
    flip_bit(corpus / SHARD, int(index_of(corpus).blocks["tokens_offset"][1]) - 640, 0)


def header_size(corpus: Path) -> None:
    flip_bit(corpus / SHARD, int(index_of(corpus).blocks["tokens_offset"][1]) - 640 + 130, 0)


def index_bit(corpus: Path) -> None:
    flip_bit((corpus / SHARD).with_suffix(".idx"), 70, 1)


def read_everything(corpus: Path) -> list[list[int]]:
    corpora = {"main": str(corpus)}
    with Loader(corpora, DataConfig(corpora=corpora), 16) as loader:
        return loader.batch(0, loader.num_rows, range(loader.num_rows)).tokens.tolist()


@pytest.mark.promise("no damage of a shard changes what is trained on: it is detected and named, or without effect")
@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (data_bit, r"member 00000\d\.tokens\.npy, row \d of the block \(row \d+ of split train\), byte \d+"),
        (documents_bit, r"member 00000\d\.docs\.npy.*byte \d+"),
        (truncated, r"has \d+ bytes, the manifest has \d+"),
        (zeroed, r"member 00000\d\.(tokens|docs)\.npy.*byte \d+"),
        (deleted, "is missing, but the manifest names it"),
        (index_bit, r"train-000001\.idx: sha256 is"),
        (header_name, None),
        (header_size, None),
    ],
)
def test_training_reads_the_right_rows_or_names_the_damage(
    sound: Path, corpus: Path, damage: Callable[[Path], None], named: str | None
) -> None:
    expected = read_everything(sound)
    damage(corpus)
    if named is None:
        assert read_everything(corpus) == expected
        return
    with pytest.raises(DataIntegrityError, match=rf"train-000001.*{named}|{named}") as caught:
        read_everything(corpus)
    assert "train-000001" in str(caught.value)
    assert int(caught.value.exit_code) == 64


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (data_bit, "tokens"),
        (documents_bit, "documents"),
        (truncated, "size"),
        (zeroed, "archive"),
        (deleted, "missing"),
        (index_bit, "index"),
        (header_name, "archive"),
        (header_size, "archive"),
    ],
)
def test_verify_lists_every_damaged_place(
    corpus: Path, damage: Callable[[Path], None], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    index = index_of(corpus)
    damage(corpus)
    assert cli.main(["verify", "corpus", str(corpus), "--json"]) == 64
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    faults = answer["faults"]
    assert {"shards", "blocks", "bytes"} <= set(answer)
    assert kind in {fault["kind"] for fault in faults}
    assert {fault["shard"] for fault in faults} == {SHARD}
    assert {index.first_block <= fault["block"] < index.first_block + index.num_blocks for fault in faults} == {True}
    if damage is data_bit:
        assert [(fault["block"], fault["offset"]) for fault in faults] == [
            (index.first_block + 1, int(index.blocks["tokens_offset"][1]) + 32)
        ]
    if damage is zeroed:
        assert len(faults) >= 2


def test_verify_of_a_sound_corpus_counts_and_lists_nothing(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "corpus", str(sound), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["faults"] == []
    assert answer["bytes"] == sum(path.stat().st_size for path in (sound / "shards").glob("*.tar"))
    assert answer["shards"] == len(list((sound / "shards").glob("*.tar")))
