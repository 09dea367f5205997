from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megamask.errors import StorageError
from megamask.storage import durable
from megamask.storage.durable import (
    create_exclusive,
    fsync_directory,
    fsync_file,
    make_folders,
    storage_errors,
    write_atomic,
)
from support.disk_model import ROOT, replay
from support.disk_recorder import Recorder


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("data", [b"", b"x", b"\0" * 100_000])
def test_write_atomic_creates_and_replaces_whole_files(tmp_path, data):
    path = tmp_path / "file"
    write_atomic(path, b"old content")
    write_atomic(path, data)
    assert path.read_bytes() == data
    assert names(tmp_path) == ["file"]


def test_reader_sees_the_old_or_the_new_content_never_a_mixture(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([letter]) * 50_000 for letter in b"abcd"]
    write_atomic(path, contents[0])
    seen, done = set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(10):
        for data in contents:
            write_atomic(path, data)
    done.set()
    reader.join()
    assert seen <= set(contents)


def test_create_exclusive_writes_the_whole_content(tmp_path):
    create_exclusive(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert names(tmp_path) == ["file"]


def test_create_exclusive_leaves_what_is_there_alone(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"first")
    with pytest.raises(FileExistsError):
        create_exclusive(path, b"second")
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["file"]


def test_create_exclusive_does_not_follow_a_dangling_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        create_exclusive(tmp_path / "link", b"content")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.promise("a folder that contains durable files is itself durable after a power cut")
def test_folders_and_those_above_them_are_found_again_after_a_crash(tmp_path):
    (tmp_path / "there").mkdir()
    recorder = Recorder(tmp_path)
    with recorder.recording():
        make_folders(tmp_path / "there" / "a" / "b")
        make_folders(tmp_path / "there" / "a" / "b")
    disk = replay(recorder.ops, recorder.folders)
    assert list(disk.possible_trees(ROOT)) == [{"there": {"a": {"b": {}}}}]


@pytest.mark.parametrize("name", ["file", "file/deep/er"])
def test_folders_are_not_made_where_a_file_is_in_the_way(tmp_path, name):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileExistsError):
        make_folders(tmp_path / name)
    assert names(tmp_path) == ["file"]


def race(path: str, number: int, barrier, winners) -> None:
    barrier.wait()
    try:
        create_exclusive(Path(path), str(number).encode() * 1000)
    except FileExistsError:
        return
    winners.put(number)


def test_exactly_one_of_many_threads_creates_the_file(tmp_path):
    import queue

    for attempt in range(10):
        barrier, winners = threading.Barrier(8), queue.Queue()
        path = tmp_path / str(attempt)
        threads = [threading.Thread(target=race, args=(str(path), n, barrier, winners)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert winners.qsize() == 1
        assert path.read_bytes() == str(winners.get()).encode() * 1000
    assert names(tmp_path) == [str(attempt) for attempt in range(10)]


@pytest.mark.promise("exactly one of many processes creates a file")
def test_exactly_one_of_many_processes_creates_the_file(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, winners = context.Barrier(4), context.Queue()
    path = tmp_path / "file"
    processes = [context.Process(target=race, args=(str(path), n, barrier, winners)) for n in range(4)]
    for process in processes:
        process.start()
    winner = winners.get(timeout=30)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert winners.empty()
    assert path.read_bytes() == str(winner).encode() * 1000
    assert names(tmp_path) == ["file"]


LIMITED = """
import resource, signal, sys
from pathlib import Path
from megamask.errors import StorageError
from megamask.storage.durable import {function}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    {function}(Path(sys.argv[1]), b"n" * 100_000)
except StorageError as error:
    print(int(error.exit_code), error.message)
"""


@pytest.mark.parametrize("function", ["write_atomic", "create_exclusive"])
def test_limit_on_file_size_is_a_storage_error_and_nothing_changes(tmp_path, function):
    (tmp_path / "old").write_bytes(b"old content")
    target = tmp_path / ("old" if function == "write_atomic" else "new")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(function=function), str(target)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.startswith("74 "), done.stderr
    assert "the file-size limit is reached" in done.stdout
    assert str(target) in done.stdout
    assert "Nothing was published." in done.stdout
    assert names(tmp_path) == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old content"


@pytest.mark.parametrize("call", ["fsync", "link", "replace"])
def test_failure_of_any_stage_leaves_no_trace(tmp_path, monkeypatch, call):
    def fail(*_arguments, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "old").write_bytes(b"old content")
    monkeypatch.setattr(durable.os, call, fail) if call != "replace" else monkeypatch.setattr(Path, "replace", fail)
    functions = {"fsync": (write_atomic, create_exclusive), "link": (create_exclusive,), "replace": (write_atomic,)}
    for function in functions[call]:
        target = tmp_path / ("old" if function is write_atomic else "new")
        with pytest.raises(StorageError, match="the disk is full"):
            function(target, b"new content")
    assert names(tmp_path) == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old content"


def test_content_is_flushed_before_its_name_is_seen_and_the_folder_after(tmp_path, monkeypatch):
    events: list[str] = []
    real_fsync, real_link, real_replace = os.fsync, os.link, Path.replace

    def fsync(descriptor: int) -> None:
        events.append("folder" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "file")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", lambda *a: (events.append("visible"), real_link(*a)))
    monkeypatch.setattr(Path, "replace", lambda *a: (events.append("visible"), real_replace(*a)))
    create_exclusive(tmp_path / "a", b"1")
    write_atomic(tmp_path / "b", b"2")
    assert events == ["file", "visible", "folder"] * 2


@pytest.mark.parametrize("number", sorted(durable._STORAGE_ERRNOS))
def test_errors_of_the_storage_name_action_and_reason(number):
    with pytest.raises(StorageError) as caught, storage_errors("writing the thing"):
        raise OSError(number, os.strerror(number), "some/file")
    assert caught.value.message.startswith("writing the thing: ")
    assert "(some/file)" in caught.value.message
    assert isinstance(caught.value.__cause__, OSError)


def test_errors_that_storage_is_not_to_blame_for_pass_unchanged():
    for error in (FileNotFoundError(errno.ENOENT, "x"), OSError("without number"), ValueError("other")):
        with pytest.raises(type(error)) as caught, storage_errors("writing"):
            raise error
        assert caught.value is error


def test_missing_folder_is_the_callers_mistake(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "none" / "file", b"x")
    with pytest.raises(FileNotFoundError):
        fsync_file(tmp_path / "none")
    with pytest.raises(NotADirectoryError):
        (tmp_path / "file").write_bytes(b"x")
        fsync_directory(tmp_path / "file")


def test_flushing_accepts_what_is_there(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    fsync_file(tmp_path / "file")
    fsync_directory(tmp_path)
    assert (tmp_path / "file").read_bytes() == b"x"
