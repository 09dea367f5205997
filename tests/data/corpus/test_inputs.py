from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from megamask.data.corpus.inputs import companions, find_inputs
from megamask.errors import ExitCode, UsageError


def names(patterns: list[str]) -> list[str]:
    return [file.name for file in find_inputs(patterns)]


def test_inputs_are_sorted_by_name_relative_to_their_common_folder(tmp_path: Path) -> None:
    for name in ("b/z.txt", "b/a.md", "a/c/x.txt", "a/c/.hidden.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert names([f"{tmp_path}/**/*.txt", f"{tmp_path}/b/*.md"]) == ["a/c/x.txt", "b/a.md", "b/z.txt"]
    assert names([f"{tmp_path}/b/*"]) == ["a.md", "z.txt"]
    assert names([f"{tmp_path}/b/z.txt"]) == ["z.txt"]


def test_input_counts_once_when_it_matches_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    monkeypatch.chdir(tmp_path)
    assert names(["a.txt", "*.txt", f"{tmp_path}/a.txt"]) == ["a.txt"]


def test_input_with_glob_letters_in_its_name_is_found_literally(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("a")
    assert names([f"{tmp_path}/a[1].txt"]) == ["a[1].txt"]


def test_python_stdlib_stands_for_the_folder_of_the_library() -> None:
    (file,) = find_inputs(["{python_stdlib}/os.py"])
    assert file.path == Path(sysconfig.get_paths()["stdlib"]).absolute() / "os.py"


@pytest.mark.parametrize("pattern", ["nothing/*.txt", "gone.txt", "**/*.none"])
def test_pattern_is_refused_when_it_matches_nothing(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="matches no file") as caught:
        find_inputs([f"{tmp_path}/{pattern}"])
    assert pattern in caught.value.message
    assert caught.value.exit_code == ExitCode.USAGE


def test_folder_stands_for_all_files_below_it_but_hidden_ones(tmp_path: Path) -> None:
    folder = tmp_path / "te[x]t"
    for name in ("a.txt", "deep/er/b.jsonl", ".hidden/c.txt", "deep/.d.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    assert [file.name for file in find_inputs([str(folder)])] == ["a.txt", "deep/er/b.jsonl"]
    named = find_inputs([{"name": "web", "path": f"{folder}/"}])
    assert [file.name for file in named] == ["web/a.txt", "web/deep/er/b.jsonl"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no file but hidden ones"):
        find_inputs([f"{tmp_path}/empty"])


def test_inputs_are_refused_when_the_list_is_empty() -> None:
    with pytest.raises(UsageError, match=r"corpus\.inputs is empty"):
        find_inputs([])


def test_file_name_is_refused_when_it_is_not_utf8(tmp_path: Path) -> None:
    name = b"\xff.txt".decode("utf-8", "surrogateescape")
    (tmp_path / name).write_text("x")
    with pytest.raises(UsageError, match="not UTF-8"):
        find_inputs([f"{tmp_path}/*.txt"])


def test_excluded_files_are_left_out_by_name_pattern_or_glob(tmp_path: Path) -> None:
    for name in ("a.txt", "SOURCE.txt", "deep/b.txt", "deep/SOURCE.txt", "deep/old/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    taken = find_inputs([f"{tmp_path}/**/*.txt"], ["SOURCE.*", f"{tmp_path}/deep/old/**"])
    assert [file.name for file in taken] == ["a.txt", "deep/b.txt"]


@pytest.mark.parametrize(("pattern", "reason"), [("SOURCE.txt", "matches no input"), ("*.txt", "leaves no input")])
def test_exclusion_without_effect_or_with_too_much_is_refused(pattern: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UsageError, match=reason):
        find_inputs([f"{tmp_path}/*.txt"], [pattern])


@pytest.mark.promise("a glob that takes in SOURCE.txt, a README or a licence is reported, with the key to exclude it")
def test_companion_file_that_a_glob_takes_in_is_a_warning(tmp_path: Path) -> None:
    for name in ("a.txt", "SOURCE.txt", "LICENSE", "sources.txt", "b.json"):
        (tmp_path / name).write_text(name)
    warnings = companions(find_inputs([f"{tmp_path}/*"]))
    assert [warning.split(" is ")[0].rpartition("/")[2] for warning in warnings] == ["LICENSE", "SOURCE.txt", "b.json"]
    assert "corpus.exclude=['SOURCE.txt']" in warnings[1]
    assert companions(find_inputs([f"{tmp_path}/SOURCE.txt"])) == [], "asked for by its name"
    assert companions(find_inputs([{"path": f"{tmp_path}/b.json", "format": "json"}])) == []


def test_mapping_names_its_files_and_says_how_they_are_read(tmp_path: Path) -> None:
    for name in ("one/x/a.txt", "one/b.txt", "two/c.data"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    files = find_inputs(
        [
            f"{tmp_path}/one/**/*.txt",
            {"name": "web", "path": f"{tmp_path}/two/*", "format": "jsonl", "text_key": "body", "licence": "CC0-1.0"},
        ]
    )
    assert [(file.name, file.format, file.text_key("text")) for file in files] == [
        ("b.txt", "text", "text"),
        ("web/c.data", "jsonl", "body"),
        ("x/a.txt", "text", "text"),
    ]
    assert [file.options() for file in files] == [{}, {"source": "web", "format": "jsonl", "text_key": "body"}, {}]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.txt", ("text", None)),
        ("a.JSONL", ("jsonl", None)),
        ("a.ndjson", ("jsonl", None)),
        ("a.jsonl.gz", ("jsonl", "gz")),
        ("a.md.zst", ("text", "zst")),
        ("a.parquet", ("parquet", None)),
        ("a.tar", ("webdataset", None)),
    ],
)
def test_format_follows_the_suffix(name: str, expected: tuple[str, str | None], tmp_path: Path) -> None:
    (tmp_path / name).touch()
    (file,) = find_inputs([f"{tmp_path}/{name}"])
    assert (file.format, file.compression) == expected


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"path": "a.txt", "txt_key": "x"}, "unknown key 'txt_key'"),
        ({"name": "a"}, "has no path"),
        ({"path": "a.txt", "format": "csv"}, "allowed: text, jsonl"),
        ({"path": "a.txt", "name": "a/b"}, "is not a name"),
        ({"path": "a.txt", "name": ".."}, "is not a name"),
        ({"path": "a.txt", "text_key": ""}, "text_key of a.txt is empty"),
    ],
)
def test_mapping_that_is_wrong_is_refused(entry: dict[str, str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        find_inputs([entry])


def test_file_that_two_entries_read_differently_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UsageError, match="twice, with different"):
        find_inputs([f"{tmp_path}/a.txt", {"path": f"{tmp_path}/*.txt", "name": "other"}])


def test_two_inputs_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("x/web/a.txt", "y/a.txt", "x/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    with pytest.raises(UsageError, match=r"both called 'web/a\.txt'"):
        find_inputs([f"{tmp_path}/x/**/*.txt", {"name": "web", "path": f"{tmp_path}/y/a.txt"}])
