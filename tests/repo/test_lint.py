"""tools/lint.py finds nothing in this repository, and each of its rules finds what it is meant to find."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
ROOM = "platform/megamask/errors.py"


def load_tool():
    spec = importlib.util.spec_from_file_location("megamask_lint", REPO / "tools" / "lint.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


lint = load_tool()


@pytest.mark.promise("files and functions stay short, public ones are documented, and the language is plain English")
def test_repository_has_no_findings() -> None:
    if not (REPO / ".git").exists():
        pytest.skip("not a git checkout")
    assert list(lint.findings(lint.tracked_files())) == []


def findings_of(text: str, name: str = "platform/megamask/data/example.py") -> list[str]:
    return [finding for rule in lint.RULES for finding in rule(lint.Source(name, text))]


def test_file_and_function_of_the_allowed_length_are_accepted() -> None:
    body = '"""Example module."""\n\ndef _function():\n' + "    x = 1\n" * 59
    assert findings_of(body + "\n" * (400 - 62)) == []


def test_file_of_a_job_is_shorter() -> None:
    text = '"""Example module."""\n' + "x = 1\n" * 100
    name = "pipelines/megamask_pipelines/example.py"
    assert findings_of(text, name) == [f"{name}:1: 101 lines; at most 100"]
    assert findings_of(text) == []


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ('"""Example module."""\n' + "x = 1\n" * 400, "1: 401 lines; at most 400"),
        ('"""Example module."""\ndef _f():\n' + "    x = 1\n" * 60, "2: _f has 61 lines; at most 60"),
        ("x = 1\n", "1: the module has no docstring"),
        ('"""Example module."""\ndef function(): ...\n', "2: function has no docstring"),
        ('"""Example module."""\nclass Example: ...\n', "2: Example has no docstring"),
        (
            '"""Example module."""\nclass _Other: ...\nclass Example:\n    """An example."""\n'
            "    def long(self):\n" + "        x = 1\n" * 9,
            "5: long has no docstring",
        ),
        ('"""Example module."""\ndef function():\n    """It is."""\n', "3: 'It is.' is not a description"),
        ('"""Example module."""\nprint(1)\n', "2: no print in the product"),
        ('"""Example module."""\nimport pickle\n', "2: no pickle in the product"),
        ('"""Example module."""\nfrom pickle import loads\n', "2: no pickle in the product"),
        ('"""Example module."""\nx = torch.load(path)\n', "2: no pickle in the product"),
        ('"""Example module."""\nx = np.load(path, allow_pickle=True)\n', "2: no pickle in the product"),
        ('"""Example module."""\ntry: ...\nexcept Exception:\n    pass\n', "3: a handler that drops every error"),
        ('"""Example module."""\ntry:\n    ...\nexcept:\n    raise\n', "4: a handler that drops every error"),
    ],
)
def test_violation_is_found_at_its_line(text: str, finding: str) -> None:
    [found] = findings_of(text)
    assert found.startswith(f"platform/megamask/data/example.py:{finding}")


def test_short_method_needs_no_docstring() -> None:
    assert findings_of('"""Example module."""\nclass Example:\n    """An example."""\n    def name(self): ...\n') == []


def test_misplaced_tests_are_found() -> None:
    assert findings_of("def helper(): ...", "tests/data/test_x.py") == [
        "tests/data/test_x.py:1: a test file without a test"
    ]
    assert findings_of("def test_x(): ...", "tests/data/x.py") == [
        "tests/data/x.py:1: pytest collects no test of this file; name it test_*.py"
    ]


@pytest.mark.parametrize(
    ("extra", "finding"),
    [
        ("platform/__init__.py", "platform/__init__.py:1: a package of this name shadows the standard library"),
        ("platform/megamask/untested/a.py", "platform/megamask/untested: no tests in tests/untested"),
        ("tests/nothing/test_a.py", "tests/nothing: no room of this name"),
    ],
)
def test_wrong_file_of_the_tree_is_found(monkeypatch: pytest.MonkeyPatch, extra: str, finding: str) -> None:
    monkeypatch.setattr(lint, "CLEAN_ROOMS", (ROOM,))
    tree = ["platform/megamask/__init__.py", ROOM, "tests/errors/test_errors.py", "tests/errors/deep/test_more.py"]
    assert list(lint.findings_of_tree(tree)) == []
    assert list(lint.findings_of_tree([*tree, extra])) == [finding]


def test_clean_room_that_does_not_exist_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lint, "CLEAN_ROOMS", ("platform/megamask/gone",))
    tree = ["platform/megamask/errors.py", "tests/errors/test_errors.py"]
    assert list(lint.findings_of_tree(tree)) == [
        "tools/lint.py: CLEAN_ROOMS names platform/megamask/gone, which does not exist"
    ]


def test_path_of_one_machine_is_found_in_any_text_file(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("fine\nsee /" + "home/anna/notes\n")
    (tmp_path / "data.bin").write_bytes(b"\0/" + b"home/anna")
    found = [line for line in lint.findings(["notes.md", "data.bin"], tmp_path) if "CLEAN_ROOMS" not in line]
    assert found == ["notes.md:2: a path of one machine"]


@pytest.mark.parametrize(
    "opening", ["What a file holds.", "Where it is.", "How it works.", "It removes a file.", "If true."]
)
def test_docstring_that_opens_with_a_question_word_is_found(opening: str) -> None:
    [found] = lint.openings(lint.Source("a.py", f'"""Example module."""\ndef f():\n    """{opening}"""\n'))
    assert found.startswith("a.py:3: ")
    assert not list(lint.openings(lint.Source("a.py", '"""Whatsapp, iterate, itself: words are compared in full."""')))


def test_dialect_is_found_in_docstrings_and_comments_but_not_in_code() -> None:
    sentence = "It tells nobody what stands in the whole file, whatever one says."
    in_prose = lint.Source("a.py", f'"""{sentence}"""\nx = 1  # {sentence}\n')
    num_words, places = lint.dialect([in_prose])
    assert num_words == 2 * len(sentence.split()) + 1
    found = {name: len(of_name) for name, of_name in places.items() if of_name}
    assert found == dict.fromkeys(["tell", "nobody", "stand", "whole", "whatever", "say"], 2)
    in_code = lint.Source("a.py", f'"""Names in backticks, as `tell`, are not prose."""\nsay = "{sentence}"\n')
    assert not any(lint.dialect([in_code])[1].values())


@pytest.mark.parametrize(("words", "num_allowed"), [(3_000, 0), (3_400, 1), (10_000, 3)])
def test_dialect_is_limited_by_the_rate_of_the_model_codebases(words: int, num_allowed: int) -> None:
    def excess(count: int) -> list[str]:
        text = " ".join(["whole"] * count + ["word"] * (words - count))
        return list(lint.excess_of_dialect([lint.Source("a.py", f'"""{text}"""\n')]))

    assert excess(num_allowed) == []
    assert excess(num_allowed + 1)[0].startswith(f"'whole' occurs {num_allowed + 1} times in {words} words")


def test_standard_platform_module_is_not_shadowed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.system())"], cwd=REPO, capture_output=True, text=True
    )
    assert done.stdout.strip(), done.stderr


@pytest.mark.promise("imports go downward only, large libraries have one door")
def test_import_contracts_hold() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_code_lines_leave_out_blanks_comments_and_docstrings() -> None:
    text = '"""Two\nlines."""\n\n# a comment\nx = (\n    1,\n)\n\n\ndef f():\n    """One."""\n    return "a"  # code\n'
    assert lint.code_lines(lint.Source("a.py", text)) == 5
