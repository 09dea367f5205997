"""tools/coverage_floor.py adds up lines and branches by room and holds each room to its floor."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
TOOL = REPO / "tools" / "coverage_floor.py"


def load_tool():
    spec = importlib.util.spec_from_file_location("coverage_floor", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def entry(covered_lines: int, lines: int, covered_branches: int, branches: int) -> dict:
    counts = {
        "covered_lines": covered_lines,
        "num_statements": lines,
        "covered_branches": covered_branches,
        "num_branches": branches,
    }
    return {"summary": counts}


REPORT = {
    "files": {
        "platform/megamask/errors.py": entry(10, 10, 0, 0),
        "platform/megamask/data/order.py": entry(30, 40, 5, 10),
        "platform/megamask/data/corpus/pack.py": entry(40, 40, 10, 10),
        "platform/megamask/empty/__init__.py": entry(0, 0, 0, 0),
        "pipelines/megamask_pipelines/cli/train.py": entry(1, 4, 0, 0),
    }
}
COVERAGE = {"megamask": 100.0, "megamask/data": 85.0, "megamask_pipelines/cli": 25.0}


def test_lines_and_branches_are_added_up_by_room() -> None:
    assert tool.coverage_of_rooms(REPORT) == COVERAGE


@pytest.mark.parametrize(
    ("floors", "beginnings"),
    [
        (COVERAGE, []),
        (COVERAGE | {"megamask/data": 85.1}, ["megamask/data has 85.0 %; its floor is 85.1 %"]),
        ({"megamask": 90, "megamask/data": 80}, ["megamask_pipelines/cli has 25.0 % and no floor"]),
        (COVERAGE | {"megamask/gone": 1}, ["megamask/gone has a floor and no code"]),
    ],
)
def test_room_below_its_floor_without_one_or_without_code_is_found(floors: dict, beginnings: list[str]) -> None:
    found = list(tool.violations(COVERAGE, floors))
    assert len(found) == len(beginnings)
    for sentence, beginning in zip(found, beginnings, strict=True):
        assert sentence.startswith(beginning)


def test_every_room_has_a_floor() -> None:
    floors = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["megamask"]["coverage_floors"]
    files = [
        *(REPO / "platform" / "megamask").rglob("*.py"),
        *(REPO / "pipelines" / "megamask_pipelines").rglob("*.py"),
    ]
    with_code = [path for path in files if path.name != "__init__.py" or path.read_text(encoding="utf-8").strip()]
    rooms = {tool.room_of(str(path.relative_to(REPO))) for path in with_code}
    message = "list the rooms of the code, and no other, in [tool.megamask.coverage_floors] of pyproject.toml"
    assert rooms == set(floors), message


def test_command_ends_with_1_below_a_floor(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    done = subprocess.run([sys.executable, str(TOOL), str(tmp_path / "report.json")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "megamask_pipelines/cli has 25.0 %; its floor is" in done.stderr
