from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.data.corpus.inputs import InputFile, InputReader, find_inputs
from megamask.errors import DataIntegrityError, ExitCode, UsageError


def names(patterns: list[str]) -> list[str]:
    return [file.name for file in find_inputs(patterns)]


def read(path: Path, key: str = "text") -> list[str]:
    reader = InputReader(InputFile(name=path.name, path=path), key)
    return [document.text for document in reader.documents()]


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


def test_folder_is_refused_with_a_hint_to_use_a_glob(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names the folder") as caught:
        find_inputs([str(tmp_path)])
    assert f"{tmp_path}/**/*.txt" in str(caught.value.hint)


def test_inputs_are_refused_when_the_list_is_empty() -> None:
    with pytest.raises(UsageError, match=r"corpus\.inputs is empty"):
        find_inputs([])


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_text_file_is_decoded_exactly(text: str, tmp_path: Path) -> None:
    path = tmp_path / "exact.txt"
    path.write_bytes(text.encode())
    assert read(path) == [text]


def test_newlines_and_byte_order_mark_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert read(path) == ["\ufeffa\r\nb\rc\n"]


def test_undecodable_text_is_refused_with_file_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"abc\xe9def")
    with pytest.raises(DataIntegrityError, match=r"latin\.txt: byte 3 \(0xe9\)") as caught:
        read(path)
    assert caught.value.exit_code == ExitCode.DATA_INTEGRITY


def test_jsonl_gives_a_document_a_line_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"body": "one"}\r\n\n  \n{"x": 1, "body": "t\\u00fcwo\\n"}')
    reader = InputReader(InputFile(name="a.jsonl", path=path), "body")
    documents = list(reader.documents())
    assert [document.text for document in documents] == ["one", "tüwo\n"]
    data = path.read_bytes()
    assert [json.loads(data[d.offset : d.offset + d.bytes])["body"] for d in documents] == ["one", "tüwo\n"]
    assert [(d.offset, d.bytes) for d in documents] == [(0, 16), (21, len(data) - 21)]
    assert reader.num_bytes == len(data)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": ', "not a JSON value"),
        (b'"text"', "not a JSON object"),
        (b'{"body": "x"}', "no key 'text'"),
        (b'{"text": 5}', "is int, not a string"),
        (b'{"text": null}', "not a string"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b"[" * 100_000, "not a JSON value"),
        (b"1" * 10_000, "not a JSON"),
    ],
)
def test_jsonl_line_is_refused_with_file_and_line(line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataIntegrityError) as caught:
        read(path)
    assert "bad.jsonl:2" in caught.value.message
    assert reason in caught.value.message


def test_input_is_refused_when_it_is_gone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path / "gone.txt")


def test_file_name_is_refused_when_it_is_not_utf8(tmp_path: Path) -> None:
    name = b"\xff.txt".decode("utf-8", "surrogateescape")
    (tmp_path / name).write_text("x")
    with pytest.raises(UsageError, match="not UTF-8"):
        find_inputs([f"{tmp_path}/*.txt"])
