"""An attempt that ends before it trains: what it leaves, and what it was asked for meanwhile."""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path
from typing import Any, NoReturn

import pytest

from megamask.config import load
from megamask.errors import UsageError
from megamask_pipelines.cli import train
from support.command import tiny
from support.faulty_main import start_with_fault


@pytest.mark.promise("an attempt that fails right after its claim is recorded as failed")
@pytest.mark.multiprocess
def test_attempt_that_fails_right_after_its_claim_is_recorded_as_failed(small_corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (tmp_path / "fault").mkdir()
    fault: dict[str, Any] = {"point": "attempt-0001.yaml.written", "nth": 1, "rank": None, "action": "fail"}
    fault |= {"folder": str(tmp_path / "fault"), "run_dir": str(run_dir)}
    process = start_with_fault(["train", *tiny(small_corpus, tmp_path, "run")], fault)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 74, stderr
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["attempt"], status["phase"], status["exit_code"]) == (1, "failed", 74)
    assert "disk is full" in status["reason"]
    assert json.loads((run_dir / "attempts" / "0001" / "rank-00000.json").read_text())["exit_code"] == 74


@pytest.mark.promise("a signal that comes before a process has its handlers is not lost")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_is_counted_before_anything_is_read(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    def signalled(*_arguments: object) -> NoReturn:
        os.kill(os.getpid(), number)
        raise UsageError("the process is still here")

    monkeypatch.setattr(load, "load_train_config", signalled)
    with pytest.raises(UsageError, match="still here"):
        train.run(argparse.Namespace(config="c.yaml", overrides=[], json=False))
