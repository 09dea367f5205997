"""docs/security.md: each claim names a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "security.md"
ROWS = re.findall(r"^\| (?!claim \||---)(.+?) \| (.+?) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_page_has_claims() -> None:
    assert len(ROWS) > 20


@pytest.mark.parametrize(("claim", "test"), ROWS, ids=[row[0][:40] for row in ROWS])
def test_claim_has_its_test(claim: str, test: str) -> None:
    named = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", test)
    assert named is not None, f"{claim}: {test} is not the name of a test"
    tree = ast.parse((ROOT / named[1]).read_text(encoding="utf-8"))
    assert named[2] in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, claim
