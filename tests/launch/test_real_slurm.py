"""Jobs of `megamask launch slurm --submit` on a real Slurm: each end is the contract's, each requeue continues bitwise.

Each test takes one to four minutes on an idle machine. They share one cluster; none runs where Slurm is not installed.
Every wait is for an event, with a limit that a busy machine does not reach.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megamask.launch.verdict import read_verdict
from support.command import VOLATILE, checkpoints, command, environment, step_lines, tiny
from support.slurm_cluster import Cluster, slurm_cluster, wait_for, why_not

REASON = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.multiprocess,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(REASON is not None, reason=f"no promise about a real Slurm is tested: {REASON}"),
]
# Far above what an end takes: on a busy machine nothing is killed that would have ended.
KILL_WAIT, STOP_GRACE, SAVE_BUDGET = 400, 240, 120
WAIT_S = 900.0
COMPARED_STEPS = 300
COMPARED_AFTER = 10
# The same schedule in every run, far longer than a test: attempts are ended, none runs out.
ENDLESS = ("layout.data_parallel_size=2", "training.steps=1000000", "checkpoint.every_steps=10")
ON_TWO_NODES = (
    f'launch.command=["{sys.executable}", "-P", "-m", "megamask_pipelines.cli.main"]',
    "launch.nodes=2",
    "launch.gpus_per_node=0",
    "launch.interface=eth0",
    f"launch.slurm.kill_wait_s={KILL_WAIT}",
    f"launch.stop_grace_s={STOP_GRACE}",
    f"launch.save_budget_s={SAVE_BUDGET}",
    "launch.slurm.partition=low",
)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One cluster of three nodes for all tests."""
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster", kill_wait=KILL_WAIT) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _rested(slurm: Cluster) -> Iterator[None]:
    slurm.rest()
    yield


