"""Fault points: nothing happens unless this very process armed one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megamask.storage import fault_points
from megamask.storage.durable import create_exclusive, write_atomic


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    fault_points.disarm()


@pytest.mark.promise("fault points do nothing unless this process armed one")
def test_point_that_nobody_armed_does_nothing() -> None:
    fault_points.arm("another.point", lambda: pytest.fail("it is another point"))
    fault_points.reached("some.point")


def test_armed_point_acts_every_time_until_it_is_disarmed() -> None:
    seen: list[str] = []
    fault_points.arm("some.point", lambda: seen.append("armed"))
    fault_points.follow(seen.append)
    fault_points.reached("some.point")
    fault_points.reached("some.point")
    fault_points.disarm()
    fault_points.reached("some.point")
    assert seen == ["armed", "some.point"] * 2


def test_action_that_raises_reaches_the_caller() -> None:
    def refuse() -> None:
        raise OSError("the disk")

    fault_points.arm("some.point", refuse)
    with pytest.raises(OSError, match="the disk"):
        fault_points.reached("some.point")


def test_points_of_a_durable_file_lie_between_its_actions(tmp_path: Path) -> None:
    seen: list[tuple[str, list[str]]] = []

    def look(name: str) -> None:
        files = sorted(path.suffix if path.suffix == ".tmp" else path.name for path in tmp_path.iterdir())
        seen.append((name, files))

    fault_points.follow(look)
    create_exclusive(tmp_path / "claim.json", b"{}")
    assert seen == [
        ("claim.json.created", [".tmp"]),
        ("claim.json.written", [".tmp"]),
        ("claim.json.linked", [".tmp", "claim.json"]),
        ("claim.json.temporary_removed", ["claim.json"]),
        ("claim.json.flushed", ["claim.json"]),
    ]
    (tmp_path / "claim.json").unlink()
    seen.clear()
    write_atomic(tmp_path / "latest", b"x")
    assert seen == [
        ("latest.created", [".tmp"]),
        ("latest.written", [".tmp"]),
        ("latest.replaced", ["latest"]),
        ("latest.flushed", ["latest"]),
    ]


def test_file_is_the_old_or_the_new_one_when_its_write_fails_at_any_point(tmp_path: Path) -> None:
    def refuse() -> None:
        raise OSError(28, "No space left on device")

    for point in ("created", "written", "replaced"):
        path = tmp_path / point
        write_atomic(path, b"old")
        fault_points.arm(f"{point}.{point}", refuse)
        with pytest.raises(Exception, match="the disk is full"):
            write_atomic(path, b"new")
        fault_points.disarm()
        assert path.read_bytes() == (b"new" if point == "replaced" else b"old")
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


@pytest.mark.promise("fault points do nothing unless this process armed one")
def test_no_environment_variable_or_setting_arms_a_point() -> None:
    source = Path(fault_points.__file__).read_text()
    imported = "import sys; import megamask.storage.fault_points as f; print(len(f._followers), 'os' in vars(f))"
    done = subprocess.run([sys.executable, "-c", imported], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False"]
    assert "environ" not in source
