"""`megamask launch node` as two nodes on one machine: every node leaves with the job's one exit code."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from megamask.launch.verdict import read_verdict
from support.command import command, environment, journal, step_lines, tiny
from support.exposition import parsed
from support.nodes import ends, node, ranks, wait_for_attempt, wait_for_commit

pytestmark = pytest.mark.multiprocess

NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
ENDLESS = ("layout.data_parallel_size=2", "training.steps=1000000", "checkpoint.every_steps=5")


@pytest.mark.promise("`megamask launch node`: a preempted job ends with 75 on every node and resumes")
def test_preempted_job_ends_with_75_on_every_node_and_resumes(small_corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = tiny(small_corpus, tmp_path, "run", *ENDLESS, f"launch.metrics_folder={tmp_path / 'metrics'}")
    nodes = [node(arguments, number, "job-1.0") for number in (0, 1)]
    wait_for_commit(run_dir)
    nodes[1].send_signal(signal.SIGTERM)  # one node is enough: the ranks agree
    codes, errors = ends(nodes)
    assert codes == [75, 75], errors
    verdict = read_verdict(tmp_path / "run.launch" / "job-1.0")
    assert verdict is not None and (verdict.code, verdict.attempt) == (75, 1)
    assert verdict.step == max(step_lines(run_dir))
    assert verdict.node == json.loads((run_dir / "status.json").read_text())["node"] == "host-0"
    assert [line["host"] for line in journal(run_dir) if line["kind"] == "attempt_started"] == ["host-0"]
    claim = json.loads((run_dir / "attempts" / "0001" / "claim.json").read_text())
    assert (claim["token"], claim["node"]) == ("job-1.0", "host-0")
    _assert_metrics(tmp_path / "metrics", run_dir, verdict.step)
    nodes = [node([*arguments, f"training.stop_after_step={verdict.step + 2}"], number, "job-1.1") for number in (0, 1)]
    codes, errors = ends(nodes)
    assert codes == [0, 0], errors
    assert max(step_lines(run_dir)) == verdict.step + 2


def _assert_metrics(folder: Path, run_dir: Path, step: int) -> None:
    """Assert that both nodes' metrics files have the end of a preempted first attempt."""
    found = {
        number: {series.name: series for series in parsed((folder / f"megamask-run-{number}.prom").read_text())}
        for number in (0, 1)
    }
    for number, metrics in found.items():
        assert (metrics["megamask_up"].value, metrics["megamask_exit_code"].value) == (0, 75)
        assert 0 < metrics["megamask_step"].value <= step
        labels = {"run": "run", "node": str(number), "host": f"host-{number}"}
        assert metrics["megamask_node_info"].labels == labels
    newest = step_lines(run_dir)[step]
    assert found[0]["megamask_loss_nats_per_token"].value == newest["loss"]
    assert found[0]["megamask_consumed_tokens"].value == newest["consumed_tokens"]
    assert (found[0]["megamask_checkpoint_step"].value, found[0]["megamask_restarts_total"].value) == (step, 0)
    assert "megamask_loss_nats_per_token" not in found[1]


@pytest.mark.promise("`megamask launch node`: a refusal ends with 2 on every node")
def test_refusal_by_rank_0_ends_with_2_on_every_node(small_corpus: Path, tmp_path: Path) -> None:
    first = subprocess.run(
        command("train", *tiny(small_corpus, tmp_path, "run", "training.stop_after_step=1")),
        env=environment(),
        capture_output=True,
    )
    assert first.returncode == 0
    arguments = tiny(small_corpus, tmp_path, "run", "layout.data_parallel_size=2", "run.seed=2")
    codes, errors = ends([node(arguments, number, "job-2.0") for number in (0, 1)])
    assert codes == [2, 2], errors
    assert "run.seed" in errors


@pytest.mark.promise("`megamask launch node`: a killed rank is named, status.json is closed, every node has one code")
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_ends_the_job_on_every_node(small_corpus: Path, tmp_path: Path, victim: int) -> None:
    run_dir = tmp_path / "run"
    nodes = [node(tiny(small_corpus, tmp_path, "run", *ENDLESS), number, "job-3.0") for number in (0, 1)]
    wait_for_commit(run_dir)
    os.kill(ranks(nodes[victim])[0], signal.SIGKILL)
    codes, errors = ends(nodes)
    assert codes == [1, 1], errors
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["phase"], status["exit_code"]) == ("failed", 1)
    failure = json.loads((run_dir / "attempts" / "0001" / f"rank-{victim:05d}.json").read_text())
    assert "killed by SIGKILL" in failure["reason"]


@pytest.mark.promise("`megamask launch node`: a hung rank ends the job with 71 on every node after a signal")
def test_hung_rank_ends_the_job_with_71_after_a_signal(small_corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = tiny(small_corpus, tmp_path, "run", *ENDLESS, "launch.stop_grace_s=2")
    nodes = [node(arguments, number, "job-4.0") for number in (0, 1)]
    wait_for_commit(run_dir)
    os.kill(ranks(nodes[1])[0], signal.SIGSTOP)
    time.sleep(0.5)
    for process in nodes:
        process.send_signal(signal.SIGTERM)
    codes, errors = ends(nodes)
    assert codes == [71, 71], errors
    status = json.loads((run_dir / "status.json").read_text())
    # 1 only where rank 0 journalled an end of its own, as when the other rank is killed first and the connection breaks
    assert status["exit_code"] == 71 or (status["exit_code"] == 1 and status["journal"] is not None), status


@pytest.mark.promise("`megamask launch node`: a job whose run another job takes over ends with 93 on every node")
def test_superseded_job_ends_with_93_on_every_node(small_corpus: Path, tmp_path: Path) -> None:
    """The other job has a pid namespace of its own, as on another host; on one host it would be refused."""
    tried = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"only root can make a pid namespace: a job that is taken over is unproven here ({tried.stderr})")
    run_dir = tmp_path / "run"
    arguments = tiny(small_corpus, tmp_path, "run", *ENDLESS)
    older = [node(arguments, number, "job-6.0") for number in (0, 1)]
    wait_for_commit(run_dir)
    alone = [*arguments, "layout.data_parallel_size=1"]
    newer = node(alone, 0, "job-7.0", num_nodes=1, prefix=NAMESPACE)
    try:
        codes, errors = ends(older)
        assert codes == [93, 93], errors
        older_end = read_verdict(tmp_path / "run.launch" / "job-6.0")
        assert older_end is not None and (older_end.code, older_end.attempt) == (93, 1)
        wait_for_attempt(run_dir, 2)
        assert json.loads((run_dir / "status.json").read_text())["exit_code"] is None, "the older job closed it"
        os.kill(ranks(newer)[0], signal.SIGTERM)
        codes, errors = ends([newer])
        assert codes == [75], errors
    finally:
        newer.kill()
    newer_end = read_verdict(tmp_path / "run.launch" / "job-7.0")
    assert newer_end is not None and (newer_end.code, newer_end.attempt) == (75, 2)


@pytest.mark.promise("`megamask launch node`: a taken port is replaced by a free one")
def test_taken_port_is_replaced_by_a_free_one(small_corpus: Path, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        arguments = tiny(small_corpus, tmp_path, "run", "layout.data_parallel_size=2", "training.steps=10")
        codes, errors = ends([node(arguments, number, "job-5.0", port) for number in (0, 1)])
    assert codes == [0, 0], errors
    assert f"port {port} is taken" in errors
