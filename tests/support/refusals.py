"""Parts that the tests of bad input share: commands, what is on disk, and what a refusal is."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path

from support.command import ROOT, tiny

Refuse = Callable[..., str]
Snapshot = dict[Path, tuple[int, int] | None]

STDLIB = str(ROOT / "configs" / "corpus" / "python_stdlib.yaml")
# Each refusal names what did not happen.
_ASSURANCES = ("Nothing was", "No row was", "No batch was", "No sample", "not touched", "must not be used", "not used")


def snapshot(*folders: Path) -> Snapshot:
    """Size and time of every file and the name of every folder."""
    found: Snapshot = {}
    for path in (path for folder in folders for path in folder.rglob("*")):
        status = path.lstat()
        found[path] = None if path.is_dir() else (status.st_size, status.st_mtime_ns)
    return found


def check_refusal(code: int, stdout: str, stderr: str, expected: int, words: tuple[str, ...]) -> None:
    """One error line with these words, no trace, and the same in the JSON object that ends stdout."""
    assert code == expected, stderr
    assert stderr.startswith("error: "), stderr
    assert sum(line.startswith("error:") for line in stderr.splitlines()) == 1, stderr
    assert "Traceback" not in stderr
    for word in words:
        assert word in stderr
    answer = json.loads(stdout.splitlines()[-1])
    assert answer["exit_code"] == expected
    assert f"error: {answer['error']}" in stderr


READERS = {
    "evaluate": ["evaluate"],
    "sample": ["sample"],
    "inspect": ["inspect", "--step", "1"],
    "verify corpus": ["verify", "corpus"],
    "verify checkpoint": ["verify", "checkpoint"],
    "status": ["status"],
}


def prepare(*overrides: str) -> list[str]:
    return [
        "prepare",
        STDLIB,
        "corpus.inputs=[text.txt]",
        "corpus.output_dir=new/corpus",
        "corpus.validation_fraction=0",
        *overrides,
    ]


def train(corpus: Path | str, *overrides: str) -> list[str]:
    return ["train", *tiny(Path(corpus), Path("runs"), "new", "training.steps=2", *overrides)]


def truncate(path: Path) -> None:
    """Leaves the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def limit_files(num_bytes: int) -> None:
    """The system refuses to let any file grow beyond this."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def check_assurance(stderr: str) -> None:
    """The message names what did not happen."""
    assert any(words in stderr for words in _ASSURANCES), stderr
