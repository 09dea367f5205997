"""The house as it is meant to be: sizes, docstrings, layers, and which rooms have tests."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
SOURCE_ROOTS = (REPO / "platform", REPO / "pipelines")
SOURCES = sorted(path for root in SOURCE_ROOTS for path in root.rglob("*.py") if "egg-info" not in str(path))
TESTS = sorted((REPO / "tests").rglob("*.py"))
TOOLS = sorted((REPO / "tools").rglob("*.py"))
ALL = [*SOURCES, *TESTS, *TOOLS]

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80
MIN_DOCSTRINGS = 0.95
MIN_TEST_LINES = 0.8

Function = ast.FunctionDef | ast.AsyncFunctionDef


def relative(path: Path) -> str:
    return str(path.relative_to(REPO))


def num_lines(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield node


def public_definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Public functions, classes and methods with their dotted names; what is inside a function is its own affair."""
    for node in body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        yield f"{prefix}{node.name}", node
        if isinstance(node, ast.ClassDef):
            yield from public_definitions(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("root", SOURCE_ROOTS, ids=lambda root: root.name)
def test_source_root_is_no_package_so_that_it_cannot_shadow_the_standard_library(root):
    assert root.is_dir()
    assert not (root / "__init__.py").exists()


def test_standard_platform_module_is_not_shadowed():
    done = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.system())"], cwd=REPO, capture_output=True, text=True
    )
    assert done.stdout.strip(), done.stderr


@pytest.mark.promise("files and functions stay short, and public ones are documented")
def test_no_file_is_over_600_lines():
    assert [relative(path) for path in ALL if num_lines([path]) > MAX_FILE_LINES] == []


def test_median_source_file_is_near_150_lines():
    sizes = sorted(num_lines([path]) for path in SOURCES if num_lines([path]) >= 10)
    assert sizes[len(sizes) // 2] <= 200


@pytest.mark.promise("files and functions stay short, and public ones are documented")
def test_no_function_is_over_80_lines():
    long = [
        f"{relative(path)}:{function.lineno} {function.name}"
        for path in ALL
        for function in functions(path)
        if (function.end_lineno or 0) - function.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long == []


@pytest.mark.promise("files and functions stay short, and public ones are documented")
def test_public_functions_and_classes_have_docstrings():
    named = [
        (f"{relative(path)}: {name}", ast.get_docstring(node) is not None)
        for path in SOURCES
        for name, node in public_definitions(ast.parse(path.read_text(encoding="utf-8")).body)
    ]
    missing = [name for name, has_docstring in named if not has_docstring]
    assert len(missing) <= (1 - MIN_DOCSTRINGS) * len(named), missing


def test_every_module_says_its_purpose():
    silent = [
        relative(path)
        for path in SOURCES
        if (tree := ast.parse(path.read_text(encoding="utf-8"))).body and ast.get_docstring(tree) is None
    ]
    assert silent == []


def test_every_argument_of_a_public_function_is_annotated():
    bare = [
        f"{relative(path)}: {name}({argument.arg})"
        for path in SOURCES
        for name, node in public_definitions(ast.parse(path.read_text(encoding="utf-8")).body)
        if isinstance(node, Function)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        if argument.annotation is None and argument.arg not in ("self", "cls")
    ]
    assert bare == []


def test_there_are_enough_tests():
    assert num_lines(TESTS) >= MIN_TEST_LINES * num_lines(SOURCES)


def test_every_room_has_tests_of_its_own():
    package = REPO / "platform" / "megamask"
    rooms = [path.parent.name for path in package.glob("*/__init__.py")]
    rooms += [path.stem for path in package.glob("*.py") if path.stem != "__init__"]
    without = [room for room in rooms if not list((REPO / "tests" / room).glob("test_*.py"))]
    assert without == []


def test_every_test_module_mirrors_something_and_tests_it():
    """A folder of tests has the name of a room, or is one of the folders that stand across rooms."""
    across = {"parallel", "golden", "gpu", "faults", "pipelines", "repo", "security", "support"}
    rooms = {path.name for path in (REPO / "platform" / "megamask").iterdir()} | {"errors"}
    tests = [path.relative_to(REPO / "tests") for path in TESTS if path.name.startswith("test_")]
    folders = {path.parts[0] for path in tests if len(path.parts) > 1}
    assert folders <= rooms | across
    empty = [
        relative(path)
        for path in TESTS
        if path.name.startswith("test_") and not any(f.name.startswith("test_") for f in functions(path))
    ]
    assert empty == []


def test_no_source_prints_or_swallows_every_error():
    pattern = re.compile(r"^\s*except:\s*$|^\s*except (Base)?Exception:\s*\n\s*pass", re.MULTILINE)
    assert [relative(path) for path in SOURCES if pattern.search(path.read_text(encoding="utf-8"))] == []
    printing = [
        relative(path)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []


def tracked_texts() -> Iterator[tuple[str, str]]:
    """The text files that the repository holds."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        path = REPO / name
        if path.is_file():
            with_text = path.read_bytes()
            if b"\0" not in with_text:
                yield name, with_text.decode("utf-8", errors="replace")


# Absolute paths of somebody's machine. Spelt in pieces, so that this file does not find itself.
FORBIDDEN = re.compile("|".join(("/" + "work/", "/" + "root/", "/" + "home/[a-z]", "/" + "Users/[a-z]")))


def test_nothing_names_a_path_of_one_machine():
    if not (REPO / ".git").exists():
        pytest.skip("not a git checkout")
    found = [
        f"{name}:{number}"
        for name, text in tracked_texts()
        for number, line in enumerate(text.splitlines(), 1)
        if FORBIDDEN.search(line)
    ]
    assert found == []


@pytest.mark.promise("imports go downward only, large libraries have one door")
def test_import_contracts_hold():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_reading_path_is_short_files():
    stops = [
        "pipelines/megamask_pipelines/cli/train.py",
        "pipelines/megamask_pipelines/pretrain.py",
        "platform/megamask/training/loop.py",
        "platform/megamask/engine/step.py",
        "platform/megamask/diffusion/objective.py",
    ]
    assert [stop for stop in stops if num_lines([REPO / stop]) >= 300] == []
