"""A journalled run, a copy to change, and the verb that checks it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamask_pipelines.cli.main import main


@pytest.fixture
def run_dir(journalled_run: Path, tmp_path: Path) -> Path:
    """A copy whose attempts are over: the claims name no living process."""
    copy = Path(shutil.copytree(journalled_run, tmp_path / "run"))
    for path in copy.glob("attempts/*/claim.json"):
        path.write_text(path.read_text().replace(f'"pid": {os.getpid()}', '"pid": 999999999'))
    return copy


@pytest.fixture
def verify(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs the verb and returns its answer; the exit code is the answer's."""

    def run(code: int) -> dict[str, Any]:
        assert main(["verify", "run", str(run_dir), "--json"]) == code
        answer: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert answer["exit_code"] == code
        assert answer["ok"] is (code == 0)
        assert bool(answer["findings"]) is (code != 0)
        assert main(["verify", "run", str(run_dir)]) == code
        text = capsys.readouterr().out
        assert text.count("found: ") == len(answer["findings"])
        return answer

    return run
