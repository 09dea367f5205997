"""Checks of a node before its ranks start: what keeps a job from starting, and how the other nodes learn of it."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megamask.config.load import load_train_config
from megamask.errors import MegamaskError, StorageError
from megamask.launch import node as launch_node
from megamask.launch import preflight
from megamask.launch import watch as launch_watch
from megamask.launch.node import run_node
from megamask.launch.placement import NodePlace
from megamask.launch.preflight import Unfit, examine_node, read_unfit, write_unfit
from megamask.launch.verdict import Verdict, launch_folder, read_codes, read_verdict
from megamask.resilience.preflight.finding import Check, Finding
from megamask.resilience.preflight.host import host_checks
from megamask.resilience.signals import StopRequest

TESTS = Path(__file__).parents[1]
TINY = TESTS.parent / "configs" / "run" / "tiny.yaml"
CLOCK = Check(name="clock", run=lambda: Finding(outcome="fail", message="3600 s off"))


def _raising(error: OSError) -> Callable[[], Finding]:
    def run() -> Finding:
        raise error

    return run


def _wrapped() -> Finding:
    try:
        raise OSError(errno.EIO, "Input/output error")
    except OSError as error:
        raise StorageError("creating x: the storage failed") from error


def _sleeping(seconds: float) -> Callable[[], Finding]:
    def run() -> Finding:
        time.sleep(seconds)
        return Finding(outcome="fail", message="found")

    return run


def _found(outcome: str) -> Callable[[], Finding]:
    return lambda: Finding(outcome=outcome, message="found")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("check", "code"),
    [
        (Check(name="storage", run=_raising(OSError(errno.EROFS, "Read-only file system"))), 70),
        (Check(name="storage", run=_wrapped), 70),
        (Check(name="storage", run=_raising(OSError(errno.ENOSPC, "No space left on device"))), 74),
        (Check(name="storage", run=_raising(PermissionError(errno.EACCES, "Permission denied"))), 74),
        (Check(name="free space", run=_found("fail")), 74),
        (CLOCK, 70),
        (Check(name="shared memory", run=_found("fail")), 70),
        (Check(name="GPUs", run=_found("fail")), 70),
        (Check(name="GPUs", run=_sleeping(2), limit_s=0.05), None),
        (Check(name="clock", run=_found("warn")), None),
        (Check(name="storage", run=_found("fail")), None),
        (Check(name="open files", run=_found("fail")), None),
        (Check(name="clock", run=_raising(OSError(errno.EIO, "Input/output error"))), None),
        (Check(name="storage", run=_sleeping(2), limit_s=0.05), None),
    ],
)
def test_only_severe_findings_keep_a_job_from_starting(tmp_path: Path, check: Check, code: int | None) -> None:
    unfit = examine_node(tmp_path, checks=[check])
    assert (unfit.code if unfit else None) == code


def test_finding_that_is_not_severe_is_a_line_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    examine_node(tmp_path, checks=[Check(name="open files", run=_found("warn")), CLOCK])
    assert [record.message for record in caplog.records] == [
        "preflight: open files: found",
        "preflight: clock: 3600 s off",
    ]


def test_full_storage_is_not_the_nodes_fault(tmp_path: Path) -> None:
    unfit = examine_node(tmp_path, checks=[CLOCK, Check(name="free space", run=_found("fail"))])
    assert unfit is not None and (unfit.code, unfit.check) == (74, "free space")


def test_sound_host_may_start_and_nothing_is_left_there(tmp_path: Path) -> None:
    assert examine_node(tmp_path / "runs" / "run") is None
    assert list(tmp_path.iterdir()) == []


def test_checks_take_no_longer_than_their_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "BUDGET_S", 0.3)
    assert examine_node(tmp_path, checks=[Check(name="storage", run=_sleeping(30)), CLOCK]) is None


@pytest.mark.parametrize(("with_gpus", "asked"), [(True, 1), (False, 0)])
def test_gpus_are_asked_where_the_job_has_some(
    with_gpus: bool, asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of the GPUs is replaced: none is here."""
    calls: list[int] = []

    def ask() -> Finding:
        calls.append(1)
        return Finding(outcome="fail", message="cuda:0: 1 of 9 entries are wrong")

    monkeypatch.setattr(preflight, "gpu_checks", lambda: [Check(name="GPUs", run=ask)])
    unfit = examine_node(tmp_path, with_gpus=with_gpus)
    assert len(calls) == asked
    assert (unfit.code if unfit else None) == (70 if with_gpus else None)


