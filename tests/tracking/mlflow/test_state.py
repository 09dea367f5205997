from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamask.runs.layout import mlflow_state_path
from megamask.tracking.journal.tail import Position
from megamask.tracking.mlflow.points import Memory
from megamask.tracking.mlflow.state import SinkState, load_state, save_state


def test_state_reads_back_what_was_saved(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    state = SinkState(
        uri="sqlite:////x",
        experiment_id="1",
        run_id="ab",
        position=Position(file="attempt-0001-000.jsonl", offset=17),
        memory=Memory(sent_through={"step": 3}, is_completed=True),
        artifacts=["attempt-0001.yaml"],
    )
    save_state(tmp_path, state)
    assert load_state(tmp_path) == state


@pytest.mark.parametrize("change", [{"version": 2}, {"position": {"line": 1}}, {"memory": None}, {"run_id": ...}])
def test_state_that_cannot_be_read_counts_as_lost(tmp_path: Path, change: dict[str, object]) -> None:
    save_state(tmp_path, SinkState(uri="u", experiment_id="1", run_id="ab"))
    content = json.loads(mlflow_state_path(tmp_path).read_bytes()) | change
    content = {key: value for key, value in content.items() if value is not ...}
    mlflow_state_path(tmp_path).write_text(json.dumps(content))
    assert load_state(tmp_path) is None
