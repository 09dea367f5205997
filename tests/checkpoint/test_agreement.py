from __future__ import annotations

import pytest

from megamask.checkpoint.agreement import agree, captured, on_main
from megamask.errors import (
    CheckpointIntegrityError,
    MegamaskError,
    NumericsError,
    StorageError,
    SupersededError,
    UsageError,
)
from support.thread_world import ThreadEngine, ThreadWorld


def _fail_on(rank: int, error: Exception) -> list[object]:
    def job(engine: ThreadEngine) -> str:
        failures: list[BaseException] = []
        with captured(failures):
            if engine.rank == rank:
                raise error
        agree(engine, failures)
        return "went on"

    return ThreadWorld(3).run(job)


@pytest.mark.parametrize("kind", [StorageError, CheckpointIntegrityError, UsageError, SupersededError, NumericsError])
def test_all_ranks_raise_the_same_kind_when_one_fails(kind: type[MegamaskError]) -> None:
    results = _fail_on(1, kind("the disk is full", hint="free space"))
    assert [type(result) for result in results] == [kind] * 3
    assert [str(result) for result in results] == [
        "rank 1: the disk is full\nhint: free space",
        "the disk is full\nhint: free space",
        "rank 1: the disk is full\nhint: free space",
    ]


def test_a_bug_on_one_rank_ends_the_others_with_code_1() -> None:
    results = _fail_on(2, KeyError("x"))
    assert isinstance(results[2], KeyError)
    assert isinstance(results[0], MegamaskError)
    assert (results[0].exit_code, results[0].message) == (1, "rank 2: KeyError: 'x'")


def test_nothing_is_raised_when_nobody_fails() -> None:
    assert _fail_on(9, KeyError()) == ["went on"] * 3


def test_on_main_runs_once_and_all_ranks_get_the_result() -> None:
    ran: list[int] = []

    def job(engine: ThreadEngine) -> int:
        return on_main(engine, lambda: (ran.append(engine.rank), 42)[1])

    assert ThreadWorld(3).run(job) == [42] * 3
    assert ran == [0]


def test_on_main_raises_everywhere_when_rank_0_fails() -> None:
    def refuse() -> None:
        raise SupersededError("attempt 2 owns the run")

    results = ThreadWorld(2).run(lambda engine: on_main(engine, refuse))
    assert [type(result) for result in results] == [SupersededError] * 2
