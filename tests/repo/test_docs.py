"""The documents agree with what the repository holds: links, paths, verbs, keys, tables."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import re
import tomllib
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from megamask.config.schema.roots import PrepareConfig, TrainConfig
from megamask.errors import ExitCode

ROOT = Path(__file__).parents[2]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FILE_SUFFIXES = {"json", "yaml", "py", "md", "tar", "idx", "jsonl", "parquet", "toml", "txt", "npy", "pt"}
TENSOR_SUFFIXES = {"weight", "bias"}
CLI = ROOT / "pipelines" / "megamask_pipelines" / "cli"

each_document = pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)


@cache
def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def prose(path: Path) -> str:
    """A document without its code blocks."""
    return re.sub(r"^```.*?^```", "", text(path), flags=re.M | re.S)


def quoted(path: Path) -> list[str]:
    """Yield the words in backticks, outside code blocks."""
    return re.findall(r"`([^`\n]+)`", prose(path))


def anchors(path: Path) -> set[str]:
    """The anchors that a Markdown renderer gives a document's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(path), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def section(path: Path, heading: str) -> str:
    """The text below a heading, up to the next one of the same or a higher level."""
    found = re.search(rf"^(#+) {re.escape(heading)}$", text(path), flags=re.M)
    assert found, f"{path.name} has no heading {heading!r}"
    rest = text(path)[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, flags=re.M)
    return rest[: end.start()] if end else rest


def table(path: Path, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    rows = []
    for line in section(path, heading).splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            break
    return rows[2:]


def schema_keys(root: type) -> set[str]:
    """Every dotted key of a config tree, sections included; NAME represents the keys of a mapping."""
    keys: set[str] = set()
    hints = get_type_hints(root)
    for field in dataclasses.fields(root):
        keys.add(field.name)
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner):
            keys |= {f"{field.name}.{key}" for key in schema_keys(inner)}
        elif get_args(inner) == (str, str):
            keys |= {f"{field.name}.NAME", f"{field.name}.main"}
    return keys


KEYS = schema_keys(TrainConfig) | schema_keys(PrepareConfig)
SECTIONS = {key for key in KEYS if "." not in key}


def named_keys(path: Path) -> set[str]:
    """The settings that a document names: dotted words that begin with a section, also as key=value and in blocks."""
    words = set(quoted(path)) | set(re.findall(r"(?<=\s)[a-z_]+(?:\.\w+)+(?==)", text(path)))
    keys = {word.split("=")[0] for word in words}
    return {
        key
        for key in keys
        if re.fullmatch(r"[a-z_]+(\.\w+)+", key)
        and key.split(".")[0] in SECTIONS
        and key.rsplit(".")[-1] not in FILE_SUFFIXES | TENSOR_SUFFIXES
        and not key.startswith("optimizer.exp_avg")
    }


