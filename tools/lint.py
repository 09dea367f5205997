#!/usr/bin/env python3
"""Check the rules of docs/style.md that ruff and mypy do not know.

    tools/lint.py              # findings as `file:line: rule`, exit code 1 if there are any
    tools/lint.py --measure    # code lines, dialect words and docstring openings of every room

tests/repo/test_lint.py runs the same rules, and breaks each one once.
"""

from __future__ import annotations

import argparse
import ast
import io
import math
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = ("platform", "pipelines")

MAX_FILE_LINES = 400
# A file of pipelines holds one job or one verb; the frame of all verbs is neither.
MAX_JOB_LINES = 100
FRAME_OF_VERBS = "pipelines/megamask_pipelines/cli/main.py"
MAX_FUNCTION_LINES = 60
MIN_DOCSTRING_LETTERS = 10
SHORT_METHOD_LINES = 8

# Rooms whose docstrings and comments are at the level of the model codebases. The list only grows.
CLEAN_ROOMS: tuple[str, ...] = (
    "pipelines",
    "platform/megamask/audit",
    "platform/megamask/checkpoint",
    "platform/megamask/config",
    "platform/megamask/conversion",
    "platform/megamask/data",
    "platform/megamask/diffusion",
    "platform/megamask/engine",
    "platform/megamask/errors.py",
    "platform/megamask/evaluation",
    "platform/megamask/generation",
    "platform/megamask/launch",
    "platform/megamask/models",
    "platform/megamask/objectives",
    "platform/megamask/planning",
    "platform/megamask/provenance",
    "platform/megamask/resilience",
    "platform/megamask/runs",
    "platform/megamask/storage",
    "platform/megamask/tracking",
    "platform/megamask/training",
    "tests",
    "tools",
)

# Occurrences per 10,000 words of docstrings and comments that the clean rooms may have together: the level of six
# established codebases of this field.
DIALECT = {
    "tell": (r"tells?|told|telling|untold", 0.5),
    "stand": (r"stands?(?!-)|stood", 0.0),
    "say": (r"says?|said|saying", 1.0),
    "nobody": (r"nobody|somebody", 0.0),
    "whatever": (r"whatever|whoever|whichever", 1.0),
    "whole": (r"whole", 3.0),
    "let be": (r"(?:let|lets) be", 0.0),
    "last words": (r"last words?", 0.0),
    "has not got": (r"(?:has|have) not got", 0.0),
    "is no": (r"(?:is|are) no (?!longer|more|less|fewer)", 1.0),
}
# A docstring opens with an imperative verb or a noun phrase.
BAD_OPENINGS = {"what", "where", "how", "who", "whose", "when", "why", "which", "whether", "that", "if", "it", "is"}

# Absolute paths of one machine, spelled in pieces so that this file does not match itself.
ONE_MACHINE = re.compile("|".join(("/" + "work/", "/" + "root/", "/" + "home/[a-z]", "/" + "Users/[a-z]")))
SWALLOWS_ERRORS = re.compile(r"^\s*except:\s*$|^\s*except (?:Base)?Exception:\s*\n\s*pass", re.MULTILINE)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | Function


@dataclass(frozen=True)
class Source:
    """One Python file of the repository: its path relative to the root and its text."""

    name: str
    text: str

    @property
    def top(self) -> str:
        """The top-level folder."""
        return self.name.split("/", 1)[0]

    @property
    def is_product(self) -> bool:
        """True for the code that users install."""
        return self.top in SOURCE_ROOTS

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def functions(self) -> list[Function]:
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]

    @cached_property
    def docstrings(self) -> list[tuple[int, str]]:
        """(line, docstring) of the module and of every class and function."""
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, Documented) and (docstring := ast.get_docstring(node)) is not None:
                found.append((node.body[0].lineno, docstring))
        return sorted(found)

    @cached_property
    def comments(self) -> list[tuple[int, str]]:
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]


def code_lines(source: Source) -> int:
    """Return the number of lines that hold code: neither blank, nor a comment, nor part of a docstring."""
    found: set[int] = set()
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type not in layout:
            found.update(range(token.start[0], token.end[0] + 1))
    for line, _ in source.docstrings:
        [node] = [node for node in ast.walk(source.tree) if isinstance(node, ast.Expr) and node.lineno == line]
        found -= set(range(line, (node.end_lineno or line) + 1))
    return len(found)


