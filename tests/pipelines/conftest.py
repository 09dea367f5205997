"""Bad input: a working folder of mistakes, and the command that must refuse them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from megamask_pipelines.cli import main as cli
from support.command import TINY, command, environment
from support.refusals import STDLIB, Refuse, check_assurance, check_refusal, limit_files, snapshot


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a text, an empty file, a folder of something else, and configs with mistakes."""
    folder = tmp_path / "place"
    (folder / "folder").mkdir(parents=True)
    (folder / "folder" / "thesis.tex").write_text("x")
    (folder / "text.txt").write_text("some text, and some more")
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "bad_train.yaml").write_text(f"defaults: ['{TINY}']\n\ntraining:\n  stepps: 3\n")
    (folder / "bad_prepare.yaml").write_text(f"defaults: ['{STDLIB}']\ncorpus:\n  sequence_lenght: 3\n")
    (folder / "bad_type.yaml").write_text(f"defaults: ['{TINY}']\ntraining:\n  steps: many\n")
    (folder / "broken.yaml").write_text("training: [\n")
    (folder / "alone.yaml").write_text("training:\n  steps: 3\n")
    (folder / "lost.yaml").write_text("defaults:\n  - nope.yaml\n")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RANK", raising=False)
    return folder


@pytest.fixture
def refuse(place: Path, small_corpus: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Runs a command that must be refused, as JSON, and returns what it wrote to stderr."""

    def run(*arguments: object, code: int = 2, says: tuple[str, ...] = (), assures: bool = True) -> str:
        watched = (place, small_corpus)
        before = snapshot(*watched)
        capsys.readouterr()
        ended = cli.main([*map(str, arguments), "--json"])
        written = capsys.readouterr()
        check_refusal(ended, written.out, written.err, code, says)
        if assures:
            check_assurance(written.err)
        assert snapshot(*watched) == before
        return written.err

    return run


@pytest.fixture
def damaged(place: Path, small_corpus: Path) -> Path:
    """A copy of the corpus to damage."""
    return Path(shutil.copytree(small_corpus, place / "damaged"))


@pytest.fixture
def refuse_outside(place: Path, small_corpus: Path) -> Refuse:
    """As `refuse`, in a process of its own."""

    def run(*arguments: object, code: int, says: tuple[str, ...], file_bytes: int | None = None) -> str:
        before = snapshot(place, small_corpus)
        done = subprocess.run(
            command(*arguments, "--json"),
            capture_output=True,
            text=True,
            timeout=240,
            env=environment(),
            cwd=place,
            check=False,
            preexec_fn=None if file_bytes is None else lambda: limit_files(file_bytes),
        )
        check_refusal(done.returncode, done.stdout, done.stderr, code, says)
        assert snapshot(place, small_corpus) == before
        return done.stderr

    return run
