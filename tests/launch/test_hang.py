"""A hang of ranks: found by the launcher, reported with every rank's stacks and the rank that holds up the others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megamask.config.schema.watchdog import WatchdogConfig
from megamask.errors import ExitCode, MegamaskError
from megamask.launch.failures import RankExit, failure_of
from megamask.launch.hang import Standing, behind, hang_error, read_standings, write_standings
from megamask.launch.local import run_local_ranks
from megamask.launch.watch import Observer, StopGrace

TESTS = Path(__file__).parents[1]
QUICK = WatchdogConfig(startup_s=60.0, first_steps_s=4.0, step_s=4.0, measure_s=4.0, save_s=4.0, close_s=4.0)
BEAT = (
    "import time\n"
    "from megamask.resilience.heartbeat import Heartbeat\n"
    "from megamask.resilience.stacks import offer_stacks\n"
    "offer_stacks()\n"
    "heartbeat = Heartbeat.of_environment()\n"
)


def standing(
    rank: int, step: int = 5, section: str = "step", *, state: str = "S (sleeping)", waits: bool = True
) -> Standing:
    return Standing(
        rank=rank,
        node="host",
        step=step,
        section=section,
        still_s=9.0,
        limit_s=5.0,
        state=state,
        place="all_reduce (torch/distributed/x.py:1)",
        waits=waits,
    )


@pytest.mark.parametrize(
    ("standings", "suspects"),
    [
        ([standing(0), standing(1, state="T (stopped)"), standing(2, waits=False)], [1]),
        ([standing(0), standing(1, waits=False), standing(2)], [1]),
        ([standing(0, 6), standing(1, 5, "agreement"), standing(2, 5, "save")], [2]),
        ([standing(0, 5, "agreement"), standing(1, 5, "step")], [1]),
        ([standing(0), standing(1)], [0, 1]),
        ([standing(0, waits=False), standing(1, waits=False)], [0, 1]),
    ],
    ids=["stopped", "not waiting", "earlier section", "last of the step", "all wait", "none waits"],
)
def test_rank_that_holds_up_the_others_is_found(standings: list[Standing], suspects: list[int]) -> None:
    assert [found.rank for found in behind(standings)] == suspects


def test_message_names_the_rank_or_a_node_that_does_not_answer(tmp_path: Path) -> None:
    standings = [standing(0), standing(3, state="T (stopped)")]
    error = hang_error(standings, tmp_path)
    assert error.exit_code == ExitCode.HANG
    assert (
        "the others wait for rank 3 on host: section 'step' of step 5 for 9 s (limit 5 s), T (stopped)" in error.message
    )
    assert str(tmp_path) in error.message
    assert "node 1 of the job does not answer" in hang_error(standings[:1], None, silent_nodes=[1]).message


def test_standings_travel_to_the_other_nodes(tmp_path: Path) -> None:
    standings = [standing(0), standing(1, waits=False)]
    write_standings(tmp_path / "hang-0", standings)
    assert read_standings(tmp_path / "hang-0") == standings
    (tmp_path / "hang-1").write_text("[{}]")
    assert read_standings(tmp_path / "hang-1") is None
    assert read_standings(tmp_path / "hang-2") is None


class Keeper(Observer):
    """Keeps what a launcher records."""

    def __init__(self) -> None:
        self.standings: list[Standing] = []
        self.stacks: dict[int, str] = {}

    def hung(self, standings: Sequence[Standing], stacks: dict[int, str]) -> MegamaskError:
        self.standings = list(standings)
        return super().hung(standings, stacks)

    def keep_stacks(self, stacks: dict[int, str]) -> None:
        self.stacks |= stacks


def hung(script: str) -> tuple[Keeper, list[RankExit], MegamaskError]:
    """Run a script that hangs on two ranks; return what was kept of it, their ends and the failure of the job."""
    keeper = Keeper()
    exits = run_local_ranks([script], 2, module="support.rank_script", watchdog=QUICK, observer=keeper)
    failure = failure_of(exits)
    assert failure is not None and failure.exit_code == ExitCode.HANG
    return keeper, exits, failure


@pytest.mark.multiprocess
def test_rank_that_sleeps_in_a_section_ends_all_with_71(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    script = BEAT + (
        "def sleeping_here(): time.sleep(300)\n"
        "for step in range(1, 100_000):\n"
        "    heartbeat.enter('step', step)\n"
        "    if rank == 1 and step == 3: sleeping_here()\n"
        "    time.sleep(0.05)\n"
    )
    keeper, exits, failure = hung(script)
    assert [rank_exit.was_hung for rank_exit in exits] == [True, True]
    sleeper = next(found for found in keeper.standings if found.rank == 1)
    assert (sleeper.step, sleeper.section) == (3, "step")
    assert sleeper.place.startswith("sleeping_here")
    assert "sleeping_here" in keeper.stacks[1] and set(keeper.stacks) == {0, 1}
    assert "rank 1" in failure.message


@pytest.mark.multiprocess
def test_stopped_rank_is_named_and_gives_its_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    script = BEAT + (
        "import signal\n"
        "heartbeat.enter('save', 7)\n"
        "if rank == 0: os.kill(os.getpid(), signal.SIGSTOP)\n"
        "time.sleep(300)\n"
    )
    keeper, _, failure = hung(script)
    assert "the others wait for rank 0" in failure.message
    assert "T (stopped)" in failure.message
    assert set(keeper.stacks) == {0, 1} and all("rank_script" in text for text in keeper.stacks.values())


@pytest.mark.multiprocess
def test_process_that_is_stuck_before_its_first_mark_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    started = time.monotonic()
    config = WatchdogConfig(startup_s=2.0)
    exits = run_local_ranks(["import time\ntime.sleep(300)"], 1, module="support.rank_script", watchdog=config)
    failure = failure_of(exits)
    assert failure is not None and failure.exit_code == ExitCode.HANG
    assert "section 'import'" in failure.message
    assert time.monotonic() - started < 200


@pytest.mark.multiprocess
def test_signal_still_ends_ranks_whose_watchdog_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    script = "import signal, time\ntime.sleep(1)\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(300)"
    config = WatchdogConfig(enabled=False, startup_s=1.0)
    grace = StopGrace(grace_s=1.0, save_budget_s=0.0)
    exits = run_local_ranks([script], 1, module="support.rank_script", watchdog=config, grace=grace)
    assert [(rank_exit.was_hung, rank_exit.was_overdue) for rank_exit in exits] == [(False, True)]
