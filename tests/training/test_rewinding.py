"""A rewind on its way: the sections in which a launcher's watchdog sees the rank."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megamask.resilience.heartbeat import Heartbeat
from megamask.resilience.numerics import RewindError
from megamask.resilience.signals import StopRequest
from megamask.training import build, loop
from megamask.training.build import _guard
from megamask.training.stopping import StopReason
from megamask_pipelines import pretrain
from support.journalled_run import JournalledRun
from support.tiny_run import write_corpus


@pytest.fixture
def run(tmp_path: Path) -> JournalledRun:
    return JournalledRun(tmp_path, write_corpus(tmp_path / "data"))


def test_rewind_waits_for_a_save_in_the_section_save(run: JournalledRun) -> None:
    run.start(None)
    heartbeat, seen = Heartbeat(), list[str]()
    scope: Any = SimpleNamespace(
        attempt=run.attempt,
        committer=SimpleNamespace(finish=lambda: seen.append(heartbeat.mark.section)),
        run_dir=run.run_dir,
        progress=run.progress,
    )
    guard = _guard(run.config, run.data, run.engine, scope, [], heartbeat)  # type: ignore[arg-type]
    heartbeat.enter("step", 1)
    guard.rewind(1, "nonfinite")
    assert seen == ["save"]
    run.close()


@pytest.mark.promise("The watchdog's limit of a step does not apply while a rewind goes back to a checkpoint")
def test_attempt_after_a_rewind_begins_in_the_section_restore(
    run: JournalledRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = []

    def build_run(*parts: Any) -> str:
        heartbeat = parts[-1]
        sections.append(heartbeat.mark.section)
        if len(sections) == 1:
            heartbeat.enter("step", 1)
            incident = {"incident": "rewind", "problem": "a loss is not finite"}
            raise RewindError("a loss is not finite", hint="none", incident=incident)
        return "a run"

    monkeypatch.setattr(build, "build_run", build_run)
    monkeypatch.setattr(loop, "train", lambda _run: StopReason.FINISHED)
    with StopRequest() as signals:
        pretrain.pretrain(run.config, signals)
    assert sections == ["import", "restore"]
    run.close()