def lengths(source: Source) -> Iterator[str]:
    """Find files and functions over the limits."""
    num_lines = len(source.text.splitlines())
    limit = MAX_JOB_LINES if source.top == "pipelines" and source.name != FRAME_OF_VERBS else MAX_FILE_LINES
    if num_lines > limit:
        yield f"{source.name}:1: {num_lines} lines; at most {limit}"
    for function in source.functions:
        num_lines = (function.end_lineno or 0) - function.lineno + 1
        if num_lines > MAX_FUNCTION_LINES:
            problem = f"{function.name} has {num_lines} lines; at most {MAX_FUNCTION_LINES}"
            yield f"{source.name}:{function.lineno}: {problem}"


def public_definitions(body: list[ast.stmt]) -> Iterator[tuple[Function | ast.ClassDef, bool]]:
    """Yield (definition, is a method) of everything public; definitions inside functions are private."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node, False
            if isinstance(node, ast.ClassDef):
                for inner, _ in public_definitions(node.body):
                    yield inner, True


def missing_docstrings(source: Source) -> Iterator[str]:
    """Find modules, public classes, functions and long methods without a docstring, and docstrings without content.

    A method of a few lines may leave its docstring out: one that only repeats the name is worse than none.
    """
    if not source.is_product:
        return
    if source.tree.body and ast.get_docstring(source.tree) is None:
        yield f"{source.name}:1: the module has no docstring"
    for node, is_method in public_definitions(source.tree.body):
        is_short = (node.end_lineno or 0) - node.lineno < SHORT_METHOD_LINES
        if ast.get_docstring(node) is None and not (is_method and is_short):
            yield f"{source.name}:{node.lineno}: {node.name} has no docstring"
    for line, docstring in source.docstrings:
        if len(docstring) < MIN_DOCSTRING_LETTERS:
            yield f"{source.name}:{line}: {docstring!r} is not a description; write one or delete it"


def openings(source: Source) -> Iterator[str]:
    """Find docstrings that open with a question word instead of a verb or a noun phrase."""
    for line, docstring in source.docstrings:
        first = re.match(r"\w*", docstring.lower())
        if first and first[0] in BAD_OPENINGS:
            start = docstring.splitlines()[0][:50]
            yield f"{source.name}:{line}: a docstring opens with a verb or a noun phrase, not as in {start!r}"


def prints_and_swallowed_errors(source: Source) -> Iterator[str]:
    """Find `print` and handlers that drop every error."""
    if not source.is_product:
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{source.name}:{node.lineno}: no print in the product; use the reporter of the verb"
    for found in SWALLOWS_ERRORS.finditer(source.text):
        line = source.text.count("\n", 0, found.start()) + 1
        yield f"{source.name}:{line}: a handler that drops every error"


def pickles(source: Source) -> Iterator[str]:
    """Find code of the product that reads or writes pickles: a file of one runs what its author likes."""
    if not source.is_product:
        return
    for node in ast.walk(source.tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        is_import = any(name.split(".")[0] in ("pickle", "cloudpickle", "dill", "joblib", "shelve") for name in names)
        is_torch_file = isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.save")
        is_allowed = isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
        if is_import or is_torch_file or is_allowed:
            line = node.value.lineno if isinstance(node, ast.keyword) else node.lineno  # type: ignore[attr-defined]
            yield f"{source.name}:{line}: no pickle in the product; write safetensors or JSON"


def misplaced_tests(source: Source) -> Iterator[str]:
    """Find test files without a test, and tests outside test files."""
    if source.top != "tests":
        return
    is_test_file = source.name.rsplit("/", 1)[-1].startswith("test_")
    has_tests = any(function.name.startswith("test_") for function in source.functions)
    if is_test_file and not has_tests:
        yield f"{source.name}:1: a test file without a test"
    if has_tests and not is_test_file:
        yield f"{source.name}:1: pytest collects no test of this file; name it test_*.py"


def prose(source: Source) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of docstrings and comments, without names in backticks and doctest lines."""
    for line, text in (*source.docstrings, *source.comments):
        yield line, re.sub(r"``[^`]*``|`[^`\n]*`|^\s*>>>.*$", "", text, flags=re.MULTILINE)


