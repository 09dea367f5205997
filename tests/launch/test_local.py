"""Local ranks: placement, one error for all, signals, and death with the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamask.errors import ExitCode, MegamaskError, NumericsError, UsageError, error_with_code
from megamask.launch import watch as launch_watch
from megamask.launch.failures import RankExit, failure_of
from megamask.launch.local import run_local_ranks
from megamask.launch.placement import rank_place
from megamask.launch.rank_folder import leave_report
from megamask.launch.watch import Observer, StopGrace
from megamask.resilience.exit_codes import combine
from megamask.resilience.signals import StopRequest

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


def ranks(script: str, world_size: int = 2) -> list[RankExit]:
    return run_local_ranks([script], world_size, module="support.rank_script")


def ended(
    returncode: int,
    report: MegamaskError | None = None,
    rank: int = 0,
    tail: str = "",
    place: int = 0,
    was_stopped: bool = False,
) -> RankExit:
    return RankExit(
        rank=rank,
        pid=1000 + rank,
        returncode=returncode,
        place_of_end=place,
        was_stopped=was_stopped,
        report=report,
        stderr_tail=tail,
    )


def test_failure_names_the_rank_that_failed_first_not_the_one_that_lost_it() -> None:
    failure = failure_of([ended(1, place=1), ended(-signal.SIGKILL, rank=1, place=0)])
    assert failure is not None
    assert failure.message.startswith("rank 1 was killed by SIGKILL")


@pytest.mark.multiprocess
@pytest.mark.promise("the launcher kills a rank that does not end in time after a signal, and ends with 71")
def test_rank_that_does_not_end_after_a_signal_is_killed_and_the_run_ends_with_71() -> None:
    script = (
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(600)\n"
    )
    grace = StopGrace(grace_s=0.5, save_budget_s=0.0)
    exits = run_local_ranks([script], 1, module="support.rank_script", grace=grace)
    assert [(each.was_overdue, each.returncode) for each in exits] == [(True, -signal.SIGKILL)]
    failure = failure_of(exits)
    assert failure is not None and failure.exit_code == ExitCode.HANG
    assert "did not end within the grace period and was killed" in failure.message


def test_failure_of_a_killed_rank_is_reported_before_that_of_one_that_lost_it() -> None:
    lost = error_with_code(1, "lost the connection to another rank")
    failure = failure_of([ended(1, lost, place=1), ended(-signal.SIGKILL, rank=1, place=0)])
    assert failure is not None
    assert failure.message == "rank 1 was killed by SIGKILL (9); the kernel's OOM killer is the usual cause."


@pytest.mark.promise("a rank that ends before it has met the others does not let them wait for it")
@pytest.mark.multiprocess
def test_rank_that_ends_before_it_has_met_the_others_does_not_let_them_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_watch, "REFUSAL_GRACE_S", 0.5)
    script = (
        "import time; from megamask.resilience.heartbeat import Heartbeat\n"
        "beat = Heartbeat.of_environment(); beat.enter('rendezvous')\n"
        "os._exit(75) if rank == 1 else time.sleep(60)"
    )
    started = time.monotonic()
    exits = ranks(script)
    assert time.monotonic() - started < 40
    assert [(each.returncode, each.was_stopped) for each in exits] == [(-signal.SIGKILL, True), (75, False)]
    assert failure_of(exits) is None
    assert combine([each.returncode for each in exits if not each.was_stopped]) == 75


@pytest.mark.multiprocess
def test_rank_that_ends_after_training_leaves_the_others_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_watch, "REFUSAL_GRACE_S", 0.1)
    script = (
        "import time; from megamask.resilience.heartbeat import Heartbeat\n"
        "from megamask.resilience.heartbeat import VARIABLE, read_mark\n"
        "from pathlib import Path\n"
        "beat = Heartbeat.of_environment(); beat.enter('save')\n"
        "path = Path(os.environ[VARIABLE]); others = path.with_name(path.name.replace('1', '0'))\n"
        "while rank == 1 and getattr(read_mark(others), 'section', None) != 'save': time.sleep(0.01)\n"
        "time.sleep(0.0 if rank == 1 else 1.5); os._exit(75)"
    )
    assert [each.returncode for each in ranks(script)] == [75, 75]


@pytest.mark.promise("the launcher reports at once which rank was killed, not which it stops")
@pytest.mark.multiprocess
def test_launcher_tells_at_once_which_rank_was_killed_but_not_whom_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_watch, "FAILURE_GRACE_S", 0.5)
    script = "import time, signal\nos.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)"
    killed: list[tuple[int, int]] = []
    observer = Observer()
    monkeypatch.setattr(observer, "killed", lambda rank, number: killed.append((rank, number)))
    exits = run_local_ranks(
        [script],
        2,
        module="support.rank_script",
        observer=observer,
    )
    assert killed == [(1, signal.SIGKILL)]
    assert [(e.returncode, e.was_stopped) for e in exits] == [(-signal.SIGKILL, True), (-signal.SIGKILL, False)]


@pytest.mark.promise("a superseded job ends with 93 regardless of how its other ranks end")
@pytest.mark.parametrize("codes", [(93, 93), (93, 1), (1, 93), (93, -signal.SIGKILL)])
def test_superseded_job_ends_with_93_however_its_other_ranks_end(codes: tuple[int, int]) -> None:
    given = error_with_code(93, "superseded by attempt 2")
    failure = failure_of([ended(code, given if code == 93 else None, rank=rank) for rank, code in enumerate(codes)])
    assert failure is not None
    assert (failure.exit_code, failure.message) == (93, "superseded by attempt 2")


def test_rank_that_was_stopped_does_not_decide_the_code() -> None:
    failure = failure_of([ended(-signal.SIGKILL, was_stopped=True), ended(70, rank=1)])
    assert failure is not None
    assert failure.exit_code == ExitCode.HARDWARE


def test_every_rank_gets_its_place(tmp_path: Path) -> None:
    script = (
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')\n"
        f"open(os.path.join({str(tmp_path)!r}, str(rank)), 'w').write(' '.join(os.environ[n] for n in names))"
    )
    exits = ranks(script, 3)
    assert [(e.rank, e.returncode) for e in exits] == [(0, 0), (1, 0), (2, 0)]
    assert [(tmp_path / str(r)).read_text() for r in range(3)] == [f"{r} {r} 3 127.0.0.1" for r in range(3)]


def test_rank_0_inherits_the_socket_whose_port_all_ranks_know(tmp_path: Path) -> None:
    script = (
        "import socket\n"
        "port = os.environ['MASTER_PORT']\n"
        "own = socket.socket(fileno=int(os.environ['MEGAMASK_STORE_FD'])).getsockname()[1] if rank == 0 else ''\n"
        f"open(os.path.join({str(tmp_path)!r}, str(rank)), 'w').write(f'{{port}} {{own}}')"
    )
    ranks(script)
    port, own = (tmp_path / "0").read_text().split()
    assert own == port
    assert (tmp_path / "1").read_text().split() == [port]


def test_failure_shows_the_reported_message_of_the_most_specific_code() -> None:
    numerics = NumericsError("step 3: the loss is nan", hint="look")
    failure = failure_of([ended(1), ended(66, numerics, rank=1), ended(1, rank=2)])
    assert failure is not None
    assert failure.exit_code == ExitCode.NUMERICS
    assert (failure.message, failure.hint) == ("step 3: the loss is nan", "look")


def test_failure_is_none_when_all_ranks_end_alike() -> None:
    for code in (0, 75, 93):
        assert failure_of([ended(code), ended(code, rank=1)]) is None


def test_failure_names_the_rank_and_the_signal_when_nothing_was_reported() -> None:
    failure = failure_of([ended(0), ended(-signal.SIGKILL, rank=1, tail="last words")])
    assert failure is not None
    assert failure.exit_code == ExitCode.BUG
    assert failure.message.startswith("rank 1 was killed by SIGKILL")
    assert "last words" in failure.message


def test_a_report_travels_from_the_rank_to_the_launcher() -> None:
    script = (
        "from megamask.errors import DataIntegrityError\n"
        "from megamask.launch.placement import rank_place\n"
        "from megamask.launch.rank_folder import leave_report\n"
        "assert rank_place().rank == rank\n"
        "if rank == 1:\n"
        "    assert leave_report(DataIntegrityError('row 7 is damaged', hint='restore it'))\n"
        "    raise SystemExit(64)"
    )
    failure = failure_of(ranks(script))
    assert failure is not None
    assert (failure.exit_code, failure.message, failure.hint) == (64, "row 7 is damaged", "restore it")


def test_no_report_is_left_outside_a_local_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGAMASK_RANK_REPORT", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert not leave_report(UsageError("x"))
    assert rank_place() is None


def test_other_ranks_are_stopped_when_rank_0_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_watch, "REFUSAL_GRACE_S", 0.2)
    exits = ranks("import time\nif rank == 0: raise SystemExit(2)\ntime.sleep(300)")
    assert [e.returncode for e in exits] == [2, -signal.SIGKILL]


def test_rank_0_is_stopped_when_another_rank_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_watch, "FAILURE_GRACE_S", 0.2)
    exits = ranks("import time\nif rank == 1: raise SystemExit(1)\ntime.sleep(300)")
    assert [(e.returncode, e.was_stopped) for e in exits] == [(-signal.SIGKILL, True), (1, False)]
    failure = failure_of(exits)
    assert failure is not None
    assert failure.message.startswith("rank 1 ended with exit code 1")


def test_report_that_was_not_finished_is_no_report() -> None:
    exits = ranks("open(os.environ['MEGAMASK_RANK_REPORT'], 'w').write('{')\nraise SystemExit(1)", 1)
    assert exits[0].report is None


def test_stderr_of_other_ranks_is_kept_for_the_report() -> None:
    exits = ranks("import sys\nif rank == 1:\n    print('rank 1 says why', file=sys.stderr)\n    raise SystemExit(1)")
    assert exits[1].stderr_tail == "rank 1 says why"


def launcher_process(script: str) -> subprocess.Popen[str]:
    code = (
        "import sys; from megamask.launch.local import run_local_ranks; "
        "exits = run_local_ranks([sys.argv[1]], 2, module='support.rank_script'); "
        "print([e.returncode for e in exits])"
    )
    return subprocess.Popen([sys.executable, "-c", code, script], stdout=subprocess.PIPE, text=True)


def wait_for(paths: list[Path]) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)


def test_signals_reach_every_rank(tmp_path: Path) -> None:
    script = (
        "import signal, time\n"
        "def leave(*_): raise SystemExit(75)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])\n"
        f"open(os.path.join({str(tmp_path)!r}, str(rank)), 'w').write(str(os.getpid()))\n"
        "time.sleep(300)"
    )
    process = launcher_process(script)
    wait_for([tmp_path / "0", tmp_path / "1"])
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert output.strip() == "[75, 75]"


@pytest.mark.promise("a signal that comes before a process has its handlers is not lost")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 93)])
def test_signal_that_comes_before_a_rank_has_its_handlers_is_not_lost(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    script = (
        "import signal, time\n"
        "from megamask.resilience.signals import StopRequest\n"
        f"open(os.path.join({str(tmp_path)!r}, str(rank)), 'w').write('here')\n"
        "deadline = time.monotonic() + 30\n"
        "while not signal.sigpending() and time.monotonic() < deadline: time.sleep(0.01)\n"
        "with StopRequest() as signals: raise SystemExit(signals.requested)"
    )
    process = launcher_process(script)
    wait_for([tmp_path / "0", tmp_path / "1"])
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert output.strip() == f"[{code}, {code}]"


@pytest.mark.promise("a signal that comes before a process has its handlers is not lost")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 93)])
def test_signal_that_came_before_the_ranks_were_started_is_passed_to_all_of_them(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    script = (
        "import time\n"
        "from megamask.resilience.signals import StopRequest\n"
        "with StopRequest() as signals:\n"
        "    deadline = time.monotonic() + 30\n"
        "    while not signals.requested and time.monotonic() < deadline: time.sleep(0.01)\n"
        "raise SystemExit(signals.requested)"
    )
    with StopRequest() as signals:
        os.kill(os.getpid(), number)
        exits = run_local_ranks([script], 2, module="support.rank_script", signals=signals)
    assert [rank_exit.returncode for rank_exit in exits] == [code, code]


@pytest.mark.promise("ranks die with the command that started them")
def test_ranks_that_ask_for_it_die_with_a_killed_launcher(tmp_path: Path) -> None:
    script = (
        "import time\n"
        "from megamask.resilience.parent_death import die_with_parent\n"
        "assert die_with_parent(int(os.environ['MEGAMASK_PARENT_PID']))\n"
        f"open(os.path.join({str(tmp_path)!r}, str(rank)), 'w').write(str(os.getpid()))\n"
        "time.sleep(300)"
    )
    process = launcher_process(script)
    wait_for([tmp_path / "0", tmp_path / "1"])
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    for rank in ("0", "1"):
        while is_running(int((tmp_path / rank).read_text())):
            assert time.monotonic() < deadline, f"rank {rank} outlived its launcher"
            time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"
