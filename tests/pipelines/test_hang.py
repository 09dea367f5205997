"""A training run that hangs: found without a signal from outside, ended with 71, and continued bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from support.command import checkpoints, command, environment, start, step_lines, tiny
from support.nodes import ends, node, ranks, wait_for_commit

pytestmark = pytest.mark.multiprocess

# A step takes milliseconds; a machine that is busy with other tests may need some seconds for it.
LIMITS = ("first_steps_s=10", "step_s=10", "measure_s=10", "save_s=10")
ENDLESS = (
    "layout.data_parallel_size=2",
    "training.steps=1000000",
    "checkpoint.every_steps=5",
    *(f"launch.watchdog.{limit}" for limit in LIMITS),
)


def stop_a_rank(pids: list[int], number: int) -> None:
    """Stop the rank of that number among some processes."""
    for pid in pids:
        if f"RANK={number}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            os.kill(pid, signal.SIGSTOP)
            return
    raise AssertionError(f"no rank {number} among {pids}")


def hang_is_recorded(run_dir: Path, *, rank: int) -> None:
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["phase"], status["exit_code"]) == ("failed", 71)
    attempt = run_dir / "attempts" / "0001"
    assert f"rank {rank} on" in json.loads((attempt / f"rank-{rank:05d}.json").read_text())["reason"]
    for number in (0, 1):
        stacks = (attempt / f"stacks-{number:05d}.txt").read_text()
        assert "training/loop.py" in stacks, (number, stacks)
    waiting = (attempt / f"stacks-{1 - rank:05d}.txt").read_text()
    assert "/torch/distributed/" in waiting, "the other rank waits in a collective call"


def resumes_bitwise(run_dir: Path, arguments: list[str], corpus: Path, folder: Path) -> None:
    """Take up the run, and compare all its steps with those of a run that nothing ended."""
    last = max(step_lines(run_dir)) + 3
    alone = tiny(corpus, folder, "alone", *ENDLESS)
    for words in (arguments, alone):
        done = subprocess.run(
            command("train", *words, f"training.stop_after_step={last}"),
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert step_lines(run_dir) == step_lines(folder / "alone")


@pytest.mark.promise("a rank that hangs ends the job with 71 without a signal from outside; its stacks are kept")
def test_hang_of_a_local_rank_ends_with_71_and_the_run_resumes(small_corpus: Path, tmp_path: Path) -> None:
    run_dir, arguments = tmp_path / "run", tiny(small_corpus, tmp_path, "run", *ENDLESS)
    launcher = start("train", *arguments)
    try:
        wait_for_commit(run_dir)
        stop_a_rank(ranks(launcher), 1)
        stopped_at = time.monotonic()
        _, stderr = launcher.communicate(timeout=150)
    finally:
        launcher.kill()
    assert launcher.returncode == 71, stderr
    assert "the others wait for rank 1" in stderr
    assert time.monotonic() - stopped_at < 60, "the limit is 10 s"
    hang_is_recorded(run_dir, rank=1)
    assert checkpoints(run_dir)
    resumes_bitwise(run_dir, arguments, small_corpus, tmp_path)


@pytest.mark.promise("`megamask launch node`: a hang ends the job with 71 on every node and names the rank")
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_hang_on_one_node_ends_all_nodes_with_71(small_corpus: Path, tmp_path: Path, victim: int) -> None:
    run_dir, arguments = tmp_path / "run", tiny(small_corpus, tmp_path, "run", *ENDLESS)
    nodes = [node(arguments, number, "job-1.0") for number in (0, 1)]
    wait_for_commit(run_dir)
    stop_a_rank(ranks(nodes[victim]), victim)
    codes, errors = ends(nodes)
    assert codes == [71, 71], errors
    assert f"the others wait for rank {victim} on host-{victim}" in errors
    hang_is_recorded(run_dir, rank=victim)
    failure = json.loads((run_dir / "attempts" / "0001" / f"rank-{victim:05d}.json").read_text())
    assert failure["node"] == f"host-{victim}"
