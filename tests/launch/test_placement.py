"""The place of a rank: what launchers set, and what is left over, incomplete or contradictory."""

from __future__ import annotations

import pytest

from megamask.errors import UsageError
from megamask.launch.placement import rank_place, uses_agent_store

WHOLE = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def test_rank_place_reads_what_torchrun_sets() -> None:
    place = rank_place({**WHOLE, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert place is not None
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (3, 8, 1, 2)
    assert (place.address, place.port) == ("node1", 29500)


def test_rank_place_is_none_without_a_launcher() -> None:
    assert rank_place({"MASTER_ADDR": "left", "PATH": "/bin"}) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "not MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": None}, "has RANK, but not WORLD_SIZE"),
        ({"RANK": None}, "has WORLD_SIZE, but not RANK"),
        ({"RANK": "abc"}, "RANK is 'abc'; allowed: an integer from 0"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "8"}, "RANK is 8, but WORLD_SIZE is 8"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; allowed: an integer from 1"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
    ],
)
def test_rank_place_refuses_incomplete_and_contradictory_variables(changes: dict[str, str | None], words: str) -> None:
    environment = {name: value for name, value in {**WHOLE, **changes}.items() if value is not None}
    with pytest.raises(UsageError, match=words) as refusal:
        rank_place(environment)
    assert ("Nothing was started" in str(refusal.value) and "RANK" in str(refusal.value.hint)) or "port" in str(
        refusal.value.hint
    )


@pytest.mark.promise("a bare `srun -N2 megamask train` is refused (2)")
def test_bare_step_of_several_tasks_is_refused_and_a_single_task_is_not() -> None:
    step = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
    with pytest.raises(UsageError, match="one of the 2 tasks of a Slurm step") as refusal:
        rank_place(step)
    assert "megamask launch node" in str(refusal.value.hint)
    assert rank_place({**step, "SLURM_STEP_NUM_TASKS": "1"}) is None  # srun --pty bash
    assert rank_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}) is None  # the batch script itself
    assert rank_place({**step, **WHOLE}) is not None  # a launcher of the user's own


def test_store_of_torchrun_s_agent_is_recognized() -> None:
    assert uses_agent_store({"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert not uses_agent_store({"TORCHELASTIC_USE_AGENT_STORE": "False"})
    assert not uses_agent_store({})
