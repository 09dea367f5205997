"""docs/testing.md lists the promise markers of the tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


def load_tool():
    spec = importlib.util.spec_from_file_location("testing_page", REPO / "tools" / "testing_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


@pytest.mark.promise("the list of promises in docs/testing.md is that of the tests' markers")
def test_page_is_up_to_date() -> None:
    written = tool.PAGE.read_text(encoding="utf-8")
    assert written == tool.page(written), "docs/testing.md is out of date. To fix it, run: tools/testing_page.py"


def test_promises_of_a_file_are_found_on_plain_parametrized_and_indented_tests() -> None:
    source = """
import pytest

@pytest.mark.promise("first")
@pytest.mark.parametrize("x", [1, 2])
def test_one(x): ...

class TestGroup:
    @pytest.mark.slow
    @pytest.mark.promise("a long "
                         "second")
    @pytest.mark.promise("first")
    def test_two(self): ...

def test_three(): ...
"""
    assert tool.promises_in(source, "tests/x.py") == {"first": ["test_one", "test_two"], "a long second": ["test_two"]}


@pytest.mark.parametrize(
    ("decorator", "name"),
    [("(TEXT)", "test_a"), ("()", "test_a"), ("('a', 'b')", "test_a"), ("('')", "test_a"), ("('a')", "helper")],
)
def test_marker_that_cannot_be_listed_is_refused_with_its_place(decorator: str, name: str) -> None:
    with pytest.raises(tool.MarkerError, match=r"tests/x\.py:1: "):
        tool.promises_in(f"@pytest.mark.promise{decorator}\ndef {name}(): ...\n", "tests/x.py")


def test_page_follows_a_moved_file(tmp_path: Path) -> None:
    (tmp_path / "tests" / "a").mkdir(parents=True)
    (tmp_path / "tests" / "b").mkdir()
    old, new = tmp_path / "tests" / "a" / "test_x.py", tmp_path / "tests" / "b" / "test_y.py"
    old.write_text('@pytest.mark.promise("it holds")\ndef test_x(): ...\n')
    before = tool.page(f"prose\n{tool.HEADING}", tmp_path)
    assert "### tests/a/test_x.py\n\n- it holds: `test_x`\n" in before
    old.rename(new)
    after = tool.page(before, tmp_path)
    assert after == before.replace("tests/a/test_x.py", "tests/b/test_y.py")