@each_document
def test_links_lead_to_files_and_headings(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{path.name} links to {target}, which has no such heading"


@pytest.mark.promise("files, verbs and settings named in documents exist")
@each_document
def test_files_named_in_documents_exist(path: Path) -> None:
    folders = ("platform/", "pipelines/", "configs/", "tests/", "tools/", "docs/")
    rooms = tuple(f"{room.name}/" for room in (ROOT / "platform" / "megamask").iterdir() if room.is_dir())
    for name in (word.split("::")[0] for word in quoted(path)):
        if not re.fullmatch(r"[\w./\-]+", name):
            continue
        if name.startswith(folders) or name.startswith(".ci/"):
            assert (ROOT / name).exists(), f"{path.name} names {name}"
        elif name.startswith(rooms) and name.endswith(".py"):
            assert (ROOT / "platform" / "megamask" / name).exists(), f"{path.name} names {name}"


@each_document
def test_tests_named_in_documents_exist(path: Path) -> None:
    for name in quoted(path):
        file, sign, function = name.partition("::")
        if not sign:
            continue
        tree = ast.parse(text(ROOT / file))
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert function in functions, f"{path.name} names {name}"


@pytest.mark.promise("files, verbs and settings named in documents exist")
@each_document
def test_settings_named_in_documents_exist(path: Path) -> None:
    unknown = named_keys(path) - KEYS
    assert not unknown, f"{path.name} names settings that the schema does not have: {sorted(unknown)}"


def test_settings_are_found_in_documents() -> None:
    """Guards the test above: a pattern that finds nothing would pass it."""
    assert {"run.seed", "training.steps", "data.corpora", "precision.compute"} <= named_keys(
        ROOT / "docs" / "architecture.md"
    )
    assert "training.steps" in named_keys(ROOT / "README.md")


@each_document
def test_documents_name_no_place_of_one_machine(path: Path) -> None:
    found = re.findall(r"(?<![\w./])/(?:home|root|tmp|work|Users|mnt)\b[^\s)`]*", text(path))
    assert not found


MAX_READING_PATH = 5
FIRST_STOPS = ["pipelines/megamask_pipelines/cli/train.py"]


def reading_path(path: Path) -> list[Path]:
    """The files that a document names as the path from the command to the optimizer."""
    found = re.search(rf"`{FIRST_STOPS[0]}`\s*->(?:\s*`[\w/.]+`\s*(?:->)?)+", text(path))
    assert found, f"{path.name} does not name the files from {FIRST_STOPS[0]} to the optimizer"
    return [ROOT / name for name in re.findall(r"`([\w/.]+)`", found[0])]


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "docs" / "architecture.md"], ids=lambda path: path.name)
def test_reading_path_is_complete_and_short(path: Path) -> None:
    """Each file imports the next, the last one calls the optimizer, and all are short."""
    stops = reading_path(path)
    assert [stop.relative_to(ROOT).as_posix() for stop in stops[:1]] == FIRST_STOPS
    assert len(stops) <= MAX_READING_PATH
    for here, there in pairwise(stops):
        assert there in imports_of(here), f"{here.name} does not import {there.name}"
    assert "optimizer.step()" in text(stops[-1])
    for stop in stops:
        assert len(text(stop).splitlines()) < 300, f"{stop.name} is long"


