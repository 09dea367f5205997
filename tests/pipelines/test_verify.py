"""The verb verify: what it calls, what it returns and what a person reads."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest

from megamask.data.manifest import Manifest
from megamask.errors import DataIntegrityError, ExitCode, UsageError
from megamask_pipelines.cli import verify as cli
from support.shards import flip_bit
from support.tiny_run import write_corpus


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("verb"), sequence_length=16, documents=3, validation_fraction=0.0)


def verify(*arguments: object, as_json: bool = True) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    parsed = parser.parse_args([str(argument) for argument in arguments])
    parsed.json = as_json
    return cli.run(parsed)


@pytest.mark.parametrize("as_json", [True, False])
def test_whole_corpus_is_reported(prepared: Path, as_json: bool) -> None:
    report = verify("corpus", prepared, as_json=as_json)
    assert report["ok"] is True
    assert report["corpus_id"] == Manifest.load(prepared).corpus_id
    text = cli.render(report)
    assert text.startswith("intact: ")
    assert f"documents {report['documents']}" in text


def test_damaged_corpus_ends_with_64(prepared: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(prepared, tmp_path / "damaged"))
    flip_bit(damaged / "shards" / "train-000000.tar", 640 + 40)
    with pytest.raises(DataIntegrityError, match="row 1 of the block") as caught:
        verify("corpus", damaged)
    assert caught.value.exit_code == ExitCode.DATA_INTEGRITY


@pytest.mark.parametrize("what", ["corpus", "checkpoint"])
def test_missing_folder_is_a_usage_error(tmp_path: Path, what: str) -> None:
    with pytest.raises(UsageError, match="nowhere is not a folder"):
        verify(what, tmp_path / "nowhere")


def test_other_things_cannot_be_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        verify("moon", tmp_path)
    assert "corpus" in capsys.readouterr().err
