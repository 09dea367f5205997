"""JobSets and TrainJobs of `megamask launch` as local processes, under a user id without an entry in passwd.

tests/support/jobset_emulation.py and trainjob_emulation.py replace controllers and kubelet: this proves what
manifest, node wrapper and exit codes do together, not Kubernetes itself.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.command import ROOT, VOLATILE, command, environment, step_lines, tiny
from support.jobset_emulation import Emulation, why_not
from support.trainjob_emulation import jobset_of

REASON = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.multiprocess,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(REASON is not None, reason=f"no promise about pods is tested: {REASON}"),
]
USER = 54321
RUNTIME = ROOT / "k8s" / "overlays" / "trainjob" / "runtime.yaml"
TARGETS = pytest.mark.parametrize("target", ["jobset", "trainjob"])
JOB = (
    f'launch.command=["{sys.executable}", "-P", "-m", "megamask_pipelines.cli.main"]',
    "launch.image=images.example/megamask@sha256:" + "0" * 64,
    "launch.nodes=2",
    "launch.gpus_per_node=0",
    "launch.interface=eth0",
    "launch.stop_grace_s=60",
    "launch.kubernetes.claims.ckpt=/ckpt",
    f"launch.kubernetes.run_as={USER}",
    "layout.data_parallel_size=2",
    "training.steps=1000000",
    "checkpoint.every_steps=10",
)
LAST_STEP = 200


@pytest.fixture
def pods(small_corpus: Path, tmp_path: Path) -> Callable[..., Emulation]:
    """Renders a job whose claim holds the corpus, and returns its emulation."""
    claim = tmp_path / "claim"
    shutil.copytree(small_corpus, claim / "corpus")
    for path in [claim, *claim.rglob("*")]:
        os.chown(path, USER, USER)

    def render(*overrides: str, target: str = "jobset", **options: Any) -> Emulation:
        arguments = tiny(Path("/ckpt/corpus"), Path("/ckpt"), "run", *JOB, *overrides)
        done = subprocess.run(command("launch", target, *arguments), env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        objects = list(yaml.safe_load_all(done.stdout))
        if target == "trainjob":
            objects[1] = jobset_of(objects[1], yaml.safe_load(RUNTIME.read_text()))
        shown = [Path(sys.base_prefix), Path(sys.prefix), ROOT]
        variables = {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
        return Emulation(objects, tmp_path / "pods", {"ckpt": claim}, shown, variables, **options)

    return render


def _claims(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("run/attempts/*/claim.json"))]


@pytest.mark.promise("Kubernetes: an evicted pod costs a restart that is not counted, and the run resumes bitwise")
@TARGETS
def test_eviction_is_saved_not_counted_and_resumed_bitwise(
    pods: Callable[..., Emulation], small_corpus: Path, tmp_path: Path, target: str
) -> None:
    """Also a read-only root, no capability, a user without a name, and names that are published late."""
    emulation = pods(f"training.stop_after_step={LAST_STEP}", target=target, names_after_s=15)
    run_dir = tmp_path / "claim" / "run"
    evicted: list[int] = []

    def evict() -> int | None:
        if evicted or not list(run_dir.glob("checkpoints/*/COMMIT.json")):
            return None
        evicted.append(1)
        return 1

    assert emulation.run(evict) == "Completed", emulation.log
    assert emulation.actions == ["RestartJobSetAndIgnoreMaxRestarts"]
    assert emulation.codes == [[75, 75], [0, 0]], emulation.log
    claims = _claims(tmp_path / "claim")
    assert [claim["token"] for claim in claims] == ["jobset-uid-1.0", "jobset-uid-1.1"]
    assert [claim["node"] for claim in claims] == ["host-0-0", "host-0-1"]
    assert json.loads((run_dir / "status.json").read_text())["node"] == "host-0-1"
    alone = tiny(small_corpus, tmp_path, "alone", *JOB[-3:], f"training.stop_after_step={LAST_STEP}")
    assert subprocess.run(command("train", *alone), env=environment(), capture_output=True).returncode == 0
    assert _kept(step_lines(run_dir)) == _kept(step_lines(tmp_path / "alone"))


def _kept(lines: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {step: {key: value for key, value in line.items() if key not in VOLATILE} for step, line in lines.items()}


@pytest.mark.promise("Kubernetes: a loss that is not finite ends the job with 66, without a restart")
@TARGETS
def test_loss_that_is_not_finite_is_not_started_again(pods: Callable[..., Emulation], target: str) -> None:
    emulation = pods("optimizer.learning_rate=1e30", "optimizer.warmup_steps=0", target=target)
    assert emulation.run() == "Failed"
    assert emulation.actions == ["FailJobSet"]
    assert emulation.codes == [[66, 66]], emulation.log


@pytest.mark.promise("Kubernetes: a pod that cannot write temporary files names that (74)")
def test_missing_temporary_folder_is_named(pods: Callable[..., Emulation]) -> None:
    emulation = pods("launch.max_restarts=0")
    (container,) = emulation.objects[1]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ]
    container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] != "tmp"]
    assert emulation.run() == "Failed"
    assert emulation.codes == [[74, 74]], emulation.log
    assert "mount an emptyDir" in emulation.log
    assert "bug" not in emulation.log


@pytest.mark.promise("Kubernetes: MLflow works without a home folder and without a name of the user")
def test_tracking_works_without_a_name_of_the_user(pods: Callable[..., Emulation], tmp_path: Path) -> None:
    emulation = pods(
        "tracking.mlflow.enabled=true",
        "training.stop_after_step=5",
        "launch.max_restarts=0",
        "launch.nodes=1",
        *("launch.interface=lo",),
    )
    assert emulation.run() == "Completed", emulation.log
    assert "home directory" not in emulation.log
    assert list((tmp_path / "claim").glob("mlflow*")), "nothing was tracked"
