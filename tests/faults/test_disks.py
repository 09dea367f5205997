"""Storage that refuses: a full disk, a file-size limit, a read-only place. 74, nothing published, and a resume after.

A small tmpfs represents the disk where the tests run as root; elsewhere those tests are skipped and report it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megamask.config.schema.data import DataConfig
from megamask.data.loader import Loader
from megamask.errors import StorageError
from megamask.tracking.journal.chain import verify_chain
from megamask_pipelines.cli import main as cli
from support.command import ROOT, Result, checkpoints, command, environment, journal, step_lines, tiny
from support.tiny_run import write_corpus

STEPS = "training.steps=100000"
RARELY = "checkpoint.every_steps=1000000"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_corpus: Path) -> Path:
    """A run that stopped after two steps, with a commit; read-only for tests."""
    runs = tmp_path_factory.mktemp("disks")
    done = train(small_corpus, runs, stop=2)
    assert done.code == 0, done.stderr
    return runs / "run"


def train(corpus: Path, runs: Path, *overrides: str, stop: int, limit: Callable[[], None] | None = None) -> Result:
    arguments = tiny(corpus, runs, "run", STEPS, RARELY, f"training.stop_after_step={stop}", *overrides)
    done = subprocess.run(
        command("train", *arguments, "--json"),
        capture_output=True,
        text=True,
        timeout=280,
        env=environment(),
        check=False,
        preexec_fn=limit,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts small disks, and takes them away again."""
    mounted: list[Path] = []

    def mount(num_bytes: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={num_bytes}"]
        done = subprocess.run(["mount", *options, "tmpfs", str(folder)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(
                f"only root can mount a small disk: what a really full or read-only one does is unproven here "
                f"({done.stderr.strip()})"
            )
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.fixture
def read_only(disk: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """Copies a folder to a place that takes nothing more: a disk mounted so, or without the rights to write."""
    locked: list[Path] = []

    def copy(source: Path) -> Path:
        if os.geteuid() == 0:  # who may write anywhere
            folder = Path(shutil.copytree(source, disk(32 << 20), dirs_exist_ok=True))
            remount(folder, "ro")
            return folder
        folder = Path(shutil.copytree(source, tmp_path / "locked"))
        locked.extend((folder, *(path for path in folder.rglob("*") if path.is_dir())))
        for path in locked:
            path.chmod(0o555)
        return folder

    yield copy
    for path in locked:
        path.chmod(0o755)


def fill(folder: Path, *, leaving: int) -> Path:
    """A file that takes all but this many bytes of a disk."""
    place = folder / "filler"
    place.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    with place.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - leaving)
    return place


def is_refused(done: Result, *words: str) -> None:
    """74, with one error, and no trace."""
    assert done.code == 74, done.stderr
    assert done.json["exit_code"] == 74
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert any(word in done.json["error"] for word in words), done.stderr
    assert "again" in done.json["hint"]


def is_whole(run_dir: Path, step: int, whole: Path) -> None:
    """The newest commit is of this step and verifies; what was journalled is chained and equals another run's steps."""
    assert checkpoints(run_dir)[-1].name.startswith(f"step-{step:08d}")
    for folder in checkpoints(run_dir):
        assert cli.main(["verify", "checkpoint", str(folder)]) == 0
    assert verify_chain(run_dir) == []
    expected = step_lines(whole)
    assert {number: line for number, line in step_lines(run_dir).items() if number in expected} == expected


# Training.


@pytest.mark.promise(
    "a full disk during journalling and saving ends with 74, keeps the last commit, and the run resumes when "
    "there is space"
)
@pytest.mark.multiprocess
def test_run_that_met_a_full_disk_while_journalling_and_while_saving_resumes_when_there_is_space(
    trained: Path, small_corpus: Path, disk: Callable[..., Path]
) -> None:
    runs = disk(8 << 20)
    run_dir = Path(shutil.copytree(trained, runs / "run"))
    fill(runs, leaving=96 << 10)
    is_refused(train(small_corpus, runs, stop=90000), "the disk is full", "the storage is full")
    is_whole(run_dir, 2, trained)
    journalled = max(step_lines(run_dir))
    assert journalled > 2, "the disk was full before the first step"
    fill(runs, leaving=600 << 10)
    is_refused(train(small_corpus, runs, stop=3), "the disk is full", "the storage took no more")
    is_whole(run_dir, 2, trained)
    assert [path for path in (run_dir / "checkpoints").iterdir() if path.is_dir()] == checkpoints(run_dir)
    (runs / "filler").unlink()
    done = train(small_corpus, runs, stop=3)
    assert (done.code, done.json["step"]) == (0, 3), done.stderr
    is_whole(run_dir, 3, trained)


@pytest.mark.promise("a file-size limit has the same effect as a full disk")
@pytest.mark.multiprocess
def test_file_size_limit_while_saving_leaves_the_last_commit_and_resumes_without_it(
    trained: Path, small_corpus: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    done = train(small_corpus, tmp_path, stop=3, limit=lambda: limit_file_size(60_000))
    is_refused(done, "file-size limit")
    is_whole(run_dir, 2, trained)
    assert json.loads((run_dir / "status.json").read_text())["exit_code"] == 74
    done = train(small_corpus, tmp_path, stop=3)
    assert (done.code, done.json["step"]) == (0, 3), done.stderr
    is_whole(run_dir, 3, trained)


@pytest.mark.promise("a file-size limit has the same effect as a full disk")
@pytest.mark.slow
@pytest.mark.multiprocess
def test_file_size_limit_while_journalling_ends_with_74_and_no_torn_line(
    trained: Path, small_corpus: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    done = train(small_corpus, tmp_path, stop=90000, limit=lambda: limit_file_size(60_000))
    is_refused(done, "file-size limit", "the storage is full")
    assert "journal" in done.json["error"]
    is_whole(run_dir, 2, trained)
    assert max(step_lines(run_dir)) > 2
    done = train(small_corpus, tmp_path, stop=3)
    assert (done.code, done.json["step"]) == (0, 3), done.stderr
    assert [record["incident"] for record in journal(run_dir) if record["kind"] == "incident"] == []


def limit_file_size(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


@pytest.mark.promise("a read-only folder ends with 74 and nothing changes; reading requires no writing")
@pytest.mark.multiprocess
def test_read_only_output_ends_with_74_and_changes_nothing(
    trained: Path, small_corpus: Path, read_only: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = read_only(trained.parent)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in runs.rglob("*")}
    for name in ("run", "new"):
        capsys.readouterr()
        arguments = tiny(small_corpus, runs, name, STEPS, RARELY, "training.stop_after_step=3", "--json")
        is_refused(Result(cli.main(["train", *arguments]), *capsys.readouterr()), "read-only", "permission denied")
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in runs.rglob("*")} == before


# Preparing, in this process.


def prepare(text: Path, output_dir: Path, capsys: pytest.CaptureFixture[str]) -> Result:
    capsys.readouterr()
    overrides = [
        f"corpus.inputs=['{text}']",
        f"corpus.output_dir={output_dir}",
        "corpus.validation_fraction=0.3",
        "corpus.sequence_length=32",
        "corpus.tokenizer.vocab_size=270",
    ]
    config = str(ROOT / "configs" / "corpus" / "python_stdlib.yaml")
    code = cli.main(["prepare", config, *overrides, "--json"])
    return Result(code, *capsys.readouterr())


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_corpus(folder)
    return folder / "texts"


@pytest.mark.promise("preparing onto a full disk ends with 74 and leaves nothing")
def test_preparing_onto_a_full_disk_ends_with_74_and_leaves_nothing(
    texts: Path, disk: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = disk(1 << 20)
    for leaving in (0, 4 << 10, 16 << 10, 32 << 10, 64 << 10):
        fill(folder, leaving=leaving)
        is_refused(prepare(texts / "*.txt", folder / "corpus", capsys), "the disk is full")
        assert [path.name for path in folder.iterdir() if path.suffix != ".lock"] == ["filler"]
    (folder / "filler").unlink()
    assert prepare(texts / "*.txt", folder / "corpus", capsys).code == 0
    assert cli.main(["verify", "corpus", str(folder / "corpus")]) == 0


@pytest.mark.promise("a read-only folder ends with 74 and nothing changes; reading requires no writing")
def test_preparing_into_a_read_only_place_ends_with_74(
    texts: Path, read_only: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = read_only(texts)
    before = sorted(folder.rglob("*"))
    for name in ("corpus", "deep/corpus"):
        is_refused(prepare(texts / "*.txt", folder / name, capsys), "read-only", "permission denied")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.promise("a read-only folder ends with 74 and nothing changes; reading requires no writing")
@pytest.mark.multiprocess
def test_reading_a_run_from_a_read_only_place_needs_no_writing(
    trained: Path, read_only: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = read_only(trained.parent) / "run"
    for verb in (["status"], ["verify", "checkpoint"], ["inspect", "--step", "1"], ["evaluate", "--rows", "1"]):
        assert cli.main([*verb, str(run_dir)]) == 0, capsys.readouterr().err


@pytest.mark.promise("a shard that the device does not return is a storage error (74), not damage")
@pytest.mark.multiprocess
def test_shard_that_the_device_does_not_give_is_the_storage_s_fault(
    trained: Path, small_corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For every reader: evaluate, inspect, and training's loader, whose reading ahead fails in a thread."""

    def preadv(*_arguments: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", preadv)
    for arguments in (["evaluate", "--corpus", str(small_corpus)], ["inspect", "--step", "1"]):
        capsys.readouterr()
        code = cli.main([arguments[0], str(trained), *arguments[1:], "--json"])
        is_refused(Result(code, *capsys.readouterr()), "the device reports an input/output error")
    with contextlib.closing(Loader({"main": str(small_corpus)}, DataConfig(corpora={}), 64)) as loader:
        loader.prefetch(0, 4, range(4))
        with pytest.raises(StorageError, match="the device reports an input/output error"):
            loader.batch(0, 4, range(4))
