#!/usr/bin/env python3
"""Write the list of promises in docs/testing.md from the `promise` markers of the tests.

    tools/testing_page.py            # write the page
    tools/testing_page.py --check    # exit code 1 if the page is out of date; nothing is written

The markers are read from the sources, so the page needs no test run. Only the part below the heading
`## Promises and tests` is generated.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "testing.md"
HEADING = "## Promises and tests\n"
INTRODUCTION = """
Each promise to users is a marker, `@pytest.mark.promise("...")`, on the tests that fail when it is broken.
`tools/testing_page.py` writes this list from the markers.
"""


class MarkerError(ValueError):
    """A promise marker that the page cannot list."""


def promises_of(function: ast.FunctionDef, place: str) -> Iterator[str]:
    """Yield the promises in the decorators of a test, top to bottom.

    Raises MarkerError if a marker is not on a test or its only argument is not a literal string.
    """
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.promise":
            match decorator:
                case ast.Call(args=[ast.Constant(value=str(promise))], keywords=[]) if promise.strip():
                    pass
                case _:
                    raise MarkerError(f"{place}:{decorator.lineno}: a promise is one literal string")
            if not function.name.startswith("test_"):
                raise MarkerError(f"{place}:{decorator.lineno}: {function.name} is not a test")
            yield promise


def promises_in(source: str, place: str) -> dict[str, list[str]]:
    """Return promise -> names of its tests, both in the order of the file."""
    found: dict[str, list[str]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            for promise in promises_of(node, place):
                found.setdefault(promise, []).append(node.name)
    return found


def generated_part(root: Path = ROOT) -> str:
    """Return the generated part of the page: a section for each test file with promises, sorted by path."""
    lines = [INTRODUCTION]
    for path in sorted((root / "tests").rglob("test_*.py")):
        place = path.relative_to(root).as_posix()
        promises = promises_in(path.read_text(encoding="utf-8"), place)
        if promises:
            lines.append(f"### {place}\n")
            lines += [f"- {promise}: {', '.join(f'`{name}`' for name in names)}" for promise, names in promises.items()]
            lines.append("")
    return "\n".join(lines)


def page(written: str, root: Path = ROOT) -> str:
    """Return the page: the prose of `written` up to the heading, then the generated part."""
    prose, heading, _ = written.partition(HEADING)
    if not heading:
        raise MarkerError(f"{PAGE.name} has no heading {HEADING.strip()!r}")
    return prose + heading + generated_part(root)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; exit code 1 on a difference")
    options = parser.parse_args()
    written = PAGE.read_text(encoding="utf-8")
    wanted = page(written)
    if options.check:
        if written != wanted:
            print("docs/testing.md is out of date; run: tools/testing_page.py", file=sys.stderr)
        return int(written != wanted)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
