"""Completion as a shell asks for it: what it offers after Tab, and that it starts nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.command import environment

MAIN = "import sys; sys.argv[0] = 'megamask'; from megamask_pipelines.cli.main import main; sys.exit(main())"


def offered(line: str, folder: Path) -> set[str]:
    """Return the words that a shell would offer at the end of a line, as argcomplete's script asks for them."""
    answer = folder / "answer"
    question = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    done = subprocess.run(
        [sys.executable, "-c", MAIN], env={**environment(), **question}, cwd=folder, capture_output=True, timeout=60
    )
    assert done.stdout == b""
    return {word.strip() for word in answer.read_text().split("\n")} - {""}


@pytest.mark.promise("Tab completes verbs, options, files and the keys of settings")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("megamask tr", {"train"}),
        ("megamask convert from-", {"from-hf"}),
        ("megamask status --go", {"--goodput"}),
        ("megamask train run.yaml training.st", {"training.steps=", "training.stop_after_step="}),
        ("megamask prepare corpus.yaml corpus.rows_", {"corpus.rows_per_block="}),
        ("megamask explain layout.tensor", {"layout.tensor_parallel_size"}),
        ("megamask train ru", {"run.yaml"}),
    ],
)
def test_tab_offers_what_can_follow(line: str, words: set[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("")
    assert offered(line, tmp_path) == words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answer", "run.yaml"]