def test_severe_checks_are_among_those_of_the_host(tmp_path: Path) -> None:
    assert {"storage", "free space", "clock", "shared memory"} <= {check.name for check in host_checks(tmp_path)}


def test_no_check_begins_after_a_signal(tmp_path: Path) -> None:
    assert examine_node(tmp_path, checks=[CLOCK], should_end=lambda: True) is None


def test_first_node_that_is_not_fit_holds(tmp_path: Path) -> None:
    assert read_unfit(tmp_path / "job") is None
    first = Unfit(node="host-1", code=70, check="clock", message="off")
    for unfit in (first, Unfit(node="host-2", code=70, check="clock", message="off")):
        write_unfit(tmp_path / "job", unfit)
    assert read_unfit(tmp_path / "job") == first


class _Job:
    """Three nodes of a job, one after the other, each with one rank that sleeps unless it is given another script."""

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run_dir = run_dir
        self._monkeypatch = monkeypatch
        monkeypatch.setenv("PYTHONPATH", str(TESTS))
        monkeypatch.delenv("MASTER_PORT", raising=False)
        monkeypatch.setattr(launch_node, "_VERDICT_S", 0.1)
        monkeypatch.setattr(launch_node, "_CODES_S", 0.1)
        monkeypatch.setattr(launch_node, "_AGREED_CODES_S", 0.1)
        monkeypatch.setattr(launch_watch, "REFUSAL_GRACE_S", 0.1)

    def node(
        self, number: int, *checks: Check, script: str = "import time\ntime.sleep(300)", settings: Sequence[str] = ()
    ) -> tuple[Verdict, MegamaskError | None]:
        self._monkeypatch.setenv("NODE_NAME", f"host-{number}")
        self._monkeypatch.setattr(preflight, "host_checks", lambda *_, **__: list(checks))
        place = NodePlace(node=number, num_nodes=3, address="127.0.0.1", token="job-1.0")
        with StopRequest() as signals:
            return run_node(
                [script],
                place,
                self.run_dir,
                ranks_per_node=1,
                signals=signals,
                launch=load_train_config(TINY, settings).config.launch,
                module="support.rank_script",
            )


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Job:
    return _Job(tmp_path / "run", monkeypatch)


@pytest.mark.promise("A node that fails the checks before its ranks start ends the job with 70 on every node, by name")
@pytest.mark.multiprocess
def test_unfit_node_ends_the_job_with_70_and_is_named_in_the_verdict(job: _Job) -> None:
    folder = launch_folder(job.run_dir, "job-1.0")
    verdict, failure = job.node(1, CLOCK)
    assert (verdict.code, verdict.node, read_codes(folder, 1)) == (70, "host-1", [70])
    assert failure is not None and "node host-1 is not fit for the run: clock: 3600 s off" in failure.message
    verdict, failure = job.node(0)  # its rank would sleep for minutes
    assert read_verdict(folder) == verdict
    assert verdict.line == "70 -1 0 host-1\n"
    assert failure is not None and failure.exit_code == 70 and "host-1" in failure.message
    with pytest.raises(MegamaskError, match="another node") as end:
        job.node(2)
    assert end.value.exit_code == 70


def test_unfit_node_0_writes_the_verdict_and_starts_no_rank(job: _Job) -> None:
    folder = launch_folder(job.run_dir, "job-1.0")
    verdict, failure = job.node(0, CLOCK, script="raise SystemExit('a rank was started')")
    assert read_verdict(folder) == verdict == Verdict(code=70, node="host-0")
    assert failure is not None and "launch.preflight=false" in str(failure.hint)
    assert (folder.parent / "history").read_text() == "job-1.0 70 -1\n"
    assert not (folder / "meeting").exists()
    with pytest.raises(MegamaskError, match="another node") as end:
        job.node(1)
    assert end.value.exit_code == 70


@pytest.mark.multiprocess
def test_preflight_can_be_left_out(job: _Job) -> None:
    verdict, failure = job.node(0, CLOCK, script="pass", settings=["launch.preflight=false"])
    assert (failure, read_unfit(launch_folder(job.run_dir, "job-1.0"))) == (None, None)
    assert verdict.code == 1  # nodes 1 and 2 never came