def imports_of(file: Path) -> set[Path]:
    """The files of this repository that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(text(file))):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            for module in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                for root in ("platform", "pipelines"):
                    path = ROOT / root / (module.replace(".", "/") + ".py")
                    if path.exists():
                        found.add(path)
    return found


def verbs_of_cli() -> set[str]:
    """The verbs of the command line."""
    from megamask_pipelines.cli.main import VERBS

    return set(VERBS)


def test_every_verb_is_a_file() -> None:
    assert verbs_of_cli() == {
        path.stem.replace("_", "-") for path in CLI.glob("*.py") if "\ndef add_arguments(" in text(path)
    }


@pytest.mark.promise("files, verbs and settings named in documents exist")
@each_document
def test_verbs_named_in_documents_exist(path: Path) -> None:
    named = {match for word in quoted(path) for match in re.findall(r"^megamask ([a-z][a-z-]*)\b", word)}
    blocks = re.findall(r"^```.*?^```", text(path), flags=re.M | re.S)
    named |= set(re.findall(r"^(?:[$+] )?megamask ([a-z][a-z-]*)\b", "\n".join(blocks), flags=re.M))
    assert named <= verbs_of_cli(), f"{path.name} names {sorted(named - verbs_of_cli())}"


def test_readme_lists_every_verb() -> None:
    named = {row[0].strip("`").split()[1] for row in table(ROOT / "README.md", "Verbs")}
    assert named == verbs_of_cli()


def test_options_in_the_readme_are_those_of_their_verbs() -> None:
    for row in table(ROOT / "README.md", "Verbs"):
        verb = row[0].strip("`").split()[1]
        parser = argparse.ArgumentParser()
        importlib.import_module(f"megamask_pipelines.cli.{verb.replace('-', '_')}").add_arguments(parser)
        known = set(parser._option_string_actions)
        assert set(re.findall(r"--[a-z]+", row[0])) <= known, row[0]


def test_readme_shows_what_the_quickstart_printed() -> None:
    capture = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- quickstart capture -->")[1].split("```")[1]
    commands = [line.split()[2] for line in capture.splitlines() if line.startswith("$ megamask ")]
    assert commands == ["prepare", "train", "evaluate", "sample"]
    assert "megamask (upper bound)" in capture


def test_every_shipped_config_is_named_or_is_a_model() -> None:
    named = text(ROOT / "README.md")
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        name = path.relative_to(ROOT).as_posix()
        assert name in named or path.parent.name == "model", f"README does not name {name}"


def test_layers_in_the_architecture_are_those_that_are_checked() -> None:
    contracts = tomllib.loads(text(ROOT / "pyproject.toml"))["tool"]["importlinter"]["contracts"]
    [checked] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    house = section(ROOT / "docs" / "architecture.md", "The house")
    [written] = re.findall(r"^```\n(megamask_pipelines\n.*?)^```", house, flags=re.M | re.S)
    assert written.split("\n")[:-1] == [layer.replace("megamask.", "") for layer in checked]


def test_rooms_in_the_architecture_are_those_that_exist() -> None:
    house = section(ROOT / "docs" / "architecture.md", "The house")
    written = set(re.findall(r"^  (\w+)/ +\w", house, flags=re.M))
    package = ROOT / "platform" / "megamask"
    assert written == {path.parent.name for path in package.glob("*/__init__.py")}


def test_exit_codes_in_the_architecture_are_those_of_the_program() -> None:
    rows = table(ROOT / "docs" / "architecture.md", "Exit codes")
    written = [int(code) for row in rows for code in row[0].split(",")]
    assert written == [int(code) for code in ExitCode]


def test_purposes_in_the_architecture_are_those_of_the_program() -> None:
    from megamask.diffusion.philox import Purpose

    rows = table(ROOT / "docs" / "architecture.md", "Order and noise, to the bit")
    assert [int(row[0]) for row in rows] == [int(purpose) for purpose in Purpose]


def test_precedence_of_exit_codes_is_that_of_the_program() -> None:
    from megamask.resilience.exit_codes import PRECEDENCE

    written = ", ".join(map(str, PRECEDENCE))
    assert written in " ".join(section(ROOT / "docs" / "architecture.md", "Exit codes").split())


def test_dependencies_in_the_architecture_are_those_of_the_package() -> None:
    project = tomllib.loads(text(ROOT / "pyproject.toml"))["project"]
    declared = {re.split(r"[<>=\[]", entry)[0] for entry in project["dependencies"]}
    rows = table(ROOT / "docs" / "architecture.md", "Dependencies")
    written = {name for row in rows for name in row[0].split(", ")}
    assert written == declared


def test_journal_kinds_in_the_formats_are_those_of_the_program() -> None:
    from megamask.tracking.records import RECORDS

    written = re.findall(r"^\| `(\w+)` \|", section(ROOT / "docs" / "formats.md", "Journal"), flags=re.M)
    assert set(written[written.index("run_started") : written.index("run_completed") + 1]) == set(RECORDS)


def test_layouts_of_the_index_have_no_gaps() -> None:
    """Offsets and sizes in the tables of the .idx add up to the sizes of header and record."""
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ", section(ROOT / "docs" / "formats.md", ".idx"), flags=re.M)
    ends = []
    position = 0
    for offset, size in ((int(a), int(b)) for a, b in rows):
        if offset == 0 and position:
            ends.append(position)
            position = 0
        assert offset == position
        position += size
    from megamask.data.index import BLOCK_DTYPE, HEADER_BYTES

    assert [*ends, position] == [HEADER_BYTES, BLOCK_DTYPE.itemsize]


def settings_with_kind(kind: str, root: Any = TrainConfig, prefix: str = "") -> set[str]:
    """Dotted keys of a kind."""
    found: set[str] = set()
    hints = get_type_hints(root)
    for field in dataclasses.fields(root):
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            found |= settings_with_kind(kind, hints[field.name], f"{name}.")
        elif field.metadata["setting"].kind == kind:
            found.add(name)
    return found


def test_extendable_settings_in_the_architecture_are_those_of_the_schema() -> None:
    laws = " ".join(section(ROOT / "docs" / "architecture.md", "The twelve laws").split())
    [written] = re.findall(r"\*Extendable\* fields may only grow: ((?:[^.]|\.\w)*)\.", laws)
    assert set(re.findall(r"`([\w.]+)`", written)) == settings_with_kind("extendable")
