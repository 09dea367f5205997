"""The named moments at which tests interrupt a run: every part of a run has some, and only tests can arm one."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from megamask.storage import fault_points
from support.command import command, environment, tiny
from support.faulty_main import start_with_fault

pytestmark = pytest.mark.multiprocess

EVERY_PART = {
    "launch.rank_started",
    "attempt.claimed",
    "claim.json.linked",
    "rendezvous.joined",
    "checkpoint.verified",
    "checkpoint.restored",
    "step.batch_read",
    "step.computed",
    "step.updated",
    "journal.appended",
    "evaluation.pass_begun",
    "evaluation.measured",
    "preview.pass_begun",
    "preview.decoded",
    "checkpoint.share_taken",
    "checkpoint.state_written",
    "COMMIT.json.linked",
    "latest.replaced",
    "prune.commit_removed",
    "status.json.replaced",
    "mlflow.sent",
}


@pytest.mark.promise("faults can be planted at named points of every part of a run, and by no setting or variable")
def test_every_part_of_a_run_has_a_named_point(small_corpus: Path, tmp_path: Path) -> None:
    settings = ["layout.data_parallel_size=2", "checkpoint.every_steps=1", "checkpoint.keep_last=1"]
    settings += ["evaluation.every_steps=3", "evaluation.rows=2", "evaluation.draws=2", "evaluation.replicates=2"]
    settings += ["preview.every_steps=3", "preview.prompts=['a']", "preview.num_tokens=2", "training.steps=4"]
    arguments = [*tiny(small_corpus, tmp_path, "run", *settings), "tracking.mlflow.enabled=true"]
    begun = subprocess.run(
        command("train", *arguments, "training.stop_after_step=1", "tracking.mlflow.enabled=false"),
        env=environment(),
        capture_output=True,
        check=False,
    )
    assert begun.returncode == 0, begun.stderr
    fault = {"point": None, "rank": None, "action": "list", "folder": str(tmp_path)}
    process = start_with_fault(["train", *arguments], fault)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    reached = {point for path in tmp_path.glob("points-*") for point in path.read_text().splitlines()}
    assert reached >= EVERY_PART


def test_nothing_is_armed_in_production(tmp_path: Path) -> None:
    code = "import json; from megamask.storage import fault_points; print(json.dumps(len(fault_points._followers)))"
    fault = {"point": "journal.appended", "nth": 1, "rank": None, "action": "kill", "folder": str(tmp_path)}
    surroundings = {**os.environ, "FAULT": json.dumps(fault)}
    done = subprocess.run([command()[0], "-c", code], env=surroundings, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), fault_points._followers) == ("0", [])