def dialect(sources: list[Source]) -> tuple[int, dict[str, list[str]]]:
    """Return the number of words of prose, and for each dialect word the places where it occurs."""
    num_words = 0
    places: dict[str, list[str]] = {name: [] for name in DIALECT}
    for source in sources:
        for line, text in prose(source):
            num_words += len(text.split())
            for name, (pattern, _) in DIALECT.items():
                for found in re.finditer(rf"\b(?:{pattern})\b", text, flags=re.IGNORECASE):
                    near = text[max(0, found.start() - 20) : found.end() + 20].replace("\n", " ")
                    places[name].append(f"{source.name}:{line}: ...{near}...")
    return num_words, places


def excess_of_dialect(sources: list[Source]) -> Iterator[str]:
    """Find dialect words that are more frequent in `sources` together than in the model codebases."""
    num_words, places = dialect(sources)
    for name, (_, rate) in DIALECT.items():
        allowed = math.floor(rate * num_words / 10_000)
        if len(places[name]) > allowed:
            yield f"{name!r} occurs {len(places[name])} times in {num_words} words; at most {allowed}:"
            yield from (f"  {place}" for place in places[name])


def is_clean_room(source: Source) -> bool:
    """True for the files of the rooms listed in CLEAN_ROOMS."""
    return any(source.name == room or source.name.startswith(f"{room}/") for room in CLEAN_ROOMS)


RULES = (lengths, missing_docstrings, prints_and_swallowed_errors, pickles, misplaced_tests)


def findings_of_tree(names: list[str]) -> Iterator[str]:
    """Find wrong files: packages that shadow a standard module, rooms without tests, test folders without a room."""
    yield from (
        f"{root}/__init__.py:1: a package of this name shadows the standard library"
        for root in SOURCE_ROOTS
        if f"{root}/__init__.py" in names
    )
    rooms = {name.split("/")[2].removesuffix(".py") for name in names if re.match(r"platform/megamask/\w+[./]", name)}
    tested = {name.split("/")[1] for name in names if re.fullmatch(r"tests/\w+/(\w+/)*test_\w+\.py", name)}
    across = {"parallel", "golden", "gpu", "faults", "pipelines", "repo", "security", "support"}
    yield from (f"platform/megamask/{room}: no tests in tests/{room}" for room in sorted(rooms - tested - {"__init__"}))
    yield from (f"tests/{folder}: no room of this name" for folder in sorted(tested - rooms - across))
    missing = [room for room in CLEAN_ROOMS if not any(name == room or name.startswith(f"{room}/") for name in names)]
    yield from (f"tools/lint.py: CLEAN_ROOMS names {room}, which does not exist" for room in missing)


def findings(names: list[str], root: Path = ROOT) -> Iterator[str]:
    """Find every violation in the named files of the repository at `root`."""
    yield from findings_of_tree(names)
    sources = []
    for name in names:
        content = (root / name).read_bytes()
        if b"\0" in content:
            continue
        text = content.decode("utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            if ONE_MACHINE.search(line):
                yield f"{name}:{number}: a path of one machine"
        if name.endswith(".py"):
            sources.append(Source(name, text))
    for rule in RULES:
        for source in sources:
            yield from rule(source)
    clean = [source for source in sources if is_clean_room(source)]
    for source in clean:
        yield from openings(source)
    yield from excess_of_dialect(clean)


def tracked_files(root: Path = ROOT) -> list[str]:
    """Return the files that git tracks and that exist."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (root / name).is_file()]


def measure(names: list[str]) -> Iterator[str]:
    """Yield a line for each folder of the product: code lines, words of prose, bad openings, dialect words."""
    total = 0
    folders: dict[str, list[Source]] = {}
    for name in names:
        if name.endswith(".py") and name.startswith(SOURCE_ROOTS):
            folders.setdefault(name.rsplit("/", 1)[0], []).append(Source(name, (ROOT / name).read_text("utf-8")))
    for folder, sources in sorted(folders.items()):
        num_words, places = dialect(sources)
        counts = ", ".join(f"{name} {len(found)}" for name, found in places.items() if found)
        num_openings = sum(1 for source in sources for _ in openings(source))
        mark = "clean" if all(map(is_clean_room, sources)) else "     "
        num_code = sum(map(code_lines, sources))
        total += num_code
        yield (
            f"{mark} {folder}: {num_code} code lines, {num_words} words, {num_openings} openings, "
            f"{counts or 'no dialect'}"
        )
    yield f"code lines of the product: {total}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="count instead of check")
    options = parser.parse_args()
    names = tracked_files()
    lines = list(measure(names) if options.measure else findings(names))
    print("\n".join(lines) or "no findings")
    return int(bool(lines) and not options.measure)


if __name__ == "__main__":
    sys.exit(main())
