"""Work beside training: its end, its failure, and that no process waits for it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from megamask.checkpoint import background
from megamask.checkpoint.background import Work, WorkState, all_done
from megamask.launch.watch import FAILURE_GRACE_S
from megamask.resilience import daemon_threads
from support.command import environment
from support.thread_world import ThreadEngine, ThreadWorld


@pytest.mark.parametrize("in_thread", [True, False])
def test_work_ends_with_its_result_or_its_failure(in_thread: bool) -> None:
    good: Work[int] = Work(lambda gate: 7, in_thread=in_thread)
    bad: Work[int] = Work(lambda gate: 1 // 0, in_thread=in_thread)
    good.wait()
    bad.wait()
    assert (good.state, good.result, good.failures) == (WorkState.DONE, 7, [])
    assert bad.state is WorkState.FAILED and [type(error) for error in bad.failures] == [ZeroDivisionError]


def until_stopped(gate: Callable[[], None]) -> None:
    while True:
        gate()


def test_stopped_work_ends_at_its_next_gate_and_is_nobodys_failure() -> None:
    work: Work[None] = Work(until_stopped, in_thread=True)
    assert work.state is WorkState.RUNNING
    assert work.stop()
    assert (work.state, work.failures) == (WorkState.FAILED, [])


def test_ranks_go_on_only_when_all_are_done() -> None:
    world, may_end = ThreadWorld(3), threading.Event()

    def job(engine: ThreadEngine) -> Any:
        work: Work[bool] = Work(lambda gate: engine.rank != 1 or may_end.wait(20), in_thread=True)
        first = all_done(engine, work, wait=False)
        engine.gather_objects(None)
        may_end.set()
        return first, all_done(engine, work, wait=True)

    assert world.run(job) == [(False, True)] * 3


@pytest.mark.promise("a hanging write keeps no process from ending")
def test_process_ends_although_a_write_hangs() -> None:
    script = (
        "import time\n"
        "from megamask.checkpoint.background import Work\n"
        "Work(lambda gate: time.sleep(1e6), in_thread=True)\n"
        "raise SystemExit(74)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), timeout=60, check=False)
    assert done.returncode == 74


@pytest.mark.promise("all waits for a hanging write together take at most 5 s")
def test_work_that_hangs_is_waited_for_once_however_often_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    may_end, now, waited = threading.Event(), [100.0], []
    work: Work[bool] = Work(lambda gate: may_end.wait(60), in_thread=True)
    monkeypatch.setattr(background.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(work._is_over, "wait", lambda seconds: bool(waited.append(seconds)))
    work.cancel()
    now[0] += 2
    assert not work.stop()
    now[0] += 20
    assert not work.stop()
    assert waited == [background._STOP_S - 2, 0]
    assert 2 * background._STOP_S < FAILURE_GRACE_S
    may_end.set()


@pytest.mark.promise("a daemon thread is listed as long as it runs")
def test_thread_of_work_is_known_as_alive_as_long_as_it_runs() -> None:
    may_end = threading.Event()
    work: Work[bool] = Work(lambda gate: may_end.wait(60), in_thread=True)
    assert daemon_threads.any_alive()
    may_end.set()
    work.wait()
    [thread.join() for thread in daemon_threads._watched]
    assert not daemon_threads.any_alive()
