"""One hypothesis profile for everybody: derandomized, so that a green suite stays green."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "megamask",
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("megamask")


TEXTS = 40


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of small text files: 300 entries, rows of 64 tokens, a validation split; read-only for tests."""
    from support.command import ROOT, megamask

    folder = tmp_path_factory.mktemp("small_corpus")
    (folder / "texts").mkdir()
    sources = sorted((ROOT / "platform" / "megamask").rglob("*.py"))
    for number in range(TEXTS):
        text = sources[number % len(sources)].read_text(encoding="utf-8")
        (folder / "texts" / f"{number:03d}.txt").write_text(f"# text {number}\n{text[:2000]}", encoding="utf-8")
    done = megamask(
        "prepare",
        ROOT / "configs" / "corpus" / "python_stdlib.yaml",
        f"corpus.inputs=[{folder}/texts/*.txt]",
        f"corpus.output_dir={folder}/corpus",
        "corpus.tokenizer.vocab_size=300",
        "corpus.sequence_length=64",
        "corpus.validation_fraction=0.1",
        "corpus.rows_per_block=16",
        "--json",
    )
    assert done.code == 0, done.stderr
    return folder / "corpus"
