"""The place of a node: Slurm, Kubernetes, SkyPilot, a single machine, and contradictions."""

from __future__ import annotations

import pytest

from megamask.errors import UsageError
from megamask.launch.placement import first_host, node_place

SLURM = {
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_JOB_ID": "7",
    "MASTER_ADDR": "node1",
}
TOKEN = {"MEGAMASK_LAUNCH_TOKEN": "jobset-uid.0", "MASTER_ADDR": "node1"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (SLURM, (1, 2, "node1", "slurm-7.0")),
        ({**SLURM, "SLURM_RESTART_COUNT": "3"}, (1, 2, "node1", "slurm-7.3")),
        (
            {**SLURM, "MASTER_ADDR": "", "SLURM_STEP_NODELIST": "gpu-[003-004]", "SLURM_STEP_ID": "2"},
            (1, 2, "gpu-003", "slurm-7.0.s2"),
        ),
        (
            {**SLURM, "SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"},
            (0, 1, "127.0.0.1", "slurm-7.0"),
        ),
        ({"JOB_COMPLETION_INDEX": "2", "MEGAMASK_NUM_NODES": "4", **TOKEN}, (2, 4, "node1", "jobset-uid.0")),
        (
            {
                "SKYPILOT_NODE_RANK": "0",
                "SKYPILOT_NUM_NODES": "2",
                "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
                "MEGAMASK_LAUNCH_TOKEN": "sky-1",
            },
            (0, 2, "10.0.0.1", "sky-1"),
        ),
        ({"MEGAMASK_NODE_RANK": "1", "MEGAMASK_NUM_NODES": "2", **TOKEN}, (1, 2, "node1", "jobset-uid.0")),
    ],
)
def test_node_place_reads_each_scheduler(environment: dict[str, str], place: tuple[int, int, str, str]) -> None:
    found = node_place(environment)
    assert (found.node, found.num_nodes, found.address, found.token) == place


def test_single_machine_needs_no_variables() -> None:
    place = node_place({})
    assert (place.node, place.num_nodes, place.address) == (0, 1, "127.0.0.1")
    assert place.token.startswith("single-")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "4"}, "4 tasks on 2 nodes"),
        ({**SLURM, "MEGAMASK_NODE_RANK": "0", "MEGAMASK_NUM_NODES": "2"}, "contradicts itself"),
        ({**SLURM, "SLURM_NODEID": "2"}, "node 2 of 2"),
        ({**SLURM, "SLURM_NODEID": "x"}, "SLURM_NODEID is 'x'"),
        ({**SLURM, "MASTER_ADDR": ""}, "not MASTER_ADDR"),
        ({"MEGAMASK_NODE_RANK": "1", "MEGAMASK_NUM_NODES": "2", "MASTER_ADDR": "a"}, "not MEGAMASK_LAUNCH_TOKEN"),
        ({"MEGAMASK_LAUNCH_TOKEN": "a/b"}, "MEGAMASK_LAUNCH_TOKEN is 'a/b'"),
    ],
)
def test_node_place_refuses_contradictions(environment: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        node_place(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu-[001-004,7],login", "gpu-001"),
        ("a[3,5]b", "a3b"),
        ("r[1-2]n[07-09]", "r1n07"),
        ("", ""),
    ],
)
def test_first_host_of_slurms_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
