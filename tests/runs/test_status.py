from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamask.errors import UsageError
from megamask.runs.status import Status, read_status, write_status

WRONG = b'{"format":"megamask-status","version":1,"attempt":1,"phase":"done","journal":5}'


def test_status_reads_back_what_was_written(tmp_path: Path) -> None:
    write_status(tmp_path, Status(attempt=1, phase="running", step=3))
    status = Status(
        attempt=2, phase="preempted", exit_code=75, step=7, node="n1", reason="SIGTERM", journal=[9, "ab"], time="t"
    )
    write_status(tmp_path, status)
    assert read_status(tmp_path) == status
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_status_time_is_filled_in(tmp_path: Path) -> None:
    write_status(tmp_path, Status(attempt=1, phase="starting"))
    status = read_status(tmp_path)
    assert status is not None
    assert status.time is not None
    assert status.time.endswith("Z")


def test_status_refuses_an_unknown_phase(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="starting, running, done"):
        write_status(tmp_path, Status(attempt=1, phase="sleeping"))  # type: ignore[arg-type]
    assert read_status(tmp_path) is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"format":"x"}', b'{"format":"megamask-status","version":1}', WRONG]
)
def test_damaged_status_reads_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "status.json").write_bytes(content)
    assert read_status(tmp_path) is None


def test_status_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    write_status(tmp_path, Status(attempt=1, phase="done"))
    content = json.loads((tmp_path / "status.json").read_bytes())
    (tmp_path / "status.json").write_text(json.dumps({**content, "version": 2}))
    with pytest.raises(UsageError, match="version 2"):
        read_status(tmp_path)
