"""Preparation of small corpora in tests."""

from __future__ import annotations

from pathlib import Path

from megamask.data.corpus.prepare import PrepareReport, build
from support.texts import corpus_config, write_inputs


def prepared(folder: Path, **changes: object) -> tuple[PrepareReport, Path]:
    inputs = write_inputs(folder / "inputs")
    report = build(corpus_config(inputs, folder / "corpus", **changes))
    return report, folder / "corpus"


def assert_nothing_is_left(folder: Path) -> None:
    assert [path.name for path in folder.iterdir() if path.name != "inputs"] == []
