"""A small corpus to tamper with, and the verb that must refuse it."""

from __future__ import annotations

import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from megamask.config.schema.corpus import TokenizerConfig
from megamask.data.corpus.prepare import build
from megamask_pipelines.cli import main as cli
from support.refusals import snapshot
from support.texts import corpus_config

MAX_MEMORY = 64 << 20


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile_corpus")
    generator = random.Random(5)
    for number in range(6):
        text = " ".join(generator.choice(("alpha", "beta", "gamma")) for _ in range(40))
        (folder / f"{number}.txt").write_text(text)
    changes = {"validation_fraction": 0.3, "blocks_per_shard": 2, "tokenizer": TokenizerConfig(vocab_size=264)}
    build(corpus_config([str(folder / "*.txt")], folder / "corpus", **changes))
    return folder / "corpus"


@pytest.fixture
def corpus(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return Path(shutil.copytree(prepared, tmp_path / "corpus"))


@pytest.fixture
def refused(corpus: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`megamask verify corpus` must end with 64, in little memory, and leave nothing behind."""

    def run(*words: str, code: int = 64) -> str:
        before = snapshot(corpus.parent)
        tracemalloc.start()
        try:
            ended = cli.main(["verify", "corpus", str(corpus), "--json"])
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        error = capsys.readouterr().err
        assert ended == code, error
        assert error.startswith("error: "), error
        assert "Traceback" not in error
        for word in words:
            assert word in error, error
        assert peak < MAX_MEMORY
        assert snapshot(corpus.parent) == before
        return error

    return run
