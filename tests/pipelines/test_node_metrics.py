"""The figures of a run that its first node exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megamask.launch.metrics_file import RunFigures
from megamask_pipelines.node_metrics import run_figures


def _line(kind: str, **fields: Any) -> str:
    return json.dumps({"seq": 1, "time": "t", "kind": kind, "prev": "p", **fields}) + "\n"


def test_run_that_has_not_begun_has_no_figures(tmp_path: Path) -> None:
    assert run_figures(tmp_path / "run") == RunFigures()


def test_figures_are_the_newest_that_can_be_read(tmp_path: Path) -> None:
    for attempt in (1, 2, 3):
        folder = tmp_path / "attempts" / f"{attempt:04d}"
        folder.mkdir(parents=True)
        (folder / "claim.json").write_text("{}")
    for name in ("step-00000004-a0001", "step-00000006-a0002", "step-00000008-a0003"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if name != "step-00000008-a0003":  # still being saved
            (tmp_path / "checkpoints" / name / "COMMIT.json").write_text("{}")
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "attempt-0001-000.jsonl").write_text(_line("step", step=9, loss=1.0, consumed_tokens=90))
    (tmp_path / "journal" / "attempt-0003-000.jsonl").write_text(
        _line("step", step=7, loss=2.5, consumed_tokens=70, tokens_per_second=None)
        + _line("incident", loss=9.0)
        + "damaged\n"
        + _line("step", step=8, loss=2.0).rstrip("\n")  # still being written
    )
    assert run_figures(tmp_path) == RunFigures(
        restarts=2, loss_nats_per_token=2.5, consumed_tokens=70, checkpoint_step=6
    )


def test_value_that_is_no_number_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    line = _line("step", step=1, loss="nan", consumed_tokens=True)
    (tmp_path / "journal" / "attempt-0001-000.jsonl").write_text(line)
    assert run_figures(tmp_path) == RunFigures()
