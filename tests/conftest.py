"""One hypothesis profile for everybody: derandomized, so that a green suite stays green."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A suite that is started with nohup ignores SIGHUP, and every process that a test starts would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# One that a shell starts in the background ignores SIGINT, and so would they.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "megamask",
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("megamask")


WORDS = ("def", "return", "self", "for", "in", "range", "if", "not", "None", "value", "index", "token", "mask", "noise")


def text_of(number: int) -> str:
    """A text that is the same on every machine: lines of a few words, indented like code."""
    generator = random.Random(number)
    lines = [f"# text {number}"]
    while sum(map(len, lines)) < 1800:
        words = " ".join(generator.choices(WORDS, k=generator.randint(2, 7)))
        lines.append("    " * generator.randint(0, 2) + f"{words} = {generator.randint(0, 99)}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 40 small texts: 300 entries, rows of 64 tokens, a validation split; read-only for tests."""
    from support.command import ROOT, megamask

    folder = tmp_path_factory.mktemp("small_corpus")
    (folder / "texts").mkdir()
    for number in range(40):
        (folder / "texts" / f"{number:03d}.txt").write_text(text_of(number), encoding="utf-8")
    done = megamask(
        "prepare",
        ROOT / "configs" / "corpus" / "python_stdlib.yaml",
        f"corpus.inputs=['{folder}/texts/*.txt']",
        f"corpus.output_dir={folder}/corpus",
        "corpus.tokenizer.vocab_size=300",
        "corpus.sequence_length=64",
        "corpus.validation_fraction=0.1",
        "corpus.rows_per_block=16",
        "--json",
    )
    assert done.code == 0, done.stderr
    return folder / "corpus"


@pytest.fixture(scope="session")
def journalled_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of two attempts beside its corpus in `data`, written without a network; read-only for tests."""
    from support.journalled_run import write_journalled_run
    from support.tiny_run import write_corpus

    folder = tmp_path_factory.mktemp("journalled")
    return write_journalled_run(folder, write_corpus(folder / "data"))


@pytest.fixture(scope="session")
def job_of_the_session() -> Iterator[None]:
    """Leave the job at the end, if a test has joined one."""
    from megamask.engine.process_group import destroy_process_group

    yield
    destroy_process_group()


@pytest.fixture
def job(job_of_the_session: None) -> None:
    """A job of one process. Engines of one layout share its groups.

    Joined anew where a command that ran in this process has left it.
    """
    from megamask.engine.backend import select_backend
    from megamask.engine.mesh import ProcessGroups
    from megamask.engine.process_group import init_process_group, is_joined

    if not is_joined():
        ProcessGroups.release()
        init_process_group(select_backend())


@pytest.fixture
def build(job: None) -> Any:
    """Makes engines on one process."""
    from support.engine_cases import make_engine

    return make_engine
