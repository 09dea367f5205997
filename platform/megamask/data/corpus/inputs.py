"""The inputs of a corpus: which files, in which order, and how each is read.

An entry of `corpus.inputs` is a file, a folder, a glob, or a mapping {name, path, format, text_key, tokenizer, licence,
origin, version}.
Files are sorted by name, so a corpus does not change when its inputs move: the path relative to the deepest folder that
holds all files of plain entries, and `<name>/<path relative to the deepest folder of the entry>` for a named entry.
"""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import re
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megamask.errors import UsageError
from megamask.storage.hashing import hash_of, sha256_file

PYTHON_STDLIB = "{python_stdlib}"
NOTHING_WRITTEN = "Nothing was written."
FORMATS = ("text", "jsonl", "json", "parquet", "webdataset", "messages", "megatron")

_ENTRY_KEYS = ("name", "path", "format", "text_key", "tokenizer", "licence", "origin", "version")
_ENTRY_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")
_COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
_FORMAT_OF_SUFFIX = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".tar": "webdataset"}
# Files that accompany a text instead of being part of it.
_COMPANIONS = re.compile(r"(source|readme|licen[cs]e|copying|notice)(\.(txt|md|rst))?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class InputEntry:
    """One entry of `corpus.inputs`.

    Args:
        path: file or glob.
        name: label of the source, which also begins the names of its files; None for a plain entry.
        format: one of FORMATS; None decides by each file's suffix.
        text_key: key, column or member suffix that holds the text; None means `corpus.jsonl_text_key`.
        tokenizer: of the format megatron alone: that wrote the ids, or the folder tokenizer/ of a corpus.
        licence, origin, version: recorded in provenance.json.
    """

    path: str
    name: str | None = None
    format: str | None = None
    text_key: str | None = None
    tokenizer: str | None = None
    licence: str | None = None
    origin: str | None = None
    version: str | None = None

    @classmethod
    def parse(cls, entry: str | Mapping[str, str]) -> InputEntry:
        """Check an entry as the config gives it.

        Raises:
            UsageError: an unknown key, no path, or a value that is not allowed.
        """
        if isinstance(entry, str):
            return cls(path=entry)
        unknown = [key for key in entry if key not in _ENTRY_KEYS]
        if unknown or not entry.get("path"):
            what = f"has the unknown key {unknown[0]!r}" if unknown else "has no path"
            raise UsageError(
                f"corpus.inputs: the entry {dict(entry)} {what}; allowed keys: {', '.join(_ENTRY_KEYS)}, of which path "
                f"is required. {NOTHING_WRITTEN}"
            )
        parsed = cls(**dict(entry))
        if parsed.format is not None and parsed.format not in FORMATS:
            raise UsageError(
                f"corpus.inputs: the format of {parsed.path} is {parsed.format!r}; allowed: {', '.join(FORMATS)}. "
                f"{NOTHING_WRITTEN}"
            )
        if parsed.name is not None and not (_ENTRY_NAME.fullmatch(parsed.name) and parsed.name.strip(".")):
            raise UsageError(
                f"corpus.inputs: {parsed.name!r} is not a name; allowed: {_ENTRY_NAME.pattern}. {NOTHING_WRITTEN}"
            )
        if (parsed.format == "megatron") != (parsed.tokenizer is not None):
            raise UsageError(
                f"corpus.inputs: the entry of {parsed.path} has the format {parsed.format} and the tokenizer "
                f"{parsed.tokenizer}; the format megatron needs the tokenizer of its ids, others have none. "
                f"{NOTHING_WRITTEN}"
            )
        if parsed.text_key == "":
            raise UsageError(f"corpus.inputs: the text_key of {parsed.path} is empty. {NOTHING_WRITTEN}")
        return parsed


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One input: its name in the corpus, where it lies on this machine, and how it was asked for."""

    name: str
    path: Path
    entry: InputEntry = InputEntry(path="")

    @property
    def compression(self) -> str | None:
        """ "gz", "zst" or None, by the file's suffix."""
        return _COMPRESSIONS.get(self.path.suffix.lower())

    @property
    def suffix(self) -> str:
        """The suffix that names the format, in lower case, without that of a compression."""
        path = self.path.with_suffix("") if self.compression else self.path
        return path.suffix.lower()

    @property
    def format(self) -> str:
        """One of FORMATS."""
        return self.entry.format or _FORMAT_OF_SUFFIX.get(self.suffix, "text")

    def text_key(self, default: str) -> str:
        """The key that holds the text, by default `corpus.jsonl_text_key`."""
        return default if self.entry.text_key is None else self.entry.text_key

    def options(self) -> dict[str, str]:
        """Return the options that the manifest records besides the name: only those given explicitly."""
        asked = {"source": self.entry.name, "format": self.entry.format, "text_key": self.entry.text_key}
        if self.entry.tokenizer is not None:
            asked["tokenizer_sha256"] = tokenizer_digest(self.entry.tokenizer)
        return {key: value for key, value in asked.items() if value is not None}


def find_inputs(entries: Sequence[str | Mapping[str, str]], exclude: Sequence[str] = ()) -> list[InputFile]:
    """Expand files, folders and globs, sorted by name; a file that matches twice counts once.

    Args:
        entries: of `corpus.inputs`; relative paths start at the working folder, a folder means all files below it that
            are not hidden, `**` crosses folders, and {python_stdlib} is replaced by the folder of Python's own
            library.
        exclude: `corpus.exclude`: file names or globs, each of which must take away a file.

    Raises:
        UsageError: an entry matches no file, an exclusion matches no input, two names are equal.
    """
    if not entries:
        raise UsageError(f"corpus.inputs is empty; give at least one file or glob. {NOTHING_WRITTEN}")
    found: dict[str, tuple[str, InputEntry]] = {}  # real path -> shortest way to it and its entry
    for entry in map(InputEntry.parse, entries):
        for path in _expand(entry.path):
            absolute = os.path.abspath(path)  # noqa: PTH100 (resolve() would follow links and change names)
            identity = os.path.realpath(path)
            known, other = found.get(identity, (absolute, entry))
            if _reading(other) != _reading(entry):
                raise UsageError(
                    f"corpus.inputs takes {path} in twice, with different names, formats or text keys. "
                    f"{NOTHING_WRITTEN}",
                    hint="let each file match one entry",
                )
            found[identity] = min(absolute, known), other
    _exclude(found, exclude)
    return _named(list(found.values()))


def writing_tokenizer_path(path: str) -> Path:
    """Return the path of the tokenizer that an entry names.

    Raises:
        UsageError: it does not exist.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise UsageError(f"corpus.inputs: the tokenizer {path} does not exist. {NOTHING_WRITTEN}")
    return found


def tokenizer_digest(path: str) -> str:
    """Return the digest of the files of a tokenizer, by their names and content; raises as `writing_tokenizer_path`."""
    found = writing_tokenizer_path(path)
    files = sorted(file for file in found.iterdir() if file.is_file()) if found.is_dir() else [found]
    return hash_of(*[[file.name, sha256_file(file)] for file in files])


def companions(files: Sequence[InputFile]) -> list[str]:
    """Warnings about inputs that are probably not meant as text, because a glob took them in."""
    warnings = []
    for file in files:
        is_named = file.path.name == Path(file.entry.path).name
        if _COMPANIONS.fullmatch(file.path.name) and not is_named:
            warnings.append(f"{file.path} is part of the text; leave it out with corpus.exclude=['{file.path.name}']")
        if file.suffix == ".json" and file.entry.format is None:
            warnings.append(
                f"{file.path} is taken as plain text, JSON syntax included; to take the text out of it, give "
                f"{{path: {file.path}, format: json, text_key: KEY}}"
            )
    return warnings


def _reading(entry: InputEntry) -> tuple[str | None, ...]:
    return entry.name, entry.format, entry.text_key, entry.tokenizer


def _named(found: Sequence[tuple[str, InputEntry]]) -> list[InputFile]:
    """Name the files and sort them by name."""
    groups: dict[str | None, list[tuple[str, InputEntry]]] = {}
    for path, entry in found:
        groups.setdefault(entry.name, []).append((path, entry))
    files = []
    for name, members in groups.items():
        common = Path(os.path.commonpath([os.path.dirname(path) for path, _ in members]))  # noqa: PTH120
        prefix = "" if name is None else f"{name}/"
        files += [
            InputFile(name=f"{prefix}{Path(path).relative_to(common).as_posix()}", path=Path(path), entry=entry)
            for path, entry in members
        ]
    files.sort(key=lambda file: file.name)
    for file, following in itertools.pairwise(files):
        if file.name == following.name:
            raise UsageError(
                f"corpus.inputs: {file.path} and {following.path} are both called {file.name!r}. {NOTHING_WRITTEN}",
                hint="give one of the entries another name",
            )
    for file in files:
        if any(0xD800 <= ord(letter) < 0xE000 for letter in file.name):  # how Python shows undecodable bytes
            raise UsageError(
                f"corpus.inputs: the file name {file.name!r} is not UTF-8. {NOTHING_WRITTEN}", hint="rename the file"
            )
    return files


def _exclude(found: dict[str, tuple[str, InputEntry]], patterns: Sequence[str]) -> None:
    """Take excluded files away: a pattern without a slash is compared with file names, another one is a glob."""
    for pattern in patterns:
        if "/" in pattern:
            taken = {os.path.realpath(path) for path in _matches(pattern)} & set(found)
        else:
            taken = {real for real, (path, _) in found.items() if fnmatch.fnmatchcase(Path(path).name, pattern)}
        if not taken:
            raise UsageError(
                f"corpus.exclude: {pattern} matches no input. {NOTHING_WRITTEN}",
                hint="a name or pattern without / is compared with file names, one with / is a path or glob",
            )
        for real in taken:
            del found[real]
    if not found:
        raise UsageError(f"corpus.exclude leaves no input. {NOTHING_WRITTEN}", hint="exclude less")


def _matches(pattern: str) -> list[str]:
    stdlib = sysconfig.get_paths()["stdlib"]
    literal = Path(pattern.replace(PYTHON_STDLIB, stdlib)).expanduser()
    if literal.is_file():
        return [str(literal)]
    expression = os.path.expanduser(pattern).replace(PYTHON_STDLIB, glob.escape(stdlib))  # noqa: PTH111
    return [path for path in glob.glob(expression, recursive=True) if Path(path).is_file()]  # noqa: PTH207


def _expand(pattern: str) -> list[str]:
    literal = Path(pattern.replace(PYTHON_STDLIB, sysconfig.get_paths()["stdlib"])).expanduser()
    if literal.is_dir():
        matches = _matches(f"{glob.escape(str(literal))}/**/*")
        if not matches:
            raise UsageError(
                f"corpus.inputs: the folder {pattern} holds no file but hidden ones. {NOTHING_WRITTEN}",
                hint="check the path; relative ones start at the working folder",
            )
        return matches
    matches = _matches(pattern)
    if not matches:
        raise UsageError(
            f"corpus.inputs: {pattern} matches no file. {NOTHING_WRITTEN}",
            hint="check the path; relative ones start at the working folder, and ** crosses folders",
        )
    return matches
