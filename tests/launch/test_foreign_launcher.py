"""Launchers of one's own start the ranks: the run is the same, bit for bit, and only its exit code is lost."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support.command import ROOT, checkpoints, command, environment, megamask, step_lines, tiny
from support.nodes import wait_for_commit

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
TWO = "layout.data_parallel_size=2"


@pytest.fixture(scope="module")
def own(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks under the product's own launcher."""
    folder = tmp_path_factory.mktemp("own")
    done = megamask("train", *tiny(small_corpus, folder, "run", TWO, "training.stop_after_step=12"))
    assert done.code == 0, done.stderr
    return folder / "run"


def _torchrun(*arguments: str) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "megamask_pipelines.cli.main", "train", *arguments),
    ]


@pytest.mark.promise("torchrun trains the same run, bit for bit")
def test_torchrun_trains_the_same_run(small_corpus: Path, tmp_path: Path, own: Path) -> None:
    words = _torchrun(*tiny(small_corpus, tmp_path, "run", TWO, "training.stop_after_step=12"))
    done = subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert step_lines(tmp_path / "run") == step_lines(own)


@pytest.mark.promise("torchrun loses the exit code; status.json has it")
def test_torchrun_that_is_asked_to_end_saves_and_the_code_is_in_the_status(small_corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = tiny(small_corpus, tmp_path, "run", TWO, "training.steps=1000000", "checkpoint.every_steps=5")
    launcher = subprocess.Popen(
        _torchrun(*arguments), env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for_commit(run_dir)
        launcher.send_signal(signal.SIGTERM)
        _, errors = launcher.communicate(timeout=400)
    finally:
        launcher.kill()
    assert launcher.returncode not in (0, 75), errors
    assert json.loads((run_dir / "status.json").read_text())["exit_code"] == 75
    assert int(checkpoints(run_dir)[-1].name[5:13]) == max(step_lines(run_dir))


@pytest.mark.promise("ranks that a bare srun or a script places by RANK train the same run, bit for bit")
def test_ranks_that_a_script_places_train_the_same_run(small_corpus: Path, tmp_path: Path, own: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = command("train", *tiny(small_corpus, tmp_path, "run", TWO, "training.stop_after_step=12"))
    ranks = []
    for rank in (0, 1):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        place |= {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "2"}  # what srun adds refuses nothing
        ranks.append(subprocess.Popen(words, env={**environment(), **place}, stdout=subprocess.DEVNULL))
    assert [rank.wait(400) for rank in ranks] == [0, 0]
    assert step_lines(tmp_path / "run") == step_lines(own)
