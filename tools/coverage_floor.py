#!/usr/bin/env python3
"""Compare the branch coverage of every room with its floor in pyproject.toml.

    coverage json -o coverage.json && tools/coverage_floor.py coverage.json

Covered lines and branches of a room are added up over its files. Exit code 1 if a room is below its floor or has none.
Processes that tests start are not measured: it would slow every one of them down, and most code runs in-process too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def room_of(file: str) -> str:
    """Return the room of a source file: the folder below a source root's package, or the package itself."""
    parts = Path(file).parts
    package = next(index for index, part in enumerate(parts) if part in ("megamask", "megamask_pipelines"))
    below = parts[package + 1 :]
    return parts[package] if len(below) == 1 else f"{parts[package]}/{below[0]}"


def coverage_of_rooms(report: Mapping[str, Any]) -> dict[str, float]:
    """Return percent of lines and branches covered, for each room of a `coverage json` report."""
    counts: dict[str, tuple[int, int]] = {}
    for file, entry in report["files"].items():
        summary = entry["summary"]
        covered, total = counts.get(room_of(file), (0, 0))
        covered += summary["covered_lines"] + summary["covered_branches"]
        total += summary["num_statements"] + summary["num_branches"]
        counts[room_of(file)] = covered, total
    return {room: 100 * covered / total for room, (covered, total) in sorted(counts.items()) if total}


def violations(coverage: Mapping[str, float], floors: Mapping[str, float]) -> Iterator[str]:
    """Yield a sentence for each room below its floor, without one, or with a floor but no code."""
    for room, percent in coverage.items():
        if room not in floors:
            yield f"{room} has {percent:.1f} % and no floor; add one to [tool.megamask.coverage_floors]"
        elif percent < floors[room]:
            yield f"{room} has {percent:.1f} %; its floor is {floors[room]} %. Test what it added, or say why not"
    yield from (f"{room} has a floor and no code; remove it" for room in sorted(set(floors) - set(coverage)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="output of `coverage json`")
    report = json.loads(parser.parse_args().report.read_text(encoding="utf-8"))
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["megamask"]
    coverage, floors = coverage_of_rooms(report), settings["coverage_floors"]
    for room, percent in coverage.items():
        print(f"{room:32} {percent:5.1f} %   floor {floors.get(room, '-')}")
    found = list(violations(coverage, floors))
    print("\n".join(found), file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
