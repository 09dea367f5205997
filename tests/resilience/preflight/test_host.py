"""Checks of a host: each passes on a sound one and fails on the fault that it is for."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from megamask.resilience.preflight import host
from megamask.resilience.preflight.finding import answers


def test_a_sound_host_passes_every_check(tmp_path: Path) -> None:
    found = answers(host.host_checks(tmp_path / "runs" / "not-there-yet"))
    assert {answer.name: answer.finding.message for answer in found if answer.finding.outcome == "fail"} == {}
    assert list(tmp_path.iterdir()) == []


def test_a_question_creates_no_folder_and_leaves_no_file(tmp_path: Path) -> None:
    host.storage(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_flushes_slowly_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_SLOW_FLUSH_S", 0.0)
    found = host.storage(tmp_path)
    assert found.outcome == "warn" and "commits will be slow" in found.message


def test_a_storage_without_exclusive_creation_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "create_exclusive", lambda path, data: path.write_bytes(data))
    found = host.storage(tmp_path)
    assert found.outcome == "fail" and "two processes" in found.message


def test_a_storage_that_cannot_be_written_fails_by_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(host, "create_exclusive", refuse)
    answer = answers(host.host_checks(tmp_path)[:1])[0]
    assert answer.finding.outcome == "fail" and "Read-only" in answer.finding.message
    assert list(tmp_path.iterdir()) == []


def test_too_little_free_space_fails_with_both_figures(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    found = host.free_space(tmp_path, free * 2)
    assert found.outcome == "fail" and found.values["needed_bytes"] == free * 2
    assert host.free_space(tmp_path, 1).outcome == "pass"


@pytest.mark.parametrize(("skew", "outcome"), [(-3600, "fail"), (3600, "fail"), (-5, "pass"), (5, "pass")])
def test_a_clock_that_is_off_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew: int, outcome: str) -> None:
    def create(path: Path, data: bytes) -> None:
        path.write_bytes(data)
        now = path.stat().st_mtime
        os.utime(path, (now + skew, now + skew))

    monkeypatch.setattr(host, "create_exclusive", create)
    assert host.clock(tmp_path).outcome == outcome


def test_small_shared_memory_fails_with_the_remedy_of_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_MIN_SHARED_MEMORY", 1 << 60)
    found = host.shared_memory()
    assert found.outcome == "fail" and "medium Memory" in found.message


def test_few_open_files_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.resource, "getrlimit", lambda what: (256, 1024))
    assert host.open_files().outcome == "warn"


def test_a_taken_port_fails() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen(1)
        assert host.free_port(taken.getsockname()[1]).outcome == "fail"
    assert host.free_port(None).outcome == "pass"


def test_names_that_do_not_resolve_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(name: str, port: object) -> list[object]:
        if name != "localhost":
            raise socket.gaierror("unknown")
        return []

    monkeypatch.setattr(host.socket, "getaddrinfo", resolve)
    assert host.network_name().outcome == "warn"
    monkeypatch.setattr(host.socket, "getaddrinfo", lambda name, port: resolve("other", port))
    assert host.network_name().outcome == "fail"