def _train_alone(corpus: Path, folder: Path, steps: int) -> dict[int, dict[str, object]]:
    """Step lines of a run that nothing ended, on this machine's own launcher."""
    arguments = tiny(corpus, folder, "alone", *ENDLESS, f"training.stop_after_step={steps}")
    done = subprocess.run(command("train", *arguments), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return step_lines(folder / "alone")


class Uninterrupted:
    """Step lines of a run that nothing ended, trained anew where more of them are asked for."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.corpus, self.folder = corpus, folder
        self.lines: dict[int, dict[str, object]] = {}

    def up_to(self, step: int) -> dict[int, dict[str, object]]:
        if step not in self.lines:
            folder = self.folder / f"{step:08d}"
            folder.mkdir()
            self.lines = _train_alone(self.corpus, folder, max(step, COMPARED_STEPS))
        return self.lines


@pytest.fixture(scope="module")
def uninterrupted(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """A run that nothing ended."""
    return Uninterrupted(small_corpus, tmp_path_factory.mktemp("uninterrupted"))


class Submitted:
    """A job on the cluster."""

    def __init__(self, slurm: Cluster, corpus: Path, folder: Path, *overrides: str, expects: int = 0) -> None:
        self.slurm, self.corpus, self.folder, self.run_dir = slurm, corpus, folder, folder / "run"
        arguments = tiny(corpus, folder, "run", *ENDLESS, *ON_TWO_NODES, *overrides)
        done = subprocess.run(
            command("launch", "slurm", *arguments, "--submit", "--json"),
            env=slurm.environment,
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == expects, done.stderr
        self.errors = done.stderr
        self.number = "" if expects else json.loads(done.stdout.splitlines()[-1])["submitted"]

    @property
    def log(self) -> str:
        """Output of the job."""
        return "".join(path.read_text(errors="replace") for path in self.folder.glob(f"*-{self.number}.log"))

    def state(self) -> str:
        return self.slurm.job(self.number)["JobState"]

    def verdict(self, restart: int = 0) -> int | None:
        found = read_verdict(self.folder / "run.launch" / f"slurm-{self.number}.{restart}")
        return None if found is None else found.code

    def wait(self, what: str, is_there: Callable[[], object]) -> None:
        """Wait until something is true of this job."""
        try:
            wait_for(f"{what} of job {self.number}", is_there, WAIT_S)
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {self.state()}\n{self.log}") from error

    def wait_for_state(self, *states: str) -> None:
        self.wait(f"one of the states {states}", lambda: self.state() in states)

    def wait_for_verdict(self) -> int | None:
        """Wait for the verdict of the first start."""
        self.wait("a verdict", lambda: self.verdict() is not None)
        return self.verdict()

    def wait_for_commits(self, attempt: int = 1) -> None:
        """Wait until an attempt has committed."""

        def is_there() -> bool:
            assert self.state() not in ("FAILED", "COMPLETED"), f"the job ended before it had committed\n{self.log}"
            return any(line["kind"] == "checkpoint_committed" for line in self.lines(attempt))

        self.wait(f"a commit of attempt {attempt}", is_there)

    def wait_for_the_end_of_ranks(self) -> None:
        """Wait until no rank runs on any node, a node that the network has lost included."""
        self.wait("the end of all ranks", lambda: not any(_ranks(self.slurm, node) for node in self.slurm.nodes))

    def lines(self, attempt: int) -> list[dict[str, object]]:
        """Journal lines of an attempt."""
        files = sorted((self.run_dir / "journal").glob(f"attempt-{attempt:04d}-*.jsonl"))
        return [
            json.loads(line)
            for file in files
            for line in file.read_text().splitlines(keepends=True)
            if line[-1:] == "\n"
        ]

    def resumes(self, uninterrupted: Uninterrupted) -> None:
        """Wait until the second attempt has trained on, end the job, and compare every step that was taken till then.

        Of the second attempt at most COMPARED_AFTER steps are compared.
        """
        self.slurm.start_now(self.number)
        self.wait_for_commits(2)
        self.slurm.call("scancel", self.number)
        self.wait_for_the_end_of_ranks()
        first, second = ([line for line in self.lines(number) if line["kind"] == "step"] for number in (1, 2))
        assert first and second
        compared = [*first, *second[:COMPARED_AFTER]]
        expected = uninterrupted.up_to(max(int(str(line["step"])) for line in compared))
        assert [line["step"] for line in compared if _kept(line) != expected[int(str(line["step"]))]] == []


def _kept(line: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in line.items() if key not in VOLATILE}


def _ranks(slurm: Cluster, node: str) -> list[int]:
    """Process ids of the training ranks on a node."""
    found = []
    for pid in slurm.pids(node):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        found += [pid] if any(entry.startswith(b"MEGAMASK_RANK_REPORT=") for entry in variables) else []
    return found


@pytest.mark.promise("Slurm: a submitted job trains on two nodes and completes")
def test_submitted_job_trains_on_two_nodes_and_completes(
    slurm: Cluster, small_corpus: Path, tmp_path: Path, uninterrupted: Uninterrupted
) -> None:
    job = Submitted(slurm, small_corpus, tmp_path, "training.stop_after_step=12")
    job.wait_for_state("COMPLETED")
    assert job.verdict() == 0
    assert step_lines(job.run_dir)[12]["loss"] == uninterrupted.up_to(12)[12]["loss"]


@pytest.mark.promise("Slurm: a preempted job saves, requeues itself and continues bitwise")
def test_preempted_job_saves_requeues_itself_and_continues_bitwise(
    slurm: Cluster, small_corpus: Path, tmp_path: Path, uninterrupted: Uninterrupted
) -> None:
    job = Submitted(slurm, small_corpus, tmp_path)
    job.wait_for_commits()
    high = slurm.call("sbatch", "--parsable", "-p", "high", "-N3", "--exclusive", "--wrap", "sleep 1").stdout.strip()
    assert job.wait_for_verdict() == 75, job.log
    wait_for("the other job", lambda: slurm.job(high)["JobState"] == "COMPLETED", WAIT_S)
    job.resumes(uninterrupted)
    assert not list((tmp_path / "run.launch").glob("*.restarts")), "a preemption was counted"


@pytest.mark.promise("Slurm: a cancelled job saves and stays cancelled")
def test_cancelled_job_saves_and_stays_cancelled(slurm: Cluster, small_corpus: Path, tmp_path: Path) -> None:
    job = Submitted(slurm, small_corpus, tmp_path)
    job.wait_for_commits()
    slurm.call("scancel", job.number)
    assert job.wait_for_verdict() == 75, job.log
    assert checkpoints(job.run_dir)[-1].name == f"step-{max(step_lines(job.run_dir)):08d}-a0001"
    wait_for("the nodes to be idle", slurm.idle, WAIT_S)
    assert job.state() == "CANCELLED"  # and it stays so: the batch script has ended


@pytest.mark.promise("Slurm: a dead node, with or without rank 0 and the batch script, costs a restart and no bit")
@pytest.mark.parametrize("place", [0, 1], ids=["with rank 0 and the batch script", "without rank 0"])
def test_dead_node_is_replaced_and_the_run_continues_bitwise(
    slurm: Cluster, small_corpus: Path, tmp_path: Path, uninterrupted: Uninterrupted, place: int
) -> None:
    job = Submitted(slurm, small_corpus, tmp_path)
    job.wait_for_commits()
    nodes = slurm.call("scontrol", "show", "hostnames", slurm.job(job.number)["NodeList"]).stdout.split()
    slurm.kill_node(nodes[place])
    job.resumes(uninterrupted)


@pytest.mark.promise(
    "Slurm: after a network cut the run continues bitwise elsewhere, and the orphan writes nothing more"
)
def test_network_cut_is_survived_bitwise(
    slurm: Cluster, small_corpus: Path, tmp_path: Path, uninterrupted: Uninterrupted
) -> None:
    job = Submitted(slurm, small_corpus, tmp_path, "launch.collective_timeout_s=20")
    job.wait_for_commits()
    nodes = slurm.call("scontrol", "show", "hostnames", slurm.job(job.number)["NodeList"]).stdout.split()
    slurm.network(nodes[1], "down")
    job.resumes(uninterrupted)


@pytest.mark.promise("Slurm: before its time limit a job saves, requeues itself and continues bitwise")
def test_time_limit_saves_requeues_and_continues_bitwise(
    slurm: Cluster, small_corpus: Path, tmp_path: Path, uninterrupted: Uninterrupted
) -> None:
    """Slurm's signal comes up to a minute early: three to four minutes after the start."""
    times = ("launch.time_limit=0:07:00", "launch.stop_grace_s=100", "launch.save_budget_s=50")
    job = Submitted(slurm, small_corpus, tmp_path, *times)
    job.wait_for_commits()
    assert job.wait_for_verdict() == 75, job.log
    job.resumes(uninterrupted)


@pytest.mark.promise("Slurm: `scontrol requeue` saves, and the run continues bitwise")
def test_requeue_by_an_operator_saves_and_continues_bitwise(
    slurm: Cluster, small_corpus: Path, tmp_path: Path, uninterrupted: Uninterrupted
) -> None:
    job = Submitted(slurm, small_corpus, tmp_path)
    job.wait_for_commits()
    slurm.call("scontrol", "requeue", job.number)
    assert job.wait_for_verdict() == 75, job.log
    job.resumes(uninterrupted)


@pytest.mark.promise("Slurm: a second job on the same run takes it over; the first ends with 93 and stays away")
def test_second_job_on_the_same_run_takes_it_over(slurm: Cluster, small_corpus: Path, tmp_path: Path) -> None:
    first = Submitted(slurm, small_corpus, tmp_path, "launch.nodes=1", "launch.interface=lo")
    first.wait_for_commits()
    elsewhere = f'launch.slurm.exclude=["{slurm.job(first.number)["NodeList"]}"]'  # on one node it would be refused
    second = Submitted(slurm, small_corpus, tmp_path, "launch.nodes=1", "launch.interface=lo", elsewhere)
    first.wait_for_state("FAILED")
    assert first.verdict() == 93, first.log
    assert slurm.job(first.number)["ExitCode"] == "93:0"
    second.wait_for_commits(2)


@pytest.mark.promise("Slurm: a refusal ends the job with 2 and is not requeued")
def test_refusal_ends_the_job_with_2(slurm: Cluster, small_corpus: Path, tmp_path: Path) -> None:
    first = tiny(small_corpus, tmp_path, "run", *ENDLESS, "training.stop_after_step=1")
    assert subprocess.run(command("train", *first), env=environment(), capture_output=True).returncode == 0
    job = Submitted(slurm, small_corpus, tmp_path, "run.seed=2")
    job.wait_for_state("FAILED")
    assert (job.verdict(), slurm.job(job.number)["ExitCode"]) == (2, "2:0"), job.log
    assert "run.seed" in job.log


@pytest.mark.promise("Slurm: a loss that is not finite ends the job with 66 and is not requeued")
def test_loss_that_is_not_finite_ends_the_job_with_66(slurm: Cluster, small_corpus: Path, tmp_path: Path) -> None:
    job = Submitted(slurm, small_corpus, tmp_path, "optimizer.learning_rate=1e30", "optimizer.warmup_steps=0")
    job.wait_for_state("FAILED")
    assert (job.verdict(), slurm.job(job.number)["ExitCode"]) == (66, "66:0"), job.log


@pytest.mark.promise("Slurm: a hang ends with 71, is requeued and counted, and the run continues bitwise")
def test_hang_is_requeued_and_counted(
    slurm: Cluster, small_corpus: Path, tmp_path: Path, uninterrupted: Uninterrupted
) -> None:
    job = Submitted(slurm, small_corpus, tmp_path, "launch.collective_timeout_s=20")
    job.wait_for_commits()
    nodes = slurm.call("scontrol", "show", "hostnames", slurm.job(job.number)["NodeList"]).stdout.split()
    for pid in _ranks(slurm, nodes[1]):
        os.kill(pid, signal.SIGSTOP)
    assert job.wait_for_verdict() == 71, job.log
    job.resumes(uninterrupted)
    assert (tmp_path / "run.launch" / f"slurm-{job.number}.restarts").read_text() == "1\n"


@pytest.mark.promise("Slurm: a request that the cluster cannot meet is refused before it is submitted (2)")
@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("launch.nodes=4", "not available"),
        ("launch.slurm.partition=absent", "partition"),
        ("launch.memory_gib=9000", "not available"),
        ("launch.gpus_per_node=1", ""),
        ('launch.slurm.extra=["--no-such-option=1"]', "no-such-option"),
    ],
)
def test_bad_request_is_refused(slurm: Cluster, small_corpus: Path, tmp_path: Path, override: str, named: str) -> None:
    arguments = tiny(small_corpus, tmp_path, "run", *ENDLESS, *ON_TWO_NODES, "layout.data_parallel_size=4", override)
    done = slurm.call(*command("launch", "slurm", *arguments, "--check"), timeout=WAIT_S)
    assert done.returncode == 2, done.stdout
    assert "sbatch --test-only refuses the job" in done.stderr
    assert named in done.stderr


@pytest.mark.promise("a bare `srun -N2 megamask train` is refused (2)")
def test_bare_srun_of_train_is_refused(slurm: Cluster, small_corpus: Path, tmp_path: Path) -> None:
    arguments = tiny(small_corpus, tmp_path, "run", *ENDLESS)
    done = slurm.call("srun", "-N2", *command("train", *arguments), timeout=WAIT_S)
    assert done.returncode == 2, done.stderr
    assert re.search(r"one of the 2 tasks of a Slurm step", done.stderr)
    assert not (tmp_path / "run").exists()
