"""Steps of datatrove pipelines make the corpus that `prepare` makes of the same documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megamask.data import Corpus
from megamask.data.corpus.prepare import build
from megamask.data.manifest import Manifest

pytest.importorskip("datatrove", exc_type=ImportError)

CONFIG = """
corpus:
  inputs: ["{folder}/documents/*.jsonl"]
  output_dir: {folder}/corpus
  sequence_length: 16
  validation_fraction: 0.1
  rows_per_block: 4
  tokenizer:
    vocab_size: 300
"""


def documents(number: int) -> list[Any]:
    from datatrove.data import Document

    texts = [f"task {number}, text {count}: " + "wörter und words " * (count % 7 + 1) for count in range(9)]
    return [Document(text=text, id=f"{number}-{count}") for count, text in enumerate([*texts, "", "\x00 nul"])]


@pytest.mark.promise("a datatrove pipeline writes the corpus that prepare makes of its documents")
def test_datatrove_pipeline_makes_the_corpus_of_prepare(tmp_path: Path) -> None:
    from datatrove.executor import LocalPipelineExecutor

    from megamask.data.datatrove import CorpusTask, PublishCorpus, WriteDocuments

    config = tmp_path / "corpus.yaml"
    config.write_text(CONFIG.format(folder=tmp_path))
    for number in range(2):
        assert len(list(WriteDocuments(tmp_path / "documents").run(documents(number), number, 2))) == 11
    lines = (tmp_path / "documents" / "00001.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"1-{count}" for count in range(11)]
    steps = [([CorpusTask(config)], 3), ([PublishCorpus(config)], 1)]
    for stage, (pipeline, tasks) in enumerate(steps):
        logs = str(tmp_path / f"logs-{stage}")
        LocalPipelineExecutor(pipeline=pipeline, tasks=tasks, workers=1, logging_dir=logs).run()
    made = Manifest.load(tmp_path / "corpus")
    plain = CorpusTask(config, [f"corpus.output_dir={tmp_path}/plain"])._load()
    build(plain)
    assert Manifest.load(tmp_path / "plain").corpus_id == made.corpus_id
    assert len(Corpus.open(tmp_path / "corpus")) > 10


def test_interrupted_task_leaves_no_half_file(tmp_path: Path) -> None:
    from megamask.data.datatrove import WriteDocuments

    writing = WriteDocuments(tmp_path / "documents").run(documents(0), 0, 1)
    next(iter(writing))
    assert list((tmp_path / "documents").glob("*.jsonl")) == []
